"""A U-Net (Ronneberger et al. 2015) whose encoder is torchvision's ResNet-34 (He et al. 2016).

image ─► (normalise)                            up5 (16) ─► head ─► logits    H
  conv1 (64) ──────────────── x1 ─────────────► up4 (32)                      H/2
  layer1 (64) ─────────────── x2 ─────────────► up3 (64)                      H/4
  layer2 (128) ────────────── x3 ─────────────► up2 (128)                     H/8
  layer3 (256) ────────────── x4 ─────────────► up1 (256)                     H/16
  layer4 (512) ────────────── x5 ────────────────┘                            H/32

Down on the left, up on the right. up = upsample to the size of the skip, concatenate the skip,
twice (3×3 conv, BatchNorm, ReLU). Channels in parentheses; odd sizes round up: H/2 is ⌈H/2⌉.
Letters: N batch, C classes, H, W size of the image, h, w size after scaling.

    python unet.py runs/…/checkpoint.pt PHOTO… --out DIR     a class map per photo, as palette PNG
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.models import ResNet34_Weights, resnet34
from torchvision.transforms.functional import pil_to_tensor

IMAGENET = ResNet34_Weights.IMAGENET1K_V1  # 83 MB
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large images are welcome


class Up(nn.Module):
    """One step up the decoder: upsample, concatenate the skip, two 3×3 conv–BatchNorm–ReLU."""

    def __init__(self, below: int, skip: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(below + skip, out, 3, padding=1, bias=False)  # BatchNorm has it
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor, size: torch.Size, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, size=size)  # (N, below, *size), nearest neighbour
        if skip is not None:
            x = torch.cat([x, skip], dim=1)  # (N, below + skip, *size)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, out, *size)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)  # (N, out, *size)


class UNet(nn.Module):
    """ResNet-34 U-Net: image (N, 3, H, W) in [0, 1] → logits (N, num_classes, H, W), H, W >= 32.
    weights: "imagenet" (fetched by torchvision), None (random), or the path of a file that holds a
    ResNet-34 anywhere in it. Raises ValueError where there is none to be had."""

    def __init__(self, num_classes: int, weights: str | None = "imagenet"):
        super().__init__()
        # Buffers, so that nobody who calls the model can forget to normalise as for ImageNet:
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.encoder = load_encoder(weights)
        self.up1 = Up(512, 256, 256)
        self.up2 = Up(256, 128, 128)
        self.up3 = Up(128, 64, 64)
        self.up4 = Up(64, 64, 32)
        self.up5 = Up(32, 0, 16)
        self.head = nn.Conv2d(16, num_classes, 1)
        # What `predict` needs to know, set by train.py and kept in its checkpoints:
        self.classes: list[str] = [str(c) for c in range(num_classes)]
        self.palette: list[list[int]] = []  # RGB of each class
        self.scale = 1.0  # the image is resized by this before it enters the network
        self.window = 64  # side of the windows that it is predicted in, after resizing

    def forward(self, image: Tensor) -> Tensor:
        e = self.encoder
        x0 = (image - self.mean) / self.std  # (N, 3, H, W)
        x1 = e.relu(e.bn1(e.conv1(x0)))  # (N, 64, H/2, W/2)
        x2 = e.layer1(e.maxpool(x1))  # (N, 64, H/4, W/4)
        x3 = e.layer2(x2)  # (N, 128, H/8, W/8)
        x4 = e.layer3(x3)  # (N, 256, H/16, W/16)
        x5 = e.layer4(x4)  # (N, 512, H/32, W/32)
        x = self.up1(x5, x4.shape[2:], x4)  # (N, 256, H/16, W/16)
        x = self.up2(x, x3.shape[2:], x3)  # (N, 128, H/8, W/8)
        x = self.up3(x, x2.shape[2:], x2)  # (N, 64, H/4, W/4)
        x = self.up4(x, x1.shape[2:], x1)  # (N, 32, H/2, W/2)
        x = self.up5(x, x0.shape[2:])  # (N, 16, H, W)
        return self.head(x)  # (N, C, H, W)

    @torch.inference_mode()
    def logits(self, photo) -> Tensor:
        """Logits (C, h, w) float32 of a photograph, at the scale of the network, on the CPU:
        blended from overlapping windows as large as the training crops. (Larger ones would show the
        deepest maps, then 2×2, less zero padding.)"""
        pixels = shrink(upright(photo), self.scale)  # (3, h, w) uint8
        _, h, w = pixels.shape
        dy, dx = min(h, self.window), min(w, self.window)
        hat_y, hat_x = (torch.bartlett_window(n + 2, periodic=False)[1:-1] for n in (dy, dx))
        weight = hat_y[:, None] * hat_x  # (dy, dx)
        logits, total = torch.zeros(self.head.out_channels, h, w), torch.zeros(h, w)
        was_training = self.training
        self.eval()
        columns = [slice(x, x + dx) for x in starts(w, dx)]
        for rows in (slice(y, y + dy) for y in starts(h, dy)):
            batch = torch.stack([pixels[:, rows, c] for c in columns])  # (N, 3, dy, dx) uint8
            for c, z in zip(columns, self(batch.to(self.mean.device).float() / 255).cpu()):
                logits[:, rows, c] += z * weight  # z (C, dy, dx)
                total[rows, c] += weight
        self.train(was_training)
        return logits.div_(total)

    @torch.inference_mode()
    def predict(self, photo) -> "numpy.ndarray":  # noqa: F821 (named, not imported)
        """The class map (H, W) uint8 of a Pillow image or a path, of any size, at its own size."""
        size, logits = upright(photo).size[::-1], self.logits(photo)  # (C, h, w)
        best, class_map = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.uint8)
        for c, z in enumerate(logits):  # one class at a time: all would be gigabytes
            z = F.interpolate(z[None, None], size=size, mode="bilinear")[0, 0]  # (H, W)
            class_map[z > best] = c
            torch.maximum(best, z, out=best)
        return class_map.numpy()

    @classmethod
    def load(cls, path) -> "UNet":
        """The trained model of a `checkpoint.pt` of train.py, on the CPU, ready to predict."""
        checkpoint = read_checkpoint(path)
        if "window" not in checkpoint:
            raise ValueError(f"{path} is not a checkpoint of train.py")
        model = cls(len(checkpoint["classes"]), weights=None)
        model.load_state_dict(checkpoint["model"])
        for name in ("classes", "palette", "scale", "window"):
            setattr(model, name, checkpoint[name])
        return model.eval()


def starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover `length` and overlap by a quarter or more."""
    steps = -(-(length - window) // (window * 3 // 4))  # rounded up
    return torch.linspace(0, length - window, steps + 1).round().int().tolist()


def upright(photo) -> Image.Image:
    """A Pillow image or a path as a viewer shows it: RGB, turned by its EXIF orientation.
    Raises ValueError for more than 8 bits a channel, which Pillow would clip or cut down."""
    try:
        image = photo if isinstance(photo, Image.Image) else Image.open(photo)
    except (UnidentifiedImageError, AttributeError):
        remedy = "of an array give Image.fromarray(…), of a TIFF's many bands three as 8-bit RGB"
        raise ValueError(f"not an image that Pillow can read; {remedy}") from None
    if image.mode[0] in "IF" or ";16" in str(getattr(image, "tile", "")):
        raise ValueError("more than 8 bits a channel; save it as RGB with 8")
    image = ImageOps.exif_transpose(image)  # (of a palette with transparency, Pillow would warn:)
    return image if image.mode == "RGB" else image.convert("RGBA").convert("RGB")


def shrink(image: Image.Image, scale: float) -> Tensor:
    """RGB image (H, W) → (3, h, w) uint8, by training and `predict` alike; no side below 32."""
    w, h = (max(32, round(side * scale)) for side in image.size)
    return pil_to_tensor(image.resize((w, h), Image.Resampling.BILINEAR))


def load_encoder(weights: str | None) -> nn.Module:
    """torchvision's ResNet-34 without its classifier: random, of ImageNet, or out of a file."""
    try:
        encoder = resnet34(weights=IMAGENET if weights == "imagenet" else None)
        del encoder.avgpool, encoder.fc
        if weights not in (None, "imagenet"):
            encoder.load_state_dict(find_resnet34(read_checkpoint(weights), encoder.state_dict()))
        return encoder
    except Exception as error:  # no file, no network, no room, other tensors
        reason = " ".join(str(error).split())[:200]
        file = Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET.url).name)
        remedy = f"that of ImageNet is fetched to {file}, --weights none needs none"
        raise ValueError(f"no ResNet-34 in {weights} ({reason}); {remedy}") from error


def find_resnet34(tree: dict, names) -> dict:
    """Its parameters in nested dictionaries, under whatever key and behind whatever prefix."""
    last = "layer4.2.conv2.weight"
    for prefix in (key.removesuffix(last) for key in map(str, tree) if key.endswith(last)):
        return {name: tree[prefix + name] for name in names if prefix + name in tree}
    inner = (find_resnet34(value, names) for value in tree.values() if isinstance(value, dict))
    return next(filter(None, inner), {})


def read_checkpoint(path) -> dict:
    """`torch.load` that cannot run code hidden in the file, and names the file where it fails."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load meets garbage with many kinds of exception
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"torch cannot read {path} ({reason.splitlines()[0]})") from error


def main() -> None:
    parser = argparse.ArgumentParser(description="class maps of photographs, as palette PNG")
    parser.add_argument("checkpoint", help="checkpoint.pt of a run")
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--out", type=Path, default="maps", metavar="DIR", help="[maps]")
    args = parser.parse_args()
    failed = []
    errors = OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError
    try:
        model = UNet.load(args.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
        args.out.mkdir(parents=True, exist_ok=True)
        for path in args.photos:
            try:
                class_map = Image.fromarray(model.predict(path))
                class_map.putpalette([value for color in model.palette for value in color])
                with open(args.out / f"{Path(path).stem}.png", "xb") as file:  # or refuse
                    class_map.save(file, "PNG")
                print(file.name)
            except errors as error:  # which the other photos may not have
                failed.append(f"error: {path}: {error}")
    except (*errors, KeyboardInterrupt) as error:
        failed.append(f"error: {str(error) or 'interrupted'}")
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that cannot show a name must not end it
    main()

"""A U-Net (Ronneberger et al. 2015) whose encoder is torchvision's ResNet-34 (He et al. 2016).

image ─► (normalise)                            up5 (16) ─► head ─► logits    H
  conv1 (64) ──────────────── x1 ─────────────► up4 (32)                      H/2
  layer1 (64) ─────────────── x2 ─────────────► up3 (64)                      H/4
  layer2 (128) ────────────── x3 ─────────────► up2 (128)                     H/8
  layer3 (256) ────────────── x4 ─────────────► up1 (256)                     H/16
  layer4 (512) ────────────── x5 ────────────────┘                            H/32

Down on the left, up on the right. Each step up enlarges the map below to the size of the skip,
concatenates the two and applies (3×3 conv, BatchNorm, ReLU) twice. Channels are in parentheses.
Odd sizes round up: H/2 means ⌈H/2⌉. Letters in shapes: N batch, C classes, H and W the size of the
image, h and w its size after scaling.

    python unet.py runs/…/checkpoint.pt PHOTO… --out maps     a class map of every photograph
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import resnet34
from torchvision.transforms.functional import pil_to_tensor

IGNORE_INDEX = 255  # in label maps: no label; in class maps: transparent
IMAGE_TYPES = ".bmp .gif .jfif .jp2 .jpeg .jpg .png .ppm .tif .tiff .webp".split()  # noqa: SIM905
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF: where it lies, in which system
Image.MAX_IMAGE_PIXELS = None  # orthomosaics are large


class UserError(ValueError):
    """A user's mistake. The message names the file or the flag, and the remedy."""


def double_conv(inputs, outputs):
    """Twice (3×3 conv, BatchNorm, ReLU): (N, inputs, h, w) → (N, outputs, h, w)."""
    layers = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),  # BatchNorm has a bias
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def join(below, skip):
    """Enlarge the map below to the size of the skip and concatenate the two."""
    below = F.interpolate(below, size=skip.shape[2:])  # nearest neighbour
    return torch.cat([below, skip], dim=1)  # the channels of both


class UNet(nn.Module):
    """ResNet-34 U-Net: image (N, 3, H, W) → logits (N, num_classes, H, W).

    The image holds floats in [0, 1] or uint8 in 0 … 255. H and W should be at least 32, and larger
    to train with batch size 1, since BatchNorm needs more than one value per channel.
    weights: "imagenet" (downloaded by torchvision), None (random), or the path of a file that holds
    a ResNet-34. Raises UserError if they cannot be loaded.
    """

    def __init__(self, num_classes, weights="imagenet"):
        super().__init__()
        # As buffers they move with the model, and no caller can forget to normalise.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.encoder = load_encoder(weights)
        self.up1 = double_conv(512 + 256, 256)
        self.up2 = double_conv(256 + 128, 128)
        self.up3 = double_conv(128 + 64, 64)
        self.up4 = double_conv(64 + 64, 32)
        self.up5 = double_conv(32, 16)
        self.head = nn.Conv2d(16, num_classes, 1)
        # What `predict` needs besides the parameters. train.py sets and saves it.
        self.classes = []  # names
        self.palette = []  # 256 colours as Pillow wants them, R, G, B, R, …; unused ones are grey
        self.scale = 1.0  # photographs are resized by this factor first
        self.window = 64  # side of the prediction windows, as of the training crops

    def forward(self, image):
        if image.dtype == torch.uint8:
            image = image / 255
        x0 = (image.to(self.mean.dtype) - self.mean) / self.std  # (N, 3, H, W)
        e = self.encoder
        x1 = e.relu(e.bn1(e.conv1(x0)))  # (N, 64, H/2, W/2)
        x2 = e.layer1(e.maxpool(x1))  # (N, 64, H/4, W/4)
        x3 = e.layer2(x2)  # (N, 128, H/8, W/8)
        x4 = e.layer3(x3)  # (N, 256, H/16, W/16)
        x5 = e.layer4(x4)  # (N, 512, H/32, W/32)
        x = self.up1(join(x5, x4))  # (N, 256, H/16, W/16)
        x = self.up2(join(x, x3))  # (N, 128, H/8, W/8)
        x = self.up3(join(x, x2))  # (N, 64, H/4, W/4)
        x = self.up4(join(x, x1))  # (N, 32, H/2, W/2)
        x = self.up5(F.interpolate(x, size=x0.shape[2:]))  # (N, 16, H, W)
        return self.head(x)  # (N, C, H, W)

    @torch.inference_mode()
    def logits(self, image):
        """Logits (C, h, w) of a whole photograph at `self.scale`, float32, on the CPU.

        They are blended from overlapping windows of the size of the training crops. In larger ones
        the deepest layer would see less zero padding than in training. Leaves the model in
        evaluation mode.
        """
        pixels = shrink(upright(image), self.scale)  # (3, h, w) uint8
        _, h, w = pixels.shape
        side = min(h, w, self.window)
        hat = torch.bartlett_window(side + 1)[1:]  # (side,), high in the middle
        weight = torch.outer(hat, hat)  # (side, side)
        logits = torch.zeros(self.head.out_channels, h, w)
        total = torch.zeros(h, w)
        self.eval()
        columns = slices(w, side)
        for rows in slices(h, side):
            batch = torch.stack([pixels[:, rows, column] for column in columns])
            batch = self(batch.to(self.mean.device)).cpu()  # (N, C, side, side)
            for column, z in zip(columns, batch):
                logits[:, rows, column] += z * weight
                total[rows, column] += weight
        return logits.div_(total)

    def predict(self, image):
        """Class map (H, W), a uint8 array, of a Pillow image or of the path of one.

        It is 255 where the photograph is transparent.
        """
        photo = upright(image)
        return classify(self.logits(photo), photo).numpy()

    @classmethod
    def load(cls, path):
        """Load a checkpoint.pt written by train.py, on the CPU, ready to predict."""
        checkpoint = read_checkpoint(path)
        if "settings" not in checkpoint:
            raise UserError(f"{path} is not a checkpoint of this version of train.py")
        model = cls(len(checkpoint["settings"]["classes"]), None)
        model.load_state_dict(checkpoint["model"])
        vars(model).update(checkpoint["settings"])  # plain attributes, not in the state_dict
        return model.eval()


def slices(length, side):
    """Windows that cover `length` and overlap by at least a quarter."""
    starts = [*range(0, length - side, side * 3 // 4), length - side]
    return [slice(start, start + side) for start in starts]


def classify(logits, photo):
    """Logits (C, h, w) → class map (H, W) uint8 at the size of the upright photograph."""
    size = photo.size[::-1]  # (H, W)
    best = torch.full(size, -torch.inf)
    class_map = torch.zeros(size, dtype=torch.uint8)
    for c, z in enumerate(logits):  # one class at a time: all at once would be gigabytes
        z = F.interpolate(z[None, None], size=size, mode="bilinear")[0, 0]  # (H, W)
        class_map[z > best] = c
        torch.maximum(best, z, out=best)
    class_map[transparent(photo)] = IGNORE_INDEX
    return class_map


def load_encoder(weights):
    """torchvision's ResNet-34 without its classifier."""
    try:
        encoder = resnet34(weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        del encoder.avgpool, encoder.fc
        if weights not in (None, "imagenet"):
            tensors = read_checkpoint(weights)
            for value in list(tensors.values()):  # they may lie one level down, behind a prefix
                tensors |= value if isinstance(value, dict) else {}
            last = "layer4.2.conv2.weight"
            prefix = next((n.removesuffix(last) for n in tensors if str(n).endswith(last)), "")
            encoder.load_state_dict(
                {
                    name: tensors[prefix + name]
                    for name in encoder.state_dict()
                    if prefix + name in tensors
                }
            )
    except Exception as error:  # no file, no network, no room, tensors of another size
        raise UserError(
            f"no ResNet-34 in {weights} ({reason(error)}); take --weights none, or put "
            f"resnet34-b627a593.pth into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return encoder


# ---- Photographs, and other files ----


def upright(image):
    """A Pillow image or a path as RGBA, rotated as a viewer shows it; info["turned"] says if so."""
    if not isinstance(image, Image.Image):
        image = open_image(image)
    if "turned" in image.info:  # it is upright already
        return image
    orientation = image.getexif().get(274, 1)
    photo = image.convert("RGBA")
    # Keep only the EXIF orientation: exif_transpose rewrites all tags, and fails on odd ones.
    photo.info = {}
    photo.getexif()[274] = orientation
    photo = ImageOps.exif_transpose(photo)
    photo.info["turned"] = orientation not in (0, 1)
    return photo


def open_image(path) -> Image.Image:
    """Open and decode. Raises UserError for what Pillow cannot read or would clip to 8 bits."""
    try:
        image = Image.open(path)
        # ;16 is RGB of 16 bits, of which Pillow silently keeps 8.
        deep = image.mode[0] in "IF" or ";16" in str(image.tile)
        image.load()
        image.getexif()
    except Exception as error:  # broken files raise exceptions of any type
        raise UserError(
            f"{path}: Pillow cannot read it ({reason(error)}); what it reads is a PNG, say, or a "
            "TIFF of three 8-bit bands"
        ) from error
    if deep:
        raise UserError(f"{path}: more than 8 bits a channel; save it with 8")
    return image


def transparent(photo):
    """Where an upright photograph shows nothing, as at an orthomosaic's border: (H, W) bool."""
    return pil_to_tensor(photo.getchannel("A"))[0] == 0


def shrink(photo, scale):
    """(H, W) → (3, h, w) uint8, in training and in `predict` alike. No side falls below 32."""
    w, h = (max(32, round(side * scale)) for side in photo.size)
    return pil_to_tensor(photo.convert("RGB").resize((w, h), Image.BILINEAR))


def read_checkpoint(path):
    """`torch.load` that runs no code hidden in the file. Raises UserError that names the file."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # broken files raise exceptions of any type
        raise UserError(f"{path}: torch cannot read it ({reason(error)})") from error


@contextlib.contextmanager
def whole_file(path):
    """Write a binary file that appears as `path` only once it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:  # such as no space left
        raise UserError(f"{path} was not written: {reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def reason(error):
    """The message of a library's exception, in one line."""
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:400]


def pick_device(name):
    """The named device, after trying it. Without a name: CUDA, else MPS, else the CPU."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(True) or "cpu")
        torch.ones(1, device=device).item()
    except Exception as error:  # each backend has exceptions of its own
        raise UserError(f"--device {name}: {reason(error)}; try --device cpu") from error
    return device


# ---- The command line: from photographs to georeferenced maps ----


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def run(command):
    """Call it. A user's mistake ends in one line, a bug in a traceback."""
    with contextlib.suppress(AttributeError):  # the stdout of a notebook cannot be reconfigured
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter prints a "?"
    try:
        command()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


def geo_tags(path):
    """The georeferencing tags of a GeoTIFF; {} for any other file."""
    with contextlib.suppress(Exception), Image.open(path) as image:
        return {tag: image.tag_v2[tag] for tag in GEO_TAGS if tag in image.tag_v2}
    return {}


def world_file(path):
    """The world file beside a.jpg, such as a.jgw or a.wld, or None."""
    short = f"{path.suffix[:2]}{path.suffix[-1:]}w"  # .jpg → .jgw
    files = [path.with_suffix(suffix) for suffix in (short.lower(), short.upper(), ".wld")]
    return next(filter(Path.is_file, files), None)


def write_maps(model, path, target, confidence):
    """Write the class map and, if wanted, the confidence, georeferenced as the photograph is."""
    photo = upright(path)
    logits = model.logits(photo)  # (C, h, w)
    class_map = classify(logits, photo)  # (H, W)
    pictures = {target: Image.fromarray(class_map.numpy())}
    pictures[target].putpalette(model.palette)
    if confidence:
        sure = logits.softmax(0).amax(0) * 255  # (h, w)
        sure = Image.fromarray(sure.byte().numpy()).resize(photo.size)
        pictures[target.with_stem(f"{target.stem}_confidence")] = sure
    tags, world = geo_tags(path), world_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        with whole_file(name) as file:
            picture.save(file, "TIFF" if tags else "PNG", tiffinfo=tags)
        if world and not tags and not photo.info["turned"]:
            name.with_suffix(".pgw").write_bytes(world.read_bytes())
    counts = class_map.flatten().bincount(minlength=256)[:-1]  # (255,), without transparent
    shares = [f" {name} {n / counts.sum():.1%}" for name, n in zip(model.classes, counts)]
    print(target, *shares)


def main():
    parser = Parser(description="class maps of photographs")
    add = parser.add_argument
    add("checkpoint", help="checkpoint.pt of a run")
    add("photos", nargs="+", type=Path, help="photographs, or folders of them")
    add("--out", type=Path, default="maps", help="folder of the maps [maps]")
    add("--confidence", action="store_true", help="also write the largest probability, 0 to 255")
    add("--device", help="cuda, mps or cpu [the first there is]")
    args = parser.parse_args()
    model = UNet.load(args.checkpoint).to(pick_device(args.device))
    photos = []
    for path in args.photos:
        below = [
            file
            for file in sorted(path.rglob("[!.]*"))
            if file.suffix.lower() in IMAGE_TYPES
            and not file.parent.name.startswith("masks")
            and args.out not in file.parents
        ]
        photos += below or [path]
    top = os.path.commonpath([path.absolute().parent for path in photos])
    plan = {}
    for path in photos:
        target = args.out / path.absolute().relative_to(top)
        target = target.with_suffix(".tif" if geo_tags(path) else ".png")
        if target.exists() or target in plan:  # before anything is computed
            print(f"error: {path}: {target} exists", file=sys.stderr)
        else:
            plan[target] = path
    written = 0
    for target, path in plan.items():
        try:
            write_maps(model, path, target, args.confidence)
            written += 1
        except Exception as error:  # noqa: BLE001 (the others may be fine)
            told = reason(error)
            print(f"error: {told if str(path) in told else f'{path}: {told}'}", file=sys.stderr)
    sys.exit(written < len(photos))  # 1 if any is missing


if __name__ == "__main__":
    run(main)

"""A U-Net (Ronneberger et al. 2015) whose encoder is torchvision's ResNet-34 (He et al. 2016).

image ─► (normalise)                                  up5 (16) ─► head ─► logits    H
            │                                          ▲
          conv1 (64) ──────────── x1 ───────────────► up4 (32)                      H/2
            ▼                                          ▲
          layer1 (64) ─────────── x2 ───────────────► up3 (64)                      H/4
            ▼                                          ▲
          layer2 (128) ────────── x3 ───────────────► up2 (128)                     H/8
            ▼                                          ▲
          layer3 (256) ────────── x4 ───────────────► up1 (256)                     H/16
            ▼                                          ▲
          layer4 (512) ────────── x5 ──────────────────┘                            H/32

up = upsample to the size of the skip, concatenate the skip, twice (3×3 conv, BatchNorm, ReLU).
Channels in parentheses; shapes below are (N, C, H, W). Odd sizes round up: H/2 is ⌈H/2⌉.

model = UNet(num_classes=5)                          # ImageNet encoder, decoder from scratch
logits = model(image)                                # image in [0, 1]; H, W >= 32
model = UNet.load("runs/…/checkpoint.pt")            # after training with train.py
class_map = model.predict(Image.open("photo.jpg"))   # (H, W) uint8, at the photo's own size
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet34_Weights, resnet34
from torchvision.transforms.functional import pil_to_tensor, resize

IMAGENET_URL = ResNet34_Weights.IMAGENET1K_V1.url  # of torchvision, 83 MB


class Up(nn.Module):
    """One step up the decoder: upsample, concatenate the skip, two 3×3 conv–BatchNorm–ReLU."""

    def __init__(self, below: int, skip: int, out: int):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(below + skip, out, 3, padding=1, bias=False),  # BatchNorm has the bias
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, size: torch.Size, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, size=size)  # (N, below, h, w), nearest neighbour
        if skip is not None:
            x = torch.cat([x, skip], dim=1)  # (N, below + skip, h, w)
        return self.convs(x)  # (N, out, h, w)


class UNet(nn.Module):
    """ResNet-34 U-Net: image (N, 3, H, W) in [0, 1] → logits (N, num_classes, H, W), H, W >= 32.

    weights: "imagenet" (downloaded by torchvision), None (random), or the path of a ResNet-34
    state dict; its classifier `fc` is not used. Raises OSError if a file or the network cannot be
    reached, ValueError if the file does not hold a ResNet-34.
    """

    def __init__(self, num_classes: int, weights: str | None = "imagenet"):
        super().__init__()
        # Buffers, so that nobody who calls the model can forget to normalise as for ImageNet:
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.encoder = resnet34()
        del self.encoder.avgpool, self.encoder.fc  # the classifier
        if weights is not None:
            load_encoder(self.encoder, weights)
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
        self.tile = 64  # side of the windows that it is predicted in, after resizing

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
        return self.head(x)  # (N, num_classes, H, W)

    @torch.inference_mode()
    def predict(self, image) -> "numpy.ndarray":  # noqa: F821 (named, not imported)
        """The class map of an 8-bit Pillow image of any size: (H, W) uint8, the image's own size.

        The image is scaled by `self.scale` and predicted in windows of `self.tile` pixels that
        overlap by a quarter or more, blended with weights that fall to their edges; the logits are
        brought back to the image's size. Windows are as large as the training crops (smaller where
        the image is): in larger ones the deep layers, 2×2 pixels small, would see less zero padding
        than they were trained with.
        """
        if image.mode[0] in "IF":  # Pillow would clip their values, not scale them
            raise ValueError(f"the image has {image.mode} pixels; convert it to 8 bits per channel")
        was_training, device = self.training, self.mean.device
        self.eval()
        W, H = image.size
        h, w = (max(32, round(side * self.scale)) for side in (H, W))
        pixels = pil_to_tensor(resize(image.convert("RGB"), [h, w]))  # (3, h, w) uint8
        logits = torch.zeros(1, self.head.out_channels, h, w)
        total = torch.zeros(h, w)  # the sum of the weights at each pixel
        dy, dx = min(h, self.tile), min(w, self.tile)
        weight = hat(dy)[:, None] * hat(dx)  # (dy, dx)
        corners = list(itertools.product(starts(h, self.tile), starts(w, self.tile)))
        n = max(1, 2**18 // (dy * dx))  # windows at a time
        for some in (corners[i : i + n] for i in range(0, len(corners), n)):
            places = [(..., slice(y, y + dy), slice(x, x + dx)) for y, x in some]
            batch = torch.stack([pixels[place] for place in places]).to(device)  # (n, 3, dy, dx)
            for place, z in zip(places, self(batch.float() / 255).cpu()):  # z (C, dy, dx)
                logits[0][place] += z * weight
                total[place] += weight
        logits /= total
        self.train(was_training)
        class_map = torch.empty(H, W, dtype=torch.uint8)
        for top in range(0, H, 512):  # in strips: 100 million pixels × C floats would be gigabytes
            strip = upsample_rows(logits, top, H, W)
            class_map[top : top + 512] = strip.max(1).indices[0]  # argmax is 12 times slower here
        return class_map.numpy()

    @classmethod
    def load(cls, path) -> "UNet":
        """The trained model of a `checkpoint.pt` of train.py, on the CPU, ready to predict."""
        checkpoint = read_checkpoint(path)
        try:
            model = cls(len(checkpoint["classes"]), weights=None)
            model.load_state_dict(checkpoint["model"])
            for name in ("classes", "palette", "scale", "tile"):
                setattr(model, name, checkpoint[name])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is not a checkpoint of train.py ({reason})") from None
        return model.eval()


def load_encoder(encoder: nn.Module, weights: str) -> None:
    """Load the ImageNet weights or those in a file, all parameters but those of the classifier."""
    if weights == "imagenet":
        try:
            state = torch.hub.load_state_dict_from_url(
                IMAGENET_URL, check_hash=True, weights_only=True
            )
        except Exception as error:  # no network, no room, a broken file in the cache
            folder = f"{torch.hub.get_dir()}/checkpoints"
            raise OSError(
                f"the ImageNet weights could not be loaded ({first_line(error)}): put "
                f"{IMAGENET_URL.rsplit('/')[-1]} into {folder}, or start with --weights none"
            ) from error
    else:
        state = read_checkpoint(weights)
    try:
        encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{weights} does not hold a ResNet-34: {reason}") from error


def read_checkpoint(path):
    """`torch.load` that cannot run code hidden in the file, and names the file where it fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch.load meets garbage with many kinds of exception
        reason = first_line(error)
        raise ValueError(
            f"{path} is not a file of tensors that torch can read ({reason})"
        ) from error


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def starts(length: int, tile: int) -> list[int]:
    """Where windows of `tile` begin that cover `length` and overlap by a quarter or more."""
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // (tile * 3 // 4))  # rounded up
    return [round(i * (length - tile) / steps) for i in range(steps + 1)]


def hat(n: int) -> Tensor:
    """Blending weights (n,): 1 at both ends, rising linearly to the middle."""
    i = torch.arange(n)
    return torch.minimum(i + 1, n - i).float()


def upsample_rows(logits: Tensor, top: int, H: int, W: int, rows: int = 512) -> Tensor:
    """Rows `top` to `top + rows` of `F.interpolate(logits, (H, W), mode="bilinear")`."""
    h = logits.shape[2]
    y = (torch.arange(top, min(top + rows, H)) + 0.5) * h / H - 0.5  # where each row comes from
    y = y.clamp(0, h - 1)
    above = y.long()
    below = (above + 1).clamp(max=h - 1)
    strip = torch.lerp(logits[:, :, above], logits[:, :, below], (y - above)[:, None])
    return F.interpolate(strip, size=(len(y), W), mode="bilinear")  # (1, C, rows, W)

"""A U-Net (Ronneberger et al. 2015) whose encoder is torchvision's ResNet-34 (He et al. 2016).

image ─► (normalise)                            up5 (16) ─► head ─► logits    H
  conv1 (64) ──────────────── x1 ─────────────► up4 (32)                      H/2
  layer1 (64) ─────────────── x2 ─────────────► up3 (64)                      H/4
  layer2 (128) ────────────── x3 ─────────────► up2 (128)                     H/8
  layer3 (256) ────────────── x4 ─────────────► up1 (256)                     H/16
  layer4 (512) ────────────── x5 ────────────────┘                            H/32

Down on the left; on the right, read from the bottom up. Each step up upsamples the coarser map to
the skip's size, concatenates the two and applies (3×3 conv, BatchNorm, ReLU) twice. Channels are in
parentheses. Odd sizes round up: H/2 means ⌈H/2⌉. Letters in shapes: N batch, C classes, H and W the
size of what comes in, h and w that of a photograph after scaling.

    python unet.py runs/…/checkpoint.pt PHOTO… --out maps     a class map of every photograph
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import resnet34
from torchvision.transforms.functional import pil_to_tensor

from data import (
    IGNORE_INDEX,
    IMAGE_TYPES,
    MARK,
    UserError,
    geo_tags,
    list_photos,
    open_photo,
    reason,
    resize,
    transparent,
    whole_file,
    without_suffix,
    world_file,
)

SETTINGS = ("classes", "palette", "scale", "window")  # what `predict` needs besides parameters
WINDOW_BATCH = 64  # windows at a time


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


def join(coarse, skip):
    """Upsample the coarser map to the skip's size and concatenate."""
    coarse = F.interpolate(coarse, size=skip.shape[2:])  # nearest neighbour
    return torch.cat([coarse, skip], dim=1)  # the channels of both


class UNet(nn.Module):
    """ResNet-34 U-Net: image (N, 3, H, W) → logits (N, num_classes, H, W).

    The image holds floats in [0, 1] or integers in 0 … 255. H and W should be at least 32, and
    larger to train with batch size 1, since BatchNorm needs more than one value per channel.
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
        self.to(memory_format=torch.channels_last)  # faster, in training and in prediction
        # The SETTINGS. train.py sets and saves them.
        self.classes = []  # names
        self.palette = []  # 256 colours as Pillow wants them, R, G, B, R, …; unused ones are grey
        self.scale = 1.0  # photographs are resized by this factor first
        self.window = 64  # window side for prediction = crop side in training

    def forward(self, image):
        if not image.is_floating_point():
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
        """Logits (C, h, w) of a photograph at `self.scale`, float32, on the CPU.

        They are blended from overlapping windows of the size of the training crops. Larger ones
        would hold less zero padding than the network was trained with. Leaves the model in
        evaluation mode.
        """
        pixels = resize(open_photo(image), self.scale)  # (3, h, w) uint8
        _, h, w = pixels.shape
        side = min(h, w, self.window)
        rise = torch.arange(1, side + 1)
        triangle = torch.minimum(rise, rise.flip(0))  # (side,): 1, 2, …, 2, 1
        weight = torch.outer(triangle, triangle)  # (side, side), high in the middle
        logits = torch.zeros(self.head.out_channels, h, w)
        total = torch.zeros(h, w)
        windows = [(rows, columns) for rows in slices(h, side) for columns in slices(w, side)]
        device = self.mean.device
        self.eval()
        for first in range(0, len(windows), WINDOW_BATCH):
            batch = windows[first : first + WINDOW_BATCH]
            crops = torch.stack([pixels[:, rows, columns] for rows, columns in batch])
            with autocast(device, self.mean.dtype):
                scores = self(crops.to(device))  # (N, C, side, side)
            for (rows, columns), z in zip(batch, scores.float().cpu()):
                logits[:, rows, columns] += z * weight
                total[rows, columns] += weight
        return logits.div_(total)

    def predict(self, image):
        """Class map (H, W), a uint8 array, of a Pillow image or of the path of one.

        It is 255 where the photograph is transparent. A large one is mapped a strip at a time.
        """
        class_maps = []
        for strip, inner, _ in cut_strips(open_photo(image), self):
            class_maps.append(classify(self.logits(strip), strip)[inner])  # without its margins
        return torch.cat(class_maps).numpy()

    @classmethod
    def load(cls, path):
        """Load a checkpoint.pt written by train.py, on the CPU, ready to predict."""
        checkpoint = read_checkpoint(path)
        try:
            settings = checkpoint["settings"]
            model = cls(len(settings["classes"]), None)
            model.load_state_dict(checkpoint["model"])
            for name in SETTINGS:
                setattr(model, name, settings[name])
        except Exception as error:  # of another version, or of something else
            raise UserError(f"{path} is not a checkpoint of this version of train.py") from error
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
    del best, z  # four bytes a pixel each
    class_map[transparent(photo)] = IGNORE_INDEX
    return class_map


def precision(device):
    """bfloat16 where a device has instructions for it (most CUDA devices, some CPUs)."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = able.get("amx_bf16") or able.get("avx512_bf16")
    if device.type == "cuda":  # not where it is only emulated
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def autocast(device, dtype=torch.float32):
    """Let a float32 network compute in `precision(device)`, in training and in prediction alike."""
    fast = dtype == torch.float32 and precision(device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, fast)


# ---- If you read for the method, stop here. The rest is strips, files and command lines. ----

STEPS = 22  # window steps per strip; more need memory, fewer cost time


def cut_strips(photo, model):
    """Yield (strip with margins, slice of its own rows in it, slice of them in the photograph).

    A whole photograph at once would take 20 to 50 bytes a pixel. Strips advance by whole steps of
    the windows, and the margins are two steps high. So all windows that reach the rows lie where
    those of the whole would, and the map is the same where a step and the scaled photograph are
    whole numbers of rows, and the photograph is a window wide. Elsewhere it is nearly the same.
    """
    step = max(1, round(model.window * 3 // 4 / model.scale))  # as in `slices`
    for top in range(0, photo.height, STEPS * step):
        bottom = min(photo.height, top + STEPS * step)
        first = max(0, top - 2 * step)
        last = min(photo.height, bottom + 2 * step)
        strip = photo.crop((0, first, photo.width, last))
        yield strip, slice(top - first, bottom - first), slice(top, bottom)


def load_encoder(weights):
    """torchvision's ResNet-34 without its classifier."""
    try:
        encoder = resnet34(weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        del encoder.avgpool, encoder.fc
        if weights not in (None, "imagenet"):
            tensors = read_checkpoint(weights)
            # They may lie one level down, and behind a prefix.
            tensors = tensors.get("state_dict", tensors.get("model", tensors))
            last = "layer4.2.conv2.weight"
            prefix = next((n.removesuffix(last) for n in tensors if str(n).endswith(last)), "")
            names = [name for name in encoder.state_dict() if prefix + name in tensors]
            encoder.load_state_dict({name: tensors[prefix + name] for name in names})
    except Exception as error:  # no file, no network, no room, tensors of another size
        raise UserError(
            f"no ResNet-34 in {weights} ({reason(error)}); take --weights none, or put "
            f"resnet34-b627a593.pth into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return encoder


def read_checkpoint(path):
    """`torch.load` that runs no code hidden in the file. Raises UserError that names the file."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # broken files raise exceptions of any type
        raise UserError(f"{path}: torch cannot read it ({reason(error)})") from error


# ---- What the command lines of train.py and unet.py share ----


def pick_device(name):
    """The named device, after trying it. Without a name: CUDA, else MPS, else the CPU."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(True) or "cpu")
        torch.ones(1, device=device).item()
    except Exception as error:  # each backend has exceptions of its own
        raise UserError(f"--device {name or ''}: {reason(error)}; try --device cpu") from error
    return device


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def run(command):
    """Call it. A user's mistake ends in one line, a bug in a traceback."""
    with contextlib.suppress(AttributeError):  # the stdout of a notebook cannot be reconfigured
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter prints a "?"
    try:
        command()
    except (UserError, OSError, KeyboardInterrupt) as error:
        clear_line()
        sys.exit(f"error: {str(error) or 'interrupted'}")


def show_progress(text, started, done, to_go):
    """How far and how long yet, on a terminal: one line that is written over and over."""
    if sys.stdout.isatty():
        minutes = (time.time() - started) * to_go / done / 60
        print(f"{text}  {minutes:.1f} min left", end="\x1b[K\r", flush=True)


def clear_line():
    if sys.stdout.isatty():
        print(end="\x1b[K", flush=True)


# ---- The command line: from photographs to georeferenced maps ----


def map_files(path, stem, confidence):
    """The files to write for a photograph: its class map, its confidence, their world files."""
    suffix = ".tif" if geo_tags(path) else ".png"
    files = [Path(f"{stem}{suffix}")]
    if confidence:
        files.append(Path(f"{stem}_confidence{suffix}"))
    if world_file(path):  # .pgw for .png, .tfw for .tif
        files += [file.with_suffix(f"{suffix[:2]}{suffix[-1]}w") for file in files]
    return files


def largest_probability(logits, photo):
    """Logits (C, h, w), overwritten → 0 … 255, 0 where transparent: (H, W) uint8."""
    # The largest probability of a softmax is 1 / Σ exp(z − max z); in place, since z is large.
    small = (255 / logits.sub_(logits.amax(0)).exp_().sum(0)).byte()  # (h, w)
    confidence = pil_to_tensor(Image.fromarray(small.numpy()).resize(photo.size))[0]  # (H, W)
    confidence[transparent(photo)] = 0
    return confidence


@torch.inference_mode()
def write_maps(model, path, files, confidence):
    """Write the `map_files` of a photograph, georeferenced as it is. They appear together.

    Yields the share of the photograph that is done, after every strip.
    """
    photo = open_photo(path)
    layers = torch.empty(1 + confidence, photo.height, photo.width, dtype=torch.uint8)
    for strip, inner, rows in cut_strips(photo, model):
        logits = model.logits(strip)  # (C, h, w)
        layers[0, rows] = classify(logits, strip)[inner]
        if confidence:
            layers[1, rows] = largest_probability(logits, strip)[inner]
        del logits  # before the next ones are made
        yield rows.stop / photo.height
    del photo  # it is large
    pictures = [Image.fromarray(layer.numpy()) for layer in layers]  # (H, W)
    pictures[0].putpalette(model.palette)

    tags = geo_tags(path)
    exif = Image.Exif()  # Pillow writes it as the tags of a TIFF, too
    exif.update(tags | {305: MARK})
    files[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(whole_file(file)) for file in files]
            for stream, picture in zip(streams, pictures):
                form = "TIFF" if tags else "PNG"
                picture.save(stream, form, exif=exif, compression="tiff_deflate")
            for stream in streams[len(pictures) :]:
                stream.write(world_file(path).read_bytes())
    except BaseException:  # also Ctrl-C between two of them: all or nothing
        for file in files:  # none of which was there before
            file.unlink(missing_ok=True)
        raise
    counts = pictures[0].histogram()[:IGNORE_INDEX]  # without transparent
    shares = ["transparent everywhere"]
    if any(counts):
        shares = [f"{name} {n / sum(counts):.1%}" for name, n in zip(model.classes, counts)]
    clear_line()
    print(files[0], *shares)


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
    for path in args.photos:  # as train.py lists them
        photos += list_photos(path) if path.is_dir() else [path]
    if not photos:
        raise UserError(f"no photograph in {path}, none of {', '.join(IMAGE_TYPES)}")

    # Plan everything before anything is computed.
    top = os.path.commonpath([os.path.abspath(path.parent) for path in photos])
    plan, taken, kept, failed = {}, set(), [], 0
    for path in photos:
        stem = without_suffix(args.out / os.path.relpath(path, top))
        files = map_files(path, stem, args.confidence)
        if taken.intersection(files):
            print(f"error: {path}: another photograph has the map {files[0]}", file=sys.stderr)
            failed += 1
        elif any(file.exists() for file in files):
            kept.append(path)
        else:
            plan[path] = files
        taken.update(files)
    if kept:
        print(f"note      {len(kept)} photographs have maps in {args.out}, such as {kept[0]}: kept")
    if not plan:
        raise UserError(f"nothing is left to do; for new maps take another folder than {args.out}")

    started = time.time()
    for number, (path, files) in enumerate(plan.items()):
        try:
            for part in write_maps(model, path, files, args.confidence):
                done = number + part  # photographs
                show_progress(f"{path}  {part:.0%}", started, done, len(plan) - done)
        except Exception as error:  # noqa: BLE001 (the others may be fine)
            failed += 1
            clear_line()
            print(f"error: {path}: {reason(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run(main)

"""What the loss, a training step and large predictions cost, against what people write otherwise.

python -m docs.benchmark                        the loss, then a training step
python -m docs.benchmark --large                the loss at 8×6×1024×1024, too, as on a GPU
python -m docs.benchmark runs/…/checkpoint.pt   prediction of 6000×6000 and 10 000×10 000 pixels

Beside the time of a loss stands the number of its operations, forward and backward, since on a GPU
each costs some 30 µs however small it is. Those that only look at a tensor in another way (views)
are not counted.

The step is compared with the U-Net of segmentation_models_pytorch if that is installed. It is no
dependency of this project: `pip install segmentation-models-pytorch`. What is compared takes turns,
block by block, so that all meet the same machine. Leave the machine alone meanwhile.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, RandomSampler

import data
from pfce import partial_focal_cross_entropy
from unet import UNet, autocast, pick_device, run

DEMO = Path(__file__).resolve().parent / "demo"
CALLS = 10  # of a loss in a block
STEPS = 5  # of training in a block
WARM_UP = 1500  # side of the small mosaic


def dense_formula(logits, target):
    """The focal loss as most code has it: at every pixel, then multiplied by the mask."""
    mask = (target != 255).float()
    ce = F.cross_entropy(logits, target.clamp(max=5).long(), reduction="none")
    loss = 0.25 * (1 - (-ce).exp()) ** 2 * ce
    return (loss * mask).sum() / mask.sum()


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target.long(), ignore_index=255)


LOSSES = {
    "pfce.py": partial_focal_cross_entropy,
    "dense focal formula": dense_formula,
    "F.cross_entropy": cross_entropy,
}


class Operations(TorchDispatchMode):
    """Counts the aten operations that are called inside it, without views."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **kwargs or {})


def benchmark_loss(device, side, blocks):
    """Forward and backward at 8×6×side×side with 100 labels an image, in both memory layouts.

    The label map is uint8, as train.py holds it. F.cross_entropy takes int64 alone, so that what
    needs it pays for the conversion.
    """
    losses = dict(LOSSES)
    if device.type == "cuda":
        losses["dense, compiled"] = torch.compile(dense_formula, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    maps = []
    for _ in range(8):
        mask = torch.randint(6, (side, side), generator=generator)
        clicks = data.sample_points(mask, 100, generator)  # (100, 3)
        maps.append(data.paint(clicks, (side, side), (side, side)))
    target = torch.stack(maps).to(device)  # (8, side, side)
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = torch.randn(8, 6, side, side, generator=generator)
        logits = logits.to(device, memory_format=layout).requires_grad_()
        notes = {}
        for name, loss in LOSSES.items():  # what is compiled cannot be counted
            with Operations() as operations:
                loss(logits, target).backward()
            notes[name] = f"{operations.count} operations"
        times = {name: [] for name in losses}
        for _ in range(blocks):  # in turns
            for name, loss in losses.items():
                for call in range(CALLS):
                    logits.grad = None
                    started = now(device)
                    loss(logits, target).backward()
                    if call > 1:  # the first two find the caches full of another's data
                        times[name].append(now(device) - started)
        report(f"the loss, 8×6×{side}×{side}, {str(layout).removeprefix('torch.')}", times, notes)


def benchmark_step(device, blocks):
    """Steps of the loop of train.py on the demo's scenes, with the cutting of their crops."""
    samples = data.find_samples(DEMO)
    for sample in samples:
        data.prepare(sample, data.read_classes(None), points=100, seed=0, scale=0.5, size=64)
    # One pass of the loader is a block, so that its start counts as it does in an epoch.
    sampler = RandomSampler(samples, replacement=True, num_samples=32 * STEPS)
    loader = DataLoader(data.Crops(samples, 64), 32, sampler=sampler)
    networks = {"unet.py": UNet(5, None)}
    try:
        import segmentation_models_pytorch as smp

        networks["smp.Unet"] = smp.Unet("resnet34", encoder_weights=None, classes=5)
    except ImportError:
        print("segmentation_models_pytorch is not installed: its U-Net was skipped")
    optimizers = {}
    for name, network in networks.items():
        network.to(device, memory_format=torch.channels_last).train()  # as UNet is
        optimizers[name] = torch.optim.AdamW(network.parameters(), 2e-3, fused=True)
    times = {name: [] for name in networks}
    for block in range(blocks + 1):
        for name, network in networks.items():
            started = now(device)
            for batch in loader:
                take_step(network, optimizers[name], batch.to(device))
            if block:  # the first one warms up
                times[name].append((now(device) - started) / STEPS)
    report("a training step, 32 crops of 64×64", times)


def take_step(network, optimizer, batch):
    """One step of the loop in train.py, without schedule and progress."""
    images, labels = batch[:, :3], batch[:, 3]  # (N, 3, S, S), (N, S, S)
    if not isinstance(network, UNet):  # ours normalises by itself
        images = (images / 255 - 0.45) / 0.225
    with autocast(batch.device):
        logits = network(images)  # (N, C, S, S)
    loss = partial_focal_cross_entropy(logits, labels, reduction="none")  # (N, S, S)
    loss = (loss.sum((1, 2)) / (labels != data.IGNORE_INDEX).sum((1, 2))).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()  # train.py reads it, too, and so waits for a GPU


def benchmark_predict(checkpoint, device, sides):
    """Time and peak memory of predicting mosaics of a demo scene, read from files.

    The bytes of a pixel are those above what a small mosaic takes: torch, the network, a batch of
    windows. The peak is that of the whole process so far, so sides are taken in ascending order.
    """
    model = UNet.load(checkpoint).to(device)
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "mosaic.png")
        write_mosaic(photo, WARM_UP)
        model.predict(photo)
        before = peak_memory()
        for side in sorted(sides):
            write_mosaic(photo, side)
            started, worked = now(device), time.process_time()
            model.predict(photo)
            worked, seconds = time.process_time() - worked, now(device) - started
            peak = peak_memory()
            print(
                f"{side}×{side}: {worked:.1f} processor seconds, {seconds:.1f} s, "
                f"{(peak - before) / side**2:.1f} bytes a pixel, peak {peak / 2**30:.2f} GiB",
                flush=True,
            )


def write_mosaic(path, side):
    """Write a square of copies of a demo scene."""
    tile = Image.open(DEMO / "Tile 3/images/image_part_001.jpg")
    mosaic = Image.new("RGB", (side, side))
    for top in range(0, side, tile.height):  # what hangs over the edge is cut off
        for left in range(0, side, tile.width):
            mosaic.paste(tile, (left, top))
    mosaic.save(path, compress_level=1)


def peak_memory():
    """The largest memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def now(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(title, times, notes=None):
    """Print the median of each list of seconds, in ms and as a multiple of the first one."""
    print(title)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        note = notes.get(name, "") if notes else ""
        print(f"  {name:<20} {median * 1000:8.2f} ms  {median / first:5.2f}×  {note}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="predict with this checkpoint.pt")
    parser.add_argument("--sides", type=int, nargs="+", default=[6000, 10_000], help="to predict")
    parser.add_argument("--large", action="store_true", help="the loss at 8×6×1024×1024, too")
    parser.add_argument("--blocks", type=int, default=12, help="of each loss and network [12]")
    parser.add_argument("--device", help="cuda, mps or cpu [the first there is]")
    args = parser.parse_args()
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    if args.checkpoint:
        benchmark_predict(args.checkpoint, device, args.sides)
    else:
        benchmark_loss(device, 256, args.blocks)
        if args.large or device.type == "cuda":
            benchmark_loss(device, 1024, args.blocks)
        benchmark_step(device, args.blocks)


if __name__ == "__main__":
    run(main)

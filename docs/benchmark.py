"""What the loss and large predictions cost, against what people write otherwise.

python -m docs.benchmark                      the loss at 8×6×256×256, 100 labels an image
python -m docs.benchmark runs/…/checkpoint.pt prediction of 6000×6000 and 10 000×10 000 pixels
"""

import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from PIL import Image

from data import sample_points
from pfce import partial_focal_cross_entropy
from unet import UNet


def dense(logits, target):
    """The focal loss as most code has it: at every pixel, then multiplied by the mask."""
    mask = (target != 255).float()
    ce = F.cross_entropy(logits, target.clamp(max=5).long(), reduction="none")
    return (0.25 * (1 - (-ce).exp()) ** 2 * ce * mask).sum() / mask.sum()


LOSSES = {
    "pfce.py": partial_focal_cross_entropy,
    "dense focal formula": dense,
    "F.cross_entropy": lambda logits, target: F.cross_entropy(
        logits, target.long(), ignore_index=255
    ),
}


def benchmark_loss(device: str, blocks: int = 12, calls: int = 10) -> None:
    """Forward and backward. Blocks of calls alternate, so that all meet the same machine.

    The label map is uint8, as train.py holds it; F.cross_entropy takes int64 only, so what needs
    it pays for the conversion.
    """
    g = torch.Generator().manual_seed(0)
    maps = [sample_points(torch.randint(6, (256, 256), generator=g), 100, g) for _ in range(8)]
    target = torch.stack(maps).to(torch.uint8).to(device)  # (8, 256, 256)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; median ms")
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = torch.randn(8, 6, 256, 256, generator=g).to(device, memory_format=layout)
        logits.requires_grad_()
        times = {name: [] for name in LOSSES}
        for _ in range(blocks):
            for name, loss in LOSSES.items():
                for call in range(calls):
                    logits.grad = None
                    started = time.perf_counter()
                    loss(logits, target).backward()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    if call > 1:  # the first two find the caches full of another's data
                        times[name].append((time.perf_counter() - started) * 1e3)
        ours = statistics.median(times["pfce.py"])
        for name, values in times.items():
            median = statistics.median(values)
            print(f"{str(layout)[6:]:<18} {name:<20} {median:6.2f}  {median / ours:5.1f}×")


def benchmark_predict(checkpoint: str) -> None:
    """Time and peak memory of whole predictions of mosaics of the demo scenes."""
    model = UNet.load(checkpoint)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    tile = Image.open("docs/demo/Tile 3/images/image_part_001.jpg")
    for side in (6000, 10_000):
        image = Image.new("RGB", (side, side))
        for corner in range((-(-side // tile.width)) ** 2):
            row, column = divmod(corner, -(-side // tile.width))
            image.paste(tile, (column * tile.width, row * tile.height))
        started = time.time()
        model.predict(image)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        print(f"{side}×{side}: {time.time() - started:.0f} s, peak memory {peak:.2f} GiB in all")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        benchmark_predict(sys.argv[1])
    else:
        benchmark_loss("cuda" if torch.cuda.is_available() else "cpu")

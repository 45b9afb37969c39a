"""How long until the score of a plain recipe is passed? Timed: training alone, without scoring.

python -m docs.time_to_quality DIR --seed 0

The plain recipe is that of the notebook that this repository goes back to: Adam at 1e-3, five
epochs of batches of 8 images squashed to 256×256, no normalisation, no augmentation, fresh clicks
in every batch, Unlabeled as a sixth class. Network, loss, split, precision, and the score of the
five classes at the images' own resolution are those of train.py. Run it on a machine that does
nothing else.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import data
from pfce import partial_focal_cross_entropy
from train import evaluate, usable_device
from unet import UNet, upright

SIDE, BATCH, EPOCHS, POINTS = 256, 8, 5, 100


class Plain(UNet):
    """Sees the whole image at once, squashed to a square."""

    @torch.inference_mode()
    def predict(self, photo):
        image = upright(photo)
        self.eval()
        logits = self(squash(image)[None].to(self.mean.device) / 255).cpu()[:, : len(self.classes)]
        logits = F.interpolate(logits, size=image.size[::-1], mode="bilinear")  # (1, 5, H, W)
        return logits[0].argmax(0).to(torch.uint8).numpy()  # (H, W)


def squash(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))  # (3, 256, 256)


def train_plain(training, six: data.Classes, device, precision: str, seed: int) -> UNet:
    torch.manual_seed(seed)
    model = Plain(len(six.names), None).to(device, memory_format=torch.channels_last)
    model.mean.zero_(), model.std.fill_(1)
    model.classes = list(data.CLASSES)
    images = torch.stack([squash(upright(sample.image)) for sample in training])  # uint8
    masks = [six.read_mask(sample.mask, sample.size)[None, None] for sample in training]
    masks = torch.cat([F.interpolate(mask, size=(SIDE, SIDE)) for mask in masks])[:, 0]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    started = time.time()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            target = torch.stack([data.sample_points(masks[i], POINTS, generator) for i in batch])
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(images[batch].to(device) / 255)
            optimizer.zero_grad()
            partial_focal_cross_entropy(logits, target.to(device)).backward()
            optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"plain recipe, {EPOCHS} epochs: {time.time() - started:.1f} s", end=", ")
    return model


def run(*flags: str) -> list[dict[str, str]]:
    """The rows of the metrics.csv of train.py with these flags."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", "--weights", "none", "--out", out, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(Path(out, "metrics.csv"), encoding="utf-8") as file:
            return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DIR", help="the Dubai images with their masks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    five = data.read_classes(None)
    six = data.Classes([*five.rows[: len(data.CLASSES)], ("Unlabeled", data.NO_LABEL[0]),
                        ("", data.NO_LABEL[1])])  # fmt: skip
    training, held_out = data.split(data.find_samples(data.find_dataset(args.data)), None, False)
    for sample in training + held_out:
        sample.size = upright(sample.image).size
    model = train_plain(training, six, *usable_device("auto"), args.seed)
    print(f"mIoU {evaluate(model, held_out, five)['miou']:.3f}", flush=True)

    # The same run twice, which prints the same numbers: once to time it, once to score it.
    flags = ("--data", args.data, "--seed", str(args.seed))
    timed, scored = run(*flags, "--score-every", "99"), run(*flags)
    seconds = 0.0
    for epoch, (row, score) in enumerate(zip(timed[:-1], scored), start=1):  # (the last is scored)
        seconds += float(row["seconds"])
        miou = float(score["miou"])
        print(f"train.py, {epoch} of {len(timed)} epochs: {seconds:.1f} s, mIoU {miou:.3f}")


if __name__ == "__main__":
    main()

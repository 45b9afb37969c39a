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
from train import evaluate
from unet import UNet, autocast, pick_device, run

SIDE, BATCH, POINTS = 256, 8, 100
CLASSES = len(data.CLASSES)  # that count in the score: all but Unlabeled


class Plain(UNet):
    """Sees the whole image at once, squashed to a square."""

    @torch.inference_mode()
    def predict(self, image):
        photo = data.open_photo(image)
        self.eval()
        device = self.mean.device
        with autocast(device):  # as in `UNet.logits`
            logits = self(squash(photo)[None].to(device))  # (1, 6, 256, 256)
        logits = logits[:, :CLASSES].float().cpu()
        logits = F.interpolate(logits, photo.size[::-1], mode="bilinear")  # (1, 5, H, W)
        return logits[0].argmax(0).to(torch.uint8).numpy()  # (H, W)


def squash(photo):
    small = photo.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return pil_to_tensor(small)  # (3, 256, 256) uint8


def train_plain(training, device, epochs, seed):
    """The trained network of the plain recipe. Prints what it took."""
    # Dubai's five classes, Unlabeled as a sixth. Black stays without a label.
    five = data.read_classes(None).rows[:CLASSES]
    (_, grey), black = data.NO_LABEL
    six = data.Classes([*five, ("Unlabeled", grey), black])
    images, masks = [], []
    for sample in training:
        photo = data.open_photo(sample.image)
        mask = six.read_mask(sample.mask, photo)  # (H, W)
        images.append(squash(photo))
        masks.append(F.interpolate(mask[None, None], (SIDE, SIDE))[0, 0])  # (256, 256)
    images = torch.stack(images)  # (M, 3, 256, 256)

    torch.manual_seed(seed)
    model = Plain(len(six.names), None).to(device)
    model.mean.zero_()  # no normalisation
    model.std.fill_(1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    started = time.time()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            labels = torch.stack([fresh_clicks(masks[i], generator) for i in batch])
            with autocast(device):  # as in train.py
                logits = model(images[batch].to(device))  # (N, 6, 256, 256)
            loss = partial_focal_cross_entropy(logits, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # a GPU has to finish before the time is read
    print(f"plain recipe, {epochs} epochs: {time.time() - started:.1f} s", end=", ")
    return model


def fresh_clicks(mask, generator):
    """A mask (256, 256) → a label map (256, 256) with 100 labels."""
    clicks = data.sample_points(mask, POINTS, generator)  # (100, 3)
    return data.paint(clicks, (SIDE, SIDE), (SIDE, SIDE))


def metrics(*flags):
    """The rows of the metrics.csv that train.py leaves with these flags."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", "--weights", "none", "--out", out, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(Path(out, "metrics.csv"), encoding="utf-8") as file:
            return list(csv.DictReader(file))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DIR", help="the Dubai images with their masks")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--epochs", type=int, default=5, help="of each recipe [5]")
    args = parser.parse_args()
    samples = data.find_samples(data.find_dataset(args.data))
    training, held_out = data.split(samples, None, clicked=False)

    model = train_plain(training, pick_device(None), args.epochs, args.seed)
    scores = evaluate(model, held_out, data.read_classes(None))
    print(f"mIoU {scores['miou']:.3f}", flush=True)

    # `seconds` is the time that an epoch trained, without its scoring.
    options = {"--data": args.data, "--seed": args.seed, "--epochs": args.epochs}
    seconds = 0.0
    for row in metrics(*(str(word) for option in options.items() for word in option)):
        seconds += float(row["seconds"])
        done = f"train.py, {row['epoch']} of {args.epochs} epochs"
        print(f"{done}: {seconds:.1f} s, mIoU {float(row['miou']):.3f}")


if __name__ == "__main__":
    run(main)

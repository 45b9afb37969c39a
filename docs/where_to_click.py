"""Where should one click? Simulates four annotators, as files for `train.py --clicks`.

python -m docs.where_to_click DIR --seed 0 --out runs/where

leaves uniform_0.csv, grid_0.csv, classes_0.csv and both_0.csv: 100 clicks on every image of DIR,
- uniform: any labelled pixel, as train.py itself draws them (the very same clicks)
- grid: one in every cell of 10 × 10
- classes: equally many on every class that the image holds
- both: half of them as in grid (a half of the cells, drawn at random), half as in classes
Where a cell or a class has too few labelled pixels, the rest are uniform: all have equally many.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

import data
from data import IGNORE_INDEX, generator_for, sample_points
from unet import upright

POINTS, SIDE = 100, 10


def grid(mask: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """One click in each of n cells: label map (H, W) → label map (H, W)."""
    (H, W), clicks = mask.shape, torch.full_like(mask, IGNORE_INDEX)
    for cell in torch.randperm(SIDE * SIDE, generator=generator)[:n].tolist():
        i, j = divmod(cell, SIDE)
        rows = slice(i * H // SIDE, (i + 1) * H // SIDE)
        columns = slice(j * W // SIDE, (j + 1) * W // SIDE)
        clicks[rows, columns] = sample_points(mask[rows, columns], 1, generator)
    return clicks


def classes(mask: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Equally many clicks on every class: label map (H, W) → label map (H, W)."""
    present, clicks = mask[mask != IGNORE_INDEX].unique(), torch.full_like(mask, IGNORE_INDEX)
    order = present[torch.randperm(len(present), generator=generator)].tolist()
    for i, c in enumerate(order):
        one = mask.where(mask == c, IGNORE_INDEX)  # the labels of this class alone
        share = n // len(order) + (i < n % len(order))
        clicks = torch.minimum(clicks, sample_points(one, share, generator))
    return clicks


def click(mask: Tensor, strategy: str, generator: torch.Generator) -> Tensor:
    """The label map (H, W) of a simulated annotator: POINTS labels of the mask (H, W)."""
    clicks = torch.full_like(mask, IGNORE_INDEX)
    for draw, share in STRATEGIES[strategy]:
        left = mask.where(clicks == IGNORE_INDEX, IGNORE_INDEX)  # no pixel twice
        # (IGNORE_INDEX is above every class: the minimum has the labels of both.)
        clicks = torch.minimum(clicks, draw(left, round(POINTS * share), generator))
    left = mask.where(clicks == IGNORE_INDEX, IGNORE_INDEX)
    missing = POINTS - int((clicks != IGNORE_INDEX).sum())
    return torch.minimum(clicks, sample_points(left, missing, generator))


STRATEGIES = {
    "uniform": [],
    "grid": [(grid, 1)],
    "classes": [(classes, 1)],
    "both": [(grid, 0.5), (classes, 0.5)],
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DIR", help="images with masks, of Dubai's classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="runs/where", metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    samples, legend = data.find_samples(data.find_dataset(args.data)), data.read_classes(None)
    masks = [legend.read_mask(s.mask, upright(s.image).size) for s in samples]  # (H, W) each
    for strategy in STRATEGIES:
        with open(args.out / f"{strategy}_{args.seed}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "x", "y", "class"))
            for sample, mask in zip(samples, masks):
                # (the name and epoch 1, as in `Sample.draw`: uniform is what train.py draws)
                generator = generator_for(args.seed, sample.name, 1)
                points = data.list_points(click(mask, strategy, generator))
                writer.writerows((sample.name, x, y, legend.names[c]) for x, y, c in points)
        print(file.name)

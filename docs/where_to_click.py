"""Where should one click? Simulates annotators, as files for `train.py --clicks`.

    python -m docs.where_to_click STRATEGY NUMBER --data DIR --seed 0 --out FILE.csv

puts NUMBER clicks on every training image of DIR, those of the default split or without
--hold-out. The rest stays unclicked, and `train.py --data DIR --clicks FILE.csv` scores it. People
leave unequal numbers: for 10-1000, each image gets a number of its own, and as many images get 10
to 100 clicks as 100 to 1000.

    uniform      any labelled pixel: the very clicks that `train.py --points NUMBER` draws
    grid         one in each cell of 10 × 10, or of that many cells at random
    classes      equally many on every class that the image holds
    both         half of them as in grid, half as in classes
    unsure       at random among the tenth of the pixels with the smallest margin between the two
                 largest probabilities
    unsure-grid  one in each cell, at random among the tenth of its pixels with the smallest margin
    wrong        at random among the pixels where the map is not what the mask says

The last three look at the maps of a trained model, `--model runs/…/checkpoint.pt`. With
`--clicks FILE` the new clicks are added to those, and no pixel is clicked twice. So a shell loop
can do rounds: click, train, click where the model is unsure, train anew. Where a cell, a class or
the maps have too few such pixels, the rest are uniform: every image gets its whole number.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from data import IGNORE_INDEX, sample_points
from docs.pretrained import load
from train import at_least, click_rows, to_csv, write
from unet import Parser, pick_device, run

SIDE = 10  # cells in a row and in a column of the grid
NO_CLICKS = torch.empty(0, 3, dtype=torch.int64)


def cells(mask):
    """The 10 × 10 cells of a label map (H, W), each as two slices: rows and columns."""
    H, W = mask.shape
    rows = [H * i // SIDE for i in range(SIDE + 1)]  # where they begin and end
    columns = [W * i // SIDE for i in range(SIDE + 1)]
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            yield slice(top, bottom), slice(left, right)


def without(mask, clicks):
    """The label map (H, W) without the labels of these clicks: no pixel is clicked twice."""
    x, y, _ = clicks.T  # (P,) each
    mask = mask.clone()
    mask[y, x] = IGNORE_INDEX
    return mask


# ---- How to draw n clicks (n, 3) from a label map (H, W). `sample_points` is one way. ----


def grid(mask, n, generator):
    """One click in each of n cells."""
    clicks = [NO_CLICKS]
    every = list(cells(mask))
    for cell in torch.randperm(len(every), generator=generator)[:n].tolist():
        rows, columns = every[cell]
        one = sample_points(mask[rows, columns], 1, generator)  # (1, 3), or (0, 3) without labels
        corner = torch.tensor([columns.start, rows.start, 0])  # from x, y in the cell to the image
        clicks.append(one + corner)
    return torch.cat(clicks)


def classes(mask, n, generator):
    """Equally many clicks on every class. Which of them get one more is random."""
    present = mask[mask != IGNORE_INDEX].unique()  # the classes of this image
    order = present[torch.randperm(len(present), generator=generator)].tolist()
    clicks = [NO_CLICKS]
    for i, c in enumerate(order):
        share = n // len(order) + (i < n % len(order))
        of_class = mask.where(mask == c, IGNORE_INDEX)  # (H, W)
        clicks.append(sample_points(of_class, share, generator))
    return torch.cat(clicks)


def both(mask, n, generator):
    """Half of the clicks in cells, half by class."""
    first = grid(mask, n // 2, generator)
    second = classes(without(mask, first), n - n // 2, generator)
    return torch.cat([first, second])


DRAW = {
    "uniform": sample_points,
    "grid": grid,
    "classes": classes,
    "both": both,
    "unsure": sample_points,
    "unsure-grid": grid,
    "wrong": sample_points,
}


# ---- Where to draw them from, by the maps of a model ----


def narrow(mask, strategy, logits):
    """The label map (H, W) with the labels alone that a strategy clicks on."""
    if strategy == "wrong":
        return mask.where(logits.argmax(0) != mask, IGNORE_INDEX)
    best = logits.softmax(0).topk(2, dim=0).values  # (2, H, W)
    margin = best[0] - best[1]  # (H, W)
    if strategy == "unsure":
        return least(mask, margin)
    narrowed = mask.clone()
    for cell in cells(mask):
        narrowed[cell] = least(mask[cell], margin[cell])  # each cell has a tenth of its own
    return narrowed


def least(mask, margin):
    """The tenth of the labels where the margin is smallest, in a label map or in a cell of it."""
    margins = margin[mask != IGNORE_INDEX]  # (M,)
    if len(margins) == 0:  # a cell without labels has no quantile
        return mask
    return mask.where(margin <= margins.quantile(0.1), IGNORE_INDEX)


def click(sample, legend, model, strategy, n, seed):
    """Give a sample n clicks more."""
    photo = data.open_photo(sample.image)
    mask = legend.read_mask(sample.mask, photo)  # (H, W)
    if sample.clicks is None:
        sample.clicks = NO_CLICKS
    # The generator of train.py for the first clicks, another one in every round.
    number = 1 + len(sample.clicks)
    generator = torch.Generator().manual_seed(data.seed_for(seed, sample.name, number))
    mask = without(mask, sample.clicks)
    chosen = mask
    if model:
        # At the size of the mask, as `predict` has them: margins are smallest between two classes.
        logits = model.logits(photo)[None]  # (1, C, h, w)
        logits = F.interpolate(logits, mask.shape, mode="bilinear")  # (1, C, H, W)
        chosen = narrow(mask, strategy, logits[0])
    clicks = DRAW[strategy](chosen, n, generator)  # (n, 3) or fewer
    # Every image gets its whole number.
    rest = sample_points(without(mask, clicks), n - len(clicks), generator)
    sample.clicks = torch.cat([sample.clicks, clicks, rest])


def low_high(text):
    """An argparse type: "100" → (100, 100), "10-1000" → (10, 1000)."""
    low, _, high = text.partition("-")
    low = at_least(1)(low)
    return low, at_least(low)(high or low)


def how_many(numbers, name, seed):
    """The number of clicks on an image, from low to high: its logarithm is uniform."""
    low, high = numbers
    generator = torch.Generator().manual_seed(data.seed_for(seed, f"how many on {name}"))
    share = torch.rand((), generator=generator).item()
    return round(low * (high / low) ** share)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("strategy", choices=DRAW)
    add("number", type=low_high, help="of new clicks on every image, or from-to, as in 10-1000")
    add("--data", required=True, metavar="DIR", help="images with masks")
    add("--classes", metavar="FILE", help="CSV class,color [Dubai's five]")
    add("--hold-out", metavar="PATTERN", help="never click these [last 2 of each folder]")
    add("--clicks", metavar="FILE", help="the clicks that were made before")
    add("--model", metavar="FILE", help="checkpoint.pt of a run on them")
    add("--seed", type=int, default=0, help="[0]")
    add("--out", required=True, type=Path, metavar="FILE", help="CSV image,x,y,class,color")
    args = parser.parse_args()
    looks = args.strategy in ("unsure", "unsure-grid", "wrong")
    if looks != bool(args.model):
        parser.error(f"{args.strategy} {'needs' if looks else 'takes no'} --model")
    model = load(args.model).to(pick_device(None)) if looks else None
    legend = data.read_classes(args.classes)
    samples = data.find_samples(data.find_dataset(args.data))
    training, _ = data.split(samples, args.hold_out, clicked=False)
    if args.clicks:
        data.read_clicks(args.clicks, training, legend)  # not `samples`: these alone count
    for sample in training:
        n = how_many(args.number, sample.name, args.seed)
        click(sample, legend, model, args.strategy, n, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out, to_csv(["image", "x", "y", "class", "color"], click_rows(training, legend)))
    print(args.out)


if __name__ == "__main__":
    run(main)

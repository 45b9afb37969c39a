"""Train a segmentation network from 100 clicked pixels per image.

    python train.py --demo                         synthetic scenes: no network, no account
    python train.py                                the Dubai dataset, downloaded from Kaggle
    python train.py --data DIR --clicks FILE.csv   your photographs, your clicks

Read `main` like the method section of a paper: data, clicks, network, loop, scores. Letters in
shapes: N batch, S side of a crop, C classes, H and W the size of an image, h and w after scaling.
"""

import argparse
import csv
import io
import json
import os
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, WeightedRandomSampler

import data
from data import IGNORE_INDEX, UserError, open_photo
from pfce import partial_focal_cross_entropy
from unet import (
    SETTINGS,
    Parser,
    UNet,
    autocast,
    clear_line,
    pick_device,
    precision,
    read_checkpoint,
    run,
    show_progress,
)

OPTIONS = {  # default, smallest number, meaning
    "data": (None, None, "folder of your photographs [data, from Kaggle]"),
    "masks": (None, None, "folder of their masks [masks for images]"),
    "hold_out": (None, None, "images to score only [unclicked masks, or last 2 per folder]"),
    "classes": (None, None, "CSV class,color [those of the clicks, or Dubai's five]"),
    "clicks": (None, None, "CSV image,x,y,class: your clicks"),
    "demo": (False, None, "docs/demo with --weights none"),
    "points": (100, 1, "simulated clicks per image, or all"),  # all: dense masks
    "epochs": (5, 1, "of training"),
    "batch_size": (32, 1, "crops per step"),
    "size": (64, 48, "side of the crops"),  # many small ones beat few large ones
    "scale": (0.5, 0.01, "resize all images by"),  # a crop should show surroundings, too
    "lr": (2e-3, 1e-9, "learning rate at the peak of the cycle"),
    "gamma": (2.0, 0.0, "focusing exponent"),  # 0: the plain partial cross-entropy
    "alpha": (0.25, 0.0, "factor of the loss"),  # as one number, it only scales the loss
    "weights": ("imagenet", None, "imagenet, none or a file"),
    "score_every": (1, 1, "score every so many epochs, and the last"),
    "seed": (0, 0, "of all random draws"),  # same machine, same numbers
    "device": (None, None, "cuda, mps or cpu [the first there is]"),
    "out": (None, None, "new or empty folder [runs/<date-time>]"),
    "resume": (None, None, "folder of a run to continue with its own options"),
}
CROPS_PER_IMAGE = 16  # in an epoch
MIN_STEPS = 10  # in an epoch, so that three images are enough to train on
GREY = (225, 225, 225)  # no label, transparent


def main(args):
    device = pick_device(args.device)

    # 1. The data: every photograph with its mask or its clicks. Some are held out.
    checkpoint = checkpoint_of(args)  # None in a new run
    if checkpoint:
        classes = data.Classes(checkpoint["rows"])
    else:
        classes = data.read_classes(args.classes, args.clicks)
    samples = data.find_samples(data.find_dataset(args.data), args.masks, bool(args.clicks))
    if args.clicks:  # masks of images trained on are never read
        data.read_clicks(args.clicks, samples, classes)
    training, held_out = data.split(samples, args.hold_out, bool(args.clicks))

    # 2. The clicks, drawn once for the whole run, and the pixels of the training images.
    for sample in training:
        data.prepare(sample, classes, args.points, args.seed, args.scale, args.size)
    training = [sample for sample in training if (sample.pixels[3] != IGNORE_INDEX).any()]
    if not training:
        raise UserError("no training image has a label; check --classes, --clicks and masks")
    for sample in held_out:  # what is broken is found now, not after an hour of training
        data.truth_map(sample, open_photo(sample.image), classes)

    # 3. The network.
    torch.manual_seed(args.seed)  # for what is not pretrained
    weights = None if checkpoint or args.weights == "none" else args.weights
    model = UNet(len(classes.names), weights).to(device)
    model.classes, model.palette = classes.names, palette_of(classes)
    model.scale, model.window = args.scale, args.size

    # 4. The crops. Images are drawn in proportion to their area.
    crops = max(len(training) * CROPS_PER_IMAGE, args.batch_size * MIN_STEPS)  # in an epoch
    sampler = WeightedRandomSampler([sample.area for sample in training], crops)
    # Crops are cheap. If a GPU has to wait for them, pass num_workers here.
    loader = DataLoader(data.Crops(training, args.size), args.batch_size, sampler=sampler)
    steps = len(loader)  # in an epoch

    # 5. The optimiser. A pretrained encoder learns at a tenth of the decoder's rate.
    decoder = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": model.encoder.parameters()}, {"params": decoder}]
    rates = [args.lr if args.weights == "none" else args.lr / 10, args.lr]  # peaks
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps * args.epochs)

    # 6. The folder of the run. A run that is resumed gets its state back here.
    history = []  # a row of metrics.csv for every epoch
    state = {
        "rows": classes.rows,
        "settings": {name: getattr(model, name) for name in SETTINGS},  # what `predict` needs
        "names": [sample.name for sample in training],
        "history": history,
    }
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}  # saved as state_dicts
    clicks = to_csv(["image", "x", "y", "class", "color"], click_rows(training, classes))
    out = open_run(args, device, checkpoint, clicks, state, parts)
    describe(samples, training, held_out, classes)
    print(
        f"training  {args.epochs} epochs of {steps} steps on {device} in {precision(device)}, "
        f"{torch.get_num_threads()} threads"
    )

    # 7. The loop. No checkpoint is selected: the last epoch's weights are the result.
    columns = ["epoch", "loss", "seconds", "miou", "pixel_accuracy"]
    columns += [f"iou_{name}" for name in classes.names]
    for epoch in range(len(history) + 1, args.epochs + 1):
        # Seeded by its number, so that a resumed run repeats the same epoch.
        torch.manual_seed(data.seed_for(args.seed, "epoch", epoch))
        model.train()
        started, total = time.time(), 0.0
        for step, batch in enumerate(loader, start=1):
            batch = batch.to(device)  # (N, 4, S, S) uint8
            images, labels = batch[:, :3], batch[:, 3]  # (N, 3, S, S), (N, S, S)
            with autocast(device):
                logits = model(images)  # (N, C, S, S)
            loss = partial_focal_cross_entropy(
                logits, labels, gamma=args.gamma, alpha=args.alpha, reduction="none"
            )  # (N, S, S), 0 where nothing is labelled
            # Every crop counts alike: the mean over its labels, then the mean over the crops.
            count = (labels != IGNORE_INDEX).sum((1, 2))  # (N,), never 0
            loss = (loss.sum((1, 2)) / count).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
            progress = f"epoch {epoch}/{args.epochs}  {step}/{steps}  loss {loss:.4f}"
            if not model.head.bias.isfinite().all():  # a step too long ends in nan
                raise UserError(f"{progress}: the network is not finite; try a lower --lr")
            to_go = (args.epochs - epoch + 1) * steps - step
            show_progress(progress, started, step, to_go)
        seconds = round(time.time() - started, 1)
        row = {"epoch": epoch, "loss": round(total / crops, 6), "seconds": seconds}
        if epoch % args.score_every == 0 or epoch == args.epochs:
            row |= evaluate(model, held_out, classes)
        history.append(row)
        # In this order: a run that is killed between the two repeats the epoch, and loses nothing.
        write(out / "metrics.csv", to_csv(columns, history))
        # A finished run needs no optimiser.
        save_checkpoint(out, state, parts if epoch < args.epochs else {"model": model})
        score = f"  mIoU {row['miou']:.3f}" if "miou" in row else ""
        clear_line()
        print(f"epoch {epoch}/{args.epochs}  loss {row['loss']:.4f}{score}", flush=True)

    # 8. The scores of the last epoch, and a picture of them.
    for name in columns[3:]:
        if name in history[-1]:  # unlike a class neither there nor predicted
            print(f"  {name:<20} {history[-1][name]:.3f}")
    draw_picture(out / "predictions.png", model, classes, training, held_out)
    print(f"in {out}: predictions.png, metrics.csv, checkpoint.pt, clicks.csv, config.json")


def evaluate(model, held_out, classes):
    """Scores on all labelled pixels of the held-out images, from one confusion matrix.

    IoU of a class = TP / (TP + FP + FN) (Everingham et al. 2010). A score without a pixel to judge
    it by, such as that of a class neither there nor predicted, is left out.
    """
    # One matrix for all images: a mean of their scores would count small ones like large ones.
    C = len(classes.names)
    confusion = torch.zeros(C, C, dtype=torch.float64)  # [truth, prediction]
    for sample in held_out:
        photo = open_photo(sample.image)
        labels = data.truth_map(sample, photo, classes)  # (H, W)
        prediction = torch.from_numpy(model.predict(photo))  # (H, W)
        labelled = labels != IGNORE_INDEX  # (H, W)
        # Encode (truth, prediction) as one integer, then count.
        pairs = labels[labelled].long() * C + prediction[labelled]  # (P,)
        confusion += pairs.bincount(minlength=C * C).view(C, C)
    hits = confusion.diag()  # (C,) TP
    ious = hits / (confusion.sum(0) + confusion.sum(1) - hits)  # (C,), 0 / 0 = nan
    scores = {"miou": ious.nanmean(), "pixel_accuracy": hits.sum() / confusion.sum()}
    scores |= {f"iou_{name}": iou for name, iou in zip(classes.names, ious)}
    return {name: round(score.item(), 6) for name, score in scores.items() if score.isfinite()}


# ---- If you read for the method, stop here. The rest prints, draws and writes files. ----


def draw_picture(path, model, classes, training, held_out):
    """Two training and three held-out images: image | clicks | prediction | ground truth."""
    apart = max(1, len(held_out) // 3)  # to show held-out images of several folders
    # The training images show what the network was given, the held-out ones what it learnt.
    samples = [("training", sample) for sample in training[:2]]
    samples += [("held out", sample) for sample in held_out[::apart][:3]]
    legend = [*zip(classes.names, classes.palette), ("no label", GREY)]
    top = 45 + len(legend) // 4 * 28
    canvas = Image.new("RGB", (1480, top + len(samples) * 340), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = ImageFont.load_default(18)
    for i, (name, color) in enumerate(legend):
        x, y = 5 + i % 4 * 370, 5 + i // 4 * 28
        pen.rectangle((x, y, x + 20, y + 20), color)
        pen.text((x + 27, y), name, "black")
    for role, sample in samples:
        cells = draw_cells(sample, model, classes, (360, 300))
        captions = f"{role}: {sample.name[-32:]}", "clicks", "prediction", "ground truth"
        for column, (cell, caption) in enumerate(zip(cells, captions)):
            if cell:
                canvas.paste(cell, (5 + column * 370, top))
                pen.text((5 + column * 370, top + 302), caption, "black")
        top += 340
    with data.whole_file(path) as file:
        canvas.save(file, "PNG")


def draw_cells(sample, model, classes, size):
    """Four small pictures of a sample, None for clicks and masks that were not used."""

    def in_color(class_map):
        picture = Image.fromarray(class_map)
        picture.putpalette(model.palette)
        picture = ImageOps.contain(picture, size, Image.Resampling.NEAREST)  # mixes no colours
        return picture.convert("RGB")

    # Clicks are drawn on a small copy, so that dots have one size everywhere.
    photo = open_photo(sample.image)
    small = ImageOps.contain(photo.convert("RGB"), size)
    dots = truth = None
    if sample.clicks is not None:
        dots = small.copy()
        for x, y, c in sample.clicks.tolist():
            # The pixel's centre, in the small picture.
            center = [(v + 0.5) * small.width / photo.width for v in (x, y)]
            ImageDraw.Draw(dots).circle(center, 5, classes.palette[c], "white", 2)
    if sample.mask:
        truth = in_color(classes.read_mask(sample.mask, photo).numpy())
    return small, dots, in_color(model.predict(photo)), truth


def describe(samples, training, held_out, classes):
    """Print what the network is trained on, with notes on likely problems."""
    labels = torch.cat([sample.pixels[3].flatten() for sample in training])
    counts = labels.bincount(minlength=256)[: len(classes.names)].tolist()  # not 255
    area = sum(sample.area for sample in training)  # without the padding of small images
    print(f"data      {len(training)} images to train on, {len(held_out)} held out to score")
    print(
        f"labels    {sum(counts):,}, {sum(counts) / area:.3%} of the pixels that the network sees"
    )
    for name, count in zip(classes.names, counts):
        print(f"          {name:<20} {count / sum(counts):.1%}")
    # Notes, printed only where they apply.
    left_out = len(samples) - len(training) - len(held_out)
    if left_out:
        print(f"note      {left_out} images left out: no clicks, mask or labels")
    if 0 in counts:
        print("note      a class without labels cannot be learnt")
    if classes.rotated:
        print(f"note      {classes.rotated} photographs are rotated (EXIF); are their masks?")
    for color, count in classes.strays.most_common(5):
        print(f"note      {count:,} pixels of the masks are {color}, which is not in --classes")


def palette_of(classes):
    """The colours of all 256 values of a class map in one row, as Pillow wants them."""
    colors = classes.palette + [GREY] * (256 - len(classes.palette))
    return [value for color in colors for value in color]


# ---- The files of a run, and its options ----


def checkpoint_of(args):
    """The checkpoint of a run to resume. None for a new run, whose folder must be empty."""
    if args.resume:
        checkpoint = read_checkpoint(Path(args.resume, "checkpoint.pt"))
        if "names" not in checkpoint:
            raise UserError(f"{args.resume}/checkpoint.pt is of another version of train.py")
        return checkpoint
    if args.out and any(Path(args.out).glob("*")):
        raise UserError(f"--out {args.out} is not empty; take another, or --resume it")
    return None


def open_run(args, device, checkpoint, clicks, state, parts):
    """The folder of a new run, or of the run of `checkpoint`, which fills `state` and `parts`."""
    if not checkpoint:
        out = create_run(args, device)
        print(f"run       {out}: if it is interrupted, go on with --resume {out}")
        write(out / "clicks.csv", clicks)
        save_checkpoint(out, state, parts)
        return out
    out = Path(args.resume)
    if state["names"] != checkpoint["names"] or clicks != (out / "clicks.csv").read_bytes():
        raise UserError(f"--resume {out} used different images or clicks")
    state["history"] += checkpoint["history"]  # in place: it is the list of `main`
    for name in parts.keys() & checkpoint.keys():  # of a finished run, the model alone
        parts[name].load_state_dict(checkpoint[name])
    return out


def create_run(args, device):
    """Create the run's folder. config.json claims it: of two runs there, one can create it."""
    out = Path(args.out or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
    config = vars(args) | {
        "data": os.path.abspath(args.data or "data"),
        "out": os.path.abspath(out),
        "device": str(device),
        "precision": precision(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    # Creating a file exclusively is the one step that two runs cannot both take.
    out.mkdir(parents=True, exist_ok=True)
    try:
        with open(out / "config.json", "x") as file:
            json.dump(config, file, indent=2)
    except FileExistsError as error:
        raise UserError(f"--out {out}: another run has just begun there; take another") from error
    return out


def save_checkpoint(out, state, parts):
    """Write what resuming and predicting need to checkpoint.pt."""
    with data.whole_file(out / "checkpoint.pt") as file:
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, file)


def write(path, content):
    with data.whole_file(path) as file:
        file.write(content)


def click_rows(training, classes):
    """The rows of clicks.csv."""
    for sample in training:
        for x, y, c in sample.clicks.tolist():
            # With a colour beside every class, the file needs no --classes.
            color = "#{:02X}{:02X}{:02X}".format(*classes.palette[c])
            yield {"image": sample.name, "x": x, "y": y, "class": classes.names[c], "color": color}


def to_csv(columns, rows):
    """Rows, dictionaries by column, as the bytes of a CSV file. What a row lacks is blank."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")  # on every system
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parse_args(argv=None):
    """What was typed over the options of --demo or of the run to resume, these over the defaults.

    Of a run to resume, only --data, --masks, --clicks and --device may change.
    """
    parser = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    for name, (default, smallest, text) in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = str if smallest is None else at_least(smallest)
            if name == "points":
                kind = count_or_all
            text = text if default is None else f"{text} [{default}]"
            parser.add_argument(flag, type=kind, help=text)
    typed = vars(parser.parse_args(argv))  # nothing else, because of SUPPRESS
    # Absolute, so that a run can be resumed from elsewhere.
    for name in typed.keys() & {"data", "masks", "classes", "clicks"}:
        typed[name] = os.path.abspath(typed[name])
    # The defaults, or the options of the run to resume; most of those are fixed.
    options = {name: default for name, (default, _, _) in OPTIONS.items()}
    if "resume" in typed:
        path = Path(typed["resume"], "config.json")
        try:
            config = json.loads(path.read_text())
            options = {name: config[name] for name in OPTIONS}
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged, or of another version of train.py") from error
        for name in typed.keys() - {"resume", "data", "masks", "clicks", "device"}:
            if typed[name] != options[name]:
                parser.error(f"--resume keeps {name} = {options[name]}; else start a new run")
    elif "demo" in typed:
        if "data" in typed:
            parser.error("--demo has its own images: drop --data")
        options |= {"data": f"{Path(__file__).resolve().parent}/docs/demo", "weights": "none"}
    options |= typed
    if options["clicks"] and options["points"] != 100:  # typed, or of the run to resume
        parser.error("--points simulates clicks: drop it beside --clicks")
    return argparse.Namespace(**options)


def at_least(low):
    """An argparse type: a number in [low, 2**31), an int if `low` is one."""

    def number(text):
        value = type(low)(text)
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{text} must be {low} or more, below 2**31")
        return value

    return number


def count_or_all(text):
    return text if text == "all" else at_least(1)(text)


if __name__ == "__main__":
    run(lambda: main(parse_args()))

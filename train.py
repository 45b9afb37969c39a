"""Train a segmentation network from 100 clicked pixels per image.

    python train.py --demo                         synthetic scenes: no network, no account
    python train.py                                the Dubai dataset, downloaded from Kaggle
    python train.py --data DIR --clicks FILE.csv   your own photographs, your own clicks

Read `main` like the method section of a paper: data, clicks, network, loop, scores. Letters in
shapes: N batch, S side of a crop, C classes, H and W the size of an image, h and w after scaling.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, WeightedRandomSampler

import data
from data import IGNORE_INDEX
from pfce import partial_focal_cross_entropy
from unet import (
    Parser,
    UNet,
    UserError,
    pick_device,
    read_checkpoint,
    run,
    shrink,
    upright,
    whole_file,
)

EPOCH_PIXELS = 256**2  # 16 crops of 64×64
MIN_STEPS = 10  # so that three images are enough to train on
GREY = (225, 225, 225)  # no label, transparent


def main(args):
    device = pick_device(args.device)
    precision = "bfloat16" if is_fast_at_bfloat16(device) else "float32"

    # 1. The data: every photograph with its mask or its clicks. Some are held out.
    if args.resume:
        checkpoint = read_checkpoint(Path(args.resume, "checkpoint.pt"))
        if "names" not in checkpoint:
            raise UserError(f"{args.resume}/checkpoint.pt is of another version of train.py")
        classes = data.Classes(checkpoint["rows"])
    elif args.out and os.path.exists(args.out) and os.listdir(args.out):
        raise UserError(f"--out {args.out} is not empty; take another, or --resume it")
    else:
        classes = data.read_classes(args.classes)
    samples = data.find_samples(data.find_dataset(args.data), args.masks)
    if args.clicks:  # then no mask of a clicked image is ever looked at
        data.read_clicks(args.clicks, samples, classes)
    training, held_out = data.split(samples, args.hold_out, bool(args.clicks))

    # 2. The clicks, drawn once for the whole run, and the pixels of the training images.
    for sample in training:
        load(sample, classes, args.points, args.seed, args.scale, args.size)
    training = [sample for sample in training if (sample.pixels[3] != IGNORE_INDEX).any()]
    if not training:
        raise UserError("no training image has a label; check --classes and --clicks")
    for sample in held_out:  # what is broken is found now, not after an hour of training
        truth(sample, upright(sample.image), classes)

    # 3. The network.
    torch.manual_seed(args.seed)  # for what is not pretrained
    weights = None if args.resume or args.weights == "none" else args.weights
    model = UNet(len(classes.names), weights).to(device, memory_format=torch.channels_last)
    settings = {"classes": classes.names, "scale": args.scale, "window": args.size}
    # Pillow wants the colours of all 256 values in one row.
    colors = classes.palette + [GREY] * (256 - len(classes.palette))
    settings["palette"] = [value for color in colors for value in color]
    vars(model).update(settings)  # what `predict` needs to know

    # 4. The crops. Images are drawn in proportion to their area.
    # In an epoch: as many as cover EPOCH_PIXELS per image, and MIN_STEPS batches at least.
    crops = max(len(training) * EPOCH_PIXELS // args.size**2, args.batch_size * MIN_STEPS)
    sampler = WeightedRandomSampler([sample.area for sample in training], crops)
    # Crops are cheap. If a GPU has to wait for them, pass num_workers here.
    loader = DataLoader(data.Crops(training, args.size), args.batch_size, sampler=sampler)
    steps = len(loader)  # in an epoch

    # 5. The optimiser. A pretrained encoder learns at a tenth of the decoder's rate.
    decoder = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": model.encoder.parameters()}, {"params": decoder}]
    rates = [args.lr if args.weights == "none" else args.lr / 10, args.lr]  # at their peak
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps * args.epochs)

    # 6. The folder of the run, new or resumed. Its checkpoint holds all that predicting and
    # resuming need.
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}  # by their state_dict
    names = [sample.name for sample in training]
    state = {"rows": classes.rows, "settings": settings, "names": names, "history": []}
    clicks = to_csv(["image", "x", "y", "class"], click_rows(training, classes))
    if args.resume:
        out = Path(args.resume)
        if names != checkpoint["names"] or clicks != (out / "clicks.csv").read_bytes():
            raise UserError(f"--resume {out} used different images or clicks")
        state["history"] = checkpoint["history"]
        for name in parts.keys() & checkpoint.keys():  # of a finished run, the model alone
            parts[name].load_state_dict(checkpoint[name])
    else:
        out = begin(args, device, precision)
        print(f"run       {out}: if it is interrupted, go on with --resume {out}")
        write(out / "clicks.csv", clicks)
        save_checkpoint(out, state, parts)
    describe(samples, training, held_out, classes)
    print(
        f"training  {args.epochs} epochs of {steps} steps on {device} in {precision}, "
        f"{torch.get_num_threads()} threads"
    )

    # 7. The loop. No checkpoint is selected: the last epoch's weights are the result.
    history = state["history"]  # a row of metrics.csv for every epoch
    for epoch in range(max(1, len(history)), args.epochs + 1):
        if epoch > len(history):  # else only its scoring was interrupted
            # Seeded by its number, so that a resumed run repeats the same epoch.
            torch.manual_seed(seed_for(args.seed, "epoch", epoch))
            model.train()
            started, total = time.time(), 0.0
            for step, batch in enumerate(loader, start=1):
                batch = batch.to(device)  # (N, 4, S, S) uint8
                images, labels = batch[:, :3], batch[:, 3]  # (N, 3, S, S), (N, S, S)
                with torch.autocast(device.type, torch.bfloat16, precision == "bfloat16"):
                    logits = model(images)  # (N, C, S, S)
                loss = partial_focal_cross_entropy(
                    logits, labels, gamma=args.gamma, alpha=args.alpha
                )  # (), the mean over the clicks of the batch
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(batch)
                progress = f"epoch {epoch}/{args.epochs}  {step}/{steps}  loss {loss:.4f}"
                if not math.isfinite(total):
                    raise UserError(f"{progress}: not finite; try a lower --lr")
                if sys.stdout.isatty():  # one line, written over and over
                    to_go = (args.epochs - epoch + 1) * steps - step
                    minutes = to_go * (time.time() - started) / step / 60
                    print(f"{progress}  {minutes:.1f} min left", end="\x1b[K\r")
            row = {"epoch": epoch, "loss": round(total / crops, 6)}  # weighted by crops
            row |= {"miou": None, "pixel_accuracy": None}  # not scored yet
            history.append(row | {"seconds": round(time.time() - started, 1)})
            # Saved before the scoring, which may fail; after the last epoch without the optimiser.
            save_checkpoint(out, state, parts if epoch < args.epochs else {"model": model})
        scored = epoch % args.score_every == 0 or epoch == args.epochs
        scores = evaluate(model, held_out if scored else [], classes)  # of no image: None
        history[-1] |= scores
        write(out / "metrics.csv", to_csv(history[-1], history))
        score = "" if scores["miou"] is None else f"  mIoU {scores['miou']:.3f}"
        print(f"epoch {epoch}/{args.epochs}  loss {history[-1]['loss']:.4f}{score}", flush=True)

    # 8. The scores, and a picture of them.
    for name, score in scores.items():  # of the last epoch
        if score is not None:  # as for a class that no held-out image has
            print(f"  {name:<20} {score:.3f}")
    draw_picture(out / "predictions.png", model, classes, training, held_out)
    print(f"in {out}: predictions.png, metrics.csv, checkpoint.pt, clicks.csv, config.json")


def load(sample, classes, points, seed, scale, size):
    """Give a training sample its pixels and, unless someone has clicked on it, simulated clicks."""
    photo = upright(sample.image)
    if sample.clicks is None:
        mask = classes.read_mask(sample.mask, photo)  # (H, W)
        generator = torch.Generator().manual_seed(seed_for(seed, sample.name))
        count = mask.numel() if points == "all" else points
        sample.clicks = data.sample_points(mask, count, generator)  # (P, 3)
    image = shrink(photo, scale)  # (3, h, w) uint8
    _, h, w = image.shape
    labels = data.paint(sample.clicks, photo.size, (h, w))  # (h, w) uint8
    # Image and labels are stacked, so that crops and flips act on both alike. Where they are
    # smaller than a crop, they are padded with white that has no label.
    pixels = torch.cat([image, labels[None]])  # (4, h, w)
    padding = (0, max(0, size - w), 0, max(0, size - h))  # right and below
    sample.pixels = F.pad(pixels, padding, value=IGNORE_INDEX)
    sample.area = h * w
    if points == "all":
        sample.clicks = sample.clicks[:0]  # they would take 24 bytes a pixel


def seed_for(seed, what, number=1):
    """A seed that depends on its arguments alone, not on what was drawn before."""
    digest = hashlib.sha256(repr((seed, what, number)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def truth(sample, photo, classes):
    """The label map (H, W) to score a held-out photograph on: its mask, or else its clicks."""
    if sample.mask:
        return classes.read_mask(sample.mask, photo)
    return data.paint(sample.clicks, photo.size, (photo.height, photo.width))


def evaluate(model, held_out, classes):
    """Scores on all labelled pixels of the held-out images, from one confusion matrix.

    IoU of a class = TP / (TP + FP + FN) (Everingham et al. 2010), None if all three are 0.
    """
    C = len(classes.names)
    confusion = torch.zeros(C, C, dtype=torch.float64)  # [truth, prediction]
    for sample in held_out:
        photo = upright(sample.image)
        labels = truth(sample, photo, classes)  # (H, W)
        prediction = torch.from_numpy(model.predict(photo))  # (H, W)
        labelled = labels != IGNORE_INDEX  # (H, W)
        # Encode (truth, prediction) as one integer, then count.
        pairs = labels[labelled].long() * C + prediction[labelled]  # (P,)
        confusion += pairs.bincount(minlength=C * C).view(C, C)
    hits = confusion.diag()  # (C,) TP
    ious = hits / (confusion.sum(0) + confusion.sum(1) - hits)  # (C,), 0 / 0 = nan
    scores = {"miou": ious.nanmean(), "pixel_accuracy": hits.sum() / confusion.sum()}
    scores |= {f"iou_{name}": iou for name, iou in zip(classes.names, ious)}
    return {
        name: None if score.isnan() else round(score.item(), 6)  # as in metrics.csv
        for name, score in scores.items()
    }


def draw_picture(path, model, classes, training, held_out):
    """Two training and three held-out images: image | clicks | prediction | ground truth."""
    size = (360, 300)  # of a picture, in a cell of 370×340
    samples = training[:2] + held_out[:: len(held_out) // 3 or 1][:3]  # of several folders
    legend = [*zip(classes.names, classes.palette), ("no label", GREY)]
    top = 45 + len(legend) // 4 * 28
    canvas = Image.new("RGB", (1480, top + len(samples) * 340), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = ImageFont.load_default(18)
    for i, (name, color) in enumerate(legend):
        x, y = 5 + i % 4 * 370, 5 + i // 4 * 28
        pen.rectangle((x, y, x + 20, y + 20), color)
        pen.text((x + 27, y), name, "black")

    def in_color(class_map):
        picture = Image.fromarray(class_map)
        picture.putpalette(model.palette)
        return ImageOps.contain(picture, size, Image.NEAREST).convert("RGB")  # no mixed colours

    for sample in samples:
        photo = upright(sample.image)
        small = ImageOps.contain(photo.convert("RGB"), size)
        cells = [small, None, in_color(model.predict(photo)), None]
        # Clicks and masks only where they were used, to train on or to score with.
        if sample.clicks is not None:
            cells[1] = small.copy()
            for x, y, c in sample.clicks.tolist():
                # The pixel's centre, in the small picture.
                center = [(v + 0.5) * small.width / photo.width for v in (x, y)]
                ImageDraw.Draw(cells[1]).circle(center, 5, classes.palette[c], "white", 2)
        if sample.mask:
            cells[3] = in_color(classes.read_mask(sample.mask, photo).numpy())
        captions = (
            f"{'training' if sample in training else 'held out'}: {sample.name[-32:]}",
            "clicks",
            "prediction",
            "ground truth",
        )
        for column, cell in enumerate(cells):
            if cell:
                canvas.paste(cell, (5 + column * 370, top))
                pen.text((5 + column * 370, top + 302), captions[column], "black")
        top += 340
    with whole_file(path) as file:
        canvas.save(file, "PNG")


def describe(samples, training, held_out, classes):
    """Print what the network is trained on, with notes on likely problems."""
    labels = torch.cat([sample.pixels[3].flatten() for sample in training])
    counts = labels.bincount(minlength=256)[: len(classes.names)].tolist()  # without IGNORE_INDEX
    area = sum(sample.area for sample in training)
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
    if classes.turned:
        print(
            f"note      {classes.turned} photographs are stored turned: their masks must fit the "
            "upright picture"
        )
    for color, count in classes.strays.most_common(5):
        print(f"note      {count:,} pixels of the masks are {color}, which is not in --classes")


# ---- The files of a run, and its options ----


def begin(args, device, precision):
    """Create the run's folder and claim it by config.json, so that two runs cannot share it."""
    config = vars(args) | {
        "data": os.path.abspath(args.data or "data"),
        "device": str(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    # Creating a file exclusively is the one step that two runs cannot both take.
    now = time.strftime("runs/%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        out = Path(args.out or (now if number == 1 else f"{now}_{number}"))
        out.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(out / "config.json", "x") as file:
            json.dump(config | {"out": os.path.abspath(out)}, file, indent=2)
            return out
        if args.out:
            raise UserError(f"--out {out}: another run has just begun there")


def save_checkpoint(out, state, parts):
    """Write what resuming and predicting need to checkpoint.pt."""
    buffer = io.BytesIO()  # torch.save itself does not report a full disk
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, buffer)
    write(out / "checkpoint.pt", buffer.getbuffer())


def write(path, content):
    with whole_file(path) as file:
        file.write(content)


def click_rows(training, classes):
    """The rows of clicks.csv."""
    for sample in training:
        for x, y, c in sample.clicks.tolist():
            yield {"image": sample.name, "x": x, "y": y, "class": classes.names[c]}


def to_csv(columns, rows):
    """Rows, dictionaries by column, as the bytes of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def is_fast_at_bfloat16(device):
    """Whether a device has instructions for bfloat16: most CUDA devices, some CPUs."""
    if device.type == "cuda":  # not where it is only emulated
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return able.get("amx_bf16") or able.get("avx512_bf16")


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add, folder = parser.add_argument, os.path.abspath
    add("--data", metavar="DIR", type=folder, help="your photographs [data, from Kaggle]")
    add("--masks", metavar="DIR", type=folder, help="their masks [masks for images]")
    add("--hold-out", metavar="PATTERN", help="score, never train on [last 2 per folder]")
    add("--classes", metavar="FILE", type=folder, help="CSV class,color [Dubai's five]")
    add("--clicks", metavar="FILE", type=folder, help="CSV image,x,y,class: your own")
    add("--demo", action="store_true", help="docs/demo with --weights none")
    add("--points", type=count_or_all, help="simulated clicks per image, or all [100]")
    add("--epochs", type=at_least(1), default=5, help="[5]")
    add("--batch-size", type=at_least(1), default=32, help="crops per step [32]")
    add("--size", type=at_least(48), default=64, help="side of the crops [64]")
    add("--scale", type=at_least(0.01), default=0.5, help="resize all images by [0.5]")
    add("--lr", type=at_least(1e-9), default=2e-3, help="peak of the cycle [0.002]")
    add("--gamma", type=at_least(0.0), default=2.0, help="focusing exponent [2]")
    add("--alpha", type=at_least(0.0), default=0.25, help="factor of the loss [0.25]")
    add("--weights", default="imagenet", help="imagenet, none or a file [imagenet]")
    add("--score-every", type=at_least(1), default=1, help="score every N epochs, and the last [1]")
    add("--seed", type=at_least(0), default=0, help="of all random draws [0]")
    add("--device", help="cuda, mps or cpu [the first there is]")
    add("--out", metavar="DIR", help="new or empty [runs/<date-time>]")
    add("--resume", metavar="DIR", help="continue the run in DIR with its own options")
    args = parser.parse_args(argv)
    if args.demo and args.data:
        parser.error("--demo has its own images: drop --data")
    if args.clicks and args.points and not args.resume:
        parser.error("--points simulates clicks: drop it beside --clicks")
    parser.set_defaults(points=100)  # set late: above, None means not typed
    if args.demo:
        parser.set_defaults(data=f"{Path(__file__).resolve().parent}/docs/demo", weights="none")
    if args.resume:  # its own options become the defaults; most of them are fixed
        path = Path(args.resume, "config.json")
        try:
            config = json.loads(path.read_text())
            own = {name: config[name] for name in vars(args).keys() - {"resume"}}
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged, or of another version of train.py") from error
        parser.set_defaults(**own)
        args = parser.parse_args(argv)
        for name in own.keys() - {"data", "masks", "clicks", "device"}:
            if getattr(args, name) != own[name]:
                parser.error(f"--resume keeps {name} = {own[name]}; to change it, start a new run")
    return parser.parse_args(argv)


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

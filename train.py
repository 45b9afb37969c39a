"""Train a segmentation network from 100 clicked pixels per image.

    python train.py --demo                         synthetic scenes: no network, no account
    python train.py                                the Dubai dataset, downloaded from Kaggle
    python train.py --data DIR --clicks FILE.csv   your own images, your own clicks

The method, in the order of `prepare` and `main`:
  1. read the images; hold out the last two of every tile, never to be trained on;
  2. click: draw 100 labelled pixels of every training image, once, and forget all others;
  3. train a U-Net with the partial focal cross-entropy on crops around the clicks;
  4. score the last epoch's weights on every pixel of the held-out images, at their own size.

A run leaves metrics.csv, checkpoint.pt, clicks.csv, predictions.png and config.json in --out.
Letters in shapes: N batch, S side of a crop, K classes, H, W size of an image, h, w after scaling.
"""

import argparse
import contextlib
import csv
import difflib
import json
import math
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
from data import IGNORE_INDEX
from pfce import partial_focal_cross_entropy
from unet import UNet, read_checkpoint

EPOCH_PIXELS = 256**2  # pixels per image that an epoch draws, in crops: 16 of 64×64
MIN_STEPS = 10  # steps that an epoch has at least, so that three images are trained on, too


def main(args: argparse.Namespace) -> None:
    out = Path(args.resume or args.out)
    try:
        run = prepare(args)  # what a user can get wrong comes to light here
        begin(run)  # and only now is anything written
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"error: {str(error) or 'out of memory'}")
    except KeyboardInterrupt:
        sys.exit(interrupted(out))
    args, model, history = run.args, run.model, run.history
    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            started = time.time()
            if args.resample and epoch > 1:
                run.clicks = click(run.training, args, epoch)
                for crops, sample in zip(run.crops, run.training):
                    crops.label(run.clicks[sample.name])
            loss = train_one_epoch(run, epoch)
            due = epoch % args.score_every == 0 or epoch == args.epochs
            scores = evaluate(model, run.held_out if due else [], run.scored)
            seconds = round(time.time() - started, 1)
            history.append({"epoch": epoch, "loss": loss, **scores, "seconds": seconds})
            save(run)
            print(f"epoch {epoch}/{args.epochs}  {summary(history[-1])}", flush=True)
        report(run)
    except KeyboardInterrupt:
        sys.exit(interrupted(out))
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"\nerror: {error}; the last complete epoch is in {out}")


def prepare(args: argparse.Namespace) -> SimpleNamespace:
    """Everything a run needs, checked. Nothing is written yet but a dataset that was fetched."""
    checkpoint = None
    if args.resume:
        if not (Path(args.resume) / "checkpoint.pt").exists():
            raise ValueError(f"--resume {args.resume}: there is no checkpoint.pt in it")
        checkpoint = read_checkpoint(Path(args.resume) / "checkpoint.pt")
        if not isinstance(checkpoint, dict) or "config" not in checkpoint:
            raise ValueError(f"{args.resume}/checkpoint.pt is not a checkpoint of train.py")
        given, args = args, argparse.Namespace(**checkpoint["config"] | {"out": args.resume})
        args.device = args.device if given.device == "auto" else given.device
        if args.clicks and (Path(args.out) / "clicks.csv").exists():
            args.clicks = str(Path(args.out) / "clicks.csv")  # as they were when the run started
    out = Path(args.out)
    if not checkpoint and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists; choose another, or continue it with --resume {out}")
    for flag in ("clicks", "classes", "weights") if not checkpoint else ():
        value = getattr(args, flag)
        if value not in (None, "imagenet", "none") and not Path(value).is_file():
            others = ", and it is not imagenet or none" if flag == "weights" else ""
            raise ValueError(f"--{flag} {value}: there is no such file{others}")
    device = usable_device(args.device)
    args.device = str(device)
    # bfloat16 where it is fast: on most of CUDA, and on a CPU with AMX, in half the time.
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu.get("amx_bf16", False)
    precision = "bfloat16" if fast else "float32"

    # 1. The images. Unlabeled may be learnt as a last class, but is never scored.
    started = time.time()
    classes, palette = list(data.CLASSES), list(data.PALETTE)
    if args.classes and not checkpoint:
        classes, palette = data.read_classes(args.classes)
    if checkpoint:
        classes, palette = checkpoint["classes"], checkpoint["palette"]
    scored = len(classes) - bool(checkpoint and args.learn_unlabeled)
    if args.learn_unlabeled and not checkpoint:
        classes, palette = classes + ["Unlabeled"], palette + [data.UNLABELED]
    root = data.find_dataset(args.data, demo=args.demo, download=not args.clicks)
    clicks = data.read_clicks(args.clicks, root, classes) if args.clicks else None
    training, held_out, unclicked = data.read_dataset(root, palette, clicks)
    print(f"read {len(training + held_out)} images in {time.time() - started:.1f} s")

    # 2. The clicks: label maps (H, W), IGNORE_INDEX everywhere but at the clicked pixels.
    if clicks is None:
        clicks = click(training, args, epoch=1)
        unclicked = [s.name for s in training if not labelled(clicks[s.name])]
        training = [s for s in training if s.name not in unclicked]
    if not training:
        raise ValueError(f"no image in {root} has a labelled pixel to train on")
    if checkpoint and [s.name for s in training] != checkpoint["training"]:
        raise ValueError(f"the images in {root} are not those that the run was started with")
    dense = args.points == "all"
    crops = [data.Crops(s.image, clicks[s.name], args.scale, args.size, dense) for s in training]
    crops_per_epoch = max(len(crops) * EPOCH_PIXELS // args.size**2, args.batch_size * MIN_STEPS)

    # 3. The network, random where it is not pretrained, and its optimiser.
    torch.manual_seed(args.seed)
    model = UNet(len(classes), None if args.weights == "none" or checkpoint else args.weights)
    model.to(device, memory_format=torch.channels_last)
    model.classes, model.palette = classes, [list(color) for color in palette]
    model.scale, model.tile = args.scale, args.size
    decoder = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": model.encoder.parameters()}, {"params": decoder}]
    rates = [args.lr if args.weights == "none" else args.lr / 10, args.lr]  # pretrained: gently
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps = math.ceil(crops_per_epoch / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps * args.epochs)
    run = SimpleNamespace(
        args=args, out=out, device=device, precision=precision, root=root, scored=scored,
        training=training, held_out=held_out, unclicked=unclicked, clicks=clicks, crops=crops,
        model=model, optimizer=optimizer, schedule=schedule, steps=steps,
        crops_per_epoch=crops_per_epoch, history=[], resumed=bool(checkpoint),
    )  # fmt: skip
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError):
            raise ValueError(f"{out} is a run of another version of train.py; start anew") from None
        schedule.load_state_dict(checkpoint["schedule"])
        run.history = checkpoint["history"]
    return run


def begin(run: SimpleNamespace) -> None:
    """Say what there is, make the folder `--out` and write what is known before training."""
    args, out = run.args, run.out
    describe(run)
    out.mkdir(parents=True, exist_ok=True)
    if not run.resumed and any(out.iterdir()):  # of a run that was started at the same moment
        raise ValueError(f"--out {out} is no longer empty; choose another")
    save(run)
    here = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "precision": run.precision,
        "threads": torch.get_num_threads(),  # on a CPU, sums depend on it in the last digits
    }
    (out / "config.json").write_text(json.dumps(vars(args) | here, indent=2) + "\n")
    if not (out / "clicks.csv").exists():
        used = {} if args.points == "all" else dict(run.clicks)
        for epoch in range(2, args.epochs + 1) if args.resample else ():
            for name, fresh in click(run.training, args, epoch).items():
                used[name] = torch.where(fresh != IGNORE_INDEX, fresh, used[name])
        with replacing(out / "clicks.csv") as partial:
            data.write_clicks(partial, used, run.model.classes)


def interrupted(out: Path) -> str:
    if (out / "checkpoint.pt").exists():
        return f"\ninterrupted; continue with: python train.py --resume {out}"
    return "\ninterrupted before the training began"


def click(training: list[data.Sample], args, epoch: int) -> dict[str, Tensor]:
    """A label map (H, W) per image, from a generator that depends on seed, image and epoch only."""
    if args.points == "all":
        return {s.name: s.mask for s in training}
    return {
        s.name: data.sample_points(
            s.mask, args.points, data.generator_for(args.seed, s.name, epoch)
        )
        for s in training
    }


def labelled(label_map: Tensor) -> int:
    return int((label_map != IGNORE_INDEX).sum())


def train_one_epoch(run: SimpleNamespace, epoch: int) -> float:
    """Returns the mean loss of the labelled pixels in all crops of the epoch."""
    args, device, model = run.args, run.device, run.model
    model.train()
    generator = data.generator_for(args.seed, "epoch", epoch)
    # An image gives crops in proportion to its area, each around one of its labelled pixels.
    areas = torch.tensor([c.labels.numel() for c in run.crops], dtype=torch.float)
    order = areas.multinomial(run.crops_per_epoch, replacement=True, generator=generator)
    total, count, started = 0.0, 0, time.time()
    for step, indices in enumerate(order.split(args.batch_size), start=1):
        batch = [run.crops[i].draw(generator) for i in indices]
        images = torch.stack([image for image, _ in batch]).to(device)  # (N, 3, S, S) uint8
        target = torch.stack([labels for _, labels in batch]).to(device)  # (N, S, S) uint8
        images = images.to(memory_format=torch.channels_last).float() / 255  # (N, 3, S, S)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
            logits = model(images)  # (N, K, S, S)
        loss = partial_focal_cross_entropy(logits, target, gamma=args.gamma, alpha=args.alpha)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"the loss is {value} at epoch {epoch}, step {step}; try a lower --lr"
            )
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.schedule.step()
        points = labelled(target)
        total, count = total + value * points, count + points
        progress(run, epoch, step, total / count, started)
    return total / count


def progress(run: SimpleNamespace, epoch: int, step: int, loss: float, started: float) -> None:
    """One line on a terminal, written over and over; nothing where the output is a file."""
    if sys.stdout.isatty():
        per_step = (time.time() - started) / step
        left = per_step * ((run.args.epochs - epoch + 1) * run.steps - step)
        line = f"epoch {epoch}/{run.args.epochs}  step {step}/{run.steps}  loss {loss:.4f}  "
        line += f"{run.args.batch_size / per_step:.1f} crops/s  {left / 60:.1f} min left"
        print(f"\r{line:<79}", end="\r" + " " * 79 + "\r" if step == run.steps else "", flush=True)


def evaluate(model: UNet, held_out: list[data.Sample], scored: int) -> dict:
    """Scores on all labelled pixels of the held-out masks, from one confusion matrix.

    IoU of a class = TP / (TP + FP + FN) (Everingham et al. 2010); None without such pixels.
    """
    K = len(model.classes)
    confusion = torch.zeros(K, K, dtype=torch.long)  # [truth, prediction]
    for sample in held_out:
        prediction = torch.from_numpy(model.predict(sample.image))  # (H, W)
        known = sample.mask < scored  # neither IGNORE_INDEX nor Unlabeled
        pairs = sample.mask[known].long() * K + prediction[known]
        confusion += pairs.bincount(minlength=K * K).view(K, K)
    hits = confusion.diag()[:scored]
    union = (confusion.sum(0) + confusion.sum(1) - confusion.diag())[:scored]
    ious = [h / u if u else None for h, u in zip(hits.tolist(), union.tolist())]
    present = [iou for iou in ious if iou is not None]
    scores = {
        "miou": sum(present) / len(present) if present else None,
        "pixel_accuracy": hits.sum().item() / confusion.sum().item() if present else None,
    }
    return scores | {f"iou_{name}": iou for name, iou in zip(model.classes, ious)}


def save(run: SimpleNamespace) -> None:
    """Write checkpoint.pt, then metrics.csv: each is whole at any moment, old or new."""
    model = run.model
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "history": run.history,
        "config": vars(run.args) | {"data": str(Path(run.args.data).resolve()), "resume": None},
        "training": [s.name for s in run.training],
        **{name: getattr(model, name) for name in ("classes", "palette", "scale", "tile")},
    }
    with replacing(run.out / "checkpoint.pt") as partial:
        try:
            torch.save(checkpoint, partial)
        except RuntimeError as error:  # what torch makes of a full disk
            reason = str(error).splitlines()[0]
            raise OSError(f"{partial} could not be written ({reason})") from error
    with (
        replacing(run.out / "metrics.csv") as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        ious = [f"iou_{name}" for name in model.classes[: run.scored]]
        columns = ["epoch", "loss", "miou", "pixel_accuracy", "seconds", *ious]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in run.history:
            fixed = {k: f"{v:.6f}" for k, v in row.items() if isinstance(v, float)}
            writer.writerow(row | fixed | {"seconds": row["seconds"]})


@contextlib.contextmanager
def replacing(path: Path):
    """Write to a temporary file that takes the place of `path` only once it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    with open(partial, "r+b") as file:
        os.fsync(file.fileno())  # on the disk before the name points to it
    os.replace(partial, path)


# ---- what is printed and drawn ----


def describe(run: SimpleNamespace) -> None:
    args, model = run.args, run.model
    points = torch.cat([run.clicks[s.name].flatten() for s in run.training])
    counts = points[points != IGNORE_INDEX].long().bincount(minlength=len(model.classes))
    shares = counts / counts.sum()
    number = int(counts.sum())
    kind = "labelled pixels (dense masks)" if args.points == "all" else "clicks"
    fresh = ", drawn afresh every epoch" if args.resample else ""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    tiles = len({s.tile for s in run.training + run.held_out})
    step = f"{args.batch_size} crops of {args.size}×{args.size} at scale {args.scale:g}"
    lines = [
        f"data      {run.root}, {tiles} folders",
        f"images    {len(run.training)} for training, {len(run.held_out)} held out",
        f"labels    {number:,} {kind}{fresh}, {number / len(points):.4%} of the training pixels",
        "          " + ", ".join(f"{n} {s:.1%}" for n, s in zip(model.classes, shares.tolist())),
        f"network   U-Net on ResNet-34, {parameters:.1f} M parameters, weights {args.weights}",
        f"training  {args.epochs} epochs of {run.steps} steps, each {step}",
        f"device    {run.device}, {run.precision}, torch {torch.__version__}",
        f"output    {run.out}",
    ]
    if run.unclicked:
        lines.insert(2, f"          {len(run.unclicked)} images have no click and are left out")
    if not run.held_out:
        lines.insert(2, "          no held-out image has a mask: there is nothing to score against")
    print(*lines, sep="\n", flush=True)


def summary(row: dict) -> str:
    text = f"loss {row['loss']:.4f}"
    if row["miou"] is not None:
        text += f"  mIoU {row['miou']:.3f}  pixel accuracy {row['pixel_accuracy']:.3f}"
    return f"{text}  {row['seconds']:.0f} s"


def report(run: SimpleNamespace) -> None:
    last, model = run.history[-1], run.model
    if last["miou"] is not None:
        print(f"\nheld-out scores of the last epoch ({len(run.held_out)} images, never trained on)")
        for name in model.classes[: run.scored]:
            iou = last[f"iou_{name}"]
            print(f"  IoU {name:<14} " + ("no such pixel" if iou is None else f"{iou:.3f}"))
        print(f"  mIoU               {last['miou']:.3f}")
        print(f"  pixel accuracy     {last['pixel_accuracy']:.3f}")
    draw_predictions(run)
    files = "metrics.csv, checkpoint.pt, clicks.csv, predictions.png, config.json"
    print(f"\nstored in {run.out}: {files}")


def draw_predictions(run: SimpleNamespace, width: int = 360, most: int = 5) -> None:
    """predictions.png: rows of image | clicks | prediction | ground truth under a legend."""
    args, model = run.args, run.model
    font, small = ImageFont.load_default(22), ImageFont.load_default(15)
    samples = list({s.tile: s for s in reversed(run.held_out or run.training)}.values())[::-1]
    samples = (samples + [s for s in run.held_out or run.training if s not in samples])[:most]
    dense = args.points == "all"
    titles = ["image", "labels" if dense else "clicks", "prediction", "ground truth"]
    if not run.held_out:
        titles.pop()
    elif not dense:
        titles[1] = "clicks (not trained on)"  # but there to show how few they are
    colors = torch.full((256, 3), 225, dtype=torch.uint8)  # light grey where there is no label
    colors[: len(model.palette)] = torch.tensor(model.palette, dtype=torch.uint8)

    def panel(class_map: Tensor) -> Image.Image:
        return Image.fromarray(colors[class_map.long()].numpy())

    rows = []
    for sample in samples:
        height = round(width * sample.image.height / sample.image.width)
        size = (width, min(max(height, 1), 4 * width))
        photo = sample.image.resize(size, Image.Resampling.LANCZOS)
        if run.held_out and not dense:  # what an annotator would have clicked here
            n = args.points if not args.clicks else 100
            points = data.sample_points(
                sample.mask, n, data.generator_for(args.seed, sample.name, 1)
            )
        else:
            points = sample.mask if dense else run.clicks[sample.name]
        if dense:
            clicked = panel(points).resize(size, Image.Resampling.NEAREST)
        else:
            clicked = photo.copy()
            pen = ImageDraw.Draw(clicked)
            for y, x in (points != IGNORE_INDEX).nonzero().tolist():
                at = (x + 0.5) * size[0] / points.shape[1], (y + 0.5) * size[1] / points.shape[0]
                color = tuple(colors[int(points[y, x])].tolist())
                pen.circle(at, 5, fill=color, outline="white", width=1)
        prediction = panel(torch.from_numpy(model.predict(sample.image)))
        panels = [photo, clicked, prediction.resize(size, Image.Resampling.NEAREST)]
        if run.held_out:
            panels.append(panel(sample.mask).resize(size, Image.Resampling.NEAREST))
        rows.append((sample.name, panels))

    gap = 12
    total_width = gap + (width + gap) * len(titles)
    legend = list(zip(model.classes, model.palette))
    if run.held_out:
        legend.append(("no label: not scored", (225, 225, 225)))
    x, y, places = gap, 46, []  # the legend wraps where it meets the right edge
    for name, _ in legend:
        needs = 27 + small.getlength(name) + 24
        if x + needs > total_width:
            x, y = gap, y + 28
        places.append((x, y))
        x += needs
    top = y + 64
    height = top + sum(panels[0].height + 34 for _, panels in rows)
    canvas = Image.new("RGB", (total_width, height), "white")
    pen = ImageDraw.Draw(canvas)
    score = run.history[-1]["miou"]
    head = "held-out images, never trained on" if run.held_out else "training images"
    pen.text((gap, 8), head + (f": mIoU {score:.2f}" if score is not None else ""), "black", font)
    for (name, color), (x, y) in zip(legend, places):
        pen.rectangle((x, y, x + 20, y + 20), tuple(color), "black")
        pen.text((x + 27, y), name, "black", small)
    for column, title in enumerate(titles):
        pen.text((gap + column * (width + gap), top - 32), title, "black", font)
    y = top
    for name, panels in rows:
        for column, image in enumerate(panels):
            canvas.paste(image, (gap + column * (width + gap), y))
        pen.text((gap, y + panels[0].height + 4), name, "black", small)
        y += panels[0].height + 34
    with replacing(run.out / "predictions.png") as partial:
        canvas.save(partial, "PNG")


# ---- the command line ----


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        sys.exit(f"error: {message}; see python train.py --help")


def whole(low: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, at least {low}, got {text!r}"
            )
        return int(text)

    return parse


def real(low: float, above: bool = False):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value > low or value == low and not above) or math.isinf(value):
            bound = f"above {low:g}" if above else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"must be a finite number {bound}, got {text!r}")
        return value

    return parse


def points(text: str) -> int | str:
    return text if text == "all" else whole(1)(text)


def usable_device(name: str) -> torch.device:
    """The device, tried out. Raises ValueError where torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("known are cpu, cuda and mps")
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); try --device cpu"
        ) from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--data", metavar="DIR", help="dataset folder; filled from Kaggle if empty [data]")
    add("--demo", action="store_true", help="synthetic scenes, random encoder, no network")
    add("--points", metavar="N|all", type=points, default=100, help="clicks per image [100]")
    add("--resample", action="store_true", help="fresh clicks every epoch")
    add("--learn-unlabeled", action="store_true", help="Unlabeled as one class more")
    add("--clicks", metavar="FILE", help="CSV image,x,y,class: these clicks, not simulated ones")
    add("--classes", metavar="FILE", help="CSV class,color: your classes and their mask colours")
    add("--epochs", metavar="N", type=whole(1), default=5, help="[5]")
    add("--batch-size", metavar="N", type=whole(1), default=32, help="crops per step [32]")
    add("--size", metavar="N", type=whole(48), default=64, help="side of the crops [64]")
    add("--scale", metavar="X", type=real(0, True), default=0.5, help="resize all images by [0.5]")
    add("--lr", metavar="X", type=real(0, True), default=2e-3, help="peak of the cycle [0.002]")
    add("--gamma", metavar="X", type=real(0), default=2.0, help="focusing exponent [2]")
    add("--alpha", metavar="X", type=real(0), default=0.25, help="weight of the loss [0.25]")
    add("--weights", metavar="imagenet|none|FILE", help="encoder [imagenet; with --demo none]")
    add("--score-every", metavar="N", type=whole(1), default=1, help="epochs; the last always [1]")
    add("--seed", metavar="N", type=whole(0), default=0, help="of every random draw [0]")
    add("--device", metavar="NAME", default="auto", help="cuda, mps or cpu [the first there is]")
    add("--out", metavar="DIR", help="folder of the run, new or empty [runs/<date-time>]")
    add("--resume", metavar="DIR", help="continue the run in DIR with its own options")
    # fmt: on
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        parser.error(
            f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else "")
        )
    typed = {word.split("=")[0] for word in argv if word.startswith("--")}
    if args.resume and (extra := sorted(typed - {"--resume", "--device"})):
        parser.error(f"--resume continues a run with its own options; remove {', '.join(extra)}")
    if args.resample and args.points == "all":
        parser.error("--points all takes every labelled pixel; remove --resample")
    if args.clicks and (args.resample or args.points != 100):
        parser.error("--clicks brings its own clicks; remove --points and --resample")
    args.data = args.data or ("demo" if args.demo else "data")
    args.weights = args.weights or ("none" if args.demo else "imagenet")
    args.out = args.out or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return args


if __name__ == "__main__":
    main(parse_args())

"""Train a segmentation network from 100 clicked pixels per image.

    python train.py --demo                         synthetic scenes: no network, no account
    python train.py                                the Dubai dataset, downloaded from Kaggle
    python train.py --data DIR --clicks FILE.csv   your own images, your own clicks

`main` reads like the method: data, clicks, network, loop, scores. Letters in shapes: N batch, S
side of a crop, C classes, H, W size of an image, h, w after scaling.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
from data import IGNORE_INDEX, Sample, naming, refuse
from pfce import partial_focal_cross_entropy
from unet import UNet, read_checkpoint, shrink, upright

EPOCH_PIXELS = 256**2  # pixels per image that an epoch draws, in crops: 16 of 64×64
MIN_STEPS = 10  # steps that an epoch has at least, so that three images are trained on, too


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    taken = not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir()))
    refuse(taken, f"--out {out} exists; choose another, or continue it with --resume {out}")
    checkpoint = read_checkpoint(out / "checkpoint.pt") if args.resume else {}
    device, precision = usable_device(args.device)

    # 1. The data: every image with its mask, some of them held out.
    classes = data.Classes(checkpoint["rows"]) if checkpoint else data.read_classes(args.classes)
    root = data.find_dataset(args.data)
    samples = data.find_samples(root, args.masks)
    if args.clicks:
        data.read_clicks(args.clicks, samples, classes)
    training, held_out = data.split(samples, args.hold_out, bool(args.clicks))

    # 2. The clicks: pixels and labels of a training image become one tensor (4, h, w).
    history = checkpoint.get("history", [])  # a row per epoch; empty where the run is new
    for sample in training:  # (with --resample, a run that goes on lists its past clicks, too)
        for epoch in range(1, max(1, len(history) if args.resample else 1) + 1):
            label(sample, classes, args, epoch)
    for sample in held_out:  # what is broken is found now, not after an hour of training
        with naming(sample.image):
            sample.size = upright(sample.image).size
        classes.read_mask(sample.mask, sample.size)
    training = [sample for sample in training if len(sample.labelled)]
    refuse(not training, f"no image in {root} has a labelled pixel; is --classes missing?")

    # 3. The network, random where it is not pretrained, and its optimiser.
    torch.manual_seed(args.seed)
    pretrained = None if args.weights == "none" or args.resume else args.weights
    model = UNet(len(classes.names), pretrained)
    model.to(device, memory_format=torch.channels_last)
    model.classes, model.palette = classes.names, classes.palette
    model.scale, model.window = args.scale, args.size
    decoder = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": model.encoder.parameters()}, {"params": decoder}]
    rates = [args.lr if args.weights == "none" else args.lr / 10, args.lr]  # pretrained: gently
    optimizer = torch.optim.AdamW(groups, fused=True)
    crops = max(len(training) * EPOCH_PIXELS // args.size**2, args.batch_size * MIN_STEPS)
    steps = math.ceil(crops / args.batch_size)  # in an epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps * args.epochs)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    same = [sample.name for sample in training] == checkpoint.get("training")
    refuse(args.resume and not same, "--resume: the images are not those of the start of the run")
    for name in parts.keys() & checkpoint.keys():  # of a finished run, the model alone
        parts[name].load_state_dict(checkpoint[name])

    # 4. The loop. The last epoch's weights are the result, whatever the curve did.
    describe(args, root, samples, training, held_out, classes, steps, device, precision)
    save(args, parts, history, training, classes, precision)
    for epoch in range(len(history) + 1, args.epochs + 1):
        started = time.time()
        for sample in training if args.resample and epoch > 1 else ():
            label(sample, classes, args, epoch)
        loss = train_one_epoch(parts, training, args, epoch, crops, precision)
        scored = epoch % args.score_every == 0 or epoch == args.epochs
        scores = evaluate(model, held_out if scored else [], classes)
        seconds = round(time.time() - started, 1)
        history.append({"epoch": epoch, "loss": loss, "seconds": seconds, **scores})
        save(args, parts, history, training, classes, precision)
        score = "" if scores["miou"] is None else f"  mIoU {scores['miou']:.3f}"
        print(f"epoch {epoch}/{args.epochs}  loss {loss:.4f}{score}  {seconds:.0f} s", flush=True)

    # 5. The scores, and a picture of them.
    report(args, model, history[-1], training, held_out, classes)


def train_one_epoch(parts: dict, training: list[Sample], args, epoch, crops, precision) -> float:
    """Returns the mean loss of the epoch's crops."""
    model, optimizer, schedule = parts.values()
    model.train()
    device = model.mean.device
    generator = data.generator_for(args.seed, "epoch", epoch)
    # An image gives crops in proportion to its area, each around one of its labelled pixels.
    areas = torch.tensor([float(sample.pixels[0].numel()) for sample in training])  # (images,)
    batches = areas.multinomial(crops, replacement=True, generator=generator).split(args.batch_size)
    total, started = 0.0, time.time()
    for step, indices in enumerate(batches, start=1):
        batch = [training[i].crop(args.size, generator) for i in indices]
        batch = torch.stack(batch).to(device)  # (N, 4, S, S) uint8: R, G, B, label
        images = batch[:, :3].to(memory_format=torch.channels_last).float() / 255  # (N, 3, S, S)
        target = batch[:, 3]  # (N, S, S)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(images)  # (N, C, S, S)
        loss = partial_focal_cross_entropy(
            logits, target, gamma=args.gamma, alpha=args.alpha, reduction="none"
        )  # (N, S, S), 0 where no label
        # Every crop counts alike, as pixels do in the score: mean over its labels, then over the
        # crops. (A crop of a small image holds up to five times as many clicks as of a large one.)
        loss = (loss.sum((1, 2)) / (target != IGNORE_INDEX).sum((1, 2))).mean()  # (N,) → ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += (value := loss.item()) * len(batch)
        where = f"epoch {epoch} step {step}/{len(batches)} loss {value:.4f}"
        refuse(not math.isfinite(value), f"{where}: not a number to learn from; try a lower --lr")
        if sys.stdout.isatty():  # one line, written over and over
            left = (args.epochs - epoch + 1) * len(batches) - step  # steps
            left *= (time.time() - started) / step / 60  # minutes
            print(f"{where} {left:.1f} min left", end="   \r" + "\x1b[K" * (step == len(batches)))
    return total / crops


def evaluate(model: UNet, held_out: list[Sample], classes: data.Classes) -> dict:
    """Scores on all labelled pixels of the held-out masks, from one confusion matrix.
    IoU of a class = TP / (TP + FP + FN) (Everingham et al. 2010); None without such pixels."""
    C = len(model.classes)
    confusion = torch.zeros(C, C, dtype=torch.float64)  # [truth, prediction]
    for sample in held_out:
        prediction = torch.from_numpy(model.predict(sample.image))  # (H, W)
        mask = classes.read_mask(sample.mask, sample.size)  # (H, W)
        known = mask != IGNORE_INDEX  # (H, W)
        pairs = mask[known].long() * C + prediction[known]  # (P,)
        confusion += pairs.bincount(minlength=C * C).view(C, C)
    hits = confusion.diag()
    ious = hits / (confusion.sum(0) + confusion.sum(1) - hits)  # (C,), 0 / 0 = nan
    scores = {"miou": ious.nanmean(), "pixel_accuracy": hits.sum() / confusion.sum()}
    scores |= {f"iou_{name}": iou for name, iou in zip(model.classes, ious)}
    return {name: None if score.isnan() else score.item() for name, score in scores.items()}


def label(sample: Sample, classes: data.Classes, args: argparse.Namespace, epoch: int = 1) -> None:
    """Give a training image its pixels, once, and the labels of an epoch."""
    if sample.pixels is None:
        with naming(sample.image):
            photo = upright(sample.image)
        sample.size, sample.pixels = photo.size, shrink(photo, args.scale)  # (3, h, w) uint8
    if args.clicks:  # the mask of a clicked image, if it has one, is never looked at
        with naming(f"--clicks {args.clicks}"):
            points = sample.click_map()  # (H, W)
    else:
        mask = classes.read_mask(sample.mask, sample.size)  # (H, W)
        points = sample.draw(mask, args.points, args.seed, epoch)  # (H, W)
    labels = data.shrink_labels(points, *sample.pixels.shape[1:])  # (h, w)
    sample.pixels = torch.cat([sample.pixels[:3], labels[None]])  # (4, h, w)
    sample.labelled = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0].int()  # (L,)
    if args.points != "all":
        sample.clicks += data.list_points(points)


def save(args, parts: dict, history, training: list[Sample], classes, precision: str) -> None:
    """Write what a run leaves but its picture; checkpoint.pt is whole at any moment, old or new."""
    out, device = Path(args.out), str(parts["model"].mean.device)
    config = vars(args) | {"device": device, "precision": precision}
    config |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    config |= {"threads": torch.get_num_threads(), "data": os.path.abspath(args.data or "data")}
    done = len(history) == args.epochs  # needs no optimizer any more: a third of the bytes
    checkpoint = {k: v.state_dict() for k, v in parts.items() if k == "model" or not done}
    checkpoint |= {"history": history, "training": [s.name for s in training]}
    checkpoint |= {"rows": classes.rows, "classes": classes.names, "palette": classes.palette}
    checkpoint |= {"scale": args.scale, "window": args.size}
    columns = ["epoch", "loss", "miou", "pixel_accuracy", "seconds"]
    columns += [f"iou_{name}" for name in classes.names]
    metrics = [columns] + [[row[c] and round(row[c], 6) for c in columns] for row in history]
    clicks = [[s.name, x, y, classes.names[c]] for s in training for x, y, c in s.clicks]
    clicks = [["image", "x", "y", "class"], *clicks]
    with naming(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        torch.save(checkpoint, out / "checkpoint.pt.partial")
        os.replace(out / "checkpoint.pt.partial", out / "checkpoint.pt")
        for name, rows in (("clicks.csv", clicks), ("metrics.csv", metrics)):
            with open(out / name, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)


def describe(args, root, samples, training, held_out, classes, steps, device, precision) -> None:
    labels = torch.cat([s.pixels[3].flatten()[s.labelled] for s in training])  # (L,) uint8
    counts = dict(zip(classes.names, labels.bincount(minlength=len(classes.names)).tolist()))
    share = len(labels) / sum(sample.pixels[0].numel() for sample in training)
    n = len(samples) - len(training) - len(held_out)
    print(f"data      {root}: {len(training)} to train on, {len(held_out)} to score, {n} unclicked")
    clicks = f" (of {n:,} clicks)" if (n := sum(len(s.clicks) for s in training)) else ""
    print(f"labels    {len(labels):,}{clicks}, {share:.3%} of the pixels that the network sees")
    print("          " + ", ".join(f"{name} {n / len(labels):.1%}" for name, n in counts.items()))
    print(f"training  {args.epochs} epochs of {steps} steps on {device} in {precision}")
    for name in (name for name, n in counts.items() if n == 0):
        print(f"note      {name} has no label: it cannot be learnt")
    for color, n in sum(classes.strays.values(), Counter()).most_common(5):
        print(f"note      {n:,} pixels of the masks are {color}, no class: they have no label")


def report(args, model, last: dict, training, held_out, classes) -> None:
    """Print the scores; draw a legend, then rows of image | clicks | prediction | ground truth."""
    for name in [*last][3:] if held_out else ():  # after epoch, loss, seconds
        print(f"  {name:<20} " + ("no such pixel" if last[name] is None else f"{last[name]:.3f}"))
    dense, samples, grey = args.points == "all", held_out or training, [225, 225, 225]
    samples = samples[:: math.ceil(len(samples) / 5)]  # five at most, from all folders
    palette = [v for color in (classes.palette + [grey] * 256)[:256] for v in color]
    legend = [*zip(classes.names, classes.palette), ("no label", grey)]
    font = ImageFont.load_default(17)  # which has no letter beyond ASCII
    for name in ("DejaVuSans.ttf", "msyh.ttc", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc"):
        with suppress(OSError):
            font = ImageFont.truetype(name, 17)
    W, H, n = 372, 340, 4  # of a cell, and how many in a row
    top = 40 + 28 * math.ceil(len(legend) / n)
    canvas = Image.new("RGB", (n * W, top + len(samples) * H), "white")
    pen = ImageDraw.Draw(canvas)
    head = "held-out images, never trained on" if held_out else "training images"
    head += "" if last["miou"] is None else f": mIoU {last['miou']:.2f}"
    pen.text((6, 6), head, "black", font)
    for i, (name, color) in enumerate(legend):
        x, y = 6 + i % n * W, 36 + i // n * 28
        pen.rectangle((x, y, x + 20, y + 20), tuple(color), "black")
        pen.text((x + 27, y), name, "black", font)

    def in_colour(class_map) -> Image.Image:  # (H, W) uint8 array
        image = Image.fromarray(class_map)
        image.putpalette(palette)
        return ImageOps.contain(image, (360, 300), Image.Resampling.NEAREST).convert("RGB")

    for row, sample in enumerate(samples):
        photo = upright(sample.image)
        panels = {sample.name: ImageOps.contain(photo, (360, 300))}
        mask = classes.read_mask(sample.mask, photo.size) if held_out or dense else None
        if not dense:
            clicked = panels[sample.name].copy()
            drawn = sample.clicks or data.list_points(sample.draw(mask, args.points, args.seed))
            for x, y, c in drawn:
                at = [(v + 0.5) * clicked.width / photo.width for v in (x, y)]
                ImageDraw.Draw(clicked).circle(at, 5, tuple(classes.palette[c]), "white")
            panels["clicks (not trained on)" if held_out else "clicks"] = clicked
        panels["prediction"] = in_colour(model.predict(photo))
        if mask is not None:
            panels["ground truth"] = in_colour(mask.numpy())
        for column, (title, panel) in enumerate(panels.items()):
            x, y = column * W + 6, top + row * H
            canvas.paste(ImageOps.pad(panel, (360, 300), color="white"), (x, y))
            pen.text((x, y + 304), title, "black", font)
    with naming(f"--out {args.out}"):
        canvas.save(Path(args.out) / "predictions.png")
    print(f"in {args.out}: metrics.csv, checkpoint.pt, clicks.csv, predictions.png, config.json")


def usable_device(name: str) -> tuple[torch.device, str]:
    """The device, tried out, and the precision that training on it computes in."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with naming(f"--device {name} cannot be used, try --device cpu"):
        device = torch.device(name)
        (torch.ones(1, device=device) + 1).item()
    # bfloat16 where it is fast: on most of CUDA, and on a CPU that has instructions for it.
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = able.get("amx_bf16") or able.get("avx512_bf16")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, "bfloat16" if fast else "float32"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options: those that were typed, then those of the run to resume, then the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(f"error: {message}; see python train.py --help")
    add, now = parser.add_argument, time.strftime("%Y-%m-%d_%H-%M-%S")
    add("--data", metavar="DIR", type=os.path.abspath, help="your images [data, from Kaggle]")
    add("--masks", metavar="DIR", type=os.path.abspath, help="their masks [masks for images]")
    add("--hold-out", metavar="PATTERN", help="score, never train on [the last 2 of every folder]")
    add("--classes", metavar="FILE", help="CSV class,color: what your masks hold [Dubai's five]")
    add("--clicks", metavar="FILE", help="CSV image,x,y,class: these clicks, not simulated ones")
    add("--demo", action="store_true", help="--data docs/demo --weights none: synthetic scenes")
    parser.register("type", "N|all", lambda n: n if n == "all" else int(n))
    add("--points", metavar="N|all", type="N|all", default=100, help="clicks per image [100]")
    add("--resample", action="store_true", help="fresh clicks every epoch")
    add("--epochs", metavar="N", type=int, default=5, help="[5]")
    add("--batch-size", metavar="N", type=int, default=32, help="crops per step [32]")
    add("--size", metavar="N", type=int, default=64, help="side of the crops [64]")
    add("--scale", metavar="X", type=float, default=0.5, help="resize all images by [0.5]")
    add("--lr", metavar="X", type=float, default=2e-3, help="peak of the cycle [0.002]")
    add("--gamma", metavar="X", type=float, default=2.0, help="focusing exponent [2]")
    add("--alpha", metavar="X", type=float, default=0.25, help="weight of the loss [0.25]")
    add("--weights", metavar="imagenet|none|FILE", default="imagenet", help="encoder [imagenet]")
    add("--score-every", metavar="N", type=int, default=1, help="epochs; the last always [1]")
    add("--seed", metavar="N", type=int, default=0, help="of every random draw [0]")
    add("--device", metavar="NAME", default="auto", help="cuda, mps or cpu [the first there is]")
    add("--out", metavar="DIR", default=f"runs/{now}", help="new or empty [runs/<date-time>]")
    add("--resume", metavar="DIR", help="continue the run in DIR with its own options")
    defaults = vars(parser.parse_args([]))
    blank = argparse.Namespace(**dict.fromkeys(defaults))  # what stays None was not typed
    typed = {k: v for k, v in vars(parser.parse_args(argv, blank)).items() if v is not None}
    lowest = {"size": 48, "scale": 0.01, "lr": 1e-9, "gamma": 0, "alpha": 0, "seed": 0}
    for name, value in typed.items():
        if not isinstance(value, str) and not (low := lowest.get(name, 1)) <= value < 2**31:
            parser.error(f"--{name.replace('_', '-')} {value}: must be {low} or more, below 2**31")
    # What each of these sets by itself, and therefore forbids beside it:
    forbids = {"demo": {"data"}, "clicks": {"points", "resample"}}
    forbids["resume"] = defaults.keys() - {"resume", "data", "masks", "device"}
    forbids["points"] = {"resample"} if typed.get("points") == "all" else set()
    for one in typed.keys() & forbids.keys():
        if both := sorted(name.replace("_", "-") for name in typed.keys() & forbids[one]):
            more = "; its learning rate has its cycle: start anew, --weights DIR/checkpoint.pt"
            parser.error(f"--{one} forbids --{', --'.join(both)}{more * (one == 'resume')}")
    if "demo" in typed:
        typed = {"data": str(Path(__file__).parent / "docs/demo"), "weights": "none"} | typed
    if "resume" in typed:
        run = Path(typed["resume"])
        with naming(f"--resume {run}: there is no run in it"):
            config = json.loads((run / "config.json").read_text())
        own = {name: config[name] for name in defaults if name in config and name != "device"}
        own["clicks"] = own["clicks"] and str(run / "clicks.csv")  # as they were at the start
        typed = own | typed | {"out": str(run)}
    return argparse.Namespace(**defaults | typed)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that cannot show a name must not end it
    try:
        with naming("error"):
            main(args := parse_args())
    except ValueError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; if it had begun, continue with: --resume {args.out}")

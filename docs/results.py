"""The README's table and its plot, from the numbers that runs left.

python -m docs.results runs/*  adds the finished ones to docs/results.csv, then does as below
python -m docs.results         reads docs/results.csv, prints the table, draws docs/curve.png

Collect the runs of a GPU on its machine: that is where the GPU's name is read. A row is one run:
its command, its seed, its device, the commit that is checked out when it is added, and the scores
of its last epoch. The same run again replaces its row. Minutes are those of training alone, without
scoring. The plot shows the device that has most of the plain runs.
"""

import csv
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from train import parse_args

DOCS = Path(__file__).resolve().parent
COLORS = {
    "100 clicks": "#EF6C00",
    "dense masks": "#1565C0",
    "20 epochs": "#2E7D32",
}
# Options that change no number, or have a column of their own.
UNTOLD = {"data", "out", "device", "resume", "seed", "demo", "score_every"}
PANEL = (1100, 900)  # of the plot, in pixels
LEFT, RIGHT, TOP, BOTTOM = 130, 40, 120, 150  # its margins


# ---- Reading runs ----


def collect(folder):
    """The row of a run, or None if it is not finished."""
    config = json.loads((folder / "config.json").read_text())
    if not (folder / "metrics.csv").exists():  # not one epoch is
        return None
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    if len(epochs) < config["epochs"]:
        return None
    last = epochs[-1]
    row = {
        "command": command(config),
        "seed": str(config["seed"]),
        "epochs": config["epochs"],
        "points": "" if config["clicks"] else config["points"],
        "loss_first": epochs[0]["loss"],
        "loss_last": last["loss"],
    }
    # The median, since now and then a machine has other work to do.
    seconds = statistics.median(float(epoch["seconds"]) for epoch in epochs)
    row["minutes"] = f"{seconds * len(epochs) / 60:.1f}"
    for name, score in last.items():
        if name in ("miou", "pixel_accuracy") or name.startswith("iou_"):
            row[name] = score
    for name in ("device", "torch", "precision", "threads"):
        row[name] = config[name]
    git = ["git", "rev-parse", "--short=7", "HEAD"]
    row["commit"] = subprocess.check_output(git, cwd=DOCS, text=True).strip()
    if config["device"] == "cuda" and torch.cuda.is_available():  # which one?
        row["device"] = torch.cuda.get_device_name()
    return row


def command(config):
    """What to type for a run with this config.json, without what is in UNTOLD."""
    default = vars(parse_args([]))
    words = ["python", "train.py"]
    given = {"weights"} if config["demo"] else set()  # by --demo itself
    if "network" in config:
        encoder = "imagenet" if config["weights"] == "imagenet" else "random"
        words, given = ["python", "-m docs.pretrained", encoder], {"weights"}
    if "mean" in config:  # an encoder's name follows it, too
        words[1] = "-m docs.plain_mean"
    words.append("--demo" if config["demo"] else "--data DIR")
    for name in default:  # in the order of `python train.py --help`
        value = config[name]
        if name in UNTOLD | given or value == default[name]:
            continue
        if name in ("clicks", "classes", "masks"):
            value = Path(value).name  # so that it is the same for every seed and machine
        text = shlex.quote(str(value)).removesuffix(".0")
        words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)


def read_rows(path):
    """The rows of results.csv by what makes them the same run."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8") as file:
        return {key(row): row for row in csv.DictReader(file)}


def key(row):
    return row["command"], row["seed"], device(row), row["commit"]


def device(row):
    return row.get("device") or "cpu"  # older rows have none


def in_order(text):
    """To sort by: numbers by their size, not by their digits, and before words."""
    parts = []
    for part in re.split(r"(\d+)", text):
        if part:
            parts.append((0, int(part), "") if part.isdigit() else (1, 0, part))
    return parts


# ---- The table ----


def print_table(rows):
    """Mean and spread of the runs of each command, which differ in their seed alone."""
    runs_of = defaultdict(list)  # by command, device and commit
    for row in rows:
        runs_of[row["command"], device(row), row["commit"]].append(row)
    print("| command | held-out mIoU | pixel accuracy | minutes | seeds | device | commit |")
    print("|---|---|---|---|---|---|---|")
    for (words, where, commit), runs in runs_of.items():
        miou, accuracy = spread(runs, "miou"), spread(runs, "pixel_accuracy")
        minutes = statistics.median(float(run["minutes"]) for run in runs)
        seeds = ", ".join(run["seed"] for run in runs)
        scores = f"{miou} | {accuracy} | {minutes:.1f} | {seeds}"
        print(f"| `{words}` | {scores} | {where} | {commit} |")


def spread(runs, name):
    """Mean ± standard deviation (of a sample: n − 1) where there is more than one run."""
    values = [float(run[name]) for run in runs]
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


# ---- The plot ----


def curves(rows):
    """Two panels: series → tick → mIoU of each seed, from the plain runs of the usual device."""
    over_epochs = {"100 clicks": defaultdict(list), "dense masks": defaultdict(list)}
    over_clicks = {"20 epochs": defaultdict(list)}
    plain = []
    for row in rows:
        command = re.sub(r" --(epochs|points) \w+", "", row["command"])
        if command == "python train.py --data DIR --weights none":
            plain.append(row)
    # A run that was repeated must not count twice: in the usual precision it counts, else the
    # last one does.
    usual = statistics.mode(device(row) for row in plain)
    plain = [row for row in plain if device(row) == usual]
    precision = statistics.mode(row["precision"] for row in plain)
    plain.sort(key=lambda row: row["precision"] == precision)  # later rows replace earlier ones
    once = {(row["command"], row["seed"]): row for row in plain}
    for row in once.values():
        miou, points, epochs = float(row["miou"]), row["points"], row["epochs"]
        if points in ("100", "all"):  # the panel on the left
            name = "100 clicks" if points == "100" else "dense masks"
            over_epochs[name][epochs].append(miou)
        if f"{epochs} epochs" in over_clicks:  # and that on the right
            over_clicks[f"{epochs} epochs"][points].append(miou)
    return {"epochs": over_epochs, "clicks per image": over_clicks}


def plot(panels, path):
    """Draw what `curves` returns, all panels on one scale."""
    width, height = PANEL
    canvas = Image.new("RGB", (width * len(panels), height), "white")
    values = []
    for series in panels.values():
        for scores in series.values():
            for seeds in scores.values():
                values += seeds
    if not values:  # no such run yet
        return
    # In steps of 0.05, with room for the name of the highest line.
    low, high = int(min(values) * 20), int(max(values) * 20 + 0.5) + 1
    for column, (title, series) in enumerate(panels.items()):
        panel = Image.new("RGB", PANEL, "white")
        draw_panel(ImageDraw.Draw(panel), title, series, low, high)
        canvas.paste(panel, (column * width, 0))
    canvas.save(path, optimize=True)


def draw_panel(pen, title, series, low, high):
    """A line through the means of each series, and a ring for every seed."""
    width, height = PANEL
    right, bottom = width - RIGHT, height - BOTTOM
    font, large = ImageFont.load_default(36), ImageFont.load_default(40)

    def y_of(miou):
        return bottom - (bottom - TOP) * (miou * 20 - low) / (high - low)

    # What the panel shows, and its axes.
    pen.text((LEFT, 28), "held-out mIoU, random encoder", "black", large)
    pen.text(((LEFT + right) / 2, height - 45), title, "black", large, anchor="mm")
    for step in range(low, high + 1):
        y = y_of(step / 20)
        pen.line((LEFT, y, right, y), "#DDDDDD", 3)
        pen.text((LEFT - 20, y), f"{step / 20:.2f}", "black", font, anchor="rm")

    # The ticks at equal distances, as on a logarithmic scale.
    ticks = set().union(*series.values())
    x_of = {}
    for i, tick in enumerate(sorted(ticks, key=in_order)):
        x_of[tick] = LEFT + (right - LEFT) * (i + 0.5) / len(ticks)
        pen.text((x_of[tick], bottom + 20), tick, "black", font, anchor="mt")

    for name, scores in series.items():
        if not scores:  # no run of it yet
            continue
        means = []
        for tick in sorted(scores, key=in_order):
            means.append((x_of[tick], y_of(statistics.mean(scores[tick]))))
        pen.line(means, COLORS[name], 8)
        for mean in means:
            pen.circle(mean, 14, COLORS[name])
        for tick, seeds in scores.items():
            for miou in seeds:  # over the means, so that none is hidden
                pen.circle((x_of[tick], y_of(miou)), 8, "white", COLORS[name], 4)
        # The name of the higher line stands above it, that of the other one below.
        above = name == list(series)[-1]
        y = means[-1][1] + (-75 if above else 60)
        pen.text((right, y), name, COLORS[name], font, anchor="rm")


def main():
    path = DOCS / "results.csv"
    known = read_rows(path)
    columns = []
    for row in known.values():
        columns += [name for name in row if name not in columns]
    for folder in sys.argv[1:]:
        row = collect(Path(folder))
        if row is None:  # told, since a table without it may look complete
            print(f"not finished: {folder}", file=sys.stderr)
        else:
            known[key(row)] = row  # in the place of the same run, if that was there
            columns += [name for name in row if name not in columns]
    rows = sorted(known.values(), key=lambda row: [in_order(text) for text in key(row)])
    if len(sys.argv) > 1:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        rows = read_rows(path).values()  # every value as text
    print_table(rows)
    plot(curves(rows), DOCS / "curve.png")


if __name__ == "__main__":
    main()

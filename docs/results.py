"""The README's tables and its plot, from the numbers that runs left.

python -m docs.results runs/*  adds the finished ones to docs/results.csv, then does as below
python -m docs.results         reads docs/results.csv, prints the tables, draws docs/clicks.png
"""

import csv
import json
import re
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from train import parse_args

DOCS = Path(__file__).resolve().parent
VARIED = ("points", "gamma", "resample", "learn_unlabeled")  # within a table; seeds are averaged
SCORES = ("miou", "pixel_accuracy", "loss_first", "loss_last", "minutes")
DENSE_WITHOUT_FOCUS = "--points all --gamma 0"
UNTOLD = ("data", "out", "device", "resume", "seed")  # say nothing about the result, or are columns


def collect(folder: Path) -> dict | None:
    """One row of results.csv: the command of a run and the scores of its last epoch."""
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "metrics.csv") as file:
        epochs = list(csv.DictReader(file))
    if len(epochs) < config["epochs"]:
        return None
    default = vars(parse_args(["--demo"] if config["demo"] else []))
    command = ["OMP_NUM_THREADS=1"] if config.get("threads") == 1 else []
    command += ["python train.py"] + ([] if config["demo"] else ["--data DIR"])
    flags = []
    for name, value in config.items():
        if name in default and name not in UNTOLD and (value != default[name] or value is True):
            text = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            (flags if name in VARIED else command).append(text.removesuffix(".0"))
    seconds = statistics.median(float(row["seconds"]) for row in epochs)
    return {
        "command": " ".join(command),
        "flags": " ".join(flags),
        "seed": config["seed"],
        "epochs": len(epochs),
        "points": config["points"],
        "minutes": f"{seconds * len(epochs) / 60:.1f}",  # of a usual epoch, times their number
        "loss_first": epochs[0]["loss"],
        "loss_last": epochs[-1]["loss"],
        **{
            k: v
            for k, v in epochs[-1].items()
            if k == "miou" or k == "pixel_accuracy" or "iou_" in k
        },
        "torch": config["torch"],
        "precision": config["precision"],
    }


def place(row: dict) -> tuple:
    """What a run is known by in results.csv, and sorted by: no flags, then clicks, then others."""
    flags = re.sub(r"\d+", lambda number: number[0].zfill(4), row["flags"])  # 30 before 100
    kind = (flags != "") + ("--points" not in flags)
    return int(row["epochs"]), row["command"], kind, flags, int(row["seed"])


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (of a sample: n − 1) where there is more than one value."""
    text = f"{statistics.mean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def groups(rows: list[dict], name: str) -> dict[str, list[dict]]:
    """The rows that share a value in column `name`, by that value."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def tables(rows: list[dict]) -> None:
    """A table for each command, a row for each set of flags, over its seeds."""
    for command, of_command in groups(rows, "command").items():
        print(f"\n`{command}`\n")
        head = "flags, held-out mIoU, pixel accuracy, loss first → last, minutes, seeds, torch"
        print(f"| {' | '.join(head.split(', '))} |")
        print("|---" * (head.count(", ") + 1) + "|")
        for flags, runs in groups(of_command, "flags").items():
            column = {name: [float(row[name]) for row in runs] for name in SCORES}
            minutes = statistics.median(column["minutes"])
            cells = [
                f"`{flags}`" if flags else "none",
                spread(column["miou"]),
                spread(column["pixel_accuracy"]),
                " → ".join(
                    f"{statistics.mean(column[k]):.4f}" for k in ("loss_first", "loss_last")
                ),
                f"{minutes:.0f}" if minutes > 1 else f"{minutes:.1f}",
                ", ".join(row["seed"] for row in runs),
                ", ".join(sorted({row["torch"].partition("+")[0] for row in runs})),
            ]
            print(f"| {' | '.join(cells)} |")


def plot(series: dict[str, dict[str, list[float]]], path: Path) -> None:
    """mIoU against clicks per image, a line per series; "all" is drawn as its dashed ceiling."""
    width, height, left, right, top, bottom = 1600, 1000, 150, 60, 120, 150
    canvas = Image.new("RGB", (width, height), "white")
    pen, font, large = ImageDraw.Draw(canvas), *map(ImageFont.load_default, (36, 44))
    clicks = sorted({int(n) for scores in series.values() for n in scores if n != "all"})
    values = [v for scores in series.values() for group in scores.values() for v in group]
    low, high = int(min(values) * 20) / 20, int(max(values) * 20 + 1) / 20

    def x(n: int) -> float:  # at equal distances, as 10, 30, 100, 300 are on a logarithmic axis
        return left + (width - left - right) * (clicks.index(n) + 0.5) / len(clicks)

    def y(miou: float) -> float:
        return height - bottom - (height - top - bottom) * (miou - low) / (high - low)

    pen.text((left, 28), "held-out mIoU, trained from a random encoder", "black", large)
    for i in range(round((high - low) / 0.05) + 1):
        pen.line((left, y(low + i / 20), width - right, y(low + i / 20)), "#DDDDDD", 3)
        pen.text((left - 20, y(low + i / 20)), f"{low + i / 20:.2f}", "black", font, anchor="rm")
    for n in clicks:
        pen.text((x(n), height - bottom + 20), str(n), "black", font, anchor="mt")
    middle = (left + width - right) / 2
    pen.text((middle, height - 50), "clicked pixels per image", "black", large, anchor="mm")
    for (name, scores), color in zip(series.items(), ("#EF6C00", "#1565C0")):
        if "all" in scores:
            ceiling = y(statistics.mean(scores["all"]))
            for start in range(left, width - right, 40):
                pen.line((start, ceiling, start + 22, ceiling), color, 6)
            label = f"every labelled pixel, {name}"
            pen.text((left + 10, ceiling - 16), label, color, font, anchor="ls")
        points = [(x(n), scores[str(n)]) for n in clicks if str(n) in scores]
        means = [(at, y(statistics.mean(group))) for at, group in points]
        pen.line([xy for mean in means for xy in mean], color, 8)
        for mean, (at, group) in zip(means, points):
            pen.circle(mean, 18, color)
            for value in group:  # its seeds
                pen.circle((at, y(value)), 8, "white", color, 4)
        label = f"clicks, {name}"
        under = min(means[-1][0], width - right - font.getlength(label) / 2), y(min(group)) + 24
        pen.text(under, label, color, font, anchor="mt")
    canvas.save(path, optimize=True)


if __name__ == "__main__":
    if folders := sys.argv[1:]:
        with open(DOCS / "results.csv") as file:
            reader = csv.DictReader(file)
            known = {place(row): row for row in reader}
        new = [row for folder in folders if (row := collect(Path(folder)))]
        known |= {place(row): row for row in new}  # the same run again replaces its row
        with open(DOCS / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, reader.fieldnames, lineterminator="\n")
            writer.writeheader()
            writer.writerows(known[key] for key in sorted(known))
    with open(DOCS / "results.csv") as file:
        rows = list(csv.DictReader(file))
    tables(rows)
    rows = [r for r in rows if r["flags"] in ("", f"--points {r['points']}", DENSE_WITHOUT_FOCUS)]
    rows = [row for row in rows if not {"--demo", "--size"} & set(row["command"].split())]
    series: dict[str, dict[str, list[float]]] = {}
    for epochs, of_epochs in groups(rows, "epochs").items():
        of_points = groups(of_epochs, "points")
        if not {"10", "30", "100", "300", "all"} <= set(of_points):
            continue  # no curve of it
        of_series = series[f"{epochs} epochs"] = {}
        for points, of_these in of_points.items():
            runs = groups(of_these, "flags").values()
            scores = [[float(row["miou"]) for row in of_flags] for of_flags in runs]
            of_series[points] = max(scores, key=statistics.mean)  # dense: with the better γ
    plot(series, DOCS / "clicks.png")

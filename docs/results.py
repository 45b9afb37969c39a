"""The README's table and its plot, from the numbers that runs left.

python -m docs.results runs/*  adds the finished ones to docs/results.csv, then does as below
python -m docs.results         reads docs/results.csv, prints the table, draws docs/curve.png
"""

import csv
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from train import parse_args

DOCS = Path(__file__).resolve().parent
COLORS = {"100 clicks": "#EF6C00", "dense masks": "#1565C0"}
COLORS |= {"20 epochs": "#43A047", "80 epochs": "#1B5E20"}
UNTOLD = ("data", "out", "device", "resume", "seed", "demo", "score_every")  # or are columns


def collect(folder: Path) -> dict | None:
    """One row of results.csv: the command of a run and the scores of its last epoch."""
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    if len(epochs) < config["epochs"]:
        return None
    default = vars(parse_args([]))
    flags = ["--demo"] if config["demo"] else ["--data DIR"]
    for name in (name for name in default if name not in UNTOLD and name in config):
        value = config[name]
        if value != default[name] and not (config["demo"] and name == "weights"):
            text = f"--{name.replace('_', '-')}"
            text += "" if value is True else " " + shlex.quote(str(value))
            flags.append(text.removesuffix(".0"))
    seconds = statistics.median(float(row["seconds"]) for row in epochs)
    return {
        "command": "python train.py " + " ".join(flags),
        "seed": config["seed"],
        "epochs": len(epochs),
        "points": config["points"],
        "minutes": f"{seconds * len(epochs) / 60:.1f}",  # of a usual epoch, times their number
        "loss_first": epochs[0]["loss"],
        "loss_last": epochs[-1]["loss"],
        **{name: value for name, value in epochs[-1].items() if "iou" in name or "acc" in name},
        **{name: config[name] for name in ("torch", "precision", "threads")},
    }


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (of a sample: n − 1) where there is more than one value."""
    text = f"{statistics.mean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def by_command(rows: list[dict]) -> dict[str, list[dict]]:
    """The runs of each command, which differ in their seed."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["command"], []).append(row)
    return groups


def print_table(rows: list[dict]) -> None:
    print("| command | held-out mIoU | pixel accuracy | minutes | seeds |\n|---|---|---|---|---|")
    for command, runs in by_command(rows).items():
        scores = [spread([float(run[name]) for run in runs]) for name in ("miou", "pixel_accuracy")]
        minutes = statistics.median(float(run["minutes"]) for run in runs)
        seeds = ", ".join(run["seed"] for run in runs)
        print(f"| `{command}` | {' | '.join(scores)} | {minutes:.0f} | {seeds} |")


def plot(panels: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """panels[axis][series][tick] = mIoU of each seed. A line through the means, a ring per seed."""
    width, height, left, right, top, bottom = 1100, 900, 130, 40, 120, 150  # of a panel
    canvas = Image.new("RGB", (width * len(panels), height), "white")
    pen, font, large = ImageDraw.Draw(canvas), *map(ImageFont.load_default, (36, 40))
    lines = [scores for series in panels.values() for scores in series.values()]
    values = [value for scores in lines for group in scores.values() for value in group]
    low, high = int(min(values) * 20) / 20, int(max(values) * 20 + 1) / 20

    def y(miou: float) -> float:
        return height - bottom - (height - top - bottom) * (miou - low) / (high - low)

    for column, (title, series) in enumerate(panels.items()):
        x0, x1 = column * width + left, (column + 1) * width - right
        ticks = sorted({n for scores in series.values() for n in scores}, key=order)
        step = (x1 - x0) / len(ticks)  # at equal distances, as on a logarithmic scale
        x = {n: x0 + step * (i + 0.5) for i, n in enumerate(ticks)}
        pen.text((x0, 28), "held-out mIoU, random encoder", "black", large)
        pen.text(((x0 + x1) / 2, height - 45), title, "black", large, anchor="mm")
        for i in range(round((high - low) / 0.05) + 1):
            pen.line((x0, y(low + i / 20), x1, y(low + i / 20)), "#DDDDDD", 3)
            pen.text((x0 - 20, y(low + i / 20)), f"{low + i / 20:.2f}", "black", font, anchor="rm")
        for n in ticks:
            pen.text((x[n], height - bottom + 20), n, "black", font, anchor="mt")
        for name, scores in series.items():
            color = COLORS[name]
            means = [(x[n], y(statistics.mean(scores[n]))) for n in ticks if n in scores]
            pen.line([xy for mean in means for xy in mean], color, 8)
            for mean in means:
                pen.circle(mean, 14, color)
            for n, group in scores.items():
                for value in group:  # its seeds
                    pen.circle((x[n], y(value)), 8, "white", color, 4)
            above = name == list(series)[-1]  # the higher of two lines
            pen.text((x1, means[-1][1] + (-60 if above else 60)), name, color, font, anchor="rm")
    canvas.save(path, optimize=True)


def order(key) -> list:
    """To sort by: numbers by their size, not by their digits, and before words."""
    parts = re.split(r"(\d+)", str(key))
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


if __name__ == "__main__":
    with open(DOCS / "results.csv", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        known = {(row["command"], row["seed"]): row for row in reader}
    for folder in sys.argv[1:]:
        if row := collect(Path(folder)):
            known[row["command"], str(row["seed"])] = row  # the same run again replaces its row
    with open(DOCS / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, reader.fieldnames, lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[key] for key in sorted(known, key=order))
    with open(DOCS / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print_table(rows)
    over_epochs: dict[str, dict[str, list[float]]] = {"100 clicks": {}, "dense masks": {}}
    over_clicks: dict[str, dict[str, list[float]]] = {"20 epochs": {}, "80 epochs": {}}
    for row in rows:
        plain = re.sub(r" --(epochs|points) \w+", "", row["command"])
        if plain == "python train.py --data DIR --weights none":
            name = {"100": "100 clicks", "all": "dense masks"}.get(row["points"])
            if name:
                over_epochs[name].setdefault(row["epochs"], []).append(float(row["miou"]))
            epochs = f"{row['epochs']} epochs"
            if epochs in over_clicks:
                over_clicks[epochs].setdefault(row["points"], []).append(float(row["miou"]))
    plot({"epochs": over_epochs, "clicks per image": over_clicks}, DOCS / "curve.png")

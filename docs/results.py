"""The README's tables and its plot, from the numbers that runs left.

python docs/results.py runs/*     write the finished runs into docs/results.csv, then as below
python docs/results.py            from docs/results.csv: print the tables, draw docs/clicks.png
"""

import csv
import json
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
from train import parse_args  # noqa: E402 (after the line that makes it importable)


def collect(folder: Path) -> dict | None:
    """One row of results.csv: the command of a run and the scores of its last epoch."""
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "metrics.csv") as file:
        epochs = list(csv.DictReader(file))
    if len(epochs) < config["epochs"]:
        return None
    command = ["OMP_NUM_THREADS=1"] if config["threads"] == 1 else []
    command += ["python train.py"] + ["--demo"] * config["demo"]
    command += [] if config["demo"] else ["--data DIR"]
    for name, default in vars(parse_args(["--demo"] if config["demo"] else [])).items():
        value = config[name]
        if name not in ("data", "demo", "out", "seed", "device") and value != default:
            flag = f"--{name.replace('_', '-')}"
            command.append(flag if value is True else f"{flag} {value:g}".rstrip() if
                           isinstance(value, float) else f"{flag} {value}")  # fmt: skip
    last = epochs[-1]
    return {
        "command": " ".join(command),
        **{name: config[name] for name in ("seed", "points", "gamma", "epochs", "threads")},
        "minutes": f"{sum(float(row['seconds']) for row in epochs) / 60:.1f}",
        "loss_first": epochs[0]["loss"],
        "loss_last": last["loss"],
        **{k: v for k, v in last.items() if k not in ("epoch", "loss", "seconds")},
        "torch": config["torch"],
    }


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (of a sample: n − 1) where there is more than one value."""
    text = f"{statistics.mean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(rows: list[dict]) -> None:
    runs: dict[str, list[dict]] = {}
    for row in rows:
        runs.setdefault(row["command"], []).append(row)
    print(
        "| command | held-out mIoU | pixel accuracy | loss, first → last epoch | minutes | seeds |"
    )
    print("|---|---|---|---|---|---|")
    for command, group in runs.items():
        column = {name: [float(row[name]) for row in group] for name in
                  ("miou", "pixel_accuracy", "loss_first", "loss_last", "minutes")}  # fmt: skip
        mean = {name: statistics.mean(values) for name, values in column.items()}
        print(f"| `{command}` | {spread(column['miou'])} | {spread(column['pixel_accuracy'])} | "
              f"{mean['loss_first']:.4f} → {mean['loss_last']:.4f} | {mean['minutes']:.1f} | "
              f"{', '.join(row['seed'] for row in group)} |")  # fmt: skip


def plot(series: dict[str, dict[str, list[float]]], path: Path) -> None:
    """mIoU against clicks per image, a line per series; "all" is drawn as its dashed ceiling."""
    width, height, left, right, top, bottom = 1600, 1000, 150, 60, 120, 150
    canvas = Image.new("RGB", (width, height), "white")
    pen, font, large = ImageDraw.Draw(canvas), *map(ImageFont.load_default, (36, 44))
    clicks = sorted({int(n) for scores in series.values() for n in scores if n != "all"})
    values = [v for scores in series.values() for group in scores.values() for v in group]
    low, high = int(min(values) * 20) / 20, int(max(values) * 20 + 1) / 20

    def x(n) -> float:  # the numbers of clicks at equal distances: 10, 30, 100, 300
        return left + (width - left - right) * (clicks.index(int(n)) + 0.5) / len(clicks)

    def y(miou: float) -> float:
        return height - bottom - (height - top - bottom) * (miou - low) / (high - low)

    pen.text((left, 28), "held-out mIoU after training from a random encoder", "black", large)
    for i in range(round((high - low) / 0.05) + 1):
        miou = low + i * 0.05
        pen.line((left, y(miou), width - right, y(miou)), "#DDDDDD", 3)
        pen.text((left - 20, y(miou)), f"{miou:.2f}", "black", font, anchor="rm")
    for n in clicks:
        pen.text((x(n), height - bottom + 20), str(n), "black", font, anchor="mt")
    middle = (left + width - right) / 2
    pen.text((middle, height - 55), "clicked pixels per image", "black", large, anchor="mm")
    for (name, scores), color in zip(series.items(), ("#1565C0", "#EF6C00")):
        if "all" in scores:
            ceiling = y(statistics.mean(scores["all"]))
            for start in range(left, width - right, 40):
                pen.line((start, ceiling, start + 22, ceiling), color, 6)
            label = f"every labelled pixel, {name}"
            pen.text((left + 10, ceiling - 10), label, color, font, anchor="ls")
        points = [(x(n), scores[str(n)]) for n in clicks if str(n) in scores]
        means = [(at, y(statistics.mean(group))) for at, group in points]
        pen.line([xy for mean in means for xy in mean], color, 8)
        for (at, mean), (_, group) in zip(means, points):
            pen.circle((at, mean), 18, color)
            for value in group:
                pen.circle((at, y(value)), 8, "white", color, 4)
        pen.text((means[-1][0] + 10, means[-1][1] + 30), name, color, font, anchor="mt")
    canvas.save(path, optimize=True)


if __name__ == "__main__":
    if folders := sys.argv[1:]:
        rows = [row for folder in folders if (row := collect(Path(folder)))]
        with open(DOCS / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with open(DOCS / "results.csv") as file:
        rows = list(csv.DictReader(file))
    table(rows)
    series: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        plain = row["gamma"] == "2.0" and not {"--demo", "--resample", "--learn-unlabeled"} & set(
            row["command"].split()
        )
        if plain:
            scores = series.setdefault(f"{row['epochs']} epochs", {})
            scores.setdefault(row["points"], []).append(float(row["miou"]))
    plot(series, DOCS / "clicks.png")

"""Accuracy by minutes, everything counted but the installation.

    python benchmarks/frontier.py 12 24 40       execute the notebook with so many epochs
    python benchmarks/frontier.py                draw assets/frontier.png

Each run is a line of assets/frontier.csv. benchmarks/original.py adds the lines of the original project.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from safetensors import safe_open

from tables import ROOT, by_minutes  # isort: skip - it makes the next ones possible
from checkpoint import save_figure
from held_out import append
from original import describe_machine

TABLE = ROOT / "assets" / "frontier.csv"
TICKS = [5, 10, 20, 30, 60, 105]  # minutes
LINES = {  # of each recipe: label, colour and mark
    "ours": ("this repository", "#0072B2", "o"),
    "the original's, autocast and channels-last": (
        "the original recipe, with autocast and channels-last", "#D55E00", "s",
    ),
    "the original's": ("the original recipe, as it was, in float32", "#777777", "^"),
}  # fmt: skip
LEVELS = {"ResNet-20's paper": (91.25, "#009E73", "--"), "the original project": (86.15, "#CC79A7", "-.")}


def measure(epochs: int, seed: int) -> dict:
    """Execute the notebook with so many epochs; returns the line for the table."""
    options = [f"EPOCHS={epochs}", f"SEED={seed}", "RESUME=false", "DATA=full"]
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "run_notebook.py", *options], check=True)
    minutes = (time.perf_counter() - start) / 60
    with safe_open(ROOT / f"runs/{epochs}-epochs-seed-{seed}/net.safetensors", "pt") as file:
        metadata = file.metadata()
    teacher = metadata["teacher"].split()[0]
    return {
        "recipe": "ours",
        "minutes": f"{minutes:.2f}",
        "seed": seed,
        "test_accuracy": metadata["test_accuracy"],
        "epochs": epochs,
        "teacher_epochs": 0 if teacher == "none" else teacher,
        "machine": describe_machine(autocast=True),
        "command": f"make notebook {' '.join(options)}",
        "commit": metadata["commit"],
    }


def plot(picture: Path) -> None:
    """Draw the table's runs on two Intel cores, and two levels to compare with."""
    figure = Figure((9, 5), dpi=150, layout="constrained")
    figure.suptitle("Accuracy by minutes on two CPU cores (Intel Xeon, AMX)", fontsize=13)
    axes = figure.subplots()
    for recipe in LINES:
        plot_runs(axes, recipe)
    for name, (level, color, dashes) in LEVELS.items():
        axes.axhline(level, color=color, ls=dashes, lw=1.5, label=f"{name}: {level:.2f} %")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("minutes, everything counted but the installation")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    save_figure(figure, picture)


def plot_runs(axes: Axes, recipe: str) -> None:
    """A mark for each run; ours say how many epochs they had."""
    label, color, mark = LINES[recipe]
    runs = by_minutes(recipe)
    times, scores = ([float(run[name]) for run in runs] for name in ("minutes", "test_accuracy"))
    axes.plot(times, scores, color=color, marker=mark, lw=1.5, label=label)
    for run, *place in zip(runs, times, scores):
        if recipe == "ours":
            offset = {"xytext": (0, 8), "textcoords": "offset points"}
            axes.annotate(f"{run['epochs']} epochs", place, **offset, ha="center", fontsize=8.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("epochs", nargs="*", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for epochs in arguments.epochs:
        append(measure(epochs, arguments.seed), TABLE)
    if not arguments.epochs:
        plot(TABLE.with_suffix(".png"))


if __name__ == "__main__":
    main()

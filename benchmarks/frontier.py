"""Accuracy by minutes, everything counted but the installation.

    python benchmarks/frontier.py EPOCHS=24      execute the notebook so
    python benchmarks/frontier.py                draw assets/frontier.png

Each run is a line of assets/frontier.csv. benchmarks/original.py adds the lines of the original project.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from safetensors import safe_open

from tables import ROOT, best_by_minutes, by_minutes  # isort: skip - it makes the next ones possible
from checkpoint import save_figure
from held_out import append
from original import describe_machine
from parameters import run_folder
from run_notebook import parse, values_of

TABLE = ROOT / "assets" / "frontier.csv"
ALWAYS = ["RESUME=false", "DATA=full"]
TICKS = [5, 10, 20, 30, 60, 120]  # minutes
SCORES = [20, 40, 60, 70, 80, 85, 88, 90, 91, 92]  # per cent
LINES = {  # of each recipe: label, colour and mark
    "ours": ("this repository, with the epochs", "#0072B2", "o"),
    "the original's, autocast and channels-last": (
        "the original recipe, with autocast and channels-last", "#D55E00", "s",
    ),
    "the original's": ("the original recipe, as it was, in float32", "#777777", "^"),
}  # fmt: skip
LEVELS = {"ResNet-20's paper": (91.25, "#009E73", "--"), "the original project": (86.15, "#CC79A7", "-.")}


def measure(parameters: list[str]) -> dict:
    """Execute the notebook with these parameters; returns the line for the table."""
    options = [*parameters, *ALWAYS]
    os.chdir(ROOT)
    values = values_of(nbformat.read("S8.ipynb", as_version=4)) | parse(options)
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "run_notebook.py", *options], check=True)
    minutes = (time.perf_counter() - start) / 60
    with safe_open(run_folder(values, is_sample=False) / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    return {
        "recipe": "ours",
        "minutes": f"{minutes:.2f}",
        **{name: metadata[name] for name in ("seed", "test_accuracy", "epochs")},
        "teacher_epochs": metadata["teacher"].split()[0].replace("none", "0"),
        "machine": describe_machine(autocast=True),
        "command": f"make notebook {' '.join(options)}",
        "commit": metadata["commit"],
    }


def plot(picture: Path) -> None:
    """Draw the table's runs on two Intel cores, and two levels to compare with."""
    figure = Figure((9, 5), dpi=150, layout="constrained")
    figure.suptitle("Accuracy by minutes on two CPU cores (Intel Xeon, AMX)", fontsize=13)
    axes = figure.subplots()
    for recipe in filter(by_minutes, LINES):
        plot_runs(axes, recipe)
    for name, (level, color, dashes) in LEVELS.items():
        axes.axhline(level, color=color, ls=dashes, lw=1.5, label=f"{name}: {level:.2f} %")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("minutes, everything counted but the installation")
    # Spaced by the logarithm of the error: near 90 % a point is harder won than near 50 %.
    axes.set_yscale("function", functions=(lambda score: -np.log(100 - score), lambda x: 100 - np.exp(-x)))
    axes.set_ylim(15, 93)
    axes.yaxis.set_major_locator(FixedLocator(SCORES))
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    save_figure(figure, picture)


def plot_runs(axes: Axes, recipe: str) -> None:
    """A mark for each run, and a line through those that no shorter one beats.

    Our marks say how many epochs they had, and whether a teacher.
    """
    label, color, mark = LINES[recipe]
    runs, best = by_minutes(recipe), best_by_minutes(recipe)
    axes.plot(*places(runs), color=color, marker=mark, ls="", label=label)
    axes.plot(*places(best), color=color, ls=":", lw=1.5)
    for run, place in zip(runs, places(runs).T):
        if recipe == "ours":
            text = run["epochs"] + " + teacher" * (run["teacher_epochs"] != "0")
            offset, side = ((0, 6), "bottom") if run in best else ((0, -6), "top")
            style = {"textcoords": "offset points", "ha": "center", "va": side, "fontsize": 8.5}
            axes.annotate(text, place, offset, bbox={"fc": "white", "ec": "none", "pad": 0.5}, **style)


def places(runs: list[dict[str, str]]) -> np.ndarray:
    """The runs' minutes and test accuracies: float64 (2, runs)."""
    return np.array([[float(run[name]) for run in runs] for name in ("minutes", "test_accuracy")])


if __name__ == "__main__":
    if sys.argv[1:]:
        append(measure(sys.argv[1:]), TABLE)
    else:
        plot(TABLE.with_suffix(".png"))

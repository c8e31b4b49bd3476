"""Images held out from training, and what changes of the recipe did to them (assets/ablations.csv).

    python benchmarks/held_out.py        draw assets/ablations.png

benchmarks/arms.py adds its runs to the table. Older lines name the commit that has their code.
"""

import csv
import functools
import itertools
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import numpy as np
from matplotlib.figure import Figure

from checkpoint import save_figure
from cifar10 import find_cifar10
from dataset import AlbumentationsCIFAR10, AlbumentationsImages
from parameters import describe_commit

COMMIT = describe_commit()  # before the runs: what is edited meanwhile is not part of them
TABLE = ROOT / "assets" / "ablations.csv"


# ---------------------------------------------------------------- the images


def images_at(start: int, end: int | None, transform: A.Compose, seed: int = 0) -> AlbumentationsImages:
    """The training images at these places of a fixed random order, whose first are held out."""
    images = training_images()
    indices = np.random.default_rng(0).permutation(len(images))[start:end]
    targets = [images.targets[i] for i in indices]
    return AlbumentationsImages(images.data[indices], targets, images.classes, transform, seed)


@functools.cache
def training_images() -> AlbumentationsCIFAR10:
    return AlbumentationsCIFAR10(find_cifar10(os.environ.get("CIFAR10_ROOT") or ROOT / "data", "full"))


# ---------------------------------------------------------------- the table


def append(row: dict, table: Path) -> None:
    """Add a line to a table, which may have more columns."""
    with open(table, "a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        writer = csv.DictWriter(file, columns or row)
        if columns is None:
            writer.writeheader()
        writer.writerow(row)


Rows = list[dict[str, str]]
Table = tuple[list[str], list[list[str]]]


def runs(rows: Rows, change: str, epochs: int) -> Rows:
    return [row for row in rows if row["change"] == change and row["epochs"] == str(epochs)]


# ---------------------------------------------------------------- 5,000 held-out images

JUDGES = 5000  # images


def findings(rows: Rows) -> Table:
    """The mean accuracy of each change, and its difference to a baseline."""
    table = []
    for label, change, epochs, baseline in (
        (
            "an earlier recipe with a teacher, beside one without",
            "teacher S, 20 views, no cutout, no label, plain statistics",
            100,
            "notebook",
        ),
        ("labels in place of the teacher", "labels", 16, "taught"),
        ("SGD in place of Muon", "taught, SGD", 16, "taught"),
        ("AdamW in place of Muon", "taught, AdamW, rate 3e-3, decay 0.05", 16, "taught"),
        ("twice the learning rates", "taught, twice the peak rates", 16, "taught"),
        ("no moving average", "taught, no average", 16, "taught"),
        ("no flip", "taught, no flip", 16, "taught"),
        ("dropout of 0.03", "taught, dropout 0.03", 16, "taught"),
    ):
        values, base = (
            [float(row["accuracy"]) for row in runs(rows, name, epochs)] for name in (change, baseline)
        )
        # All runs are judged by the same images, so more runs do not make this error smaller.
        shares = [statistics.mean(part) / 100 for part in (values, base)]
        error = 100 * sum(share * (1 - share) / JUDGES for share in shares) ** 0.5
        difference = f"{statistics.mean(values) - statistics.mean(base):+.2f} ± {error:.2f}"
        reached, counts = f"{statistics.mean(values):.2f} %", f"{len(values)} and {len(base)}"
        table.append([label, str(epochs), reached, difference, counts])
    return ["change", "epochs", "held out", "difference (points)", "runs"], table


def plot(table: Path, picture: Path) -> None:
    """Draw what each change of "taught" gains or costs in 16 epochs: a dot for each run.

    Raises:
        KeyError: the recipe, "taught", has no run with one of the seeds.
    """
    with open(table, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["epochs"] == "16"]
    rows = [row for row in rows if row["change"].startswith(("taught", "labels"))]
    recipe = {row["seed"]: float(row["accuracy"]) for row in rows if row["change"] == "taught"}
    gains = {}  # of each change: its seeds and gains
    for row in rows:
        if row["change"] != "taught":
            gain = float(row["accuracy"]) - recipe[row["seed"]]
            gains.setdefault(row["change"], {})[row["seed"]] = gain
    order = sorted(gains, key=lambda change: statistics.mean(gains[change].values()))
    mean = statistics.mean(recipe.values())
    errors = 2 * (2 * mean * (100 - mean) / JUDGES) ** 0.5

    figure = Figure((9, 1.2 + 0.24 * len(order)), dpi=150, layout="constrained")
    title = "One change of an earlier recipe, 16 epochs, the teacher's 8; 5,000 held-out images judge"
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    axes.axvspan(-errors, errors, color="#EEEEEE", label="within two standard errors of a difference")
    axes.axvline(0, color="#777777", ls="--", lw=1.5, label=f"the recipe: {mean:.2f} %")
    seeds = sorted({seed for gain in gains.values() for seed in gain})
    colors, marks = itertools.cycle(("#0072B2", "#D55E00", "#009E73")), itertools.cycle("os^D")
    for seed, color, mark in zip(seeds, colors, marks):
        places = [place for place, change in enumerate(order) if seed in gains[change]]
        dots = [gains[order[place]][seed] for place in places]
        axes.scatter(dots, places, s=25, color=color, marker=mark, zorder=3, label=f"random seed {seed}")
    axes.set_yticks(range(len(order)), [change.removeprefix("taught, ") for change in order])
    axes.set_xlabel("held-out accuracy less the recipe's with the same seed (points)", fontsize=9.5)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, loc="upper left")
    save_figure(figure, picture)


# ---------------------------------------------------------------- 10,000 held-out images

PREFIX, MEAN = "40,000 images, teacher ", "the mean over the picture and its mirror image"
BRANCH = "from epoch 32 of nothing_2_40, order 0"
EXPERIMENTS = [  # label, change, epochs, what it is beside
    ("the teacher itself, mean over both mirror images", f"labels 0 itself, {MEAN}", 20, "labels 0 itself"),
    (
        "… and small images first",
        f"labels 0 itself, growing from 16 pixels, {MEAN}",
        20,
        f"labels 0 itself, {MEAN}",
    ),
    ("the teacher itself, squared loss", "squared 0 itself", 20, "labels 0 itself"),
    ("answers: mean over both mirror images", "labels 0: mirrored", 20, "labels 0: nothing"),
    (
        "… and over two teachers, one with a squared loss",
        "labels 0 and squared 0: mirrored",
        20,
        "labels 0: mirrored",
    ),
    ("… and standardized logits", "labels 0: mirrored, standardized", 20, "labels 0: mirrored"),
    ("answers of two like teachers", "0 and 1: nothing", 20, "0: nothing"),
    (
        "… and classes that they do not rank first count twice",
        "0 and 1: decoupled",
        20,
        "0 and 1: nothing",
    ),
    ("classes that the teacher does not rank first count twice", "0: decoupled", 20, "0: nothing"),
    ("half of an answer is the mean over all views", "0: smoothed", 20, "0: nothing"),
    ("two more classifiers while it learns", "0: heads", 20, "0: nothing"),
    ("8 views in place of 16, also mirrored", "0: half", 20, "0: nothing"),
    ("CutMix, and 0.6 of the peak rates", "0: cutmix, rates", 40, "0: nothing"),
    (
        "two orders of the last fifth, averaged",
        "0: the mean of net_nothing_2_40_0 and net_nothing_2_40_1",
        40,
        "0: nothing",
    ),
    (
        "sharpness-aware steps in the last fifth, radius 0.04",
        f"0: sharpness 0.04; {BRANCH}",
        40,
        "0: nothing",
    ),
    (
        "sharpness-aware steps in the last fifth, radius 0.01",
        f"0: sharpness 0.01; {BRANCH}",
        40,
        "0: nothing",
    ),
]


def experiments(rows: Rows) -> Table:
    """The mean accuracy and scaled loss of each change, and the differences to its baseline."""
    table = []
    for label, change, epochs, baseline in EXPERIMENTS:
        changed, base = (runs(rows, PREFIX + name, epochs) for name in (change, baseline))
        cells = [label, str(epochs)]
        for column, unit, digits in (("accuracy", " %", 2), ("scaled_loss", "", 4)):
            value, before = (statistics.mean(float(row[column]) for row in part) for part in (changed, base))
            cells += [f"{value:.{digits}f}{unit}", f"{value - before:+.{digits}f}"]
        table.append([*cells, f"{len(changed)} and {len(base)}"])
    header = ["change", "epochs", "held out", "difference (points)", "scaled loss", "difference", "runs"]
    return header, table


if __name__ == "__main__":
    plot(TABLE, TABLE.with_suffix(".png"))

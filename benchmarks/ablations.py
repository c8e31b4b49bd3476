"""What one change of the recipe does to the accuracy on 5,000 held-out training images.

    python benchmarks/ablations.py "taught, cosine" "taught, dropout 0.03" --seeds 0 1 --epochs 16
    python benchmarks/ablations.py plot

The network learns the other 45,000 training images, and no test image is used. Each run adds a line to
assets/ablations.csv. A change that helps becomes the notebook's default; the others stay lines of that file.
`plot` draws assets/ablations.png from the lines of 16 epochs.
"""

import argparse
import csv
import functools
import itertools
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from batches import BatchLoader, TaughtLoader
from checkpoint import save_figure
from cifar10 import find_cifar10
from dataset import AlbumentationsCIFAR10, AlbumentationsImages, test_transform, train_transform
from hardware import accelerator_name, best_device, precision
from model import Net, Teacher, whitening
from muon import WARM_UP, one_cycle, parameter_groups, plan
from parameters import describe_commit
from training_utils import fit, soft_targets
from utils import set_seed

DEVICE = best_device()
COMMIT = describe_commit()  # before the runs: what is edited meanwhile is not part of them
HELD_OUT = 5000  # images, the same ones in all runs


# ---------------------------------------------------------------- the recipe and its changes


def pad_2_pixels(transforms: list) -> list:
    return [A.PadIfNeeded(36, 36, border_mode=cv2.BORDER_REFLECT_101), *transforms[1:]]


def no_flip(transforms: list) -> list:
    return [transform for transform in transforms if not isinstance(transform, A.HorizontalFlip)]


def cosine_plan(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """`plan` with half a cosine after the warm-up, in place of a line."""
    optimizer, _ = plan(network, steps)

    def share_of_peak(step: int) -> float:
        share = one_cycle(step / steps)
        return share if step < WARM_UP * steps else 0.5 - 0.5 * math.cos(math.pi * share)

    return optimizer, LambdaLR(optimizer, share_of_peak)


def norm_decay_plan(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """`plan` with the same weight decay on the batch norms."""
    optimizer, scheduler = plan(network, steps)
    _, filters, norms = optimizer.param_groups
    norms["weight_decay"] = filters["weight_decay"]
    return optimizer, scheduler


def sgd_plan(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    groups = decayed_groups(network, 5e-4)
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9, nesterov=True, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: one_cycle(step / steps))


def adamw_plan(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    groups = decayed_groups(network, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True, capturable=DEVICE.type == "cuda")
    return optimizer, LambdaLR(optimizer, lambda step: one_cycle(step / steps))


def decayed_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """All filters, with weight decay, and the batch norms, without."""
    banks, filters, norms = parameter_groups(network)
    return [{"params": banks + filters, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


# The notebook's recipe.
RECIPE = {
    "teacher_epochs": 20,  # at most half of the run's; 0: learn the labels
    "augmentation": list,  # the transforms of `train_transform` to those that are used
    "batch": 256,
    "plan": plan,
    "average": 0.995,
    "dropout": 0.0,
}
TEMPERATURE, VIEWS = 2.0, 20

# What each row does differently.
CHANGES = {
    "taught": {},
    "labels": {"teacher_epochs": 0},
    "taught, padding of 2 pixels": {"augmentation": pad_2_pixels},
    "taught, no flip": {"augmentation": no_flip},
    "taught, cosine": {"plan": cosine_plan},
    "taught, batch 128": {
        "batch": 128,
        "plan": functools.partial(plan, learning_rate=0.01, sgd_learning_rate=0.14),
        "average": 0.9975,
    },
    "taught, weight decay 1e-3": {"plan": functools.partial(plan, weight_decay=1e-3)},
    "taught, no weight decay": {"plan": functools.partial(plan, weight_decay=0.0)},
    "taught, norms decayed as well": {"plan": norm_decay_plan},
    "taught, twice the peak rates": {
        "plan": functools.partial(plan, learning_rate=0.03, sgd_learning_rate=0.4)
    },
    "taught, no average": {"average": 0.0},
    "taught, average 0.998": {"average": 0.998},
    "taught, dropout 0.03": {"dropout": 0.03},
    "taught, SGD": {"plan": sgd_plan},
    "taught, AdamW, rate 3e-3, decay 0.05": {"plan": adamw_plan},
}


# ---------------------------------------------------------------- one run


def train_with(change: dict, seed: int, epochs: int) -> dict[str, float]:
    """Train a `Net` with the change. Returns its last row of history; "test" there means held-out images."""
    recipe = RECIPE | change
    teacher_epochs = min(recipe["teacher_epochs"], epochs // 2)
    arguments = recipe["augmentation"], recipe["batch"], seed
    loader = taught_loader(teacher_epochs, *arguments) if teacher_epochs else batch_loader(*arguments)
    plain = BatchLoader(images_at(HELD_OUT, 2 * HELD_OUT, test_transform()), 1000, False, DEVICE)
    set_seed(seed)
    net = Net(dropout=recipe["dropout"]).to(DEVICE)
    return learn(net, recipe, loader, epochs, plain)[-1]


def learn(
    network: nn.Module,
    recipe: dict,
    loader: BatchLoader | TaughtLoader,
    epochs: int,
    plain: BatchLoader | None,
) -> list[dict[str, float]]:
    """Train the network in place; returns the history."""
    held_out = BatchLoader(images_at(0, HELD_OUT, test_transform()), 1000, False, DEVICE)
    return fit(
        network,
        loader,
        held_out,
        *recipe["plan"](network, epochs * len(loader)),
        epochs=epochs,
        ema_decay=recipe["average"],
        statistics=plain,
        compile=epochs >= 16,
    )


@functools.cache  # the teacher's answers stay in it, for other changes with the same pictures
def taught_loader(teacher_epochs: int, augmentation: Callable, batch: int, seed: int) -> TaughtLoader:
    answer = functools.partial(soft_targets, teacher_after(teacher_epochs), temperature=TEMPERATURE)
    return TaughtLoader(batch_loader(augmentation, batch, seed), answer, VIEWS)


@functools.cache  # one for all changes and seeds
def teacher_after(epochs: int) -> nn.Module:
    """A teacher that has learnt with RECIPE."""
    set_seed(0)
    loader = batch_loader(RECIPE["augmentation"], RECIPE["batch"], seed=0)
    teacher = Teacher(whitening(next(iter(loader))[0])).to(DEVICE)
    learn(teacher, RECIPE, loader, epochs, plain=None)
    return teacher


def batch_loader(augmentation: Callable, batch: int, seed: int) -> BatchLoader:
    transform = A.Compose(augmentation(list(train_transform())))
    return BatchLoader(images_at(HELD_OUT, None, transform, seed), batch, True, DEVICE)


def images_at(start: int, end: int | None, transform: A.Compose, seed: int = 0) -> AlbumentationsImages:
    """The training images at these places of a fixed random order. The first 5,000 are held out."""
    images = training_images()
    indices = np.random.default_rng(0).permutation(len(images))[start:end]
    targets = [images.targets[i] for i in indices]
    return AlbumentationsImages(images.data[indices], targets, images.classes, transform, seed)


@functools.cache
def training_images() -> AlbumentationsCIFAR10:
    return AlbumentationsCIFAR10(find_cifar10(os.environ.get("CIFAR10_ROOT") or ROOT / "data", "full"))


# ---------------------------------------------------------------- the picture


def plot(table: Path, picture: Path) -> None:
    """Draw what each change gains or costs in 16 epochs: a dot for each run.

    Raises:
        KeyError: the recipe, "taught", has no run with one of the seeds.
    """
    with open(table, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["change"] in CHANGES and row["epochs"] == "16"]
    recipe = {row["seed"]: float(row["accuracy"]) for row in rows if row["change"] == "taught"}
    gains = {}  # of each change: its seeds and gains
    for row in rows:
        if row["change"] != "taught":
            gain = float(row["accuracy"]) - recipe[row["seed"]]
            gains.setdefault(row["change"], {})[row["seed"]] = gain
    order = sorted(gains, key=lambda change: statistics.mean(gains[change].values()))
    mean = statistics.mean(recipe.values())
    errors = 2 * (2 * mean * (100 - mean) / HELD_OUT) ** 0.5

    figure = Figure((9, 1.2 + 0.24 * len(order)), dpi=150, layout="constrained")
    title = "One change of the recipe, 16 epochs, the teacher's 8; 5,000 images held out from training judge"
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


# ---------------------------------------------------------------- all of it


def record(change: str, seed: int, epochs: int) -> dict:
    """Train with one of CHANGES; returns the line for the table."""
    start = time.perf_counter()
    last = train_with(CHANGES[change], seed, epochs)
    seconds = time.perf_counter() - start
    processor = f"CPU, {torch.get_num_threads()} threads"
    if DEVICE.type != "cpu":
        processor = accelerator_name(DEVICE)
    options = f"{shlex.quote(change)} --seeds {seed} --epochs {epochs}"
    return {
        "change": change,
        "epochs": epochs,
        "seed": seed,
        "held_out": HELD_OUT,
        "accuracy": f"{last['test_accuracy']:.2f}",
        "loss": f"{last['test_loss']:.4f}",
        "train_accuracy": f"{last['train_accuracy']:.2f}",
        "train_loss": f"{last['train_loss']:.4f}",
        "seconds": round(seconds),
        "machine": f"{processor}, {str(precision(DEVICE)).removeprefix('torch.')}",
        "torch": torch.__version__,
        "commit": COMMIT,
        "command": f"python benchmarks/ablations.py {options}",
    }


def append(row: dict, table: Path) -> None:
    """Add a line to a table, which may have more columns."""
    with open(table, "a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        writer = csv.DictWriter(file, columns or row)
        if columns is None:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*CHANGES, "plot"]
    names = f"of: {', '.join(choices)}"
    parser.add_argument("changes", nargs="+", choices=choices, metavar="CHANGE", help=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--csv", type=Path, default=ROOT / "assets" / "ablations.csv")
    arguments = parser.parse_args()
    if arguments.changes == ["plot"]:
        return plot(arguments.csv, arguments.csv.with_suffix(".png"))
    if "plot" in arguments.changes:
        parser.error("expected changes or plot, found both: run the changes first")
    for seed in arguments.seeds:
        for change in arguments.changes:
            print(f"--- {change}, seed {seed}")
            append(record(change, seed, arguments.epochs), arguments.csv)


if __name__ == "__main__":
    main()

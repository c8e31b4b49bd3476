"""What one change of the recipe does: trained on 45,000 training images, judged on the other 5,000; no test image.

    python ablations.py "taught, cosine" "taught, dropout 0.03" --seeds 0 1 --epochs 16

Each run is a line of assets/ablations.csv. What helps becomes the notebook's default, what does not stays a line there.
`python ablations.py plot` draws assets/ablations.png from the lines of 16 epochs.
"""

import argparse
import csv
import functools
import io
import itertools
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from batches import BatchLoader
from cifar10 import find_cifar10
from dataset import AlbumentationsCIFAR10, AlbumentationsImages, test_transform, train_transform
from model import Net, Teacher, whitening
from checkpoint import write_file
from hardware import precision
from muon import Muon
from training_utils import fit, soft_targets
from utils import set_seed

HERE = Path(__file__).resolve().parent

# The notebook's recipe. Every row of CHANGES is this one with the given differences.
RECIPE = dict(optimizer="Muon", muon_rate=0.015, momentum=0.95, rate=0.2, decay=5e-4, norm_decay=0.0, batch=256)
RECIPE |= dict(warm_up=0.2, shape="linear", average=0.995, statistics=True, dropout=0.0, augmentation=list)
RECIPE |= dict(teacher=20, temperature=2.0, views=20)

CHANGES = {
    "taught": {},
    "labels": {"teacher": 0},
    "taught, padding of 2 pixels": {"augmentation": lambda steps: [A.PadIfNeeded(36, 36, border_mode=cv2.BORDER_REFLECT_101), *steps[1:]]},
    "taught, no flip": {"augmentation": lambda steps: [step for step in steps if not isinstance(step, A.HorizontalFlip)]},
    "taught, cosine": {"shape": "cosine"},
    "taught, batch 128": {"batch": 128, "muon_rate": 0.01, "rate": 0.14, "average": 0.9975},
    "taught, weight decay 1e-3": {"decay": 1e-3},
    "taught, no weight decay": {"decay": 0.0},
    "taught, norms decayed as well": {"norm_decay": 5e-4},
    "taught, twice the peak rates": {"muon_rate": 0.03, "rate": 0.4},
    "taught, no average": {"average": 0.0},
    "taught, average 0.998": {"average": 0.998},
    "taught, dropout 0.03": {"dropout": 0.03},
    "taught, SGD": {"optimizer": "SGD"},
    "taught, AdamW, rate 3e-3, decay 0.05": {"optimizer": "AdamW", "rate": 3e-3, "decay": 0.05},
}


@functools.cache  # one for all seeds
def teacher_of(epochs: int, root: Path, device: torch.device) -> nn.Module:
    """A teacher after so many epochs of RECIPE on the images that its pupils learn from, whatever their changes."""
    set_seed(0)
    # New ones: the cached are at the epoch where another change has left them.
    loaders = loaders_of.__wrapped__(RECIPE["augmentation"], RECIPE["batch"], 0, root, device)
    teacher = Teacher(whitening(next(iter(loaders[0]))[0])).to(device)
    learn(teacher, RECIPE | {"statistics": False}, loaders, epochs)
    return teacher


@functools.cache  # one for all changes, by which the loaders know what they have asked already
def answers_of(epochs: int, temperature: float, root: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """What that teacher says of a batch of images."""
    return functools.partial(soft_targets, teacher_of(epochs, root, device), temperature=temperature)


def run(change: dict, seed: int, epochs: int, root: Path, device: torch.device) -> dict[str, float]:
    """Train with the change, and give the last row of its history; its "test" are the images held out."""
    recipe = RECIPE | change
    teacher_epochs = min(recipe["teacher"], epochs // 2)
    loaders = loaders_of(recipe["augmentation"], recipe["batch"], seed, root, device)
    loaders[0].teacher = answers_of(teacher_epochs, recipe["temperature"], root, device) if teacher_epochs else None
    loaders[0].views = recipe["views"] if teacher_epochs else None
    set_seed(seed)
    return learn(Net(dropout=recipe["dropout"]).to(device), recipe, loaders, epochs)[-1]


@functools.cache  # what the teacher said stays in the first, for other changes of the same pictures
def loaders_of(augmentation: Callable, batch: int, seed: int, root: Path, device: torch.device) -> list[BatchLoader]:
    """Those of the images to train on, of those held out, and of a tenth of the first as they are."""
    images = AlbumentationsCIFAR10(root)
    order = np.random.default_rng(0).permutation(len(images))  # the same images are held out in all runs
    held = len(images) // 10
    transform = A.Compose(augmentation(list(train_transform())))
    loaders = []
    for rows, compose in ((order[held:], transform), (order[:held], test_transform()), (order[held : 2 * held], test_transform())):
        part = AlbumentationsImages(images.data[rows], [images.targets[i] for i in rows], images.classes, compose, seed)
        loaders.append(BatchLoader(part, batch if not loaders else 1000, shuffle=not loaders, device=device))
    return loaders


def learn(net: nn.Module, recipe: dict, loaders: list[BatchLoader], epochs: int) -> list[dict[str, float]]:
    """Train the network in place, and give the history."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    norms = [p for _, p in named if p.ndim == 1]
    filters = [p for name, p in named if p.ndim > 1 and ("depthwise" in name or "classifier" in name)]
    banks = [p for name, p in named if p.ndim > 1 and not ("depthwise" in name or "classifier" in name)]
    decayed = filters if recipe["optimizer"] == "Muon" else [p for _, p in named if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": recipe["decay"]}, {"params": norms, "weight_decay": recipe["norm_decay"]}]
    if recipe["optimizer"] == "AdamW":
        optimizer = torch.optim.AdamW(groups, lr=recipe["rate"], fused=True, capturable=banks[0].is_cuda)
    elif recipe["optimizer"] == "Muon":
        sgd = [group | {"lr": recipe["rate"], "momentum": 0.9, "orthogonal": False} for group in groups]
        optimizer = Muon([{"params": banks}, *sgd], lr=recipe["muon_rate"], momentum=recipe["momentum"])
    else:
        optimizer = torch.optim.SGD(groups, lr=recipe["rate"], momentum=0.9, nesterov=True, fused=True)
    steps = epochs * len(loaders[0])

    def share(step: int) -> float:
        place = np.interp(step, [0, recipe["warm_up"] * steps, steps], [0.04, 1, 0])
        falling = step > recipe["warm_up"] * steps
        return float(0.5 - 0.5 * np.cos(np.pi * place)) if falling and recipe["shape"] == "cosine" else float(place)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return fit(
        net,
        *loaders[:2],
        optimizer,
        scheduler,
        epochs=epochs,
        ema_decay=recipe["average"],
        statistics=loaders[2] if recipe["statistics"] else None,
        compile=epochs >= 16,
    )


def plot(table: Path, picture: Path) -> None:
    """Draw what each change brings or costs in 16 epochs: a dot a run, its accuracy less the recipe's with the same seed.

    Raises KeyError for a seed that the recipe, "taught", has no run with.
    """
    with open(table) as file:
        rows = [row for row in csv.DictReader(file) if row["change"] in CHANGES and row["epochs"] == "16"]
    recipe = {row["seed"]: float(row["accuracy"]) for row in rows if row["change"] == "taught"}
    gains = {}
    for row in rows:
        if row["change"] != "taught":
            gains.setdefault(row["change"], []).append((float(row["accuracy"]) - recipe[row["seed"]], row["seed"]))
    order = sorted(gains, key=lambda change: statistics.mean(gain for gain, _ in gains[change]))
    figure = Figure((9, 1.2 + 0.24 * len(order)), dpi=150, layout="constrained")
    figure.suptitle("One change of the recipe, 16 epochs, the teacher's 8; 5,000 images held out from training judge", fontsize=11)
    axes = figure.subplots()
    mean = statistics.mean(recipe.values())
    errors = 2 * (2 * mean * (100 - mean) / 5000) ** 0.5
    axes.axvspan(-errors, errors, color="#EEEEEE", label="within two standard errors of a difference")
    axes.axvline(0, color="#777777", ls="--", lw=1.5, label=f"the recipe: {mean:.2f} %")
    seeds = sorted({seed for dots in gains.values() for _, seed in dots})
    for seed, color, mark in zip(seeds, itertools.cycle(("#0072B2", "#D55E00", "#009E73")), itertools.cycle("os^D")):
        dots = [(gain, place) for place, change in enumerate(order) for gain, other in gains[change] if other == seed]
        axes.scatter(*zip(*dots), s=25, color=color, marker=mark, zorder=3, label=f"random seed {seed}")
    axes.set_yticks(range(len(order)), [change.removeprefix("taught, ") for change in order])
    axes.set_xlabel("held-out accuracy less the recipe's with the same seed (points)", fontsize=9.5)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, loc="upper left")
    drawn = io.BytesIO()
    figure.savefig(drawn)
    write_file(picture, drawn.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*CHANGES, "plot"]
    parser.add_argument("changes", nargs="+", choices=choices, metavar="CHANGE", help="of: " + ", ".join(choices))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--csv", type=Path, default=HERE / "assets" / "ablations.csv")
    given = parser.parse_args()
    if "plot" in given.changes:
        if len(given.changes) > 1:
            parser.error("expected changes or plot, found both: run the changes first")
        return plot(given.csv, given.csv.with_suffix(".png"))
    root = find_cifar10(data="full")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine += f", {precision(device)}".replace("torch.", "")
    for seed in given.seeds:
        for change in given.changes:
            print(f"--- {change}, seed {seed}")
            start = time.perf_counter()
            last = run(CHANGES[change], seed, given.epochs, root, device)
            row = {
                "change": change,
                "epochs": given.epochs,
                "seed": seed,
                "accuracy": f"{last['test_accuracy']:.2f}",
                "loss": f"{last['test_loss']:.4f}",
                "train_accuracy": f"{last['train_accuracy']:.2f}",
                "train_loss": f"{last['train_loss']:.4f}",
                "seconds": round(time.perf_counter() - start),
                "machine": machine,
                "torch": torch.__version__,
                "commit": commit,
                "command": f"python ablations.py {shlex.quote(change)} --seeds {seed} --epochs {given.epochs}",
            }
            new = not given.csv.exists()
            with open(given.csv, "a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()

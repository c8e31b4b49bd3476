"""What one change of the recipe does: trained on 45,000 training images, judged on the other 5,000; no test image.

    python ablations.py "notebook, cosine" "notebook, dropout 0.03" --seeds 0 1 --epochs 16

Each run is a line of assets/ablations.csv. What helps becomes the notebook's default, what does not stays a line there.
"""

import argparse
import csv
import shlex
import subprocess
import time
from pathlib import Path

import albumentations as A
import numpy as np
import torch
from torch import nn

from dataset import AlbumentationsCIFAR10, AlbumentationsImages, BatchLoader, BatchTransform
from dataset import find_cifar10, test_transform, train_transform
from model import Net
from training_utils import Muon, fit
from utils import set_seed

# The notebook's recipe. Every row of CHANGES is this one with the given differences.
RECIPE = dict(optimizer="Muon", muon_rate=0.015, momentum=0.95, rate=0.2, batch=256, warm_up=0.2, shape="linear", decay=5e-4)
RECIPE |= dict(smoothing=0.05, average=0.995, dropout=0.0, identity=2, augmentation=list, alternate=False)
RECIPE |= dict(late=0, late_augmentation=list)  # so many epochs, the last ones, have an augmentation of their own


def without(*kinds: type) -> dict:
    """The augmentation without the transforms of these kinds."""
    return {"augmentation": lambda steps: [step for step in steps if not isinstance(step, kinds)]}


def lately(epochs: int, *kinds: type) -> dict:
    """The last epochs without the transforms of these kinds."""
    return {"late": epochs, "late_augmentation": without(*kinds)["augmentation"]}


COLOUR = A.RandomBrightnessContrast(0.2, 0.2, p=0.5)
FIRST = {"optimizer": "SGD", "identity": 0} | without(A.Affine)  # of the first 100 epochs recorded (90.10 %)
SHORT = {"muon_rate": 0.05, "momentum": 0.6}  # of the 100 epochs that reached 90.93 %
MUON = SHORT | {"identity": 0} | without(A.Affine)  # of those before them (90.27 %)
CHANGES = {
    "base": FIRST,
    "flips alternate": FIRST | {"alternate": True},
    "Muon, rate 0.2": MUON | {"muon_rate": 0.2},
    "Muon, rate 0.1": MUON | {"muon_rate": 0.1},
    "Muon, rate 0.05": MUON,
    "Muon, rate 0.025": MUON | {"muon_rate": 0.025},
    "Muon, rate 0.05, identity added": MUON | {"identity": 1},
    "Muon, rate 0.05, identity added twice": MUON | {"identity": 2},
    "Muon, rate 0.05, identity added twice, momentum 0.85": MUON | {"identity": 2, "momentum": 0.85},
    "Muon, rate 0.05, identity added twice, affine": SHORT,
    "notebook": {},
    "notebook, cosine": {"shape": "cosine"},
    "notebook, batch 128": {"batch": 128, "muon_rate": 0.01, "rate": 0.14, "average": 0.9975},
    "notebook, weight decay 1e-3": {"decay": 1e-3},
    "notebook, label smoothing 0.1": {"smoothing": 0.1},
    "notebook, average 0.998": {"average": 0.998},
    "notebook, dropout 0.03": {"dropout": 0.03},
    "notebook, colour": {"augmentation": lambda steps: [COLOUR, *steps]},
    "notebook, no affine": without(A.Affine),
    "notebook, last 10 epochs without affine and cutout": lately(10, A.Affine, A.CoarseDropout),
    "notebook, last 20 epochs without affine and cutout": lately(20, A.Affine, A.CoarseDropout),
    "notebook, last 20 epochs without cutout": lately(20, A.CoarseDropout),
    "notebook, AdamW, rate 3e-3, decay 0.05": {"optimizer": "AdamW", "rate": 3e-3, "decay": 0.05},
}


class Alternating(BatchTransform):
    """Each image is flipped in every other epoch, a half of them in the even ones (airbench)."""

    def parameters(self, count, size, seed, epoch):
        drawn = super().parameters(count, size, seed, epoch)
        first = np.random.default_rng(seed).random(count) < 0.5
        for step, found in zip((step for stage in self.stages for step in stage), drawn):
            if isinstance(step, A.HorizontalFlip):
                found["applied"] = first ^ bool(epoch % 2)
        return drawn


def run(change: dict, seed: int, epochs: int, root: Path, device: torch.device) -> dict[str, float]:
    """Train with the change, and give the last row of its history; its "test" are the images held out."""
    recipe = RECIPE | change
    loaders = loaders_of(recipe, seed, root, device)
    set_seed(seed)
    net = Net(dropout=recipe["dropout"]).to(device)
    for name, module in net.named_modules():  # Net begins with the identity added twice
        if isinstance(module, nn.Conv2d) and name != "classifier" and recipe["identity"] != 2:
            module.reset_parameters()
            module.weight.data += recipe["identity"] * nn.init.dirac_(torch.empty_like(module.weight), module.groups)
    return learn(net, recipe, loaders, epochs)[-1]


def loaders_of(recipe: dict, seed: int, root: Path, device: torch.device) -> list[BatchLoader]:
    """Those of the images to train on and of those held out."""
    images = AlbumentationsCIFAR10(root)
    order = np.random.default_rng(0).permutation(len(images))  # the same images are held out in all runs
    held = len(images) // 10
    transform = A.Compose(recipe["augmentation"](list(train_transform())))
    loaders = []
    for rows, compose in ((order[held:], transform), (order[:held], test_transform())):
        part = AlbumentationsImages(images.data[rows], [images.targets[i] for i in rows], images.classes, compose, seed)
        loaders.append(BatchLoader(part, recipe["batch"] if not loaders else 1000, shuffle=not loaders, device=device))
    if recipe["alternate"]:
        loaders[0].transform = Alternating(transform, device)
    return loaders


def learn(net: nn.Module, recipe: dict, loaders: list[BatchLoader], epochs: int) -> list[dict[str, float]]:
    """Train the network in place, and give the history."""
    named = list(net.named_parameters())
    norms = [p for _, p in named if p.ndim == 1]
    filters = [p for name, p in named if p.ndim > 1 and ("depthwise" in name or "classifier" in name)]
    banks = [p for name, p in named if p.ndim > 1 and not ("depthwise" in name or "classifier" in name)]
    decayed = filters if recipe["optimizer"] == "Muon" else [p for _, p in named if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": recipe["decay"]}, {"params": norms, "weight_decay": 0.0}]
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

    def on_epoch(row: dict[str, float]) -> None:
        if row["epoch"] == epochs - recipe["late"]:
            late = A.Compose(recipe["late_augmentation"](list(train_transform())))
            loaders[0].transform = BatchTransform(late, loaders[0].images.device)

    return fit(
        net,
        *loaders,
        optimizer,
        scheduler,
        epochs=epochs,
        label_smoothing=recipe["smoothing"],
        ema_decay=recipe["average"],
        compile=epochs >= 16,
        on_epoch=on_epoch,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("changes", nargs="+", choices=CHANGES, metavar="CHANGE", help="of: " + ", ".join(CHANGES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--csv", type=Path, default=Path("assets/ablations.csv"))
    given = parser.parse_args()
    root = find_cifar10(data="full")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
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

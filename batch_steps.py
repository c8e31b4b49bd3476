"""How each Albumentations transform runs on a whole batch: one class for each kind. See batches.py.

`draw` makes the random parameters, with Albumentations' distributions; each array has the next of the
random `streams`. A geometric transform turns the parameters into `maps` of coordinates. Any other one
packs them into `columns` of the table and uses these in `apply`.
"""

import functools
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.nn import functional as F

Size = tuple[int, int]  # height, width in pixels
Parameters = dict[str, np.ndarray]  # of one transform: a value for each image
Streams = Iterator[np.random.Generator]  # a new one for each array

PADDING = {
    cv2.BORDER_CONSTANT: "zeros",
    cv2.BORDER_REPLICATE: "border",
    cv2.BORDER_REFLECT_101: "reflection",
}


KINDS: dict[type, type["Step"]] = {}  # of an Albumentations class, the class below that runs it


def batched(*transforms: type) -> Callable[[type], type]:
    """Register the decorated class as the one that runs these Albumentations transforms."""

    def register(step: type) -> type:
        KINDS.update(dict.fromkeys(transforms, step))
        return step

    return register


def unbatched(expected: str, found: object) -> NotImplementedError:
    """The error for a transform that has no batched form, with an option or a place that it has."""
    return NotImplementedError(
        f"expected {expected}, found {found}: "
        "run it image by image, the data set (AlbumentationsImages) behind a DataLoader"
    )


class Step:
    """One Albumentations transform, for a whole batch."""

    options: dict[str, tuple] = {}  # the values of the transform's options that work here
    always = False  # whether it must have p=1
    width = 0  # columns of the table

    def __init__(self, transform: A.BasicTransform):
        self.transform = transform
        name = type(transform).__name__
        for option, allowed in self.options.items():
            value = getattr(transform, option, allowed[0])
            if value not in allowed:
                raise unbatched(f"{name} with {option} {' or '.join(map(repr, allowed))}", repr(value))
        if self.always and transform.p < 1:
            raise unbatched(f"{name} with p 1", transform.p)
        fill = getattr(transform, "fill", 0)
        if isinstance(fill, str) or np.shape(fill) not in ((), (3,)):
            raise unbatched(f"{name} with fill of one or three numbers", repr(fill))

    def draw(self, streams: Streams, count: int, size: Size) -> Parameters:
        return {}

    def columns(self, parameters: Parameters, applied: np.ndarray) -> np.ndarray:
        """The parameters as (count, width), without effect where `applied` (count, 1) is False."""
        return np.empty((len(applied), 0))

    def apply(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Images float32 (N, 3, H, W), 0 to 255, changed in place by their rows of the table."""
        return x

    def output_size(self, size: Size) -> Size:
        return size


class Geometric(Step):
    """A transform that moves pixels. Neighbouring ones share one sampling of the image: see `Sampling`."""

    border: tuple[int, list[float]] | None = None  # mode and colour beyond the image; None: never looked at
    pads = False  # whether it adds a border, for which the image before it must be complete
    warps = False  # whether it interpolates between pixels

    def maps(self, parameters: Parameters, count: int, size: Size) -> np.ndarray:
        """Matrices (count, 3, 3): pixel coordinates (x, y, 1) of the image to those of the result."""
        raise NotImplementedError

    def find_border(self) -> tuple[int, list[float]]:
        fill = np.broadcast_to(self.transform.fill, 3)
        return self.transform.border_mode, np.rint(fill).clip(0, 255).tolist()  # as OpenCV makes it uint8


@batched(A.HorizontalFlip, A.VerticalFlip)
class Flip(Geometric):
    """Mirrors the image, left to right or top to bottom."""

    def maps(self, parameters, count, size):
        maps = identity(count)
        if isinstance(self.transform, A.HorizontalFlip):
            maps[:, 0] = -1, 0, size[1] - 1
        else:
            maps[:, 1] = 0, -1, size[0] - 1
        return maps


@batched(A.PadIfNeeded, A.RandomCrop)
class Crop(Geometric):
    """Whole pixels move."""

    options = {
        "border_mode": tuple(PADDING),
        "position": ("center",),
        "pad_position": ("center",),
        "pad_height_divisor": (None,),
        "pad_width_divisor": (None,),
    }
    always = True

    def __init__(self, transform):
        super().__init__(transform)
        self.pads = getattr(transform, "pad_if_needed", True)
        if self.pads:
            self.border = self.find_border()

    def output_size(self, size):
        step = self.transform
        if isinstance(step, A.PadIfNeeded):
            return max(size[0], step.min_height), max(size[1], step.min_width)
        wanted = step.height, step.width
        if not step.pad_if_needed and (step.height > size[0] or step.width > size[1]):
            raise ValueError(f"expected images of at least {wanted}, found {size}: pad before {step!r}")
        return wanted

    def draw(self, streams, count, size):
        if isinstance(self.transform, A.PadIfNeeded):
            return {}
        offsets = {}
        for axis, before, after in zip("yx", size, self.output_size(size)):
            room = max(0, before - after)
            offsets[axis] = (next(streams).random(count) * (room + 1)).astype(int)
        return offsets

    def maps(self, parameters, count, size):
        maps = identity(count)
        for row, axis, before, after in zip((1, 0), "yx", size, self.output_size(size)):
            maps[:, row, 2] = max(0, after - before) // 2 - parameters.get(axis, 0)
        return maps


@batched(A.Rotate, A.Affine, A.ShiftScaleRotate)
class Warp(Geometric):
    """ShiftScaleRotate is an Affine."""

    options = {
        "interpolation": (cv2.INTER_LINEAR,),
        "border_mode": tuple(PADDING),
        "crop_border": (False,),
        "fit_output": (False,),
        "balanced_scale": (False,),
    }
    warps = True

    def __init__(self, transform):
        super().__init__(transform)
        self.border = self.find_border()

    def draw(self, streams, count, size):
        step = self.transform
        if isinstance(step, A.Rotate):
            return {"rotate": next(streams).uniform(*step.limit, count)}
        parameters = {}
        for axis, pixels in (("x", size[1]), ("y", size[0])):
            if step.translate_px is not None:
                low, high = map(int, step.translate_px[axis])
                shift = next(streams).integers(low, high + 1, count)
            else:
                shift = (next(streams).uniform(*step.translate_percent[axis], count) * pixels).astype(int)
            parameters["translate_" + axis] = shift
            parameters["shear_" + axis] = -next(streams).uniform(*step.shear[axis], count)
            parameters["scale_" + axis] = next(streams).uniform(*step.scale[axis], count)
        if step.keep_ratio:
            parameters["scale_y"] = parameters["scale_x"]
        parameters["rotate"] = next(streams).uniform(*step.rotate, count)
        return parameters

    def maps(self, parameters, count, size):
        # As Albumentations does it: scale, rotate and shear about the centre, then translate.
        angle = np.deg2rad(parameters["rotate"])
        cos, sin = np.cos(angle), np.sin(angle)
        shear_x = np.tan(np.deg2rad(parameters.get("shear_x", 0)))
        shear_y = np.tan(np.deg2rad(parameters.get("shear_y", 0)))
        scale_x = parameters.get("scale_x", 1)
        scale_y = parameters.get("scale_y", 1)
        maps = identity(count)
        maps[:, 0, 0] = (cos - shear_x * sin) * scale_x
        maps[:, 0, 1] = (sin + shear_x * cos) * scale_y
        maps[:, 1, 0] = (shear_y * cos - sin) * scale_x
        maps[:, 1, 1] = (shear_y * sin + cos) * scale_y
        centre = np.array([size[1] - 1, size[0] - 1]) / 2
        maps[:, :2, 2] = centre - maps[:, :2, :2] @ centre
        maps[:, 0, 2] += parameters.get("translate_x", 0)
        maps[:, 1, 2] += parameters.get("translate_y", 0)
        return maps


@batched(A.CoarseDropout)
class Holes(Step):
    """Rectangles of one colour."""

    def __init__(self, transform):
        super().__init__(transform)
        fill = np.asarray(transform.fill)
        if not np.all((fill > -1) & (fill < 256)):
            raise ValueError(
                f"expected CoarseDropout with fill from 0 to 255, found {transform.fill}: "
                "give numbers that uint8 holds"
            )
        self.fill = fill.astype(np.uint8)
        self.holes = transform.num_holes_range[1]
        self.width = 4 * self.holes

    def draw(self, streams, count, size):
        step = self.transform
        low, high = step.num_holes_range
        unused = np.arange(high) >= next(streams).integers(low, high + 1, count)[:, None]
        parameters = {}
        for axis, pixels, span in zip("yx", size, (step.hole_height_range, step.hole_width_range)):
            if step.hole_height_range[1] >= 1:
                extent = next(streams).integers(int(span[0]), int(min(span[1], pixels)) + 1, (count, high))
            else:
                extent = (pixels * next(streams).uniform(*span, (count, high))).astype(int)
            start = (next(streams).random((count, high)) * (pixels - extent + 1)).astype(int)
            parameters[axis + "_min"] = start
            parameters[axis + "_max"] = start + np.where(unused, 0, extent)
        return parameters

    def columns(self, parameters, applied):
        edges = [parameters[key] for key in ("y_min", "y_max", "x_min", "x_max")]
        return np.hstack(edges) * applied  # a hole from 0 to 0 is empty

    def apply(self, x, columns):
        y_min, y_max, x_min, x_max = columns.reshape(len(x), 4, self.holes, 1).unbind(1)
        ys, xs = (torch.arange(pixels, device=x.device) for pixels in x.shape[2:])
        in_rows = (ys >= y_min) & (ys < y_max)
        in_columns = (xs >= x_min) & (xs < x_max)
        hole = (in_rows[..., None] & in_columns[:, :, None]).any(1, keepdim=True)
        fill = per_channel(self.fill, x)
        return x.sub_(fill).mul_(~hole).add_(fill)


@batched(A.RandomBrightnessContrast)
class Brightness(Step):
    """A factor and an offset for each image."""

    options = {"brightness_by_max": (True,), "ensure_safe_range": (False,)}
    width = 2

    def draw(self, streams, count, size):
        factor = 1 + next(streams).uniform(*self.transform.contrast_limit, count)
        offset = 255 * next(streams).uniform(*self.transform.brightness_limit, count)
        return {"alpha": factor, "beta": offset}  # Albumentations' names

    def columns(self, parameters, applied):
        return np.where(applied, np.stack([parameters["alpha"], parameters["beta"]], 1), (1, 0))

    def apply(self, x, columns):
        factor, offset = columns.reshape(len(x), 2, 1, 1, 1).unbind(1)
        return x.mul_(factor).add_(offset).clamp_(0, 255)


@batched(A.Normalize)
class Normalize(Step):
    options = {"normalization": ("standard",)}
    always = True

    def apply(self, x, columns):
        return x.sub_(per_channel(self.transform.mean_np, x)).mul_(per_channel(self.transform.denominator, x))


@batched(ToTensorV2)
class ToTensor(Step):
    always = True


class Sampling:
    """Neighbouring geometric transforms, done as one: their maps are multiplied, the image is sampled once.

    One may bring back what the one before it moved out of the frame.
    """

    width = 6  # the first two rows of the map from the result's pixels to the image's

    def __init__(self, first: Geometric):
        self.steps = [first]
        self.border = first.border

    def accepts(self, step: Geometric) -> bool:
        return not step.pads and (step.border is None or self.border in (None, step.border))

    def add(self, step: Geometric) -> None:
        self.steps.append(step)
        self.border = self.border or step.border

    def output_size(self, size: Size) -> Size:
        for step in self.steps:
            size = step.output_size(size)
        return size

    def columns(self, parameters: list[Parameters], count: int, size: Size) -> np.ndarray:
        maps = identity(count)
        for step, values in zip(self.steps, parameters):
            applied = values["applied"][:, None, None]
            maps = np.where(applied, step.maps(values, count, size), np.eye(3)) @ maps
            size = step.output_size(size)
        # The inverse, by hand.
        (a, b, x), (c, d, y) = np.moveaxis(maps[:, :2], 0, 2)
        inverse = np.stack([d, -b, b * y - d * x, -c, a, c * x - a * y], 1)
        return inverse / (a * d - b * c)[:, None]

    def apply(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        count, _, height, width = x.shape
        mode, fill = self.border or (cv2.BORDER_REPLICATE, [0.0] * 3)
        # grid_sample can pad with zeros only, so the colour is made zero meanwhile.
        colour = per_channel(fill, x) if mode == cv2.BORDER_CONSTANT and any(fill) else None
        if colour is not None:
            x.sub_(colour)
        rows, cols = self.output_size((height, width))
        xs = torch.arange(cols, device=x.device).repeat(rows)
        ys = torch.arange(rows, device=x.device).repeat_interleave(cols)
        pixels = torch.stack([xs, ys, torch.ones_like(xs)]).float()
        # grid_sample has the centres of the first and the last pixel at -1 and 1.
        unit = constant((2 / max(1, width - 1), 2 / max(1, height - 1)), x.device).view(2, 1)
        maps = columns.reshape(count, 2, 3) * unit - constant((0, 0, 1), x.device)
        grid = (maps.view(-1, 3) @ pixels).view(count, 2, rows, cols).permute(0, 2, 3, 1)
        kind = "bilinear" if any(step.warps for step in self.steps) else "nearest"
        x = F.grid_sample(x, grid, mode=kind, padding_mode=PADDING[mode], align_corners=True)
        return x if colour is None else x.add_(colour)


def identity(count: int) -> np.ndarray:
    return np.tile(np.eye(3), (count, 1, 1))


def per_channel(values: np.ndarray | list[float], x: torch.Tensor) -> torch.Tensor:
    """A number for each channel, or one for all, in a shape that goes with images (N, 3, H, W)."""
    return constant(tuple(np.ravel(values).tolist()), x.device).view(-1, 1, 1)


@functools.cache  # sending numbers to a GPU makes the processor wait for it
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)

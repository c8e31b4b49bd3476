"""Whole batches at once, on the CPU or the GPU: Albumentations (`BatchTransform`) and three loaders.

The augmentations of all images of an epoch are drawn in advance, one row of numbers for each
image. A row follows from (seed, epoch, index) alone. So a picture depends neither on the batch it
is in, nor on the number of images, the device or the number of processes.
"""

import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterator

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its version

import albumentations as A
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from batch_steps import KINDS, Geometric, Normalize, Parameters, Sampling, Size, Step, ToTensor, unbatched


class BatchTransform:
    """An Albumentations `Compose` on whole batches.

    Uses the distributions that Albumentations draws from. Results are not rounded to whole pixel
    values between transforms. A `Compose` or a `Sequential` with p=1 may be inside another.

    Raises:
        NotImplementedError: a transform has no batched form; it is named, with the option or the
            place that is the reason. `AlbumentationsImages` behind a `DataLoader` runs any
            transform.
        ValueError: a CoarseDropout fills with numbers beyond 0 to 255.
    """

    def __init__(self, compose: A.Compose, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.stages: list[Step | Sampling] = []
        self.image_size: Size | None = None  # to which the Compose scales, image by image
        self.append(compose)

    def append(self, transform: A.BasicTransform | A.BaseCompose) -> None:
        kind, name = type(transform), type(transform).__name__
        last = self.stages[-1] if self.stages else None
        if isinstance(transform, (A.Compose, A.Sequential)):
            if transform.p < 1:
                raise unbatched(f"{name} with p 1", transform.p)
            self.image_size = getattr(transform, "image_size", self.image_size)
            for part in transform.transforms:
                self.append(part)
            return
        if kind is A.NoOp:
            return
        if kind not in KINDS:
            raise unbatched("a transform with a batched form", name)
        step = KINDS[kind](transform)
        # After normalization the pixel values mean something else.
        if isinstance(last, (Normalize, ToTensor)) and not isinstance(step, ToTensor):
            raise unbatched(f"only ToTensorV2 after {type(last.transform).__name__}", name)
        if not isinstance(step, Geometric):
            self.stages.append(step)
        elif isinstance(last, Sampling) and last.accepts(step):
            last.add(step)
        else:
            self.stages.append(Sampling(step))

    def draw(self, count: int, size: Size, seed: int, epoch: int) -> torch.Tensor:
        """The augmentations of the first `count` images of this size in this epoch, a row for each.

        float32 (count, columns) on the device: a few megabytes for 50,000 images. With another
        count, an image has the same row.

        Raises:
            ValueError: the images are smaller than what a RandomCrop cuts out.
        """
        return self.pack(self.parameters(count, size, seed, epoch), count, size)

    def parameters(self, count: int, size: Size, seed: int, epoch: int) -> list[Parameters]:
        """The random parameters of each transform in its own units: pixels, degrees, factors."""
        # Each parameter has a generator of its own, so that an image's number depends only on how
        # many images come before it. Number 1 shuffles: see `BatchLoader.order`.
        streams = (np.random.default_rng((seed, epoch, number)) for number in itertools.count(2))
        parameters = []
        for stage in self.stages:
            for step in getattr(stage, "steps", [stage]):
                p = step.transform.p
                applied = np.ones(count, bool) if p == 1 else next(streams).random(count) < p
                parameters.append({"applied": applied, **step.draw(streams, count, size)})
                size = step.output_size(size)
        return parameters

    def pack(self, parameters: list[Parameters], count: int, size: Size) -> torch.Tensor:
        """The parameters as the table that `__call__` takes."""
        table = [np.empty((count, 0))]
        remaining = iter(parameters)
        for stage in self.stages:
            if isinstance(stage, Sampling):
                values = [next(remaining) for _ in stage.steps]
                table.append(stage.columns(values, count, size))
            else:
                values = next(remaining)
                table.append(stage.columns(values, values["applied"][:, None]))
            size = stage.output_size(size)
        numbers = np.concatenate(table, 1).astype(np.float32)  # here: some devices lack float64
        return torch.from_numpy(numbers).to(self.device)

    def __call__(self, images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) and their N rows of `draw` to float32 (N, 3, H', W'), all on the device.

        Values are normalized as the Compose says, or 0 to 255 without a Normalize.

        Raises:
            ValueError: images of another shape or dtype, or another number of rows.
        """
        if (
            images.ndim != 4
            or images.shape[3] != 3
            or images.dtype != torch.uint8
            or len(images) != len(table)
        ):
            raise ValueError(
                f"expected {len(table)} uint8 images (N, H, W, 3), one a row of the table, "
                f"found {images.dtype} {tuple(images.shape)}: convert them, and pick the same rows of both"
            )
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        # In place, because memory traffic costs more than the arithmetic.
        for stage in self.stages:
            x = stage.apply(x, table[:, : stage.width])
            table = table[:, stage.width :]
        return x


# ---------------------------------------------------------------- loaders


class BatchLoader:
    """Batches of images in memory, augmented on the device: (float32 (B, 3, H, W), int64 (B,)). No workers.

    Shuffled, every epoch has a new order, by (seed, epoch), and a last batch of a single image,
    which batch norm cannot train on, is left out. Of several `processes`, process `rank` gets
    every so many-th image of each batch, augmented as one process alone would have it. Shuffled,
    all get equally many.

    Args:
        images: has uint8 `data` (N, H, W, 3), `targets`, a `transform` and a `seed`: AlbumentationsImages.
        batch_size: images a step, of all processes together.
        shuffle: True for training.
        device: where the images stay, and where the batches are.

    Raises:
        ValueError: a batch size below 1, or one that the processes cannot share equally; a rank
            that no process has; no transform; images of another size than the transform's; targets
            that are not a class number for each image.
        NotImplementedError: the transform is none for `BatchTransform`.
    """

    def __init__(
        self,
        images,
        batch_size: int,
        shuffle: bool,
        device: torch.device | str = "cpu",
        rank: int = 0,
        processes: int = 1,
    ):
        if batch_size < 1 or (shuffle and batch_size % processes):
            share = f"a multiple of the {processes} process{'es' * (processes > 1)}"
            raise ValueError(
                f"expected batch_size >= 1, {share}, found {batch_size}: "
                "give the images a step, of all processes together"
            )
        if not 0 <= rank < processes:
            raise ValueError(
                f"expected a rank below the number of processes, {processes}, found {rank}: swap them?"
            )
        if getattr(images, "transform", None) is None:
            raise ValueError(
                f"expected AlbumentationsImages with a transform, found {type(images).__name__} without: "
                "give them test_transform(), or another Compose; a Subset goes through a DataLoader"
            )
        self.transform = BatchTransform(images.transform, device)
        size = images.data.shape[1:3]
        expected = self.transform.image_size or size
        if size != expected:
            raise ValueError(
                f"expected images of {expected}, found {size}: "
                "scale them with read_image, or keep them so with A.Compose(list(transform))"
            )
        count, targets = len(images.data), torch.as_tensor(images.targets)
        if targets.shape != (count,) or (count and targets.is_floating_point()):
            raise ValueError(
                f"expected {count} targets, the class number of each image, "
                f"found {targets.dtype} {tuple(targets.shape)}: correct images.targets"
            )
        self.images = torch.from_numpy(images.data).to(device)
        self.targets = targets.to(device, torch.int64)
        self.seed = images.seed
        self.shuffle = shuffle
        self.batch_size = -(-batch_size // processes)
        rest = len(images) % batch_size if shuffle else 0
        unused = rest % processes if rest >= 2 * processes else rest
        self.share = slice(rank, len(images) - unused, processes)  # of the epoch's order
        self.set_epoch(0)

    def set_epoch(self, epoch: int, view: int | None = None) -> None:
        """Use the order of this epoch, and the augmentations of epoch `view`, by default the same."""
        self.epoch = epoch
        self.view = epoch if view is None else view

    def __len__(self) -> int:
        return -(-len(range(len(self.images))[self.share]) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, indices in self.augmented(self.order(), self.batch_size):
            yield images, self.targets[indices]

    def order(self) -> torch.Tensor:
        """The indices of this process's images, as this epoch has them."""
        count = len(self.images)
        if not self.shuffle:
            return torch.arange(count)[self.share]
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        return torch.from_numpy(rng.permutation(count))[self.share]

    def augmented(self, order: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of the augmented images in this order, with their indices."""
        size = tuple(self.images.shape[1:3])
        table = self.transform.draw(len(self.images), size, self.seed, self.view)
        # About a thousand images at once: a small batch costs as much in calls as in pixels.
        block = batch_size * max(1, 1024 // batch_size)
        for indices in order.to(self.images.device).split(block):
            images = self.transform(self.images.index_select(0, indices), table.index_select(0, indices))
            yield from zip(images.split(batch_size), indices.split(batch_size))


def counted_from_1(epoch: int) -> int:
    if epoch < 1:
        raise ValueError(f"expected an epoch from 1, found {epoch}: count from 1, as fit does")
    return epoch


class TaughtLoader:
    """The batches of a BatchLoader with a teacher's answers: (images, targets, answers).

    The teacher must see the very pictures that are learnt from. To spare it time, the
    augmentations of the first `views` epochs come again and again, in new orders, every second
    time as mirror images. The teacher is asked about the picture and its mirror image; the mean of
    both answers is kept. Use it only where a mirrored picture means the same: not for letters.
    Each process asks for itself. If the answers to all views take more than a gigabyte, a line
    says so before they do.

    Args:
        teacher: a function of images (B, 3, H, W) that returns a tensor (B, classes), such as probabilities.
        views: how many augmentations of each image there are.

    Raises:
        ValueError: an epoch below 1; in an epoch, the teacher's answers are not one for each image, or not
            finite.
    """

    def __init__(self, loader: BatchLoader, teacher: Callable[[torch.Tensor], torch.Tensor], views: int):
        self.loader = copy.copy(loader)  # which others may use meanwhile, for an epoch of theirs
        self.teacher = teacher
        self.views = views
        self.answers: dict[int, torch.Tensor] = {}  # of each view, to all images
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch, counted from 1, and ask the teacher if its view is new."""
        self.epoch = counted_from_1(epoch)
        rounds, view = divmod(epoch - 1, self.views)
        self.view, self.mirrored = view + 1, rounds % 2 == 1
        self.loader.set_epoch(epoch, self.view)
        self.ask()

    @torch.no_grad()
    def ask(self) -> None:
        if self.view in self.answers:
            return
        count = len(self.loader.images)
        batches = self.loader.augmented(torch.arange(count), 1024)
        bar = tqdm(
            batches, "Teacher", -(-count // 1024), file=sys.stdout, leave=False, delay=2, mininterval=0.5
        )
        parts = []
        for images, _ in bar:
            parts.append((self.teacher(images) + self.teacher(images.flip(3))) / 2)
            if len(parts[-1]) != len(images):
                raise ValueError(
                    f"expected {len(images)} answers of the teacher, one for each image, "
                    f"found {tuple(parts[-1].shape)}: return a tensor (B, classes)"
                )
            if len(parts) == 1 and not self.answers:
                self.announce_memory(parts[0])
        answers = torch.cat(parts)
        if not answers.isfinite().all():
            raise ValueError(
                "expected finite answers of the teacher, found NaN or infinity: look at its weights"
            )
        self.answers[self.view] = answers

    def announce_memory(self, first: torch.Tensor) -> None:
        """Print what all answers will take if it is much. `first` are those to the first images."""
        size = first[0].nbytes * len(self.loader.images) * self.views / 1e9
        if size > 1:
            text = f"The teacher's answers to {self.views} views will take {size:.1f} GB"
            print(f"{text} on {first.device}: fewer views take less")

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if self.epoch == 0:  # a loop that counts no epochs
            self.set_epoch(1)
        self.ask()  # again, if it was interrupted
        answers, mirrored = self.answers[self.view], self.mirrored  # even if another epoch is set meanwhile
        for images, indices in self.loader.augmented(self.loader.order(), self.loader.batch_size):
            yield images.flip(3) if mirrored else images, self.loader.targets[indices], answers[indices]


class ProgressiveLoader:
    """The batches of a BatchLoader, with smaller images at first: progressive resizing.

    The first third of the epochs has images of half the height and width, the second third of
    three quarters. So a CPU has time for more epochs. Before the first `set_epoch` they are large.

    Args:
        epochs: of the whole run.

    Raises:
        ValueError: an epoch below 1.
    """

    SCALES = 0.5, 0.75, 1.0  # of height and width, in a third of the epochs each

    def __init__(self, loader: BatchLoader, epochs: int):
        self.loader = copy.copy(loader)  # which others may use meanwhile, for an epoch of theirs
        self.epochs = epochs
        self.scale = 1.0

    def set_epoch(self, epoch: int) -> None:
        """Use the order and the image size of this epoch, counted from 1."""
        self.loader.set_epoch(counted_from_1(epoch))
        part = min(2, (3 * epoch - 1) // self.epochs)  # an epoch beyond the run is like its last
        self.scale = self.SCALES[part]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        scale = self.scale  # of this epoch, even if another one is set meanwhile
        for images, *rest in self.loader:
            yield resized(images, scale), *rest

    def examples(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """A batch of each size, for which `fit` compiles the network."""
        images, *rest = next(iter(self.loader))
        for scale in self.SCALES:
            yield resized(images, scale), *rest


def resized(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Images (B, C, H, W) with this share of their height and width."""
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)

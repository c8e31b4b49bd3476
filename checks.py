"""What `fit`, `train` and `test` can work with; the rest is refused in a line. Needs only torch."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

EMPTY = "found an empty loader: too few images?"


def check_arguments(epochs: int, ema_decay: float, *loaders: Iterable | None) -> None:
    """Raise ValueError if a number is out of range, or a loader empty."""
    if epochs < 1 or not 0 <= ema_decay < 1:
        found = f"{epochs} and {ema_decay}"
        raise ValueError(f"expected epochs >= 1 and 0 <= ema_decay < 1, found {found}")
    for loader in loaders:
        if loader is not None and not len(loader):
            raise ValueError(f"expected at least one batch from each loader, {EMPTY}")


def check_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, steps: int = 0
) -> None:
    """Refuse an optimizer or a scheduler that could not train this model for that many steps.

    Raises:
        ValueError: the optimizer is of other parameters than the model's, or has none to train.
            The scheduler is of another optimizer, or is made for fewer steps.
        TypeError: their `step` needs an argument, such as LBFGS's closure or ReduceLROnPlateau's
            metrics.
    """
    own = {id(p) for p in model.parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(id(p) not in own for p in params)
    if strangers:
        raise ValueError(
            f"expected an optimizer of the model's parameters, found {strangers} of {len(params)} "
            "that are not the model's: make it after the model, and again if a layer is replaced"
        )
    if not any(p.requires_grad for p in params):
        raise ValueError("expected parameters to train, found all frozen: unfreeze some")
    for part in filter(None, (optimizer, scheduler)):
        _, *arguments = inspect.signature(type(part).step).parameters.values()
        for argument in arguments:
            if argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD:
                found = f"{type(part).__name__}, whose step needs {argument.name}"
                raise TypeError(f"expected step() without arguments, found {found}")
    if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("expected a scheduler of this optimizer, found another's: make one of it")
    # Other schedulers take any number of steps.
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        raise ValueError(
            f"expected a scheduler for {steps} steps, one a batch, found {scheduler.total_steps}: "
            "count epochs times batches"
        )


def tensors_of(batch: tuple | list, device: torch.device, count: int = 2) -> list[torch.Tensor]:
    """The first `count` parts of a batch (images, targets, ...), on the device.

    Raises:
        TypeError: the batch is no tuple or list, a part is no tensor, or images or a teacher's
            probabilities are integers.
        ValueError: the parts are of different numbers of images. On the CPU, where it costs no
            wait: classes below 0, or floats that are no probabilities.
    """
    if not isinstance(batch, (tuple, list)):
        found = f"{type(batch).__name__}: return a tuple in collate_fn"
        raise TypeError(f"expected batches (images, targets), found {found}")
    parts = batch[:count]
    kinds = ", ".join(type(part).__name__ for part in parts)
    if len(parts) < 2 or not all(isinstance(part, torch.Tensor) for part in parts):
        raise TypeError(f"expected tensors (images, targets), found ({kinds}): convert them")
    if not parts[0].is_floating_point():
        found = str(parts[0].dtype).removeprefix("torch.")
        raise TypeError(f"expected float images, found {found}: give the data set a transform")
    if any(not part.is_floating_point() for part in parts[2:]):
        found = parts[2].dtype
        raise TypeError(f"expected probabilities as a third part, found {found}: leave others out")
    if len({part.shape[:1] for part in parts}) > 1:
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"expected a target for each image, found {shapes}: give as many of both")
    for part in parts[1:]:
        if part.device.type == "cpu" and part.numel():
            check_values(part)
    return [to_device(part, device) for part in parts]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. Waits for the copy, except on CUDA: a Mac's GPU may use it too early."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def check_values(targets: torch.Tensor) -> None:
    """Raise ValueError if classes are below 0, or rows of floats are no probabilities."""
    if not targets.is_floating_point():
        if targets.min() < 0:
            found = f"{targets.min()}: leave such images out"
            raise ValueError(f"expected classes from 0 on, found {found}")
    elif targets.ndim == 2:
        errors = (targets.float().sum(1) - 1).abs()
        if targets.min() < 0 or errors.max() > 0.02:
            raise ValueError("expected probabilities, found rows that are none: take the softmax")


def check_targets(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise ValueError unless logits are (B, classes), and targets (B,) or probabilities alike."""
    expected = logits.shape if targets.is_floating_point() else logits.shape[:1]
    if logits.ndim != 2 or targets.shape != expected:
        found = f"{tuple(logits.shape)} and {targets.dtype} {tuple(targets.shape)}"
        raise ValueError(
            "expected logits (B, classes) and targets of integers (B,) "
            f"or probabilities (B, classes), found {found}: reshape them"
        )

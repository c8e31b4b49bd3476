"""Train a classifier one epoch, test it, and fit it for many. Knows no data set and no network.

A loader is any iterable of (images, targets) batches with a length: a `DataLoader`, say. What it, its
sampler or its data set offers as `set_epoch(epoch)` is called before each epoch.

Losses and accuracies are exact over all samples, whatever the batch sizes: sums are kept on the
device, and the processor waits for them only when the progress bar is drawn anew.
"""

import copy
import csv
import ctypes
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

REDRAW = 0.5  # seconds between two states of a progress bar, the only moments when the processor waits for the device


def progress(loader: Iterable, **kwargs) -> tqdm:
    """A bar on standard output, where the lines around it are, so that a notebook keeps them in one place."""
    return tqdm(loader, bar_format="{l_bar}{bar:10}{r_bar}", file=sys.stdout, mininterval=REDRAW, **kwargs)


@functools.cache
def precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware is faster with it, else float32: by GPU generation, by a measurement on a CPU.

    Some processors list the bfloat16 instructions and run them no faster than float32: only the clock knows.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix
        times = []
        for _ in range(7):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        return min(times)

    # A clear difference, as it is where there is one: two runs on one machine shall not choose differently.
    return torch.bfloat16 if seconds(torch.bfloat16) < 0.7 * seconds(torch.float32) else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """The context in which this module runs every model: mixed precision where `precision` finds the hardware for it."""
    dtype = precision(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def forward(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Logits (N, C) in float32 at least, computed in the device's best precision, channels last."""
    with autocast(images.device):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def compiled(model: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as `torch.compile` makes it for batches like this one; itself where the compiler fails, in a line.

    In training mode the failure may come as late as the first backward pass, so one is tried; the model and the random
    state stay as they were. In evaluation mode the result is for use without gradients. Batches of another shape, the
    last one of an epoch, run uncompiled: a compilation takes longer.
    """
    # Where a CUDA compiler is installed and no GPU, this logger warns of what nobody asked for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    state = copy.deepcopy(model.state_dict())
    fast = torch.compile(model, dynamic=False)
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(model.training):
            logits = forward(fast, images)
            if model.training:
                logits.sum().backward()
    except Exception as error:  # whatever a compiler may raise: there is a way on
        print(f"torch.compile fails here ({type(error).__name__}): going on without it")
        return model
    finally:
        model.load_state_dict(state)
        model.zero_grad()
    print(f"torch.compile took {time.perf_counter() - start:.0f} s for the {'training' if model.training else 'test'} step")
    return lambda batch: fast(batch) if batch.shape == images.shape else model(batch)


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, in place of giving it back to the system.

    A step on the CPU frees and takes hundreds of megabytes; else the system maps and zeroes them anew in every step.
    Elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for any block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def train(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    *,
    label_smoothing: float = 0.0,
    network: Callable[[torch.Tensor], torch.Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """One epoch of training, with a progress bar; the scheduler and `after_step` go on after every step.

    `network` computes what the model does, faster: see `compiled`.

    Returns the mean cross-entropy (without label smoothing, so that it compares with `test`'s) and the
    accuracy in percent over all the epoch's samples, each as the model was when it saw them.
    """
    device = device_of(model)
    model.train()
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    seen, redraw_at = 0, time.monotonic()
    with progress(loader, desc="Train") as bar:
        for batch_id, (images, targets) in enumerate(bar):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            logits = forward(network or model, images)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets, label_smoothing=label_smoothing).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            after_step()
            with torch.no_grad():
                loss_sum += F.cross_entropy(logits, targets, reduction="sum")
                correct += (logits.argmax(1) == targets).sum()
            seen += len(targets)
            if time.monotonic() >= redraw_at or batch_id + 1 == len(loader):
                loss, accuracy = loss_sum.item() / seen, 100 * correct.item() / seen
                bar.set_description(f"Train: Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}", refresh=False)
                redraw_at = time.monotonic() + REDRAW
    return loss, accuracy


def parts_of(images: torch.Tensor) -> Sequence[torch.Tensor]:
    """Batches to test on: a large one is what a GPU wants; a CPU is fastest while the activations stay in its cache."""
    return images.split(100) if images.device.type == "cpu" else [images]


@torch.no_grad()
def test(
    model: nn.Module, loader: Iterable, *, network: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy in percent over all the loader's samples, printed and returned.

    `network` computes what the model does in evaluation mode, faster: see `compiled`.
    """
    device = device_of(model)
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    seen = 0
    for images, targets in progress(loader, desc="Test", leave=False, delay=2):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        logits = torch.cat([forward(network or model, part) for part in parts_of(images)])
        loss_sum += F.cross_entropy(logits, targets, reduction="sum")
        correct += (logits.argmax(1) == targets).sum()
        seen += len(targets)
    model.train(was_training)
    loss, accuracy = loss_sum.item() / seen, 100 * correct.item() / seen
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct.item()}/{seen} ({accuracy:.2f}%)\n")
    return loss, accuracy


def fit(
    model: nn.Module,
    train_loader: Iterable,
    test_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    *,
    epochs: int,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    compile: bool = False,
    history_file: str | Path | None = None,
) -> list[dict[str, float]]:
    """Train for `epochs` epochs and test after each; the test results decide nothing.

    For image classifiers: batches of images (N, C, H, W). The model is made channels-last, and on a CPU the
    process keeps the memory that it frees from then on (`keep_freed_memory`).

    Args:
        ema_decay: what is tested, and what `model` holds in the end, is the exponential moving average of
            the weights and batch statistics, with this decay a step (Polyak and Juditsky 1992; Tarvainen
            and Valpola 2017, arXiv:1703.01780), or (1 + t) / (10 + t) at step t while that is smaller, so
            that a short run forgets its first steps too; 0 for the plain weights.
        compile: run the training step, and on a CPU the test, through `torch.compile`: it takes up to a minute, which
            a long run earns back.
        history_file: a CSV file to write the history to, one row an epoch, after every epoch.

    Returns the history, a dict an epoch: epoch (from 1), train_loss, train_accuracy, test_loss,
    test_accuracy (percent), learning_rate (of the epoch's first step), seconds (training and test).
    Raises ValueError for fewer than one epoch or a decay outside [0, 1).
    """
    if epochs < 1 or not 0 <= ema_decay < 1:
        raise ValueError(f"expected epochs >= 1 and 0 <= ema_decay < 1, found {epochs} and {ema_decay}")
    device = device_of(model)
    keep_freed_memory()
    model.to(memory_format=torch.channels_last)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"Training on {processor}, in {str(precision(device)).removeprefix('torch.')}, channels-last")
    average = AveragedModel(
        model,
        multi_avg_fn=lambda old, new, t: get_ema_multi_avg_fn(min(ema_decay, float((1 + t) / (10 + t))))(old, new, t),
        use_buffers=True,
    )
    network = tested = None
    if compile:
        network = compiled(model.train(), next(iter(train_loader))[0].to(device))
        if device.type == "cpu":  # on a GPU the test takes too short a time to win the compiler's back
            tested = compiled(average.module.eval(), parts_of(next(iter(test_loader))[0])[0])
    print()
    history = []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        learning_rate = optimizer.param_groups[0]["lr"]
        print(f"Epoch {epoch}")
        for part in (train_loader, getattr(train_loader, "sampler", None), getattr(train_loader, "dataset", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        train_loss, train_accuracy = train(
            model,
            train_loader,
            optimizer,
            scheduler,
            label_smoothing=label_smoothing,
            network=network,
            after_step=lambda: average.update_parameters(model),
        )
        test_loss, test_accuracy = test(average.module, test_loader, network=tested)
        history.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "learning_rate": learning_rate,
                "seconds": time.perf_counter() - start,
            }
        )
        if history_file is not None:
            write_history(history, history_file)
    model.load_state_dict(average.module.state_dict())
    return history


def write_history(history: list[dict[str, float]], path: str | Path) -> None:
    """Write the history as CSV, beside its place and then renamed into it."""
    partial = Path(f"{path}.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
    os.replace(partial, path)


def save_weights(model: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the state dict as safetensors, with the metadata, beside its place and then renamed into it."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    partial = Path(f"{path}.partial")
    partial.write_bytes(save(state, metadata))
    os.replace(partial, path)

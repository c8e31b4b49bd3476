"""Train a classifier one epoch, test it, and fit it for many. Knows no data set and no network.

A loader is any iterable of (images, targets) batches with a length: a `DataLoader`, say; see `train` for a third part.
What it, its samplers or its data set offer as `set_epoch(epoch)` is called before each epoch. Losses and accuracies are
exact over all samples, whatever the batch sizes: sums are kept on the device (see REDRAW). Nothing that is loaded here
can run code.
"""

import atexit
import contextlib
import copy
import csv
import ctypes
import functools
import io
import logging
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import timeit
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import ConcatDataset
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

    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    rounds, end = [], time.perf_counter() + 0.1
    # In turn: what else the machine does for a moment shall not decide. At least three: the first one warms up.
    while len(rounds) < 3 or time.perf_counter() < end:
        rounds.append([timeit.timeit(lambda: matrix @ matrix, number=1) for matrix in matrices])
    low, full = map(min, zip(*rounds))
    # A clear difference, as it is where there is one: two runs on one machine shall not choose differently.
    faster = torch.tensor(low < 0.7 * full)
    if distributed.is_initialized():  # nor two processes of one run
        distributed.broadcast(faster, 0)
    return torch.bfloat16 if faster else torch.float32


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
        with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.set_grad_enabled(model.training):
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


class Muon(torch.optim.Optimizer):
    """Steps of one size in every direction: the momentum of each filter bank is made orthogonal before it is applied.

    After K. Jordan's Muon (kellerjordan.github.io/posts/muon, 2024) as airbench uses it on CIFAR-10: for convolutions
    that a batch norm follows, to which the scale of their weights does not matter, so each bank is kept at the norm
    sqrt(filters). What else a network has, in groups with `orthogonal=False`, takes plain SGD with Nesterov momentum.

    Args:
        groups: parameters, or dicts of params with options of their own; those of orthogonal ones have 2 dimensions or more.
        lr: the step, as a share of the weights for orthogonal groups.
        momentum: in [0, 1).
        weight_decay: this share of the weights is added to the gradient; leave it 0 for orthogonal groups.

    Raises ValueError for an orthogonal group that holds a vector or a number.
    """

    def __init__(self, groups: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, orthogonal: bool = True):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "orthogonal": orthogonal})
        if any(p.ndim < 2 for group in self.param_groups if group["orthogonal"] for p in group["params"]):
            raise ValueError("expected 2 dimensions or more, found a vector: put it into a group with orthogonal=False")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if not (parameters := [p for p in group["params"] if p.grad is not None]):
                continue
            for p in parameters:
                momentum = self.state[p].get("momentum")
                self.state[p]["momentum"] = torch.zeros_like(p) if momentum is None else laid_out_like(p, momentum)
            weights = [matrix(p) for p in parameters]
            momenta = [matrix(self.state[p]["momentum"]) for p in parameters]
            gradients = [matrix(laid_out_like(p, p.grad)) for p in parameters]
            # Lists at once: on a GPU each call costs time.
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            updates = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
            if group["orthogonal"]:
                updates = orthogonal(updates)
                torch._foreach_div_(weights, torch._foreach_norm(weights))
                torch._foreach_mul_(weights, [len(p) ** 0.5 for p in parameters])
            torch._foreach_mul_(updates, group["lr"])
            torch._foreach_sub_(weights, updates)


def laid_out_like(p: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in the order in which p lies in memory."""
    return tensor if tensor.stride() == p.stride() else torch.empty_like(p).copy_(tensor)


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous or channels-last tensor as (first dimension, the others as they lie in memory), without a copy."""
    tensor = tensor if tensor.is_contiguous() else tensor.movedim(1, -1)
    return tensor.view(len(tensor), -1) if tensor.ndim > 1 else tensor.view(1, -1)


def orthogonal(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each with all its singular values brought near 1, by Newton-Schulz steps."""
    result, together = list(matrices), {}
    for i, one in enumerate(matrices):  # each call costs a GPU more than the zeros that make all one size
        together.setdefault(None if one.is_cuda else one.shape, []).append(i)
    for places in together.values():
        rows, columns = (max(matrices[i].shape[side] for i in places) for side in (0, 1))
        x = matrices[0].new_zeros(len(places), rows, columns)
        parts = [part[: len(matrices[i]), : matrices[i].shape[1]] for i, part in zip(places, x)]
        torch._foreach_copy_(parts, [matrices[i] for i in places])
        x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
        for _ in range(5):
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)  # K. Jordan's coefficients
            x = torch.baddbmm(x, polynomial, x, beta=3.4445)
        for i, part in zip(places, x):
            result[i] = part[: len(matrices[i]), : matrices[i].shape[1]].contiguous()
    return result


# ---------------------------------------------------------------- several processes


def join_processes() -> tuple[torch.device, int, int]:
    """Join the processes that `torchrun` started; this one's (device, rank, number of processes).

    Without a launcher that is the GPU, or else the CPU, and 0 of 1. With GPUs each process takes one, and they talk
    through NCCL; else through gloo. Only rank 0 prints from then on.
    """
    gpu = torch.cuda.is_available()
    if not distributed.is_torchelastic_launched():
        return torch.device("cuda" if gpu else "cpu"), 0, 1
    local = int(os.environ["LOCAL_RANK"])
    if gpu and local >= torch.cuda.device_count():
        raise RuntimeError(f"expected a GPU for each process, found {torch.cuda.device_count()}: lower --nproc-per-node")
    if gpu:
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if gpu else "gloo")
    if not gpu:  # a thread of gloo's that asks a Python that is ending for its lock would abort the process
        atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())
    if distributed.get_rank():
        sys.stdout = open(os.devnull, "w")
    return torch.device("cuda", local) if gpu else torch.device("cpu"), distributed.get_rank(), distributed.get_world_size()


@torch.no_grad()
def agree(tensors: Iterable[torch.Tensor]) -> None:
    """Put in the place of each floating-point tensor its mean over all processes."""
    if not (tensors := [tensor for tensor in tensors if tensor.is_floating_point()]):
        return
    mean = torch.cat([tensor.flatten() for tensor in tensors])  # one message for all: the small ones cost the time
    distributed.all_reduce(mean)
    mean /= distributed.get_world_size()
    for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def over_processes(*sums: torch.Tensor | int) -> list[torch.Tensor]:
    """Each sum over all processes, exact: float64 holds any count of samples."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=sums[0].device) for value in sums])
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return list(total)


# ---------------------------------------------------------------- training


def inside(loader: Iterable) -> list:
    """The loader, its samplers and its data set, with what a `Subset` or a `ConcatDataset` is of: they may count epochs, or draw."""
    found = [loader]
    for part in found:  # which grows meanwhile
        others = [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset")]
        others += part.datasets if isinstance(part, ConcatDataset) else []
        found += [other for other in others if other is not None and not any(other is known for known in found)]
    return found


def gradient_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    network: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Callable[..., torch.Tensor]:
    """The function that takes a batch (images, targets), changes the weights by it, and gives the logits it had for it.

    Where it is given the probabilities (B, C) that a teacher found, too, these are learnt in place of the targets.
    `network` computes what the model does, faster (`compiled`) or with batch norm over all processes.
    """

    def step(images: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None = None) -> torch.Tensor:
        logits = forward(network or model, images)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, targets if taught is None else taught)
        loss.backward()
        if distributed.is_initialized():
            agree(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        return logits.detach()

    return step


def replayed(step: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer) -> Callable[..., torch.Tensor]:
    """A `gradient_step` on a GPU as a CUDA graph: one call in place of a thousand, which take longer than what they ask for.

    Three batches run as they are, the next one's operations are recorded and from then on repeated, with the learning
    rates of the moment: for models that do the same with every batch. What differs from the recorded batch in shape, or
    in the optimizer's other options, runs as it is; so does everything where recording fails, and a line says why.
    """
    device = optimizer.param_groups[0]["params"][0].device
    stream, seen, own, recorded, graph, logits = torch.cuda.Stream(device), 0, None, None, None, None
    rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def options() -> list[dict]:
        return [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups]

    def record(*batch: torch.Tensor) -> None:
        nonlocal own, recorded, graph, logits
        state = [value for values in optimizer.state.values() for value in values.values() if value is not None]
        if not all(isinstance(value, torch.Tensor) and value.is_cuda for value in state):
            raise RuntimeError(f"{type(optimizer).__name__} keeps numbers outside the GPU")
        own, recorded = [batch[0].clone(memory_format=torch.channels_last), *(part.clone() for part in batch[1:])], options()
        floats, new = [group["lr"] for group in optimizer.param_groups], torch.cuda.CUDAGraph()
        try:
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
            with torch.cuda.graph(new, stream=stream):
                logits = step(*own)
        finally:
            for group, rate in zip(optimizer.param_groups, floats):
                group["lr"] = rate
        graph = new

    def replay(*batch: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen < 4:  # beside the current stream, as the recording will be
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                result = step(*batch)
            torch.cuda.current_stream(device).wait_stream(stream)
            return result
        if seen == 4:
            try:
                record(*batch)
            except Exception as error:  # whatever a model may do that cannot be recorded
                print(f"a CUDA graph cannot be recorded here ({type(error).__name__}: {error}): going on without it")
        if graph is None or [part.shape for part in batch] != [part.shape for part in own] or options() != recorded:
            return step(*batch)
        for group, rate in zip(optimizer.param_groups, rates):
            rate.fill_(group["lr"])
        for place, part in zip(own, batch):
            place.copy_(part)
        graph.replay()
        return logits

    return replay


def train(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    *,
    step: Callable[..., torch.Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """One epoch of training, with a progress bar; the scheduler and `after_step` go on after every step.

    `step` is a `gradient_step`; by default one with this model and optimizer. What a batch holds after images and
    targets goes to it too: the probabilities (B, C) to learn in place of the targets, as a teacher found them.

    Returns the mean cross-entropy (against the targets, so that it compares with `test`'s) and the accuracy in percent
    over all the epoch's samples, each as the model was when it saw them.
    Raises FloatingPointError for a loss that is NaN or infinite: at once on a CPU, within half a second on a GPU.
    Raises ValueError for a loader without batches.
    """
    device = next(model.parameters()).device
    step = step or gradient_step(model, optimizer)
    model.train()
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    correct, finite = torch.zeros(2, device=device, dtype=torch.int64)  # finite: the steps before the first bad loss
    seen, redraw_at, rates = 0, time.monotonic(), []
    with progress(loader, desc="Train") as bar:
        for batch_id, batch in enumerate(bar):
            images, targets, *taught = (part.to(device, non_blocking=True) for part in batch)
            rates.append(optimizer.param_groups[0]["lr"])
            logits = step(images, targets, *taught)
            if scheduler is not None:
                scheduler.step()
            after_step()
            with torch.no_grad():
                loss_sum += F.cross_entropy(logits, targets, reduction="sum")
                correct += (logits.argmax(1) == targets).sum()
                finite += (finite == batch_id) & loss_sum.isfinite()
            seen += len(targets)
            if last := batch_id + 1 == len(loader):
                loss_sum, correct, seen = over_processes(loss_sum, correct, seen)
            redraw = time.monotonic() >= redraw_at or last
            if (redraw or device.type == "cpu") and (bad := finite.item()) <= batch_id:
                raise FloatingPointError(
                    f"expected a finite loss, found {loss_sum.item()} in step {bad + 1} of {len(loader)} "
                    f"at learning rate {rates[bad]:.4g}: lower it, or look for NaN in the images"
                )
            if redraw:
                loss, accuracy = means(loss_sum, correct, seen)
                bar.set_description(f"Train: Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}", refresh=False)
                redraw_at = time.monotonic() + REDRAW
    return means(loss_sum, correct, seen)


def means(loss_sum: torch.Tensor, correct: torch.Tensor, seen: int | torch.Tensor) -> tuple[float, float]:
    """The mean loss and the accuracy in percent; ValueError where nothing was seen."""
    if not seen:
        raise ValueError("expected at least one batch of (images, targets), found an empty loader: too few images?")
    return float(loss_sum) / float(seen), 100 * float(correct) / float(seen)


def parts_of(images: torch.Tensor) -> Sequence[torch.Tensor]:
    """Batches to test on: a large one is what a GPU wants; a CPU is fastest while the activations stay in its cache."""
    return images.split(100) if images.device.type == "cpu" else [images]


@torch.no_grad()
def test(model: nn.Module, loader: Iterable, *, network: Callable[[torch.Tensor], torch.Tensor] | None = None) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy in percent over all the loader's samples, printed and returned.

    `network` computes what the model does in evaluation mode, faster: see `compiled`.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]  # some may be frozen: not all have one mode
    model.eval()
    loss_sum, correct, seen = torch.zeros((), device=device, dtype=torch.float64), 0, 0
    try:
        for images, targets, *_ in progress(loader, desc="Test", leave=False, delay=2):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            logits = torch.cat([forward(network or model, part) for part in parts_of(images)])
            loss_sum += F.cross_entropy(logits, targets, reduction="sum")
            correct += (logits.argmax(1) == targets).sum()
            seen += len(targets)
    finally:
        for module, mode in modes:
            module.training = mode
    loss_sum, correct, seen = over_processes(loss_sum, correct, seen)
    loss, accuracy = means(loss_sum, correct, seen)
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {correct:.0f}/{seen:.0f} ({accuracy:.2f}%)\n")
    return loss, accuracy


@torch.no_grad()
def soft_targets(teacher: nn.Module, images: torch.Tensor, temperature: float) -> torch.Tensor:
    """The probabilities (B, C) that the teacher finds in a batch, its logits divided by the temperature.

    To learn these in place of the labels is distillation: Hinton et al. 2015, arXiv:1503.02531.
    """
    teacher.eval()
    return torch.cat([forward(teacher, part) for part in parts_of(images)]).div(temperature).softmax(1)


def fit(
    model: nn.Module,
    train_loader: Iterable,
    test_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    *,
    epochs: int,
    ema_decay: float = 0.0,
    statistics: Iterable | None = None,
    compile: bool = False,
    history_file: str | Path | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    recipe: dict[str, object] | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> list[dict[str, float]]:
    """Train for `epochs` epochs and test after each; the test results decide nothing.

    For image classifiers: batches of images (N, C, H, W). The model is made channels-last and left in training mode,
    and on a CPU the process keeps the memory that it frees from then on (`keep_freed_memory`).

    Ctrl-C, or a notebook's stop button, ends the run between two steps: the model then holds the weights of the last
    epoch that was finished, and its history is returned. (In the first epoch it is raised; a second one is at once.)

    On several processes (`join_processes`, under `torchrun`) each loader gives this process's share of each batch, as
    `dataset.BatchLoader` does, as many batches to all for training and equal shares of each; gradients are averaged,
    losses and accuracies are those of all samples. Rank 0 alone writes files and calls `on_epoch`; the checkpoint is
    one that any number of processes with as many batches an epoch goes on from. Ctrl-C ends such a run at once.

    Args:
        ema_decay: what is tested, and what `model` holds in the end, is the exponential moving average of
            the weights and batch statistics, with this decay a step (Polyak and Juditsky 1992; Tarvainen
            and Valpola 2017, arXiv:1703.01780), or (1 + t) / (10 + t) at step t while that is smaller, so
            that a short run forgets its first steps too; 0 for the plain weights.
        statistics: a loader of images as they are in the test, training images without augmentation, the classes mixed
            in each batch: before each test the batch norms' running statistics are taken from these, anew
            (`torch.optim.swa_utils.update_bn`). Augmented images have others.
        compile: run the training step, and on a CPU the test, through `torch.compile`: it takes up to a minute, which
            a long run earns back.
        history_file: a CSV file to write the history to, one row an epoch, after every epoch.
        checkpoint: a file that holds the run as it was after its last epoch; the one before is kept beside it, as
            NAME.previous.EXT. Where the disk is full the run warns, goes on and tries again after the next epoch.
        resume: go on from the checkpoint, bit for bit on the same processor; a finished run is loaded and not trained
            again. Where the checkpoint is of another run, or this is False, it is kept under another name and the run
            starts from its first epoch.
        recipe: whatever else tells this run from others, such as the seed, the data and the augmentation, which
            cannot be seen from here; compared as text. A key that `fit` has itself, such as "epochs" or "model", keeps fit's value.
        on_epoch: called after every epoch with its row of the history: for TensorBoard, say.

    Returns the history, a dict an epoch: epoch (from 1), train_loss, train_accuracy, test_loss,
    test_accuracy (percent), learning_rate (of the epoch's first step), seconds (training and test).

    Raises:
        ValueError: fewer than one epoch, a decay outside [0, 1), an empty loader, or a checkpoint that is damaged
            without a good one before it; nothing is overwritten then. Or processes that were given different runs.
        TypeError: an optimizer or scheduler whose state could be written but not read again.
        OSError: a folder for the files that cannot be made.
        FloatingPointError: a loss or a weight that is NaN or infinite; no such weights are saved.
    """
    if epochs < 1 or not 0 <= ema_decay < 1:
        raise ValueError(f"expected epochs >= 1 and 0 <= ema_decay < 1, found {epochs} and {ema_decay}")
    if not all(len(loader) for loader in (train_loader, test_loader, statistics) if loader is not None):
        raise ValueError("expected at least one batch from each loader, found an empty loader: too few images?")
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    model.to(memory_format=torch.channels_last)
    if distributed.is_initialized():
        for tensor in model.state_dict().values():
            distributed.broadcast(tensor, 0)

    average = copy.deepcopy(model)
    for module in average.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # it is never trained, and `update_bn`, which puts it into training mode, shall drop nothing
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))  # they share the memory of both
    weights = [list(side) for side in zip(*(pair for pair in pairs if pair[0].is_floating_point()))]
    parts = {"model": model, "average": average, "optimizer": optimizer}  # of a checkpoint
    parts |= {"scheduler": scheduler} if scheduler is not None else {}
    recipe = {
        **(recipe or {}),
        "epochs": epochs,
        "steps an epoch": len(train_loader),
        "statistics": "running" if statistics is None else "taken anew",
        "decay of the average": ema_decay,
        "model": model,
        **describe(optimizer, scheduler),
    }
    recipe = {key: " ".join(str(value).split()) for key, value in recipe.items()}
    for file in filter(None, (checkpoint, history_file)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    if distributed.is_initialized():
        recipes = [None] * distributed.get_world_size()
        distributed.all_gather_object(recipes, recipe)
        if different := [key for key in recipe if any(other.get(key) != recipe[key] for other in recipes)]:
            raise ValueError(f"expected one run on all processes, found several by {different[0]!r}: give all the same data and options")
    found = [find_run(Path(checkpoint), recipe, resume) if checkpoint is not None and not rank else None, torch.initial_seed()]
    if distributed.is_initialized():  # the seed of rank 0, which no earlier `fit` has changed
        distributed.broadcast_object_list(found)
    saved, seed = found
    history = saved["history"] if saved else []
    # A run that was killed may have saved an epoch that it did not write to the history.
    if history and history_file is not None and not rank:
        try:
            write_csv(history, history_file)
        except OSError as error:
            warnings.warn(f"{history_file} could not be written ({error}): the run goes on", stacklevel=2)
    if len(history) < epochs:
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        if distributed.is_initialized():
            processor += f", in each of {distributed.get_world_size()} processes"
        print(f"Training on {processor}, in {str(precision(device)).removeprefix('torch.')}, channels-last")
    network, tested = model.train(), None
    if distributed.is_initialized() and device.type == "cuda":  # there is no such batch norm for CPUs
        own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # shared, not copied
        network = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model, own))  # torch.compile may not take it
    elif compile and len(history) < epochs:
        network = compiled(model, next(iter(train_loader))[0].to(device))
        if device.type == "cpu":  # on a GPU the test takes too short a time to win the compiler's back
            tested = compiled(average.eval(), parts_of(next(iter(test_loader))[0])[0])
    step = gradient_step(model, optimizer, network)
    if compile and device.type == "cuda" and not distributed.is_initialized():
        step = replayed(step, optimizer)
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        set_random_state(saved["random"], train_loader, statistics)
    print()

    def good() -> str:
        return f"{checkpoint} is as it was after epoch {kept}" if kept else "no checkpoint was saved"

    finished, kept, steps = copy.deepcopy(average.state_dict()), len(history), len(history) * len(train_loader)
    with interruptible() as interrupted:

        @torch.no_grad()
        def after_step() -> None:
            nonlocal steps
            # Of all at once: on a GPU each call costs time.
            torch._foreach_lerp_(*weights, 1 - min(ema_decay, (1 + steps) / (10 + steps)) if steps else 1.0)
            steps += 1
            if interrupted:
                raise KeyboardInterrupt

        for epoch in range(len(history) + 1, epochs + 1):
            start = time.perf_counter()
            learning_rate = optimizer.param_groups[0]["lr"]
            print(f"Epoch {epoch}")
            if rank:  # its own random numbers, dropout's, the same again where the run is resumed
                torch.manual_seed(seed + 1_000_003 * epoch + rank)
            for part in inside(train_loader):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            try:
                trained = train(model, train_loader, optimizer, scheduler, step=step, after_step=after_step)
                if statistics is not None:
                    with autocast(device):
                        update_bn(statistics, average, device)
                if distributed.is_initialized():  # each has its own running statistics, of the samples that it has seen
                    agree([*model.buffers(), *average.buffers()])
                for old, new in pairs:
                    if not old.is_floating_point():  # the batches counted
                        old.copy_(new)
                scored = test(average, test_loader, network=tested)
                if bad := [key for key, value in average.state_dict().items() if not value.isfinite().all()]:
                    raise FloatingPointError(f"expected finite weights, found others in {bad[0]} after the last step")
            except KeyboardInterrupt:
                if len(interrupted) > 1 or distributed.is_initialized():
                    raise
                break
            except FloatingPointError as error:
                raise FloatingPointError(f"epoch {epoch}: {error}; {good()}") from None
            names = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate", "seconds")
            history.append(dict(zip(names, (epoch, *trained, *scored, learning_rate, time.perf_counter() - start))))
            finished = copy.deepcopy(average.state_dict())
            if rank:
                continue
            try:
                if checkpoint is not None:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    state |= {"recipe": recipe, "random": random_state(train_loader, statistics), "history": history}
                    save_checkpoint(state, Path(checkpoint))
                    kept = epoch
                if history_file is not None:
                    write_csv(history, history_file)
            except OSError as error:
                warnings.warn(f"epoch {epoch} could not be saved ({error}): {good()}", stacklevel=2)
            on_epoch(history[-1])
            if interrupted:
                break
    model.load_state_dict(finished)
    if len(history) < epochs:
        if not history:
            raise KeyboardInterrupt("interrupted in the first epoch: there is nothing to keep")
        print(f"Interrupted after {len(history)} of {epochs} epochs: the history and the weights are those of the last one finished")
    return history


# ---------------------------------------------------------------- checkpoints


def describe(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler | None) -> dict[str, object]:
    """What tells these from others, whether or not they have already been stepped: all options but what steps change.

    The functions of a `LambdaLR` are not among a schedule's options: name them in the recipe.
    """
    described = {"optimizer": type(optimizer).__name__, "schedule": type(scheduler).__name__}
    for i, group in enumerate(optimizer.param_groups):
        moving = {"params"} | ({"lr"} if "initial_lr" in group else set())
        moving |= {"momentum", "betas"} if "max_momentum" in group else set()
        trained = sum(p.numel() for p in group["params"] if p.requires_grad)
        described[f"parameters {i}"] = {"trained": trained, **{key: value for key, value in group.items() if key not in moving}}
    steps = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "T_cur", "T_i")

    def settings(state: dict) -> dict:
        still = {key: value for key, value in state.items() if key not in steps}
        return {key: [settings(part) for part in value] if key == "_schedulers" else value for key, value in still.items()}

    options = settings(scheduler.state_dict()) if scheduler is not None else {}
    return described | {"schedule": f"{described['schedule']} {re.sub(' at 0x[0-9a-f]+', '', str(options))}"}


def find_run(path: Path, recipe: dict[str, str], resume: bool) -> dict | None:
    """The saved state of this very run, or None where it starts from its first epoch; says which, and why, in a line."""
    state = load_checkpoint(path) if resume else None
    changes = []
    for key in dict.fromkeys([*recipe, *state["recipe"]]) if state else ():
        was, now = (texts.get(key, "not given") for texts in (state["recipe"], recipe))
        if was != now:
            at = max(0, len(os.path.commonprefix([was, now])) - 30)  # of a long text, the place where it differs
            changes.append(f"{key} was {was[at : at + 60]}, is {now[at : at + 60]}")
    if changes or state is None:
        if kept := [str(set_aside(file)) for file in (path, previous(path)) if file.exists()]:
            why = f"is of another run ({changes[0]})" if changes else "is not resumed, as asked"
            print(f"{path} {why}: kept as {' and '.join(kept)}, starting with epoch 1")
        return None
    done, epochs = len(state["history"]), int(recipe["epochs"])
    print(f"{path} holds {done} of {epochs} epochs of this run:")
    for row in state["history"]:
        print(
            "Epoch {epoch}: Train: Loss={train_loss:.4f} Accuracy={train_accuracy:.2f}, Test set: Average loss: "
            "{test_loss:.4f}, Accuracy: {test_accuracy:.2f}%".format(**row)
        )
    rate = state["optimizer"]["param_groups"][0]["lr"]
    print("Nothing is left to train; resume=False trains anew" if done == epochs else f"Going on at learning rate {rate:.4g}")
    return state


def load_checkpoint(path: str | Path) -> dict | None:
    """What `fit` saved, on the CPU, at `path` or else at `previous(path)`; None where neither is there.

    Runs no code that a file may hold. A file whose checksums are wrong, or that holds more than numbers and text, is
    passed over with a warning and kept under another name. ValueError where no good one is left; both stay then.
    """
    bad = {}
    for file in (Path(path), previous(path)):
        if not file.exists():
            continue
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or {"recipe", "model", "average", "optimizer", "random", "history"} - state.keys():
                raise ValueError("not a checkpoint of fit")
        except Exception as error:  # noise can make the parsers raise anything
            bad[file] = str(error).partition("\n")[0]
            continue
        if bad:
            warnings.warn(f"{path} is unusable ({bad[Path(path)]}), kept as {set_aside(Path(path))}: using {file}", stacklevel=4)
        return state
    if bad:
        found = " and ".join(f"{file} ({reason})" for file, reason in bad.items())
        raise ValueError(f"expected a checkpoint of fit, found unusable {found}: move what is there away to start anew")
    return None


def save_checkpoint(state: dict, path: Path) -> None:
    """Put the state at `path`, and what was there before at `previous(path)`.

    Raises TypeError for a state that could be written but not read again, as with NumPy's numbers in it.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)  # into memory: torch's own writer reports a full disk as a RuntimeError
    try:
        torch.load(io.BytesIO(buffer.getbuffer()), weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            f"expected tensors, Python's numbers and text in the state of optimizer and scheduler, found "
            f"{found[1] if found else 'others'}: convert with float(), say"
        ) from None
    write_file(path, buffer.getbuffer(), keep=previous(path))


def previous(path: str | Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return Path(path).with_name(f"{Path(path).stem}.previous{Path(path).suffix}")


def set_aside(path: Path) -> Path:
    """Rename a file out of the way, by the time, and say to what."""
    aside = path.with_name(f"{path.stem}.{datetime.now():%Y%m%d-%H%M%S-%f}{path.suffix}")
    os.replace(path, aside)
    return aside


def generators(loaders: Iterable) -> list[torch.Generator]:
    """Those that `DataLoader`s and what is inside them were given for themselves."""
    found = (getattr(part, "generator", None) for loader in loaders for part in inside(loader))
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def random_state(*loaders: Iterable | None) -> dict:
    """The state of the global generators and of the loaders' own, as numbers and text."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": [generator.get_state() for generator in generators(loaders)],
    }


def set_random_state(state: dict, *loaders: Iterable | None) -> None:
    """Undo what was drawn since `random_state` gave that."""
    for generator, own in zip(generators(loaders), state["loader"]):
        generator.set_state(own)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within, the first Ctrl-C is only put into the list that this gives; the second is raised, as ever."""
    interrupted = []

    def note(number: int, frame: object) -> None:
        interrupted.append(number)
        if len(interrupted) > 1:
            raise KeyboardInterrupt

    # Only the main thread may set handlers, and a process that was started to ignore Ctrl-C goes on ignoring it.
    # One of several processes cannot stop between two steps by itself: the others would wait for it.
    main = threading.current_thread() is threading.main_thread()
    if not main or distributed.is_initialized() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------- files


def write_file(path: str | Path, content: bytes, keep: Path | None = None) -> None:
    """Write beside, flush and rename, so that `path` never holds half a file; what it held before goes to `keep`."""
    partial = Path(f"{path}.{os.getpid()}.partial")  # another process may be writing too
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and Path(path).exists():
            os.replace(path, keep)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(rows: list[dict], path: str | Path) -> None:
    """Write at least one row, all of the same keys, as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def save_weights(model: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the state dict as safetensors, with the metadata."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_file(path, save(state, metadata))

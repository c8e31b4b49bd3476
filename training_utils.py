"""Train an image classifier for an epoch (`train`), test it (`test`), or do both for a whole run (`fit`).

Nothing here knows the data set or the network. A loader is any iterable with a length that yields
(images, targets). Images are floats (B, C, H, W). Targets are classes (B,), or probabilities
(B, classes), as MixUp makes them: then the most probable class counts as right. A third part of a
batch, a teacher's probabilities, is learnt in place of the targets. Losses and accuracies are exact
over all samples, whatever the batch sizes. The processor waits for the device only when the
progress bar is redrawn; in float16, after every step.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from checkpoint import Run, parts_of_loader
from checks import check_arguments, check_optimizer, check_targets, tensors_of
from hardware import (
    GraphedStep,
    LossScaler,
    Network,
    StepFunction,
    autocast,
    compiled,
    describe_processor,
    evaluation_mode,
    forward,
    keep_freed_memory,
    keep_precision,
    overflow,
    processor,
    split_for_cache,
    usable_cores,
)
from identity import complete_recipe
from processes import (
    average_over_processes,
    check_same,
    check_share,
    from_rank_0,
    rank,
    share_of,
    share_weights,
    synchronize_batch_norm,
)
from totals import Totals
from weight_average import WeightAverage

REDRAW = 0.5  # seconds between two states of a progress bar


def fit(
    model: nn.Module,
    train_loader: Iterable,
    test_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
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
    """Train for `epochs` epochs and test after each; returns the history, one dict an epoch.

    The model ends up with the weights that were tested last. It is made channels-last and left in
    training mode. A model in evaluation mode is trained as a whole. In one in training mode,
    modules in evaluation mode stay so, which freezes batch norms. The scheduler is stepped after
    every batch, so its lengths count batches, not epochs. `set_epoch(epoch)` is called before
    each epoch on the loader, its samplers and its data set, if they have it. Ctrl-C, or a
    notebook's stop button, ends the run and keeps the epochs that are finished. The test results
    decide nothing.

    Under torchrun (see processes.py) each process trains on its share of every batch. Rank 0
    alone writes files and calls `on_epoch`. Ctrl-C ends such a run at once.

    Args:
        ema_decay: decay per step of a moving average of the weights, which is tested in place of
            the plain weights (Polyak and Juditsky 1992; Tarvainen and Valpola 2017,
            arXiv:1703.01780). At step t it is at most (1 + t) / (10 + t), so that a short run
            forgets its first steps, too. 0: no average.
        statistics: a loader of training images without augmentation, the classes mixed in each
            batch. Before each test the batch norms' statistics are computed from these, because
            augmented images have others.
        compile: use torch.compile, for images as large as the loader's first, or for each size of
            its `examples()`. It takes half a minute a size, which a long run earns back.
        history_file: a CSV file for the history, written after every epoch.
        checkpoint: a file that holds the whole run after its last epoch; see checkpoint.py. If the disk is
            full, the run warns, continues and tries again after the next epoch.
        resume: continue from the checkpoint, bit for bit on the same processor and in the same
            precision on any. The model must be as at the start, made from the same seed, or as
            `fit` left it. A finished run is loaded. Checkpoint and history of another run, or any
            if this is False, are kept under other names.
        recipe: what else tells this run from others: data, augmentation. Compared as text. `fit`
            adds its other arguments and the starting weights. Its keys take precedence.
        on_epoch: called with each row of the history, for TensorBoard, say.

    Returns:
        The history. Each row has epoch (from 1), train_loss, train_accuracy, test_loss,
        test_accuracy (in percent), learning_rate (of the epoch's first step) and seconds
        (training and test).

    Raises:
        ValueError: arguments out of range, an empty loader, an optimizer of another model, a
            scheduler of another optimizer, processes that were given different runs or unequal
            shares, or no good checkpoint among damaged ones. Nothing is overwritten then.
        TypeError: an optimizer or a scheduler whose `step` needs an argument, or whose state could
            be written but not read back; batches or logits of other kinds.
        OSError: the folder of a file cannot be made, or a folder is where a file would be.
        FloatingPointError: a loss or a weight became NaN or infinite. Such weights are never saved.
        KeyboardInterrupt: Ctrl-C in the first epoch, or in one of several processes.
    """
    check_arguments(epochs, ema_decay, train_loader, test_loader, statistics)
    steps = len(train_loader)
    check_optimizer(model, optimizer, scheduler, epochs * steps)
    device = prepare(model)
    average = WeightAverage(model, ema_decay)
    seed = from_rank_0(torch.initial_seed())
    loaders = [train_loader, test_loader, statistics]
    numbers = {"epochs": epochs, "ema_decay": ema_decay, "seed": seed}
    recipe = complete_recipe(recipe, model, optimizer, scheduler, loaders, **numbers)
    recipe["loaders"] = from_rank_0(recipe["loaders"])  # shares of a test may differ by a batch
    check_same(recipe, {"images of a process": share_of(train_loader)})
    scaler = LossScaler(model)
    parts = {"model": model, "average": average.module, "optimizer": optimizer, "scheduler": scheduler}
    parts["scaler"] = scaler
    run = Run(recipe, parts, [train_loader, statistics], checkpoint, history_file, processor(device))

    saved = from_rank_0(run.find(resume) if rank() == 0 else None)
    history = saved["history"] if saved else []
    run.precision = keep_precision(device, saved and saved["precision"])
    if len(history) < epochs:
        print(f"Training on {describe_processor(device)}, channels-last")
    compile = compile and len(history) < epochs
    step, tested = build_steps(model, average.module, optimizer, scaler, train_loader, test_loader, compile)
    if saved:  # only now, because building the steps draws random numbers
        run.restore(saved)
        average.updates = len(history) * steps - scaler.skipped
        if rank() == 0:
            run.complete_history(history)
    print()

    finished = history, average.weights()  # what Ctrl-C returns to
    try:
        for epoch in range(len(history) + 1, epochs + 1):
            print(f"Epoch {epoch}")
            start, learning_rate = time.perf_counter(), float(optimizer.param_groups[0]["lr"])
            start_epoch(train_loader, epoch, seed)
            try:
                train_loss, train_accuracy = train(
                    model, train_loader, optimizer, scheduler, step=step, after_step=average.update
                )
                finish_norms(model, average, statistics)
                test_loss, test_accuracy = test(average.module, test_loader, network=tested)
                average.check_finite()
            except FloatingPointError as error:
                raise FloatingPointError(f"epoch {epoch}: {error}; {run.last_good()}") from None
            row = {"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy}
            row |= {"test_loss": test_loss, "test_accuracy": test_accuracy}
            row |= {"learning_rate": learning_rate, "seconds": time.perf_counter() - start}
            history = [*history, row]
            if rank() == 0:
                run.save(history)
            finished = history, average.weights()
            if rank() == 0:
                on_epoch(dict(row))
    except KeyboardInterrupt:
        model.load_state_dict(finished[1])
        accept_interrupt(len(finished[0]), epochs)
    model.load_state_dict(finished[1])
    return finished[0]


def prepare(model: nn.Module) -> torch.device:
    """Make the model ready to train fast here: mode, memory layout, rank 0's weights in every process."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    training_mode(model).to(memory_format=torch.channels_last)
    share_weights(model)
    return device


def training_mode(model: nn.Module) -> nn.Module:
    """The model in training mode. If it is already, frozen modules stay in evaluation mode."""
    return model if model.training else model.train()


def start_epoch(loader: Iterable, epoch: int, seed: int) -> None:
    """Tell the loader which epoch it is; give every process but the first its own dropout masks."""
    if rank():
        torch.manual_seed(seed + 1_000_003 * epoch + rank())  # the same again when the run is resumed
    for part in parts_of_loader(loader):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def finish_norms(model: nn.Module, average: WeightAverage, statistics: Iterable | None) -> None:
    """Get the batch norms ready for a test: statistics of these images, the same in every process."""
    if statistics is not None:
        device = next(model.parameters()).device
        with autocast(device):
            average.measure_norms(tensors_of(batch, device)[0] for batch in statistics)
    running = [part for net in (model, average.module) for part in net.modules() if part.training]
    average_over_processes(buffer for part in running for buffer in part.buffers(recurse=False))
    average.copy_counters()


def accept_interrupt(finished_epochs: int, epochs: int) -> None:
    """Say that the run was stopped. Raises KeyboardInterrupt again if it cannot end well."""
    if distributed.is_initialized():
        raise  # the other processes would wait for this one
    if not finished_epochs:
        raise KeyboardInterrupt("interrupted in the first epoch: there is nothing to keep") from None
    print(
        f"Interrupted after {finished_epochs} of {epochs} epochs: "
        "history and weights are those of the last finished epoch"
    )


def build_steps(
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: LossScaler,
    train_loader: Iterable,
    test_loader: Iterable,
    compile: bool,
) -> tuple[StepFunction, Network | None]:
    """The fastest training step for this device, and a faster form of `average` for tests, or None."""
    device = next(model.parameters()).device
    on_cpu, several = device.type == "cpu", distributed.is_initialized()
    network, tested = model, None
    if several and not on_cpu:
        network = synchronize_batch_norm(model)  # torch.compile may not take it
    elif compile and device.type != "mps":  # for which torch's compiler is a prototype
        batches = getattr(train_loader, "examples", lambda: [next(iter(train_loader))])()
        network = compiled(model, *(tensors_of(batch, device)[0] for batch in batches))
        if on_cpu:  # on a GPU a test is too short to earn the compiler's time back
            images = tensors_of(next(iter(test_loader)), device)[0]
            with evaluation_mode(average):
                tested = compiled(average, split_for_cache(images)[0])
    step = gradient_step(model, optimizer, network, scaler)
    if compile and device.type == "cuda" and not several and not scaler.is_active():
        step = GraphedStep(step, optimizer)
    return step, tested


def gradient_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    network: Network | None = None,
    scaler: LossScaler | None = None,
) -> StepFunction:
    """Returns `step(images, targets, soft_targets=None)`: one optimizer step; returns the logits before it.

    In float16 a step may be skipped, which `scaler` counts; then the step returns None. Soft
    targets are a teacher's probabilities (B, classes). They are learnt in place of the targets.
    `network` computes the same as the model, faster (`compiled`) or with batch norm over all
    processes.
    """
    scaler = scaler or LossScaler(model)

    def step(
        images: torch.Tensor, targets: torch.Tensor, soft_targets: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        scaler.remember_buffers()
        logits = forward(network or model, images)
        learnt = targets if soft_targets is None else soft_targets
        check_targets(logits, learnt)
        loss = F.cross_entropy(logits, learnt)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        average_over_processes(p.grad for p in model.parameters() if p.grad is not None)
        return logits.detach() if scaler.step(optimizer) else None

    return step


def train(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    step: StepFunction | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Train for one epoch, with a progress bar; returns (mean loss, accuracy in percent) of all its samples.

    Each sample counts with the prediction that the model had when it saw it. The loss is against
    the targets, even if a teacher's answers are learnt, so that it compares with the loss of
    `test`. The scheduler is stepped after every batch. Modes are as in `fit`. A step that float16
    skips counts neither in the means nor for the scheduler.

    Args:
        step: a `gradient_step`; by default one of this model and optimizer.
        after_step: called after every step.

    Raises:
        FloatingPointError: the loss is NaN or infinite. At once on a CPU, within half a second on
            a GPU. In float16: all steps of an epoch, or too many of a run, have overflowed.
        ValueError: the loader is empty, the optimizer is of another model, shapes do not fit, or
            the processes had unequal shares.
        TypeError: batches that are no tuples of tensors, or hold integer images; a model that
            returns no tensor; an optimizer or a scheduler whose `step` needs an argument.
    """
    check_optimizer(model, optimizer, scheduler)
    device = next(model.parameters()).device
    step = step or gradient_step(model, optimizer)
    training_mode(model)
    totals = Totals()
    redraw_at = time.monotonic()
    with progress(loader, desc="Train") as bar:
        for batch_id, batch in enumerate(bar):
            images, targets, *answers = tensors_of(batch, device, 3)
            rate = optimizer.param_groups[0]["lr"] + 0  # a copy, because it may be a tensor
            logits = step(images, targets, *answers)
            if logits is not None:
                if scheduler is not None:
                    scheduler.step()
                after_step()
                totals.add(logits, targets, batch_id + 1, rate)
            last = batch_id + 1 == len(loader)
            redraw = last or time.monotonic() >= redraw_at
            if redraw or device.type == "cpu":
                totals.check_finite(len(loader))
            if last:
                if not totals.samples:
                    raise overflow(len(loader), rate)
                share = totals.samples
                totals.sum_over_processes()
                check_share(share, totals.samples)
            if redraw and totals.samples:
                loss, accuracy = totals.means()
                text = f"Train: Loss={loss:.4f} Batch_id={batch_id} Accuracy={accuracy:.2f}"
                bar.set_description(text, refresh=False)
                redraw_at = time.monotonic() + REDRAW
    return totals.means()


@torch.no_grad()
def test(model: nn.Module, loader: Iterable, *, network: Network | None = None) -> tuple[float, float]:
    """Print and return (mean loss, accuracy in percent) of all the loader's samples, in evaluation mode.

    `network` computes the same as the model in evaluation mode, faster: see `compiled`.

    Raises:
        ValueError: the loader is empty, or shapes do not fit.
        TypeError: batches that are no tuples of tensors, or hold integer images; a model that
            returns no tensor.
    """
    device = next(model.parameters()).device
    totals = Totals()
    with evaluation_mode(model):
        for batch in progress(loader, desc="Test", leave=False, delay=2):
            images, targets = tensors_of(batch, device)
            logits = [forward(network or model, part) for part in split_for_cache(images)]
            totals.add(torch.cat(logits), targets)
    totals.sum_over_processes()
    loss, accuracy = totals.means()
    score = f"{totals.correct}/{totals.samples} ({accuracy:.2f}%)"
    print(f"Test set: Average loss: {loss:.4f}, Accuracy: {score}\n")
    return loss, accuracy


@torch.no_grad()
def soft_targets(teacher: nn.Module, images: torch.Tensor, temperature: float) -> torch.Tensor:
    """A teacher's probabilities (B, classes) for a batch, from its logits divided by the temperature.

    Learning these in place of the labels is distillation: Hinton et al. 2015, arXiv:1503.02531.
    """
    with evaluation_mode(teacher):
        logits = [forward(teacher, part) for part in split_for_cache(images)]
    return torch.cat(logits).div(temperature).softmax(1)


def progress(loader: Iterable, **kwargs) -> tqdm:
    """A progress bar on standard output, so that a notebook keeps it among the printed lines."""
    return tqdm(loader, bar_format="{l_bar}{bar:10}{r_bar}", file=sys.stdout, mininterval=REDRAW, **kwargs)

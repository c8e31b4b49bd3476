"""Train a classifier one epoch, test it, and fit it for many. Knows no data set and no network.

A loader is any iterable of (images, targets) batches with a length: a `DataLoader`, say; see `train` for a third part.
What it, its samplers or its data set offer as `set_epoch(epoch)` is called before each epoch. Losses and accuracies are
exact over all samples, whatever the batch sizes: sums are kept on the device (see REDRAW). Nothing that is loaded here
can run code.
"""

import contextlib
import copy
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from checkpoint import describe, find_run, inside, random_state, save_checkpoint, set_random_state, write_csv
from hardware import autocast, compiled, forward, keep_freed_memory, precision, replayed
from processes import agree, over_processes

REDRAW = 0.5  # seconds between two states of a progress bar, the only moments when the processor waits for the device


def progress(loader: Iterable, **kwargs) -> tqdm:
    """A bar on standard output, where the lines around it are, so that a notebook keeps them in one place."""
    return tqdm(loader, bar_format="{l_bar}{bar:10}{r_bar}", file=sys.stdout, mininterval=REDRAW, **kwargs)


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

"""Training runs on disk: checkpoints that survive crashes, and that know which run they belong to.

A checkpoint is written beside the old one and renamed into place, so `path` never holds half a
file. The checkpoint before it is kept as NAME.previous.EXT. Reading a checkpoint never runs code.
"""

import contextlib
import csv
import io
import os
import pickle
import random
import re
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.utils.data import ConcatDataset

KEYS = {"recipe", "model", "average", "optimizer", "random", "history"}
# Keys of a recipe that another processor, or another number of processes, may make different.
START = ("starting weights", "start of the optimizer", "loaders")


@dataclass
class Run:
    """A training run: what a checkpoint holds of it, and in which files.

    Args:
        recipe: texts that tell this run from others. A checkpoint of another recipe is not resumed.
        parts: whatever has a state_dict, by name, or None; model and average among them.
        loaders: whose own random generators are saved, too.
        checkpoint, history_file: where to write, or None. Their folders are made.
        processor: its name. On another one, the start of a run may have been computed differently.
    """

    recipe: dict[str, str]
    parts: dict[str, object]
    loaders: list[Iterable | None]
    checkpoint: str | Path | None
    history_file: str | Path | None
    processor: str
    precision: torch.dtype | None = None
    epochs_on_disk: int = 0

    def __post_init__(self):
        self.parts = {name: part for name, part in self.parts.items() if part is not None}
        self.checkpoint = with_folder(self.checkpoint)
        self.history_file = with_folder(self.history_file)
        if self.checkpoint is not None and self.checkpoint == self.history_file:
            raise ValueError(
                f"expected two files, found {self.checkpoint} for both: name another history_file"
            )

    def find(self, resume: bool) -> dict | None:
        """The checkpoint's state if it is of this very run, else None.

        Prints what there is, and why it is not resumed. The files of another run are renamed.
        """
        state = load_checkpoint(self.checkpoint) if resume and self.checkpoint is not None else None
        change = self.change_since(state) if state else None
        if state and not change:
            self.announce(state)
            self.recipe, self.processor = state["recipe"], state["processor"]  # those of its start
            return state
        reason = "is of an earlier run" if resume else "is not resumed, as asked"
        if change:
            reason = f"is of another run ({change})"
        files = [self.checkpoint, self.checkpoint and previous(self.checkpoint), self.history_file]
        files = [file for file in files if file is not None and is_stored(file)]
        if files:
            names = " and ".join(str(set_aside(file)) for file in files)
            print(f"{files[0]} {reason}: kept as {names}, starting with epoch 1")
        return None

    def change_since(self, state: dict) -> str | None:
        """What makes this another run than the checkpoint's, as a text; None if nothing does."""
        average = state["average"]
        weights = {name: tensor.cpu() for name, tensor in self.parts["model"].state_dict().items()}
        # `fit` leaves the model with these weights. Called with it again, the run continues.
        same_model = weights.keys() == average.keys()
        same_model = same_model and all(torch.equal(weights[name], average[name]) for name in weights)
        recipe = state["recipe"]
        own_recipe = self.recipe
        if same_model or state.get("processor") != self.processor:
            own_recipe = self.recipe | {key: recipe[key] for key in START if key in recipe}
        change = difference(recipe, own_recipe)
        if not change and not self.parts.keys() <= state.keys():
            change = "an earlier version of this code wrote it"
        return change

    def announce(self, state: dict) -> None:
        """Print the epochs that are finished."""
        history, epochs = state["history"], int(self.recipe["epochs"])
        print(f"{self.checkpoint} holds {len(history)} of {epochs} epochs of this run:")
        for row in history:
            print(
                "Epoch {epoch}: Train: Loss={train_loss:.4f} Accuracy={train_accuracy:.2f}, Test set: "
                "Average loss: {test_loss:.4f}, Accuracy: {test_accuracy:.2f}%".format(**row)
            )
        if len(history) == epochs:
            print("Nothing is left to train. To train again: resume=False")
        else:
            if state["processor"] != self.processor:
                print(f"It was begun on {state['processor']}: on {self.processor} the last bits will differ")
            print(f"Continuing at learning rate {state['optimizer']['param_groups'][0]['lr']:.4g}")

    def restore(self, state: dict) -> None:
        """Load every part and the random state."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        set_random_state(state["random"], self.loaders)
        self.epochs_on_disk = len(state["history"])

    def save(self, history: list[dict]) -> None:
        """Write checkpoint and history. A full disk costs a warning, not the run."""
        try:
            if self.checkpoint is not None:
                state = {name: part.state_dict() for name, part in self.parts.items()}
                state["recipe"] = self.recipe
                state["random"] = random_state(self.loaders)
                state["processor"], state["precision"] = self.processor, self.precision
                state["history"] = history
                save_checkpoint(state, self.checkpoint)
                self.epochs_on_disk = len(history)
            if self.history_file is not None:
                write_csv(history, self.history_file)
        except OSError as error:
            message = f"epoch {len(history)} could not be saved ({error}): {self.last_good()}"
            warnings.warn(message, stacklevel=3)

    def complete_history(self, history: list[dict]) -> None:
        """Write the history alone: a killed run may have saved a checkpoint without its last row."""
        if self.history_file is None or not history:
            return
        try:
            if is_stored(self.history_file) and not is_beginning(self.history_file, history):
                print(f"{self.history_file} is of another run: kept as {set_aside(self.history_file)}")
            write_csv(history, self.history_file)
        except OSError as error:
            message = f"{self.history_file} could not be written ({error}): the run continues"
            warnings.warn(message, stacklevel=3)

    def last_good(self) -> str:
        """Where the last good weights are, for error messages."""
        if not self.epochs_on_disk:
            return "no checkpoint was saved"
        return f"{self.checkpoint} is as it was after epoch {self.epochs_on_disk}"


# ---------------------------------------------------------------- which run it is


def difference(old: dict[str, str], new: dict[str, str]) -> str | None:
    """The first difference of two recipes, as a text to read; None if there is none."""
    for key in [*new, *old]:
        before, after = old.get(key, "not given"), new.get(key, "not given")
        if before != after:
            # Of long texts only the place where they differ is shown.
            start = max(0, len(os.path.commonprefix([before, after])) - 30)
            return f"{key} was {before[start : start + 60]}, is {after[start : start + 60]}"
    return None


# ---------------------------------------------------------------- reading and writing checkpoints


def load_checkpoint(path: str | Path) -> dict | None:
    """The state that was saved at `path`, or else the one before it; None if there is neither.

    A damaged file is renamed, with a warning, and the one before it is used.

    Raises:
        ValueError: all that is there is damaged. Nothing is renamed then.
    """
    problems = {}
    for file in (Path(path), previous(path)):
        if not is_stored(file):
            continue
        try:
            state = read_checkpoint(file)
        except Exception as error:  # damaged bytes can make the parsers raise anything
            problems[file] = str(error).partition("\n")[0]
            continue
        if problems:
            reason = problems[Path(path)]
            message = f"{path} is unusable ({reason}), kept as {set_aside(Path(path))}: using {file}"
            warnings.warn(message, stacklevel=4)
        return state
    if problems:
        files = " and ".join(f"{file} ({reason})" for file, reason in problems.items())
        raise ValueError(
            f"expected a checkpoint of fit, found unusable {files}: move what is there away to start again"
        )
    return None


def read_checkpoint(file: Path) -> dict:
    """The state in one file. ValueError, or another error of the parsers, if it is damaged or another's."""
    with zipfile.ZipFile(file) as archive:  # torch.load does not check the checksums
        size, limit = sum(part.file_size for part in archive.infolist()), file.stat().st_size
        if size > limit:  # torch compresses nothing
            raise ValueError(f"{limit:,} bytes that unpack to {size:,}")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or KEYS - state.keys():
        raise ValueError("not a checkpoint of fit")
    return state


def save_checkpoint(state: dict, path: Path) -> None:
    """Write the state to `path`; what was there before moves to `previous(path)`.

    Raises:
        TypeError: the state could be written but not read back, because it holds NumPy numbers,
            say.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)  # into memory first: torch reports a full disk as a RuntimeError
    try:
        torch.load(io.BytesIO(buffer.getbuffer()), weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)|$", str(error))[1] or "others"
        raise TypeError(
            "expected tensors, Python's numbers and text in the state of optimizer and scheduler, "
            f"found {name}: convert with float(), say"
        ) from None
    write_file(path, buffer.getbuffer(), backup=previous(path))


def previous(path: str | Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    path = behind_links(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def set_aside(path: Path) -> Path:
    """Rename a file to a name with the current time; returns the new path. A link to it stays."""
    path = behind_links(path)
    aside = path.with_name(f"{path.stem}.{datetime.now():%Y%m%d-%H%M%S-%f}{path.suffix}")
    os.replace(path, aside)
    return aside


# ---------------------------------------------------------------- random state


def parts_of_loader(loader: Iterable | None) -> list:
    """The loader with its samplers and data sets, also those inside a `Subset` or a `ConcatDataset`."""
    parts = [loader]
    for part in parts:  # the list grows while it is read
        inner = [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset")]
        if isinstance(part, ConcatDataset):
            inner += part.datasets
        for item in inner:
            if item is not None and not any(item is known for known in parts):
                parts.append(item)
    return parts


def generators(loaders: Iterable) -> list[torch.Generator]:
    """The random generators that loaders or their parts have for themselves."""
    candidates = [getattr(part, "generator", None) for loader in loaders for part in parts_of_loader(loader)]
    return [candidate for candidate in candidates if isinstance(candidate, torch.Generator)]


def accelerators() -> list[tuple[Callable, Callable]]:
    """For each accelerator, the functions that get and set its random state."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return []
    module = torch.get_device_module(device)
    if device.type == "mps":  # there is one
        return [(module.get_rng_state, module.set_rng_state)]
    return [
        (partial(module.get_rng_state, number), partial(module.set_rng_state, device=number))
        for number in range(module.device_count())
    ]


def random_state(loaders: Iterable) -> dict:
    """The state of Python's, NumPy's and torch's generators and of the loaders' own."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "accelerators": [get_state() for get_state, _ in accelerators()],
        "loader": [generator.get_state() for generator in generators(loaders)],
    }


def set_random_state(state: dict, loaders: Iterable) -> None:
    """Return to a state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    own_shapes = [get_state().shape for get_state, _ in accelerators()]
    # Another number of GPUs, or another kind, has states of other shapes, and keeps its own.
    if [value.shape for value in state["accelerators"]] == own_shapes:
        for (_, set_state), value in zip(accelerators(), state["accelerators"]):
            set_state(value)
    for generator, value in zip(generators(loaders), state["loader"]):
        generator.set_state(value)


# ---------------------------------------------------------------- files


def with_folder(path: str | Path | None) -> Path | None:
    """The path, in a folder that now exists; None for None."""
    if path is None:
        return None
    if Path(path).is_dir():
        raise IsADirectoryError(f"expected a file, found the folder {path}: name a file in it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def write_file(path: str | Path, content: bytes, backup: Path | None = None) -> None:
    """Write beside, flush and rename: `path` never holds half a file. Its old content goes to `backup`.

    A link stays: the file that it points to is replaced, and keeps its permissions. Into a pipe, a
    device or the output of this process (/dev/stdout), the content is written at once.
    """
    stream = stream_at(path)
    if stream is not None:
        with open(stream, "wb", closefd=stream not in (1, 2)) as file:
            file.write(content)
        return
    path = behind_links(path)
    partial = Path(f"{path}.{os.getpid()}.partial")  # another process may write the same file
    try:
        with open(partial, "wb") as file:
            if path.exists():
                shutil.copymode(path, partial)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def behind_links(path: str | Path) -> Path:
    """The file that a link points to, which may be missing; any other path as it is."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def is_stored(path: str | Path) -> bool:
    """Whether there is a file at `path`, not a pipe or a device: something to read or to keep."""
    return Path(path).exists() and stream_at(path) is None


def stream_at(path: str | Path) -> str | Path | int | None:
    """What to open to write into a pipe, a device or this process's output; None for any other file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    for output in (1, 2):  # /dev/stdout may be a regular file, of which others wrote the beginning
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(status, os.fstat(output)):
                return output
    return None if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else path


def is_beginning(path: Path, rows: list[dict]) -> bool:
    """Whether the rows of a CSV file are these, as far as both go."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        found = list(csv.DictReader(file))
    expected = [{key: str(value) for key, value in row.items()} for row in rows]
    both = min(len(found), len(rows))
    return found[:both] == expected[:both]


def write_csv(rows: list[dict], path: str | Path) -> None:
    """Write at least one row, all with the same keys, as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def save_weights(model: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the state dict and the metadata as safetensors; a tensor with two names is written twice."""
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    write_file(path, save(state, metadata))


def save_figure(figure, path: str | Path) -> None:
    """Write a matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_file(path, content.getvalue())

"""A run on disk."""

import csv
import io
import os
import pickle
import random
import re
import warnings
import zipfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.utils.data import ConcatDataset


def inside(loader: Iterable) -> list:
    """The loader, its samplers and its data set, with what a `Subset` or a `ConcatDataset` is of: they may count epochs, or draw."""
    found = [loader]
    for part in found:  # which grows meanwhile
        others = [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset")]
        others += part.datasets if isinstance(part, ConcatDataset) else []
        found += [other for other in others if other is not None and not any(other is known for known in found)]
    return found


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

"""Which training run it is: everything that changes its result, as texts. Needs torch and nothing else."""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterable
from types import CodeType, FunctionType

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


def complete_recipe(
    recipe: dict[str, object] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    loaders: list[Iterable | None],
    *,
    epochs: int,
    ema_decay: float,
    seed: int,
) -> dict[str, str]:
    """All that tells this run from others. The loaders are those of training, test and statistics."""
    evaluating = [name for name, module in model.named_modules() if not module.training]
    start = [optimizer.state_dict(), scheduler.state_dict() if scheduler is not None else None]
    complete = {
        **(recipe or {}),
        "epochs": epochs,
        "steps an epoch": len(loaders[0]),
        "training loader": type(loaders[0]).__name__,  # some make images small at first
        "statistics": "running" if loaders[2] is None else "from images without augmentation",
        "decay of the average": ema_decay,
        "model": model,
        "modules in evaluation mode": evaluating,
        **describe(optimizer, scheduler),
        "torch's seed": seed,
        "loaders": [describe_loader(loader) for loader in loaders if loader is not None],
        "starting weights": digest(model.state_dict()),
        "start of the optimizer": digest(start),
    }
    return {key: text_of(value) for key, value in complete.items()}


def text_of(value: object) -> str:
    """The value in one line. Functions are printed without their address, and tensors as numbers."""
    return " ".join(re.sub(" at 0x[0-9a-f]+", "", str(without_tensors(value))).split())


def without_tensors(value: object) -> object:
    """Dicts, lists and tuples with Python's numbers in place of tensors, whose text is rounded."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if type(value) is dict:
        return {key: without_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_tensors(item) for item in value)
    return value


def digest(value: object) -> str:
    """Sixteen hexadecimal digits of everything in nested dicts and lists, tensors to the last bit."""
    sha = hashlib.sha256()

    def add(item: object) -> None:
        if isinstance(item, torch.Tensor):
            sha.update(f"{item.dtype} {tuple(item.shape)}".encode())
            sha.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(item, (dict, list, tuple)):
            for part in item.items() if isinstance(item, dict) else item:
                add(part)
        else:
            sha.update(text_of(item).encode())

    add(value)
    return sha.hexdigest()[:16]


def describe_loader(loader: Iterable) -> str:
    size = getattr(loader, "batch_size", None)
    return f"{type(loader).__name__} of {len(loader)} batches" + (f" of {size}" if size else "")


def describe(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> dict[str, object]:
    """All options of optimizer and scheduler, except those that training changes."""
    description = {"optimizer": type(optimizer).__name__}
    for i, group in enumerate(optimizer.param_groups):
        changing = {"params"}
        if scheduler is not None:
            changing.add("lr")
            if "max_momentum" in group:
                changing |= {"momentum", "betas"}
        trained = sum(p.numel() for p in group["params"] if p.requires_grad)
        options = {key: value for key, value in group.items() if key not in changing}
        description[f"parameters {i}"] = text_of({"trained": trained, **options})
    settings = schedule_settings(scheduler.state_dict()) if scheduler is not None else {}
    functions = digest(codes_of_functions(scheduler))
    return description | {
        "schedule": text_of(f"{type(scheduler).__name__} {settings}, functions {functions}")
    }


COUNTERS = {
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_get_lr_called_within_step",
    "_is_initial",
    "T_cur",
    "T_i",
}


def schedule_settings(state: dict) -> dict:
    """A scheduler's state without what its steps change, also inside a `SequentialLR`."""
    settings = {key: without_tensors(value) for key, value in state.items() if key not in COUNTERS}
    if "_schedulers" in settings:
        settings["_schedulers"] = [schedule_settings(part) for part in state["_schedulers"]]
    return settings


def codes_of_functions(scheduler: LRScheduler | None) -> list[list]:
    """The code of each function of a `LambdaLR`, because its state does not hold it.

    A function is not called: it may count its calls or draw random numbers.
    """
    parts = [scheduler, *getattr(scheduler, "_schedulers", [])]
    return [code_of(function, ()) for part in parts for function in getattr(part, "lr_lambdas", [])]


def code_of(item: object, outer: tuple) -> list:
    """A function's instructions, constants, enclosed values and what it uses of its own module.

    Of the module these are functions and numbers. Of anything but a function it is the text.
    `outer` are the functions that enclose or use this one, which may enclose or use itself.
    """
    if any(item is other for other in outer):
        return []
    if isinstance(item, CodeType):
        constants = [code_of(constant, outer) for constant in item.co_consts]
        return [item.co_code.hex(), item.co_names, constants]
    if not isinstance(item, FunctionType):
        return [text_of(item)]
    enclosed = []
    for cell in item.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty still
            enclosed.append(code_of(cell.cell_contents, (*outer, item)))
    for name in names_in(item.__code__):
        value = item.__globals__.get(name)
        if isinstance(value, (int, float)) or getattr(value, "__globals__", None) is item.__globals__:
            enclosed.append(code_of(value, (*outer, item)))
    return [code_of(item.__code__, outer), text_of(item.__defaults__), enclosed]


def names_in(code: CodeType) -> list[str]:
    """The names that a function and those inside it look up."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *itertools.chain(*inner)]

"""Several training processes, started by torchrun: who this one is, and how all of them agree.

Without torchrun there is one process, and every function here does the right thing for it.
"""

import atexit
import copy
import math
import os
import sys
from collections.abc import Iterable

import torch
from torch import distributed, nn

from hardware import best_device


def join_processes() -> tuple[torch.device, int, int]:
    """Join the processes that `torchrun` started; returns (device, rank, number of processes).

    Without torchrun: the accelerator if there is one, else the CPU, and rank 0 of 1. Each process
    takes its own GPU and they talk through NCCL (CUDA) or its counterpart, on CPUs through gloo. From
    here on only rank 0 prints.

    Raises:
        RuntimeError: more processes than GPUs.
    """
    device = best_device()
    if not distributed.is_torchelastic_launched():
        return device, 0, 1
    if device.type == "mps":  # a Mac's GPU works for one process only
        device = torch.device("cpu")
    if device.type == "cpu":
        distributed.init_process_group("gloo")
        # A gloo thread that is alive while Python shuts down aborts the process.
        atexit.register(leave_processes)
    else:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if local >= gpus:
            raise RuntimeError(f"expected a GPU for each process, found {gpus}: lower --nproc-per-node")
        torch.accelerator.set_device_index(local)
        distributed.init_process_group(distributed.get_default_backend_for_device(device))
        device = torch.device(device.type, local)
    if distributed.get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device, distributed.get_rank(), distributed.get_world_size()


def leave_processes() -> None:
    """Stop being one of several processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number; 0 if it is the only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@torch.no_grad()
def average_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each floating-point tensor by its mean over all processes.

    One flat message, not DistributedDataParallel: that sums in buckets, which it rearranges after the
    first step. With three processes or more, a resumed run would round differently from one that was
    never stopped.
    """
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not distributed.is_initialized() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.copy_(part.view_as(tensor))


def sum_over_processes(*numbers: float) -> list[float]:
    """The sum of each number over all processes, the same in each, rounded once."""
    rows = [numbers]
    if distributed.is_initialized():
        rows = [None] * distributed.get_world_size()
        distributed.all_gather_object(rows, numbers)
    return [math.fsum(column) for column in zip(*rows)]


def from_rank_0(value):
    """Returns rank 0's value in every process."""
    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]


def share_weights(model: nn.Module) -> None:
    """Give every process the weights of rank 0."""
    if distributed.is_initialized():
        for tensor in model.state_dict().values():
            distributed.broadcast(tensor, 0)


def check_same(recipe: dict[str, str], share: dict[str, str]) -> None:
    """Raise ValueError unless all processes were given the same run, and equal shares of its images."""
    if not distributed.is_initialized():
        return
    recipe = recipe | share
    recipes = [None] * distributed.get_world_size()
    distributed.all_gather_object(recipes, recipe)
    for key in recipe:
        if any(other.get(key) != recipe[key] for other in recipes):
            raise ValueError(
                f"expected one run on all processes, found several by {key!r}: "
                "give all the same data and options"
            )


def check_share(images: int, total: float) -> None:
    """Raise ValueError unless this process learnt from as many images as each of the others.

    Their gradients count the same in the average, so that in unequal shares an image would not.
    """
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    if images * processes != total:
        raise ValueError(
            f"expected equal shares on {processes} processes, found {images} of {total:.0f} images on one: "
            "leave out the last few"
        )


def share_of(loader: Iterable) -> str:
    """How many images of an epoch this process gets, if a sampler tells."""
    sampler = getattr(loader, "sampler", None)
    return str(len(sampler)) if hasattr(sampler, "__len__") else "unknown"


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """The same weights in a network whose batch norms see the batches of all processes. GPUs only."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(same_tensors(model))


def same_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares all parameters and buffers with the model."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)

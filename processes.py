"""Several processes that train as one."""

import atexit
import os
import sys
from collections.abc import Iterable

import torch
from torch import distributed


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

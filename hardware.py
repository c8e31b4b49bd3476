"""What makes a step fast on the machine at hand."""

import copy
import ctypes
import functools
import logging
import sys
import time
import timeit
from collections.abc import Callable

import torch
from torch import distributed, nn


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

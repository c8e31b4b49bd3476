"""Speed on the machine at hand: device, precision, compilation, CUDA graphs, memory. For any image model."""

import contextlib
import copy
import ctypes
import logging
import os
import platform
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import distributed, nn

Network = Callable[[torch.Tensor], torch.Tensor]  # images (B, C, H, W) to logits (B, classes)
# Learns from a batch (images, targets, ...). Returns its logits, or None if the step was skipped.
StepFunction = Callable[..., torch.Tensor | None]


# ---------------------------------------------------------------- device and precision


PRECISIONS: dict[str, torch.dtype] = {}  # of each type of device, chosen once


def best_device() -> torch.device:
    """The accelerator that torch finds here (CUDA, ROCm, MPS, XPU), else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def precision(device: torch.device) -> torch.dtype:
    """The fastest of bfloat16, float16 and float32 on this device. A resumed run keeps its own.

    A GPU is judged by its generation: NVIDIA's have bfloat16 from compute capability 8.0 on, and
    float16 from 7.0 on. A CPU is measured, because some list the bfloat16 instructions and run
    them no faster than float32. A Mac's GPU computes in float32.
    """
    if device.type not in PRECISIONS:
        choice = torch.float32
        if device.type == "cuda":
            generation, _ = torch.cuda.get_device_capability(device)
            if generation >= 7:
                choice = torch.bfloat16 if generation >= 8 else torch.float16
        elif device.type == "xpu" or (device.type == "cpu" and cpu_is_fast_in_bfloat16()):
            choice = torch.bfloat16
        PRECISIONS[device.type] = choice
    return PRECISIONS[device.type]


def keep_precision(device: torch.device, earlier: torch.dtype | None) -> torch.dtype:
    """The precision of this device, from now on the one of an earlier run if one is given."""
    if earlier is not None:
        PRECISIONS[device.type] = earlier
    return precision(device)


def cpu_is_fast_in_bfloat16() -> bool:
    """Whether a matrix product takes less than 0.7 of float32's time; rank 0's answer in every process.

    Measures the processor time of one thread, which does not depend on what else the machine does.
    """
    half, full = (torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    clock = time.perf_counter if sys.platform == "win32" else time.thread_time  # there it ticks every 16 ms
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        half_seconds, full_seconds = [], []
        for _ in range(10):  # the first round warms up
            half_seconds.append(timeit.timeit(lambda: half @ half, timer=clock, number=1))
            full_seconds.append(timeit.timeit(lambda: full @ full, timer=clock, number=1))
    finally:
        torch.set_num_threads(threads)
    # If there is a difference, it is large. The margin keeps two runs on one machine from
    # disagreeing.
    faster = torch.tensor(min(half_seconds) < 0.7 * min(full_seconds))
    if distributed.is_initialized():
        distributed.broadcast(faster, 0)
    return bool(faster)


def processor(device: torch.device) -> str:
    """The model of the processor, and the number of processes: on others a run rounds differently."""
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    return f"{processes} x {cpu_model() if device.type == 'cpu' else accelerator_name(device)}"


def accelerator_name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    if hasattr(module, "get_device_name"):
        return module.get_device_name(device)
    return f"{device.type.upper()} on {cpu_model()}"  # a Mac's GPU is a part of its processor


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of cores that this process may use: those of its affinity, or fewer in a limited container.

    torch's threads follow the affinity alone. A limit is a share of time, rounded up to whole cores here:
    more threads than that would wait for each other.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    limit = []  # the processor time of a period, or "max" or -1; and the period
    with contextlib.suppress(OSError):  # of version 2
        limit += (cgroup / "cpu.max").read_text().split()
    with contextlib.suppress(OSError):  # of version 1
        limit += [(cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]
    if limit and limit[0].isdigit():
        cores = min(cores, -(-int(limit[0]) // int(limit[1])))
    return cores


def describe_processor(device: torch.device) -> str:
    """Where and in which precision a model on this device runs, as a text."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type != "cpu":
        name = accelerator_name(device)
    if distributed.is_initialized():
        name += f", in each of {distributed.get_world_size()} processes"
    return f"{name}, in {str(precision(device)).removeprefix('torch.')}"


def autocast(device: torch.device) -> torch.autocast:
    """The context in which every model runs here: mixed precision if `precision` says so."""
    dtype = precision(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def forward(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Logits (B, classes) in float32, or float64 from a float64 network; computed in mixed precision."""
    with autocast(images.device):
        logits = network(images.contiguous(memory_format=torch.channels_last))
    if not isinstance(logits, torch.Tensor):
        found = type(logits).__name__
        raise TypeError(f"expected a model that returns logits (B, classes), found {found}: pick its tensor")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class LossScaler:
    """Loss scaling for training in float16; in any other precision, plain steps.

    Small gradients are 0 in float16. So the loss is multiplied by a large factor first, and the
    gradients are divided by it afterwards. If they overflow, the step is skipped and the factor
    is halved. Paper: Micikevicius et al. 2018, arXiv:1710.03740. After a skipped step everything
    is as before it, the batch norms' statistics, too.

    Attributes:
        skipped: how many steps were skipped.
    """

    SMALLEST = 2.0**-16  # A factor this small keeps no gradient. The run counts as diverged.

    def __init__(self, model: nn.Module):
        self.device = next(model.parameters()).device
        self.buffers = list(model.buffers())
        self.before: list[torch.Tensor] = []
        self.scaler = torch.amp.GradScaler(self.device.type)
        self.skipped = 0

    def is_active(self) -> bool:
        return precision(self.device) == torch.float16

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss) if self.is_active() else loss

    def remember_buffers(self) -> None:
        """Call this before the forward pass, which changes the batch norms' statistics."""
        if self.is_active():
            self.before = [buffer.clone() for buffer in self.buffers]

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """The optimizer's step, unless a gradient is not finite. Returns whether it was done.

        Raises:
            FloatingPointError: so many steps were skipped that the factor is not the reason.
        """
        if not self.is_active():
            optimizer.step()
            return True
        factor = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= factor:
            return True
        self.skipped += 1
        for buffer, value in zip(self.buffers, self.before):
            buffer.copy_(value)
        if self.scaler.get_scale() <= self.SMALLEST:
            raise overflow(self.skipped, optimizer.param_groups[0]["lr"])
        return False

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = state["skipped"]
        self.scaler.load_state_dict(state["scaler"])


def overflow(steps: int, rate: float) -> FloatingPointError:
    return FloatingPointError(
        f"expected finite gradients in float16, found others in {steps} steps, the last "
        f"at learning rate {float(rate):.4g}: lower it, or look for NaN in the images"
    )


# ---------------------------------------------------------------- testing


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the whole model is in evaluation mode. Afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def split_for_cache(images: torch.Tensor) -> Sequence[torch.Tensor]:
    """A test batch in the parts that run fastest: 100 images on a CPU, to fit its cache; else the whole."""
    return images.split(100) if images.device.type == "cpu" else [images]


# ---------------------------------------------------------------- speed


def compiled(model: nn.Module, *examples: torch.Tensor) -> Network:
    """The model, compiled for batches of the examples' shapes. Other shapes run uncompiled.

    If compilation fails, prints why and returns the model itself. A failure may appear as late as
    the first backward pass, so one is tried here. The model and the random state stay as they
    were. A model in evaluation mode is compiled for use without gradients.
    """
    # Without a GPU but with a CUDA compiler, this logger warns of things that nobody asked for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    state = copy.deepcopy(model.state_dict())
    fast = torch.compile(model, dynamic=False)
    gpus = [examples[0].device] if examples[0].is_cuda else []
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(gpus), torch.set_grad_enabled(model.training):
            for images in examples:
                logits = forward(fast, images)
                if model.training:
                    logits.sum().backward()
    except Exception as error:  # a compiler may raise anything, and the run does not depend on it
        print(f"torch.compile fails here ({type(error).__name__}): continuing without it")
        return model
    finally:
        model.load_state_dict(state)
        model.zero_grad()
    kind = "training" if model.training else "test"
    print(f"torch.compile took {time.perf_counter() - start:.0f} s for the {kind} step")
    shapes = {images.shape for images in examples}
    return lambda batch: fast(batch) if batch.shape in shapes else model(batch)


class GraphedStep:
    """A training step on a GPU as a CUDA graph: one call in place of a thousand kernel launches.

    Three batches run normally, the fourth is recorded, later ones replay the recording with the
    learning rates of the moment. The model must do the same operations for every batch. A batch
    of another shape runs normally, and so does a step after a change of another optimizer option.
    If recording fails, a line says why and everything runs normally.
    """

    def __init__(self, step: StepFunction, optimizer: torch.optim.Optimizer):
        self.step = step
        self.optimizer = optimizer
        self.calls = 0
        self.graph = None
        self.device = optimizer.param_groups[0]["params"][0].device
        self.stream = torch.cuda.Stream(self.device)
        self.rates = [torch.zeros((), device=self.device) for _ in optimizer.param_groups]

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls < 4:
            return self.warm_up(*batch)
        if self.calls == 4:
            try:
                self.record(*batch)
            except Exception as error:  # a model may do anything that cannot be recorded
                reason = f"{type(error).__name__}: {error}"
                print(f"a CUDA graph cannot be recorded here ({reason}): continuing without it")
        return self.replay(*batch) if self.matches(*batch) else self.step(*batch)

    def warm_up(self, *batch: torch.Tensor) -> torch.Tensor:
        """A normal step, on the stream that will record, as CUDA graphs require."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            logits = self.step(*batch)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return logits

    def record(self, images: torch.Tensor, *others: torch.Tensor) -> None:
        for values in self.optimizer.state.values():
            for value in values.values():
                if value is not None and not (isinstance(value, torch.Tensor) and value.is_cuda):
                    raise RuntimeError(f"{type(self.optimizer).__name__} keeps numbers outside the GPU")
        self.batch = [images.clone(memory_format=torch.channels_last), *(part.clone() for part in others)]
        self.recorded_options = self.options()
        graph = torch.cuda.CUDAGraph()
        numbers = [group["lr"] for group in self.optimizer.param_groups]
        try:
            self.set_rates(self.rates)
            with torch.cuda.graph(graph, stream=self.stream):
                self.logits = self.step(*self.batch)
        finally:
            self.set_rates(numbers)
        self.graph = graph

    def replay(self, *batch: torch.Tensor) -> torch.Tensor:
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            rate.fill_(group["lr"])
        for place, part in zip(self.batch, batch):
            place.copy_(part)
        self.graph.replay()
        return self.logits

    def matches(self, *batch: torch.Tensor) -> bool:
        """Whether the recording is of batches and options like these."""
        if self.graph is None or self.options() != self.recorded_options:
            return False
        return [part.shape for part in batch] == [part.shape for part in self.batch]

    def options(self) -> list[dict]:
        """The optimizer's options, without the learning rates, which may change."""
        skipped = ("params", "lr")
        groups = self.optimizer.param_groups
        return [{key: value for key, value in group.items() if key not in skipped} for group in groups]

    def set_rates(self, rates: list) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensors instead of giving it back to the system.

    A training step on the CPU frees and takes hundreds of megabytes, and mapping them again takes
    time. Does nothing on other systems than Linux with glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never map a block by itself
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes

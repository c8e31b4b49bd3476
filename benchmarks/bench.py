"""The speed of each part of a training run, beside what people would use instead: `make bench`.

    python benchmarks/bench.py               all parts; some take a minute, some several
    python benchmarks/bench.py input step    two of them; the others keep their rows of the table

The table is assets/bench.csv, and assets/bench.png is drawn from it. The rows of `input`, `step` and `epoch`
take turns in one process, for several rounds. The table gives the median rate and its ratio to the first row,
which is the way of the project that this one grew from (original.py). Every other way is as fast as its own
experts would make it (peers.py). Machines differ and are noisy, so the ratios within one run say more than
the rates.
"""

import contextlib
import copy
import csv
import functools
import io
import multiprocessing
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import original
import peers
from batches import BatchLoader, BatchTransform
from checkpoint import save_figure, write_csv
from dataset import CLASSES, AlbumentationsCIFAR10, AlbumentationsImages, test_transform
from hardware import (
    compiled,
    describe_processor,
    keep_freed_memory,
    precision,
    split_for_cache,
    usable_cores,
)
from model import Net
from peers import random_batch, sgd
from training_utils import fit, gradient_step, test, train
from utils import predict

DEVICE = original.DEVICE
TABLE = ROOT / "assets" / "bench.csv"
FIELDS = ("part", "row", "value", "unit", "ratio")


# ---------------------------------------------------------------- measuring


@dataclass
class Row:
    """One row of a table: `work` handles some images and returns how many."""

    work: Callable[[], int]
    prepare: Callable[[], object] = lambda: None  # before each round, not timed


def in_turn(rows: dict[str, Row], rounds: int = 5) -> dict[str, float]:
    """The median images/s of each row. Every round runs all rows, so that a busy moment slows all."""
    rates = {name: [] for name in rows}
    for round_ in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, row in rows.items():
            row.prepare()
            synchronize()
            start = time.perf_counter()
            images = row.work()
            synchronize()
            if round_ > 0:  # the first round warms up
                rates[name].append(images / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def fastest(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, Row]:
    """The row, with its name, of the way that handles the most images/s here."""
    rows = {name: Row(work) for name, work in ways.items()}
    rates = in_turn(rows, rounds)
    best = max(rates, key=rates.get)
    return {best: rows[best]}


def synchronize() -> None:
    """Wait until a GPU has finished."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def in_fresh_process(function: Callable, *arguments):
    """What the function returns in a new Python process, which has no memory or threads of this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> float:
    """The most memory that this process has held, in GB."""
    if sys.platform == "win32":
        import psutil  # comes with jupyter

        return psutil.Process().memory_info().peak_wset / 1e9
    if sys.platform == "linux":  # getrusage would include the parent's
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def three_digits(value: float) -> str:
    """The value as text, rounded to three significant digits."""
    return f"{float(f'{value:.3g}'):,.12g}"


def report(part: str, values: dict[str, float], unit: str = "images/s") -> list[dict]:
    """Print a table of the part; returns its rows."""
    reference = next(iter(values.values()))
    rows = [dict(zip(FIELDS, (part, name, value, unit, value / reference))) for name, value in values.items()]
    print(f"\n{part:<60}{unit:>14}{'ratio':>9}")
    for row in rows:
        print(f"{row['row']:<60}{three_digits(row['value']):>14}{row['ratio']:>9.2f}")
    return rows


# ---------------------------------------------------------------- input


def bench_input(images: AlbumentationsImages, count: int = 8192, rounds: int = 5) -> list[dict]:
    """The original augmentation, from images in memory to normalised batches on the device.

    torchvision starts from PIL images or from tensors, and Kornia has one of several batch sizes.
    The fastest of each is found first, and its row says which.
    """
    compose = original.albumentations_transform()
    batched = BatchTransform(compose, DEVICE)
    memory = torch.from_numpy(images.data).to(DEVICE)
    order = torch.from_numpy(np.random.default_rng(0).integers(len(memory), size=count)).to(DEVICE)

    def original_way() -> int:
        return sum(len(batch.to(DEVICE)) for batch, _ in original_loader)

    def with_batch_transform() -> int:
        table = batched.draw(count, (32, 32), seed=0, epoch=1)
        for indices, part in zip(order.split(1024), table.split(1024)):  # as in BatchLoader
            batched(memory.index_select(0, indices), part)
        return count

    def without_augmentation() -> int:
        for indices in order.split(1024):
            peers.gather_and_convert(memory, indices)
        return count

    transform = functools.partial(original.augmented, compose)
    original_loader = peers.PerSample(images, count, transform).loader(workers=2)
    rows = {
        "the original: Albumentations, 2 workers": Row(original_way),
        **fastest(peers.torchvision_ways(images, count), rounds),
        **fastest(peers.kornia_ways(memory, order), rounds),
        "BatchTransform": Row(with_batch_transform),
        "gathered and converted, nothing else": Row(without_augmentation),
    }
    return report("input", in_turn(rows, rounds))


# ---------------------------------------------------------------- step


def original_step() -> Callable[[], int]:
    """Returns a function like `peers.plain_step`, for the original network, batch size and step."""
    images, targets = random_batch(1024)
    net, optimizer = original.build_net()

    def step() -> int:
        original.train_step(net, optimizer, images, targets)
        return len(images)

    return step


def our_step(batch: int = 256, size: int = 32, compile: bool = False) -> Callable[[], int]:
    """Returns a function like `peers.plain_step`, with this repository's `gradient_step`."""
    images, targets = random_batch(batch, size)
    images = images.contiguous(memory_format=torch.channels_last)
    net = Net().to(DEVICE, memory_format=torch.channels_last)
    learn = gradient_step(net, sgd(net), compiled(net, images) if compile else net)

    def step() -> int:
        learn(images, targets)
        return len(images)

    return step


def steps_as_row(step: Callable[[], int], times: int, set_memory: Callable[[], None]) -> Row:
    """A row of several steps. Before it, the memory is set and one step is not timed."""

    def prepare() -> None:
        set_memory()
        step()

    return Row(lambda: sum(step() for _ in range(times)), prepare)


def bench_step() -> list[dict]:
    """A training step on a batch that is already on the device.

    Plain PyTorch takes bfloat16 only if it is fast here, as an expert would. The original and plain
    PyTorch run with glibc's defaults, as other projects do; ours keeps freed memory.
    """
    best = precision(DEVICE)
    kind = str(best).removeprefix("torch.")
    steps = {"the original: float32, batch 1024": original_step()}
    steps["plain PyTorch: float32, batch 256"] = peers.plain_step()
    if best != torch.float32:
        steps[f"plain PyTorch: {kind}, batch 256"] = peers.plain_step(best)
    steps[f"plain PyTorch: {kind}, compiled, batch 256"] = peers.plain_step(best, compile=True)
    steps[f"ours: {kind}, batch 256"] = our_step()
    steps[f"ours: {kind}, compiled, batch 256"] = our_step(compile=True)
    rows = {}
    for name, step in steps.items():
        # Memory that is kept saves nothing in the first steps, and a run has thousands.
        times = 2 if name.startswith("the original") else 16
        set_memory = keep_freed_memory if name.startswith("ours") else original.return_freed_memory
        rows[name] = steps_as_row(step, times, set_memory)
    values = in_turn(rows)
    values["as many multiply-adds in one matrix product"] = matrix_rate() / flops_per_image()
    return report("step", values)


def matrix_rate() -> float:
    """FLOP/s of a large matrix product in the precision of training."""
    matrix = torch.randn(4096, 4096, device=DEVICE).to(precision(DEVICE))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(times)


def flops_per_image() -> float:
    """FLOPs of a training step. The gradients cost twice as much as the forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Net().eval()(torch.zeros(1, 3, 32, 32))
    return 3 * counter.get_total_flops()


# ---------------------------------------------------------------- epoch


def first_images(images: AlbumentationsCIFAR10, count: int) -> AlbumentationsCIFAR10:
    part = copy.copy(images)
    part.data = images.data[:count]
    part.targets = images.targets[:count]
    return part


def bench_epoch(images: AlbumentationsCIFAR10, tests: AlbumentationsCIFAR10) -> list[dict]:
    """Training, then testing on a fifth as many images. The original way is slow and gets a tenth of all."""
    count = 20_480
    their_loaders = original.build_loaders(
        first_images(images, count // 10), first_images(tests, count // 50)
    )
    their_net, their_optimizer = original.build_net()
    train_loader = BatchLoader(first_images(images, count), 256, True, DEVICE)
    test_loader = BatchLoader(first_images(tests, count // 5), 1000, False, DEVICE)
    net = Net().to(DEVICE, memory_format=torch.channels_last)
    optimizer = sgd(net)
    learn = gradient_step(net, optimizer, compiled(net, next(iter(train_loader))[0]))
    tested = None
    if DEVICE.type == "cpu":
        tested = compiled(net.eval(), split_for_cache(next(iter(test_loader))[0])[0])
    step = our_step(compile=True)

    def original_way() -> int:
        original.train_and_test(their_net, their_loaders, their_optimizer)
        return count // 10

    def our_way() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            train(net, train_loader, optimizer, step=learn)
            test(net, test_loader, network=tested)
        return count

    def map_memory() -> None:
        keep_freed_memory()
        step()  # in a run the system maps this memory once, not once a round

    rows = {
        "the original's epoch, testing included": Row(original_way, original.return_freed_memory),
        "our epoch, testing included": Row(our_way, map_memory),
        "our training steps alone, on a batch that is there": Row(
            lambda: sum(step() for _ in range(count // 256))
        ),
    }
    return report("epoch", in_turn(rows, rounds=4), "training images/s")


# ---------------------------------------------------------------- growth


def step_rate(batch: int, size: int, threads: int) -> tuple[float, float]:
    """Images/s of uncompiled steps for three seconds, and this process's peak memory in GB."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    step = our_step(batch, size)
    step()
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < 3:
        images += step()
        synchronize()
    return images / (time.perf_counter() - start), peak_memory()


def memory_of_run() -> float:
    """The peak memory, in GB, of an epoch with a tenth of the training images."""
    train_loader = BatchLoader(first_images(original.cifar10_images(train=True), 5120), 256, True, DEVICE)
    test_loader = BatchLoader(original.cifar10_images(train=False), 1000, False, DEVICE)
    net = Net().to(DEVICE)
    with contextlib.redirect_stdout(io.StringIO()):
        fit(net, train_loader, test_loader, sgd(net), epochs=1, ema_decay=0.99, compile=True)
    return peak_memory()


def bench_growth() -> list[dict]:
    """Speed and memory by batch size, threads and image size, each in a fresh process."""
    cores = usable_cores()
    settings = [(batch, 32, cores) for batch in (64, 256, 1024, 4096)]
    settings += [(256, 32, 1), (256, 64, cores), (256, 96, cores)]
    speed, memory = {}, {}
    for batch, size, threads in tqdm(settings, desc="growth", leave=False):
        name = f"batch {batch}, {size}x{size}, {threads} thread{'s' * (threads > 1)}"
        speed[name], memory[name] = in_fresh_process(step_rate, batch, size, threads)
    memory["a run: data, compiler, batch 256, testing"] = in_fresh_process(memory_of_run)
    return report("growth", speed) + report("growth", memory, "GB at the peak")


def plot(table: Path, picture: Path) -> None:
    """Draw the rows of `growth`."""
    with open(table, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["row"].startswith("batch ")]
    figure = Figure((9, 3.2), dpi=150, layout="constrained")
    figure.suptitle("A training step, uncompiled, by batch size, image size and threads", fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True)
    panels = [(left, "images/s", "#0072B2", "{:,.0f}"), (right, "GB at the peak", "#D55E00", "{:.1f}")]
    for axes, unit, color, digits in panels:
        values = {row["row"]: float(row["value"]) for row in rows if row["unit"] == unit}
        bars = axes.barh(list(values), list(values.values()), color=color)
        axes.bar_label(bars, fmt=digits, padding=3, fontsize=8.5)
        axes.set_xlabel(unit, fontsize=9.5)
        axes.tick_params(labelsize=8.5)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    right.invert_yaxis()
    save_figure(figure, picture)


# ---------------------------------------------------------------- predict


def bench_predict(images: AlbumentationsCIFAR10) -> list[dict]:
    """`utils.predict` from stored images to class names."""
    net = Net().to(DEVICE).eval()

    def one_by_one() -> int:
        return sum(len(predict(net, images.data[:1], test_transform(), CLASSES)) for _ in range(50))

    def together() -> int:
        return len(predict(net, images.data[:1000], test_transform(), CLASSES))

    rates = in_turn({"1 image a call": Row(one_by_one), "1000 images a call": Row(together)})
    command = [sys.executable, Path(__file__).with_name("first_prediction.py")]
    seconds = [float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)]
    first_prediction = {"from import to the first prediction": statistics.median(seconds)}
    return report("predict", rates) + report("predict", first_prediction, "seconds")


# ---------------------------------------------------------------- all of it


def main(names: list[str]) -> None:
    images, tests = original.cifar10_images(train=True), original.cifar10_images(train=False)
    parts = {
        "input": lambda: bench_input(images),
        "step": bench_step,
        "epoch": lambda: bench_epoch(images, tests),
        "growth": bench_growth,
        "predict": lambda: bench_predict(images),
    }
    for name in names:
        if name not in parts:
            sys.exit(f"expected parts among {', '.join(parts)}, found {name}")
    print(f"{describe_processor(DEVICE)}; torch {torch.__version__}")
    rows = []
    if TABLE.exists() and names:
        with open(TABLE, encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] not in names]
    for name in names or parts:
        rows += parts[name]()
    rows.sort(key=lambda row: list(parts).index(row["part"]))
    write_csv(rows, TABLE)
    plot(TABLE, TABLE.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])

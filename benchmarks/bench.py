"""What each part of a training run costs beside what people would use instead: `make bench`, a minute or two a part.

The rows of `input`, `step` and `epoch` are measured in one process, in turn, several times; the table and
assets/bench.csv give the median, and its ratio to the first row, the way of the project that this one grew
from ("the seed"). `growth` runs each row in a process of its own, `predict` this repository alone. Machines differ and
are noisy: ratios of one run hold better than absolutes. `python bench.py input step` runs single parts.
assets/bench.png is drawn from the table.

`python bench.py accuracy assets/teacher_history.csv assets/history.csv` trains the seed's way for as long as that recorded
run took, its teacher included, and writes assets/seed_history.csv.
"""

import contextlib
import copy
import csv
import ctypes
import io
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

from batches import BatchLoader, BatchTransform
from cifar10 import find_cifar10
from dataset import CLASSES, MEAN, STD, AlbumentationsCIFAR10, train_transform
from dataset import test_transform as no_augmentation
from model import Dropout, Net
from checkpoint import write_csv, write_file
from hardware import compiled, forward, keep_freed_memory, precision
from training_utils import gradient_step, parts_of, test, train
from utils import predict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLE = Path("assets/bench.csv")
FIELDS = ("part", "row", "value", "unit", "ratio")


def seed_transform() -> A.Compose:
    """The augmentation of the seed."""
    return A.Compose(
        [
            A.HorizontalFlip(),
            A.Rotate(15),
            A.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5),  # ShiftScaleRotate
            A.RandomBrightnessContrast(p=0.1),
            A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(8, 8), hole_width_range=(8, 8)),
            A.Normalize(MEAN, STD),
            A.pytorch.ToTensorV2(),
        ]
    )


def synchronize() -> None:
    """Wait for what a GPU still has to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def in_turn(
    rows: dict[str, Callable[[], int]], rounds: int = 5, before: dict[str, Callable[[], object]] | None = None
) -> dict[str, float]:
    """The median images/s of each row, a function that handles images and says how many, all rows in each round.

    What a row's function in `before` does, in the state in which the row before it left the process, is not timed.
    """
    rates = {name: [] for name in rows}
    for round_ in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, work in rows.items():
            if before:
                before[name]()
                synchronize()
            start = time.perf_counter()
            images = work()
            synchronize()
            if round_:  # the first warms up
                rates[name].append(images / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def rounded(value: float) -> str:
    """Three significant digits: what such a measurement is good for."""
    return f"{float(f'{value:.3g}'):,.12g}"


def report(part: str, values: dict[str, float], unit: str = "images/s") -> list[dict]:
    """Print the part's table and return its rows."""
    first = next(iter(values.values()))
    rows = [dict(zip(FIELDS, (part, name, value, unit, value / first))) for name, value in values.items()]
    print(f"\n{part:<60}{unit:>14}{'ratio':>9}")
    for row in rows:
        print(f"{row['row']:<60}{rounded(row['value']):>14}{row['ratio']:>9.2f}")
    return rows


def bench_input(images: AlbumentationsCIFAR10, count: int = 8192, rounds: int = 5) -> list[dict]:
    """The seed's augmentation, from images in memory to normalised batches on the device."""
    import kornia.augmentation as K

    class PerSample(torch.utils.data.Dataset):
        """The seed's data set: each image by itself through any transform."""

        def __init__(self, transform):
            self.transform = transform

        def __len__(self):
            return count

        def __getitem__(self, index):
            return self.transform(images.data[index]), images.targets[index]

    per_torchvision = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.RandomRotation(15, v2.InterpolationMode.BILINEAR)]),
            v2.RandomApply([v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)]),
            v2.RandomApply([v2.ColorJitter(0.2, 0.2)], 0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomErasing(0.5, (1 / 16, 1 / 16), (1, 1)),
            v2.Normalize(MEAN, STD),
        ]
    )
    kornia = K.AugmentationSequential(
        K.RandomHorizontalFlip(),
        K.RandomRotation(15),
        K.RandomAffine(15, (0.1, 0.1), (0.9, 1.1)),
        K.ColorJitter(0.2, 0.2, p=0.1),
        K.RandomErasing((1 / 16, 1 / 16), (1, 1), p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    albumentations = seed_transform()
    workers = {"num_workers": 2, "persistent_workers": True, "batch_size": 1024}
    per_sample = DataLoader(PerSample(lambda image: albumentations(image=image)["image"]), **workers)
    torchvision = DataLoader(PerSample(per_torchvision), **workers)
    memory = torch.from_numpy(images.data).to(DEVICE)
    batched = BatchTransform(albumentations, DEVICE)
    index = np.random.default_rng(0).integers(len(memory), size=(count // 512, 512))
    index = torch.from_numpy(index).to(DEVICE)

    def consume(loader) -> int:
        return sum(len(batch.to(DEVICE)) for batch, _ in loader)

    def by_kornia() -> int:
        for rows in index:
            kornia(memory.index_select(0, rows).permute(0, 3, 1, 2).float() / 255)
        return index.numel()

    def ours() -> int:
        table = batched.draw(index.numel(), (32, 32), seed=0, epoch=1)  # as many as are used, like an epoch
        for rows, drawn in zip(index, table.split(index.shape[1])):
            batched(memory.index_select(0, rows), drawn)
        return index.numel()

    def floor() -> int:
        for rows in index:
            memory.index_select(0, rows).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return index.numel()

    return report("input", in_turn({
        "the seed: Albumentations per sample, 2 workers": lambda: consume(per_sample),
        "torchvision v2 per sample, 2 workers": lambda: consume(torchvision),
        "Kornia, batched": by_kornia,
        "BatchTransform": ours,
        "floor: gathered and converted, nothing else": floor,
    }, rounds))


def training_step(batch: int, size: int = 32, way: str = "ours") -> Callable[[], int]:
    """One training step on random images of that size, by the seed's way, plain PyTorch's, or this repository's."""
    torch.manual_seed(0)
    net, optimizer = seed_net()
    if way != "seed":
        net = Net().to(DEVICE, memory_format=torch.channels_last)
        settings = {"weight_decay": 5e-4, "nesterov": True, "fused": way == "ours"}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, **settings)
    net.train()
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    targets = torch.randint(10, (batch,), device=DEVICE)
    if way != "seed":
        images = images.contiguous(memory_format=torch.channels_last)
    network = compiled(net, images) if way == "compiled" else net

    def step() -> int:
        logits = network(images) if way in ("seed", "plain") else forward(network, images)
        loss = F.nll_loss(logits.log_softmax(1), targets) if way == "seed" else F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if way == "seed":
            loss.item()
        return batch

    return step


def matrix_rate() -> float:
    """FLOP/s of a large matrix product in the precision that training uses here."""
    matrix = torch.randn(4096, 4096, device=DEVICE).to(precision(DEVICE))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(times)


def flops_per_image() -> float:
    """Of a training step: the forward pass, and twice as many for the gradients of inputs and weights."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Net().eval()(torch.zeros(1, 3, 32, 32))
    return 3 * counter.get_total_flops()


def give_memory_back() -> None:
    """Undo `keep_freed_memory`: glibc's defaults, as everybody else runs with them."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 65536)
        libc.mallopt(-1, 128 * 1024)


def bench_step() -> list[dict]:
    """A training step on a batch that is already there."""
    kind = str(precision(DEVICE)).removeprefix("torch.")
    rows = {
        "the seed: fp32, NCHW, batch 1024, dropout 0.1, .item()": (training_step(1024, way="seed"), 1, give_memory_back),
        "plain PyTorch: fp32, channels-last, batch 256": (training_step(256, way="plain"), 4, give_memory_back),
        f"ours, uncompiled: {kind}, batch 256": (training_step(256), 4, keep_freed_memory),
        f"ours: {kind}, compiled, batch 256": (training_step(256, way="compiled"), 4, keep_freed_memory),
    }

    values = in_turn(
        {name: lambda step=step, times=times: sum(step() for _ in range(times)) for name, (step, times, _) in rows.items()},
        before={name: lambda step=step, memory=memory: memory() or step() for name, (step, _, memory) in rows.items()},
    )
    values["ceiling: the same operations as one matrix product"] = matrix_rate() / flops_per_image()
    return report("step", values)


def seed_loaders(images: AlbumentationsCIFAR10, tests: AlbumentationsCIFAR10) -> tuple[DataLoader, DataLoader]:
    """The seed's: each image by itself, in two workers, batches of 1024."""
    images = copy.copy(images)
    images.transform = seed_transform()
    workers = {"num_workers": 2, "persistent_workers": True, "batch_size": 1024}
    return DataLoader(images, shuffle=True, **workers), DataLoader(tests, **workers)


def seed_net() -> tuple[Net, torch.optim.Optimizer]:
    """The network as the seed begins it, and its optimizer, at the rate at which its schedule begins."""
    net = Net(dropout=0.1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        module.__class__ = nn.Dropout if isinstance(module, Dropout) else module.__class__
    net.to(DEVICE)
    return net, torch.optim.SGD(net.parameters(), lr=0.004, momentum=0.9, weight_decay=1e-4)


def seed_epoch(net: Net, loaders: tuple, optimizer: torch.optim.Optimizer, after_step: Callable[[], object] = lambda: None) -> float:
    """Train and test the seed's way; the share of the test images that are right. A true `after_step()` ends the training."""
    net.train()
    for inputs, targets in loaders[0]:
        loss = F.nll_loss(net(inputs.to(DEVICE)).log_softmax(1), targets.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if after_step():
            break
    net.eval()
    with torch.no_grad():
        right = [(net(inputs.to(DEVICE)).argmax(1).cpu() == targets).sum().item() for inputs, targets in loaders[1]]
    return sum(right) / len(loaders[1].dataset)


def bench_epoch(images: AlbumentationsCIFAR10, tests: AlbumentationsCIFAR10, count: int = 20_480) -> list[dict]:
    """Training on the first `count` images, testing on a fifth as many; the seed's way, ten times slower, on a tenth."""

    def some(images: AlbumentationsCIFAR10, count: int) -> AlbumentationsCIFAR10:
        part = copy.copy(images)
        part.data, part.targets = images.data[:count], images.targets[:count]
        return part

    seeds, (their_net, their_sgd) = seed_loaders(some(images, count // 10), some(tests, count // 50)), seed_net()
    our_loaders = [BatchLoader(some(images, count), 256, True, DEVICE), BatchLoader(some(tests, count // 5), 1000, False, DEVICE)]
    net = Net().to(DEVICE, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    network = compiled(net.train(), next(iter(our_loaders[0]))[0])
    tested = compiled(net.eval(), parts_of(next(iter(our_loaders[1]))[0])[0]) if DEVICE.type == "cpu" else None
    step = training_step(256, way="compiled")

    def the_seeds() -> int:
        seed_epoch(their_net, seeds, their_sgd)
        return count // 10

    def ours() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            train(net, our_loaders[0], sgd, step=gradient_step(net, sgd, network=network))
            test(net, our_loaders[1], network=tested)
        return count

    def steps_alone() -> int:
        return sum(step() for _ in range(count // 256))

    rows = {
        "the seed's epoch, testing included": the_seeds,
        "our epoch, testing included": ours,
        "our training steps alone, on a batch that is there": steps_alone,
    }
    # The system maps the memory that training keeps once a run: the step untimed, not once a round.
    memory = dict(zip(rows, (give_memory_back, lambda: keep_freed_memory() or step(), lambda: None)))
    return report("epoch", in_turn(rows, 2, memory), "training images/s")


def bench_accuracy(images: AlbumentationsCIFAR10, tests: AlbumentationsCIFAR10, histories: list[str]) -> None:
    """The seed's recipe, its one-cycle to 0.1 over as long as the runs of those histories took; a row an epoch, the last a part of one."""
    recorded = [row for history in histories for row in csv.DictReader(Path(history).read_text().splitlines())]
    seconds = sum(float(row["seconds"]) for row in recorded)
    torch.manual_seed(0)
    (net, optimizer), loaders, parts, rows = seed_net(), seed_loaders(images, tests), 10_000, []
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, parts)
    give_memory_back()
    start = time.perf_counter()

    def after_step() -> bool:
        passed = time.perf_counter() - start
        bar.update(min(round(passed), bar.total) - bar.n)
        while scheduler.last_epoch < min(parts * passed / seconds, parts - 1):
            scheduler.step()
        return passed > seconds

    with tqdm(total=round(seconds), desc="the seed's way", unit="s") as bar:
        while time.perf_counter() - start < seconds:
            loaders[0].dataset.set_epoch(len(rows) + 1)  # else each image is augmented alike in every epoch
            accuracy = 100 * seed_epoch(net, loaders, optimizer, after_step)
            rows.append({"epoch": len(rows) + 1, "test_accuracy": accuracy, "seconds": time.perf_counter() - start})
            bar.set_postfix(epoch=len(rows), test=f"{accuracy:.2f} %")
    write_csv(rows, "assets/seed_history.csv")


def peak_memory() -> float:
    """The most memory that this process has held, in GB. (getrusage would count its parent's before the exec.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def in_a_process_of_its_own(code: str) -> dict[str, float]:
    """What a fresh Python that runs `code` prints last: a name and a number in turn."""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    words = done.stdout.split("\n")[-2].split()
    return dict(zip(words[::2], map(float, words[1::2])))


GROWTH = """
import time, torch, bench, training_utils
torch.set_num_threads({threads})
training_utils.keep_freed_memory()
step = bench.training_step({batch}, {size})
step()
start, images = time.perf_counter(), 0
while time.perf_counter() - start < 3:
    images += step()
    bench.synchronize()
rate = images / (time.perf_counter() - start)
print("rate", rate, "peak", bench.peak_memory())
"""


def bench_growth() -> list[dict]:
    """How speed and memory go with batch size, threads and image size: an uncompiled step each, in its own process."""
    cores = os.cpu_count()
    rows = [(batch, 32, cores) for batch in (64, 256, 1024, 4096)] + [(256, 32, 1), (256, 64, cores), (256, 96, cores)]
    speed, memory = {}, {}
    for batch, size, threads in tqdm(rows, desc="growth", leave=False):
        name = f"batch {batch}, {size}x{size}, {threads} thread{'s' * (threads > 1)}"
        result = in_a_process_of_its_own(GROWTH.format(batch=batch, size=size, threads=threads))
        speed[name], memory[name] = result["rate"], result["peak"]
    memory["a run: data, compiler, batch 256, testing"] = in_a_process_of_its_own(RUN)["peak"]
    return report("growth", speed) + report("growth", memory, "GB at the peak")


RUN = """
import contextlib, io, torch, bench
from batches import BatchLoader
from cifar10 import find_cifar10
from dataset import AlbumentationsCIFAR10, test_transform, train_transform
from model import Net
from training_utils import fit
root = find_cifar10(data="full")
images, tests = AlbumentationsCIFAR10(root, True, train_transform()), AlbumentationsCIFAR10(root, False, test_transform())
images.data, images.targets = images.data[:5120], images.targets[:5120]
net = Net().to("cuda" if torch.cuda.is_available() else "cpu")
sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
loaders = [BatchLoader(images, 256, True, next(net.parameters()).device), BatchLoader(tests, 1000, False, next(net.parameters()).device)]
with contextlib.redirect_stdout(io.StringIO()):
    fit(net, *loaders, sgd, epochs=1, ema_decay=0.99, compile=True)
print("peak", bench.peak_memory())
"""


FIRST = """
import time
start = time.perf_counter()
from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10, test_transform
from model import Net
from utils import predict
predict(Net.from_pretrained(), AlbumentationsCIFAR10(ASSETS, train=False).data[0], test_transform(), CLASSES)
print("seconds", time.perf_counter() - start)
"""


def bench_predict(images: AlbumentationsCIFAR10) -> list[dict]:
    """`utils.predict` from stored images to class names."""
    net = Net().to(DEVICE).eval()

    def batches(size: int, times: int) -> Callable[[], int]:
        return lambda: sum(len(predict(net, images.data[:size], no_augmentation(), CLASSES)) for _ in range(times))

    rows = report("predict", in_turn({"1 image a call": batches(1, 50), "1000 images a call": batches(1000, 1)}))
    seconds = [in_a_process_of_its_own(FIRST)["seconds"] for _ in range(3)]
    return rows + report("predict", {"from import to the first prediction": statistics.median(seconds)}, "seconds")


def plot(table: Path, picture: Path) -> None:
    """How speed and memory grow, drawn from the table."""
    with open(table) as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "growth"]
    figure = Figure((9, 3.2), dpi=150, layout="constrained")
    figure.suptitle("A training step, uncompiled, by batch size, image size and threads", fontsize=11)
    for axes, unit, color in zip(figure.subplots(1, 2, sharey=True), ("images/s", "GB at the peak"), ("#0072B2", "#D55E00")):
        values = {row["row"]: float(row["value"]) for row in rows if row["unit"] == unit and row["row"].startswith("batch")}
        bars = axes.barh(list(values), list(values.values()), color=color)
        axes.bar_label(bars, fmt="{:,.0f}" if unit == "images/s" else "{:.1f}", padding=3, fontsize=8.5)
        axes.set_xlabel(unit, fontsize=9.5)
        axes.tick_params(labelsize=8.5)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    drawn = io.BytesIO()
    figure.savefig(drawn)
    write_file(picture, drawn.getvalue())


def main(parts: list[str]) -> None:
    os.chdir(Path(__file__).resolve().parent)
    accuracy = parts[:1] == ["accuracy"] and len(parts) > 1
    root = find_cifar10(data="full")
    images, tests = (AlbumentationsCIFAR10(root, t, f()) for t, f in ((True, train_transform), (False, no_augmentation)))
    benches = {
        "input": lambda: bench_input(images),
        "step": bench_step,
        "epoch": lambda: bench_epoch(images, tests),
        "growth": bench_growth,
        "predict": lambda: bench_predict(images),
    }
    if accuracy:
        return bench_accuracy(images, tests, parts[1:])
    if unknown := [part for part in parts if part not in benches]:
        sys.exit(f"expected parts of {', '.join(benches)}, or accuracy and histories, found {unknown[0]}")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, {precision(DEVICE)}; {len(images):,} training images")
    old = []
    if TABLE.exists() and parts:
        with open(TABLE) as file:
            old = [row for row in csv.DictReader(file) if row["part"] not in parts]
    measured = [row for part in parts or benches for row in benches[part]()]
    write_csv(sorted(old + measured, key=lambda row: list(benches).index(row["part"])), TABLE)
    plot(TABLE, Path("assets/bench.png"))


if __name__ == "__main__":
    main(sys.argv[1:])

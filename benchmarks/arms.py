"""Many changes of the recipe at once, judged by 10,000 held-out training images.

    python benchmarks/arms.py answers labels       train a teacher, and keep its answers under runs/arms
    python benchmarks/arms.py answers squared      the same, taught with a squared loss
    python benchmarks/arms.py factorial 0 3 5 6    four of eight runs, each with half of the changes
    python benchmarks/arms.py run mirrored cutmix  one run with these changes

The network learns the other 40,000 training images, and no test image is used. All runs see the
same pictures and the same answers. Each adds a line to assets/ablations.csv. `scaled_loss` is the
held-out loss after the logits are multiplied by one factor, which is fitted on half of the images
and used on the other half, both ways.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import muon
import training_utils
from ablations import COMMIT, append, images_at
from batches import BatchLoader
from dataset import test_transform, train_transform
from hardware import evaluation_mode, forward, precision, split_for_cache
from model import Net, Teacher, whitening
from utils import set_seed

FOLDER = Path(os.environ.get("ARMS", ROOT / "runs" / "arms"))
TABLE = ROOT / "assets" / "ablations.csv"
HELD_OUT, VIEWS, EPOCHS, TEACHER_EPOCHS = 10_000, 16, 32, 20
MIXED = [view for view in range(1, VIEWS + 1) if view % 8 in (2, 5, 7)]
CHANGES = ("mirrored", "squared", "rates", "warm-up", "standardized", "cutmix")
# A 2^(6-3) plan: the last three columns are products of the first three. Run 0 changes nothing.
PLAN = [(a, b, c, -a * b, -a * c, -b * c) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]


# ---------------------------------------------------------------- images


def learning_images() -> BatchLoader:
    return BatchLoader(images_at(HELD_OUT, None, train_transform()), 256, True)


def held_out(count: int = HELD_OUT) -> BatchLoader:
    return BatchLoader(images_at(0, count, test_transform()), 1000, False)


class Pictures:
    """The pictures of a view, plain or pasted together: CutMix, Yun et al. 2019, arXiv:1905.04899."""

    def __init__(self, loader: BatchLoader):
        self.loader = loader
        self.count = len(loader.images)

    def batches(
        self, order: torch.Tensor, size: int, view: int, mixed: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.loader.set_epoch(self.loader.epoch, view)
        if not mixed:
            yield from self.loader.augmented(order, size)
            return
        rng = np.random.default_rng((0, view, 2))
        partner = torch.from_numpy(rng.permutation(self.count))
        side = np.sqrt(1 - rng.random(self.count)) * 32
        corners = []
        for _ in "yx":
            centre = rng.random(self.count) * 32
            corners += [np.rint(centre - side / 2), np.rint(centre + side / 2)]
        corners = torch.from_numpy(np.stack(corners, 1)).float()
        both = zip(self.loader.augmented(order, size), self.loader.augmented(partner[order], size))
        for (images, indices), (others, _) in both:
            top, bottom, left, right = corners[indices].view(len(indices), 4, 1, 1, 1).unbind(1)
            place = torch.arange(32.0)
            rows, columns = place.view(1, 1, 32, 1), place.view(1, 1, 1, 32)
            inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
            yield torch.where(inside, others, images), indices


# ---------------------------------------------------------------- teachers


def gradient_step_with(loss):
    """`training_utils.gradient_step` with another loss of (logits, targets, answers)."""

    def gradient_step(model, optimizer, network, scaler):
        def step(images, targets, answers=None):
            logits = forward(network or model, images)
            optimizer.zero_grad()
            scaler.scale(loss(logits, targets, answers)).backward()
            return logits.detach() if scaler.step(optimizer) else None

        return step

    return gradient_step


def squared_loss(logits, targets, answers=None):
    """Hamidi et al. 2024: the distance of the probabilities to the labels."""
    return 5 * (logits.softmax(1) - F.one_hot(targets, logits.shape[1])).square().sum(1).mean()


def label_loss(logits, targets, answers=None):
    return F.cross_entropy(logits, targets)


def teacher_of(kind: str, seed: int) -> Teacher:
    """A teacher that has learnt the 40,000 images, by labels or by a squared loss; kept under runs/arms."""
    training_utils.gradient_step = gradient_step_with({"labels": label_loss, "squared": squared_loss}[kind])
    set_seed(seed)
    loader = learning_images()
    teacher = Teacher(whitening(next(iter(loader))[0]))
    optimizer, schedule = muon.plan(teacher, TEACHER_EPOCHS * len(loader))
    training_utils.fit(
        teacher,
        loader,
        held_out(),
        optimizer,
        schedule,
        epochs=TEACHER_EPOCHS,
        ema_decay=0.995,
        compile=True,
        checkpoint=FOLDER / f"teacher_{kind}_{seed}.pt",
        history_file=FOLDER / f"teacher_{kind}_{seed}.csv",
        recipe={"kind": kind, "seed": seed},
    )
    return teacher


@torch.no_grad()
def logits_of(network, batches, total=None) -> torch.Tensor:
    """Logits of the pictures and of their mirror images, float16 (N, 2, classes)."""
    parts = []
    with evaluation_mode(network):
        for images, _ in tqdm(batches, total=total, leave=False, delay=2, mininterval=5):
            both = []
            for x in (images, images.flip(3)):
                both.append(torch.cat([forward(network, part) for part in split_for_cache(x)]))
            parts.append(torch.stack(both, 1))
    return torch.cat(parts).half()


def keep_answers(kind: str, seed: int = 0) -> None:
    """Ask the teacher about all views, plain and mixed; one file each."""
    teacher = teacher_of(kind, seed)
    pictures = Pictures(learning_images())
    order = torch.arange(pictures.count)
    plain, mirrored = logits_of(teacher, held_out()).unbind(1)
    targets = torch.tensor(held_out().targets)
    both = (plain.float().softmax(1) + mirrored.float().softmax(1)).log()
    for name, logits in (("one view", plain), ("with its mirror image", both)):
        print(kind, name, held_out_scores(logits.float(), targets), flush=True)
    for view in range(1, VIEWS + 1):
        for mixed in (False, True) if view in MIXED else (False,):
            file = answer_file(kind, seed, view, mixed)
            if not file.exists():
                answers = logits_of(teacher, pictures.batches(order, 1000, view, mixed), 40)
                torch.save(answers, file.with_suffix(".partial"))
                os.replace(file.with_suffix(".partial"), file)


def answer_file(kind: str, seed: int, view: int, mixed: bool) -> Path:
    return FOLDER / f"answers_{kind}_{seed}_{view}{'_mixed' * mixed}.pt"


@functools.cache
def softness(kind: str, seed: int) -> float:
    """The temperature at which answers have the same mean entropy as those of "labels" at 2."""
    if kind == "labels":
        return 2.0
    wanted = entropy(torch.load(answer_file("labels", 0, 1, False))[:, 0].float() / 2)
    logits = torch.load(answer_file(kind, seed, 1, False))[:, 0].float()
    low, high = 0.1, 10.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(logits / middle) < wanted else (low, middle)
    print(f"temperature of {kind}: {middle:.3f}")
    return middle


def entropy(logits: torch.Tensor) -> float:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().item()


class AnsweredLoader:
    """Batches (images, targets, answers) from the files."""

    def __init__(self, teachers: list[tuple[str, int]], mirrored: bool, cutmix: bool, epochs: int):
        self.pictures = Pictures(learning_images())
        self.teachers, self.mirrored, self.cutmix, self.epochs = teachers, mirrored, cutmix, epochs
        self.answers = {}

    def set_epoch(self, epoch: int) -> None:
        self.pictures.loader.set_epoch(epoch)
        plain = [view for view in range(1, VIEWS + 1) if view not in MIXED]
        self.view = (epoch - 1) % VIEWS + 1
        self.mixed = self.cutmix and self.view in MIXED
        if self.cutmix and epoch > 0.8 * self.epochs:
            self.view, self.mixed = plain[(epoch - 1) % len(plain)], False

    def load(self) -> torch.Tensor:
        key = self.view, self.mixed
        if key not in self.answers:
            total = 0
            for kind, seed in self.teachers:
                logits = torch.load(answer_file(kind, seed, *key)).float() / softness(kind, seed)
                shares = logits.softmax(2)
                total = total + (shares.mean(1) if self.mirrored else shares[:, 0])
            self.answers[key] = total / len(self.teachers)
        return self.answers[key]

    def __len__(self) -> int:
        return len(self.pictures.loader)

    def __iter__(self):
        loader, answers = self.pictures.loader, self.load()
        for images, indices in self.pictures.batches(loader.order(), 256, self.view, self.mixed):
            yield images, loader.targets[indices], answers[indices]


# ---------------------------------------------------------------- losses of the pupil


def answer_loss(logits, targets, answers):
    return F.cross_entropy(logits, answers)


def standardized_loss(logits, targets, answers):
    """Sun et al. 2024, arXiv:2403.01427, at temperature 1."""
    theirs = standardize(answers.clamp(min=1e-7).log())
    return F.cross_entropy(standardize(logits), theirs.softmax(1))


def standardize(z: torch.Tensor) -> torch.Tensor:
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-6)


# ---------------------------------------------------------------- one run


def plan(network, steps: int, rate: float, warm_up: float):
    """`muon.plan` with its peak rates times `rate`, and another share of the run to reach them."""
    optimizer, _ = muon.plan(network, steps, learning_rate=0.015 * rate, sgd_learning_rate=0.2 * rate)

    def share(step: int) -> float:
        part = step / steps
        if part < warm_up:
            return muon.START + (1 - muon.START) * part / warm_up
        return max(0.0, (1 - part) / (1 - warm_up))

    return optimizer, LambdaLR(optimizer, share)


def run(changes: set[str], seed: int, teachers: list[tuple[str, int]], epochs: int = EPOCHS) -> dict:
    """Train a `Net` with these changes; returns the line for the table."""
    start = time.perf_counter()
    loss = standardized_loss if "standardized" in changes else answer_loss
    training_utils.gradient_step = gradient_step_with(loss)
    loader = AnsweredLoader(teachers, "mirrored" in changes, "cutmix" in changes, epochs)
    loader.set_epoch(1)
    set_seed(seed)
    net = Net()
    rate, warm_up = 0.6 if "rates" in changes else 1.0, 0.08 if "warm-up" in changes else 0.2
    optimizer, schedule = plan(net, epochs * len(loader), rate, warm_up)
    plain = BatchLoader(images_at(HELD_OUT, HELD_OUT + 5000, test_transform()), 500, True)
    history = training_utils.fit(
        net,
        loader,
        held_out(1000),
        optimizer,
        schedule,
        epochs=epochs,
        ema_decay=0.995,
        statistics=plain,
        compile=True,
    )
    logits = logits_of(net, held_out())[:, 0].float()
    torch.save(net.state_dict(), FOLDER / f"net_{'_'.join(sorted(changes))}_{seed}_{epochs}.pt")
    names = [f"{kind} {number}" for kind, number in teachers]
    return {
        "change": f"40,000 images, teacher {' and '.join(names)}: {', '.join(sorted(changes)) or 'nothing'}",
        "epochs": epochs,
        "seed": seed,
        "held_out": HELD_OUT,
        **held_out_scores(logits, torch.tensor(held_out().targets)),
        "train_accuracy": f"{history[-1]['train_accuracy']:.2f}",
        "train_loss": f"{history[-1]['train_loss']:.4f}",
        "seconds": round(time.perf_counter() - start),
        "machine": f"CPU, {torch.get_num_threads()} threads, {str(precision(logits.device))[6:]}",
        "torch": torch.__version__,
        "commit": COMMIT,
        "command": f"python {' '.join(sys.argv)}",
    }


def held_out_scores(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, str]:
    """Accuracy in percent, loss, and the loss after one factor for the logits: see above."""
    halves = torch.arange(len(targets)) % 2 == 0
    losses = []
    for fitted in (halves, ~halves):
        factors = torch.linspace(0.5, 4, 351)
        values = [F.cross_entropy(factor * logits[fitted], targets[fitted]) for factor in factors]
        best = factors[torch.stack(values).argmin()]
        losses.append(F.cross_entropy(best * logits[~fitted], targets[~fitted]).item())
    return {
        "accuracy": f"{100 * (logits.argmax(1) == targets).double().mean().item():.2f}",
        "loss": f"{F.cross_entropy(logits, targets).item():.4f}",
        "scaled_loss": f"{sum(losses) / 2:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["answers", "factorial", "run"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--teachers", nargs="+", default=[])
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.what == "answers":
        keep_answers(arguments.names[0], arguments.seed)
    elif arguments.what == "factorial":
        for number in map(int, arguments.names):
            changes = {change for change, level in zip(CHANGES, PLAN[number]) if level > 0}
            kind = "squared" if "squared" in changes else "labels"
            append(run(changes, 100 + number, [(kind, 0)], arguments.epochs), TABLE)
    else:
        teachers = [(name.partition(":")[0], int(name.partition(":")[2] or 0)) for name in arguments.teachers]
        append(
            run(set(arguments.names), arguments.seed, teachers or [("labels", 0)], arguments.epochs), TABLE
        )


if __name__ == "__main__":
    main()

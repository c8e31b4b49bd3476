"""Changes of the recipe, judged by 10,000 held-out training images.

    python benchmarks/arms.py answers               train a teacher, and keep its answers under runs/arms
    python benchmarks/arms.py run --epochs 50       train the network with these answers
    python benchmarks/arms.py run rates cutmix      the same with two changes
    python benchmarks/arms.py run --trunk FILE --order 1    the last fifth of a run in another order
    python benchmarks/arms.py mean FILE FILE        the mean of their weights

The network learns the other 40,000 training images, and no test image is used. All runs see the
same pictures and the same answers, means over a picture and its mirror image. Each adds a line to
assets/ablations.csv. `scaled_loss` is the held-out loss after the logits are multiplied by one
factor, which is fitted on half of the images and used on the other half, both ways.
"""

import argparse
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
from batches import BatchLoader
from dataset import test_transform, train_transform
from hardware import autocast, evaluation_mode, forward, precision, split_for_cache
from held_out import COMMIT, TABLE, append, images_at
from model import Net, Teacher, whitening
from utils import set_seed
from weight_average import WeightAverage

FOLDER = Path(os.environ.get("ARMS", ROOT / "runs" / "arms"))
HELD_OUT, VIEWS, TEMPERATURE, TEACHER_EPOCHS = 10_000, 16, 2.0, 20
MIXED = [view for view in range(1, VIEWS + 1) if view % 8 in (2, 5, 7)]
CHANGES = ("heads", "rates", "warm-up", "cutmix", "decoupled", "sharpness", "half", "smoothed")
RADIUS = 0.01  # of "sharpness"


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


# ---------------------------------------------------------------- the teacher


def teacher_of(seed: int) -> Teacher:
    """A teacher that has learnt the 40,000 images, kept under runs/arms."""
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
        checkpoint=FOLDER / f"teacher_{seed}.pt",
        history_file=FOLDER / f"teacher_{seed}.csv",
        recipe={"seed": seed},
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


def keep_answers(seed: int) -> None:
    """Ask the teacher about all views, plain and mixed; one file each."""
    teacher = teacher_of(seed)
    pictures = Pictures(learning_images())
    order = torch.arange(pictures.count)
    plain, mirrored = logits_of(teacher, held_out()).unbind(1)
    targets = torch.tensor(held_out().targets)
    both = (plain.float().softmax(1) + mirrored.float().softmax(1)).log()
    for name, logits in (("one view", plain), ("with its mirror image", both)):
        print(f"teacher {seed}, {name}: {held_out_scores(logits.float(), targets)}", flush=True)
    for view in range(1, VIEWS + 1):
        for mixed in (False, True) if view in MIXED else (False,):
            file = answer_file(seed, view, mixed)
            if not file.exists():
                answers = logits_of(teacher, pictures.batches(order, 1000, view, mixed), 40)
                torch.save(answers, file.with_suffix(".partial"))
                os.replace(file.with_suffix(".partial"), file)


def answer_file(seed: int, view: int, mixed: bool) -> Path:
    return FOLDER / f"answers_{seed}_{view}{'_mixed' * mixed}.pt"


class AnsweredLoader:
    """Batches (images, targets, answers) from the files. `first`: the epochs that a branch has behind it."""

    def __init__(self, teachers: list[int], changes: set[str], epochs: int, first: int = 0, order: int = 0):
        self.pictures = Pictures(learning_images())
        self.teachers, self.epochs, self.first = teachers, epochs, first
        self.cutmix, self.half, self.smoothed = (name in changes for name in ("cutmix", "half", "smoothed"))
        self.order = 1000 * order
        self.answers = {}

    def set_epoch(self, epoch: int) -> None:
        epoch += self.first
        self.pictures.loader.set_epoch(epoch + self.order)
        plain = [view for view in range(1, VIEWS + 1) if view not in MIXED]
        self.view = (epoch - 1) % VIEWS + 1
        self.mixed = self.cutmix and self.view in MIXED
        self.flipped = self.half and self.view > VIEWS // 2
        if self.flipped:  # the answers to a view are also those to its mirror images
            self.view -= VIEWS // 2
        if self.cutmix and epoch > 0.8 * self.epochs:
            self.view, self.mixed = plain[(epoch - 1) % len(plain)], False

    def load(self) -> torch.Tensor:
        key = self.view, self.mixed
        if key not in self.answers:
            self.answers[key] = self.read(*key)
            if self.smoothed:  # half of what all views of an image are said to be
                if "all" not in self.answers:
                    self.answers["all"] = sum(self.read(view, False) for view in range(1, VIEWS + 1)) / VIEWS
                self.answers[key] = (self.answers[key] + self.answers["all"]) / 2
        return self.answers[key]

    def read(self, view: int, mixed: bool) -> torch.Tensor:
        logits = [torch.load(answer_file(seed, view, mixed)).float() for seed in self.teachers]
        return sum((part / TEMPERATURE).softmax(2).mean(1) for part in logits) / len(logits)

    def __len__(self) -> int:
        return len(self.pictures.loader)

    def __iter__(self):
        loader, answers = self.pictures.loader, self.load()
        for images, indices in self.pictures.batches(loader.order(), 256, self.view, self.mixed):
            yield images.flip(3) if self.flipped else images, loader.targets[indices], answers[indices]


# ---------------------------------------------------------------- the changes


def decoupled_loss(logits, answers):
    """Cross-entropy in which all classes but the teacher's first count twice.

    After the decoupled distillation of Zhao et al. 2022, arXiv:2203.08679.
    """
    first = answers.argmax(1, keepdim=True)
    others = answers.scatter(1, first, 0)
    return F.cross_entropy(logits, answers) + F.cross_entropy(logits.scatter(1, first, -1e4), others)


class WithHeads(torch.nn.Module):
    """A `Net` with two more classifiers while it learns, after stages 2 and 3: logits (N, 30), then (N, 10).

    Deeply supervised nets: Lee et al. 2015, arXiv:1409.5185.
    """

    def __init__(self, net: Net):
        super().__init__()
        self.net = net
        self.heads = torch.nn.ModuleList(self.head(width) for width in (40, 44))

    @staticmethod
    def head(width: int) -> torch.nn.Sequential:
        parts = [("conv", torch.nn.Conv2d(width, 64, 3, padding=1, bias=False)), ("relu", torch.nn.ReLU())]
        parts += [("norm", torch.nn.BatchNorm2d(64)), ("pool", torch.nn.AdaptiveAvgPool2d(1))]
        parts += [("flat", torch.nn.Flatten()), ("classifier", torch.nn.Linear(64, 10, bias=False))]
        return torch.nn.Sequential(OrderedDict(parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.net(x)
        second = self.net.stage2(self.net.stage1(x))
        third = self.net.stage3(second)
        last = self.net.pool(self.net.stage4(third))
        logits = self.net.classifier(self.net.norm(last)).flatten(1)
        return torch.cat([logits, self.heads[0](second), self.heads[1](third)], 1)


def gradient_step_with_heads(steps: int):
    """A gradient step for `WithHeads`. The heads' losses count a fifth, and nothing in the last fifth."""

    def gradient_step(model, optimizer, network, scaler):
        done = 0

        def step(images, targets, answers):
            nonlocal done
            weight = 0.2 * max(0.0, 1 - done / (0.8 * steps))
            done += 1
            logits = forward(network or model, images)
            optimizer.zero_grad()
            losses = [F.cross_entropy(part, answers) for part in logits.split(10, 1)]
            (losses[0] + weight * (losses[1] + losses[2])).backward()
            optimizer.step()
            return logits[:, :10].detach()

        return step

    return gradient_step


def gradient_step_with(loss: Callable, radius: float):
    """`training_utils.gradient_step` with another loss, and the gradient of weights that are `radius` uphill.

    Foret et al. 2021, arXiv:2010.01412; `radius` is a share of each bank's norm. 0: the gradient here.
    """

    def gradient_step(model, optimizer, network, scaler):
        banks = muon.parameter_groups(model)[0]

        def gradient(images, answers):
            logits = forward(network or model, images)
            optimizer.zero_grad()
            loss(logits, answers).backward()
            return logits.detach()

        def step(images, targets, answers):
            logits = gradient(images, answers)
            if radius:
                moves = [p.grad * (radius * p.detach().norm() / p.grad.norm()) for p in banks]
                with torch.no_grad():
                    torch._foreach_add_(banks, moves)
                gradient(images, answers)
                with torch.no_grad():
                    torch._foreach_sub_(banks, moves)
            optimizer.step()
            return logits

        return step

    return gradient_step


def plan(network, steps: int, rate: float, warm_up: float, done: int = 0):
    """`muon.plan` with its peak rates times `rate` and another warm-up, from the step `done` on."""
    optimizer, _ = muon.plan(network, steps, learning_rate=0.015 * rate, sgd_learning_rate=0.2 * rate)

    def share(step: int) -> float:
        part = (step + done) / steps
        if part < warm_up:
            return muon.START + (1 - muon.START) * part / warm_up
        return max(0.0, (1 - part) / (1 - warm_up))

    return optimizer, LambdaLR(optimizer, share)


# ---------------------------------------------------------------- one run


def run(
    changes: set[str], seed: int, teachers: list[int], epochs: int, trunk: Path | None = None, order: int = 0
) -> dict:
    """Train a `Net` with these changes, from the start or from a trunk on; returns the line for the table."""
    start = time.perf_counter()
    done = int(0.8 * epochs) if trunk else 0
    loss = decoupled_loss if "decoupled" in changes else F.cross_entropy
    training_utils.gradient_step = gradient_step_with(loss, RADIUS if "sharpness" in changes else 0.0)
    loader = AnsweredLoader(teachers, changes, epochs, done, order)
    loader.set_epoch(1)
    set_seed(seed)
    net = WithHeads(Net()) if "heads" in changes else Net()
    if "heads" in changes:
        training_utils.gradient_step = gradient_step_with_heads(epochs * len(loader))
    rate, warm_up = 0.6 if "rates" in changes else 1.0, 0.08 if "warm-up" in changes else 0.2
    optimizer, schedule = plan(net, epochs * len(loader), rate, warm_up, done * len(loader))
    if trunk:
        state = torch.load(trunk)
        net.load_state_dict(state["net"])
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr
    name = f"{'_'.join(sorted(changes)) or 'nothing'}_{seed}_{epochs}"

    def keep_trunk(row: dict) -> None:
        if not trunk and row["epoch"] == int(0.8 * epochs):
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, FOLDER / f"trunk_{name}.pt")

    history = training_utils.fit(
        net,
        loader,
        held_out(1000),
        optimizer,
        schedule,
        epochs=epochs - done,
        ema_decay=0.995,
        statistics=plain_images(),
        compile=True,
        on_epoch=keep_trunk,
    )
    torch.save(net.state_dict(), FOLDER / f"net_{name}_{order}.pt")
    what = (", ".join(sorted(changes)) or "nothing").replace("sharpness", f"sharpness {RADIUS}")
    if trunk:
        what += f"; from epoch {done} of {trunk.stem.removeprefix('trunk_')}, order {order}"
    return {
        **line(net, teachers, what, epochs, seed),
        "train_accuracy": f"{history[-1]['train_accuracy']:.2f}",
        "train_loss": f"{history[-1]['train_loss']:.4f}",
        "seconds": round(time.perf_counter() - start),
    }


def line(net: Net, teachers: list[int], what: str, epochs: int, seed: int) -> dict:
    """The columns of assets/ablations.csv that every run has."""
    logits = logits_of(net, held_out())[:, 0].float()
    names = " and ".join(map(str, teachers))
    return {
        "change": f"40,000 images, teacher {names}: {what}",
        "epochs": epochs,
        "seed": seed,
        "held_out": HELD_OUT,
        **held_out_scores(logits, torch.tensor(held_out().targets)),
        "machine": f"CPU, {torch.get_num_threads()} threads, {str(precision(logits.device))[6:]}",
        "torch": torch.__version__,
        "commit": COMMIT,
        "command": f"python {' '.join(sys.argv)}",
    }


def plain_images() -> BatchLoader:
    return BatchLoader(images_at(HELD_OUT, HELD_OUT + 5000, test_transform()), 500, True)


def mean_of(files: list[Path]) -> Net:
    """The network with the mean weights of these, and statistics measured for them."""
    states = [torch.load(file) for file in files]
    net = Net()
    net.load_state_dict({key: sum(state[key] for state in states) / len(states) for key in states[0]})
    muon.fix_norms([p.data for p in muon.parameter_groups(net)[0]])
    average = WeightAverage(net.train(), 0.0)
    with autocast(torch.device("cpu")):
        average.measure_norms(images for images, _ in plain_images())
    return average.module


def held_out_scores(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, str]:
    """Accuracy in percent, loss, the loss of scaled logits (see above), and the best factor for all."""
    halves = torch.arange(len(targets)) % 2 == 0
    losses = []
    for fitted in (halves, ~halves):
        factor = best_factor(logits[fitted], targets[fitted])
        losses.append(F.cross_entropy(factor * logits[~fitted], targets[~fitted]).item())
    return {
        "accuracy": f"{100 * (logits.argmax(1) == targets).double().mean().item():.2f}",
        "loss": f"{F.cross_entropy(logits, targets).item():.4f}",
        "scaled_loss": f"{sum(losses) / 2:.4f}",
        "factor": f"{best_factor(logits, targets):.2f}",
    }


def best_factor(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """By what the logits must be multiplied for the smallest loss: Guo et al. 2017, arXiv:1706.04599."""
    factors = torch.linspace(0.5, 4, 351)
    losses = [F.cross_entropy(factor * logits, targets) for factor in factors]
    return factors[torch.stack(losses).argmin()].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["answers", "run", "mean"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--teachers", type=int, nargs="+", default=[0])
    parser.add_argument("--trunk", type=Path)
    parser.add_argument("--order", type=int, default=0)
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    seed, teachers, epochs = arguments.seed, arguments.teachers, arguments.epochs
    if arguments.what == "answers":
        keep_answers(seed)
    elif arguments.what == "mean":
        files = [Path(name) for name in arguments.names]
        what = f"the mean of {' and '.join(file.stem for file in files)}"
        append(line(mean_of(files), teachers, what, epochs, seed), TABLE)
    else:
        changes = set(arguments.names)
        append(run(changes, seed, teachers, epochs, arguments.trunk, arguments.order), TABLE)


if __name__ == "__main__":
    main()

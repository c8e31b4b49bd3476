"""Changes of the recipe, judged by 10,000 held-out training images.

    python benchmarks/arms.py answers --seed 1        train a teacher, and keep its answers
    python benchmarks/arms.py run --teachers 0 1      train the network with two teachers' answers

The network learns the other 40,000 training images, and no test image is used. Runs of the same
code see the same pictures and the same answers, which lie under runs/arms. Each run adds a line to
assets/ablations.csv. To try a change, edit the recipe, commit it, and give --change its name. The
code of older changes is in the commits that their lines name.

`scaled_loss` is the held-out loss after the logits are multiplied by one factor, which is fitted on
half of the images and used on the other half, both ways.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.nn import functional as F
from tqdm import tqdm

import muon
import training_utils
from batches import BatchLoader
from dataset import test_transform, train_transform
from hardware import evaluation_mode, forward, precision, split_for_cache
from held_out import COMMIT, TABLE, append, images_at
from identity import text_of
from model import Net, Teacher, whitening
from utils import set_seed

FOLDER = ROOT / "runs" / "arms"
HELD_OUT, VIEWS, TEMPERATURE, TEACHER_EPOCHS = 10_000, 16, 2.0, 20


# ---------------------------------------------------------------- images


def learning_images() -> BatchLoader:
    return BatchLoader(images_at(HELD_OUT, None, train_transform()), 256, True)


def held_out(count: int = HELD_OUT) -> BatchLoader:
    return BatchLoader(images_at(0, count, test_transform()), 1000, False)


# ---------------------------------------------------------------- the teacher


def teacher_of(seed: int) -> Teacher:
    """A teacher that has learnt the 40,000 images, kept under runs/arms."""
    set_seed(seed)
    loader = learning_images()
    teacher = Teacher(whitening(next(iter(loader))[0]))
    optimizer, schedule = muon.plan(teacher, TEACHER_EPOCHS * len(loader))
    history = training_utils.fit(
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
    check_whole(history, TEACHER_EPOCHS)
    return teacher


@torch.no_grad()
def logits_of(network: torch.nn.Module, batches: Iterable, total: int | None = None) -> torch.Tensor:
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
    """Ask the teacher about all views; one file each."""
    teacher, loader = teacher_of(seed), learning_images()
    plain, mirrored = logits_of(teacher, held_out()).unbind(1)
    targets = torch.tensor(held_out().targets)
    both = (plain.float().softmax(1) + mirrored.float().softmax(1)).log()
    for name, logits in (("one view", plain), ("with its mirror image", both)):
        print(f"teacher {seed}, {name}: {held_out_scores(logits.float(), targets)}", flush=True)
    views = []
    for view in tqdm(range(1, VIEWS + 1), "Views"):
        loader.set_epoch(view)
        views.append(logits_of(teacher, loader.augmented(torch.arange(len(loader.images)), 1000), 40))
    kept = {"views": torch.stack(views), "augmentation": text_of(train_transform())}
    torch.save(kept, answer_file(seed).with_suffix(".partial"))
    os.replace(answer_file(seed).with_suffix(".partial"), answer_file(seed))


def answer_file(seed: int) -> Path:
    return FOLDER / f"answers_{seed}.pt"


def answers_of(seed: int) -> torch.Tensor:
    """A teacher's logits (views, images, 2, classes), as `logits_of` returns them for each view.

    Raises:
        ValueError: they are to other augmentations than today's.
    """
    kept = torch.load(answer_file(seed))
    if kept["augmentation"] != (today := text_of(train_transform())):
        raise ValueError(
            f"expected answers to {today}, found some to {kept['augmentation']}: "
            f"run arms.py answers --seed {seed} again"
        )
    return kept["views"]


class AnsweredLoader:
    """Batches (images, targets, answers): the mean of the teachers' answers to both mirror images."""

    def __init__(self, teachers: list[int]):
        self.loader = learning_images()
        self.logits = [answers_of(seed) for seed in teachers]

    def set_epoch(self, epoch: int) -> None:
        view = (epoch - 1) % VIEWS
        self.loader.set_epoch(epoch, view + 1)
        both = torch.stack([logits[view] for logits in self.logits]).float()
        self.answers = (both / TEMPERATURE).softmax(3).mean((0, 2))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for images, indices in self.loader.augmented(self.loader.order(), self.loader.batch_size):
            yield images, self.loader.targets[indices], self.answers[indices]


# ---------------------------------------------------------------- one run


def run(change: str, seed: int, teachers: list[int], epochs: int) -> dict:
    """Train a `Net`; returns the line for the table."""
    start = time.perf_counter()
    loader = AnsweredLoader(teachers)
    loader.set_epoch(1)
    set_seed(seed)
    net = Net()
    optimizer, schedule = muon.plan(net, epochs * len(loader))
    history = training_utils.fit(
        net,
        loader,
        held_out(1000),
        optimizer,
        schedule,
        epochs=epochs,
        ema_decay=0.995,
        statistics=plain_images(),
        compile=True,
    )
    check_whole(history, epochs)
    return {
        "change": f"40,000 images, teacher {' and '.join(map(str, teachers))}: {change}",
        "epochs": epochs,
        "seed": seed,
        "held_out": HELD_OUT,
        **held_out_scores(logits_of(net, held_out())[:, 0].float(), torch.tensor(held_out().targets)),
        "train_accuracy": f"{history[-1]['train_accuracy']:.2f}",
        "train_loss": f"{history[-1]['train_loss']:.4f}",
        "seconds": round(time.perf_counter() - start),
        "machine": f"CPU, {torch.get_num_threads()} threads, {str(precision(torch.device('cpu')))[6:]}",
        "torch": torch.__version__,
        "commit": COMMIT,
        "command": f"python {' '.join(sys.argv)}",
    }


def check_whole(history: list[dict], epochs: int) -> None:
    """Raise KeyboardInterrupt if a run was stopped: it has no line, and a teacher no answers."""
    if len(history) < epochs:
        raise KeyboardInterrupt


def plain_images() -> BatchLoader:
    return BatchLoader(images_at(HELD_OUT, HELD_OUT + 5000, test_transform()), 500, True)


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
    commands = parser.add_subparsers(dest="command", required=True)
    answers, network = commands.add_parser("answers"), commands.add_parser("run")
    for command in (answers, network):
        command.add_argument("--seed", type=int, default=0)
    network.add_argument("--change", default="nothing", help="the name of what you changed")
    network.add_argument("--epochs", type=int, default=40)
    network.add_argument("--teachers", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.command == "answers":
        keep_answers(options.seed)
    else:
        append(run(options.change, options.seed, options.teachers, options.epochs), TABLE)


if __name__ == "__main__":
    main()

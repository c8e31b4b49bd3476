"""The runs of 2026-11-27 on an NVIDIA H200: what a teacher that is asked about the very picture does in 100 epochs.

    python h200.py "teacher L" --seed 0

Trained on 45,000 training images, judged on the other 5,000; `--full` trains on all 50,000 and takes the test set. The
teacher is trained first where runs/ has none. On that day seven processes shared the GPU, each with one such run after the
other, and took this from a queue; the learning is the same. Prints a line of JSON: accuracy and loss with the running
statistics of batch norm, and ("plain_...") with statistics of the training images without augmentation.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import albumentations as A
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import ablations
import training_utils
from ablations import RECIPE
from dataset import MEAN, AlbumentationsCIFAR10, AlbumentationsImages, BatchLoader, find_cifar10, test_transform, train_transform
from model import Net, convolution, whitening
from training_utils import forward, take_statistics
from utils import set_seed

HOLE = A.CoarseDropout((1, 1), (8, 8), (8, 8), fill=tuple(round(255 * value) for value in MEAN), p=1.0)
CUTOUT = {"augmentation": lambda steps: [*steps[:-2], HOLE, *steps[-2:]]}  # train_transform had it until that day
CROPS = {"augmentation": lambda steps: [step for step in steps if not isinstance(step, A.Affine)]}
# Teachers: widths, epochs, augmentation.
TEACHERS = {
    "L": ((64, 256, 256), 30, CUTOUT),
    "L of 10 epochs": ((64, 256, 256), 10, CROPS),
    "S": ((64, 128, 256), 20, CUTOUT),
    "S of 12 epochs": ((64, 128, 256), 12, CUTOUT),
    "S without cutout": ((64, 128, 256), 20, {}),
}
TAUGHT = CUTOUT | {"share": 0.9, "temperature": 2, "views": None, "smoothing": 0.0}
OPEN = TAUGHT | {"teacher": "S without cutout", "views": 20, "augmentation": list}
CHANGES = {
    "notebook": CUTOUT,
    "notebook, no cutout": {},
    "notebook, Muon's rate 0.02": CUTOUT | {"muon_rate": 0.02},
    "teacher L": TAUGHT | {"teacher": "L"},
    "teacher L, temperature 1": TAUGHT | {"teacher": "L", "temperature": 1},
    "teacher L, temperature 4": TAUGHT | {"teacher": "L", "temperature": 4},
    "teacher L, no label": TAUGHT | {"teacher": "L", "share": 1.0},
    "teacher L, 20 views": TAUGHT | {"teacher": "L", "views": 20},
    "teacher L, no cutout": TAUGHT | {"teacher": "L", "augmentation": list},
    "teacher L of 10 epochs": TAUGHT | {"teacher": "L of 10 epochs"},
    "teacher S": TAUGHT | {"teacher": "S"},
    "teacher S, 20 views": TAUGHT | {"teacher": "S", "views": 20},
    "teacher S of 12 epochs, 20 views": TAUGHT | {"teacher": "S of 12 epochs", "views": 20},
    "teacher S, 20 views, no cutout": OPEN,
    "teacher S, 20 views, no cutout, no label": OPEN | {"share": 1.0},
    "teacher S, 20 views, no cutout, temperature 1": OPEN | {"temperature": 1},
    "teacher S, 20 views, no cutout, no label, temperature 1": OPEN | {"share": 1.0, "temperature": 1},
}


class Teacher(nn.Module):
    """model.Teacher, of any widths."""

    def __init__(self, filters, widths):
        super().__init__()
        first = nn.Conv2d(3, len(filters), 2, bias=False).requires_grad_(False)
        first.weight.copy_(filters)
        layers, channels = [first, nn.BatchNorm2d(len(filters)), nn.GELU()], len(filters)
        for width in widths:
            layers += [convolution(channels, width, 3), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
            layers += [convolution(width, width, 3), nn.BatchNorm2d(width), nn.GELU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.BatchNorm2d(channels), nn.Flatten())
        self.classifier = nn.Linear(channels, 10, bias=False)

    def forward(self, x):
        return self.classifier(self.features(x))


def loaders_of(recipe, seed, root, device, full):
    if not full:
        return ablations.loaders_of(recipe, seed, root, device)
    transform = A.Compose(recipe["augmentation"](list(train_transform())))
    images = AlbumentationsCIFAR10(root, True, transform, seed), AlbumentationsCIFAR10(root, False, test_transform())
    return [BatchLoader(images[0], recipe["batch"], True, device), BatchLoader(images[1], 1000, False, device)]


def plain_images(root, device, full):
    images = AlbumentationsCIFAR10(root)
    rows = np.arange(len(images)) if full else np.random.default_rng(0).permutation(len(images))[len(images) // 10 :]
    part = AlbumentationsImages(images.data[rows], [images.targets[i] for i in rows], images.classes, test_transform())
    return BatchLoader(part, 1000, True, device)


@torch.no_grad()
def judged(net, loader):
    net.eval()
    logits, targets = (torch.cat(parts) for parts in zip(*[(forward(net, images), targets) for images, targets in loader]))
    return 100 * (logits.argmax(1) == targets).double().mean().item(), F.cross_entropy(logits, targets).item()


def taught_step(teacher, share, temperature):
    """A `gradient_step` whose targets are this share what the teacher sees in the batch, the rest the labels."""

    def make(model, optimizer, label_smoothing=0.0, network=None):
        def step(images, targets):
            with torch.no_grad():
                seen = forward(teacher, images).div(temperature).softmax(1)
            logits = forward(network or model, images)
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.lerp(F.one_hot(targets, 10).float(), seen, share)).backward()
            optimizer.step()
            return logits.detach()

        return step

    return make


def teacher_of(name, root, device, full):
    widths, epochs, augmentation = TEACHERS[name]
    file = Path("runs") / f"teacher {name}{' full' * full}.pt"
    loaders = loaders_of(RECIPE | augmentation | {"smoothing": 0.0}, 0, root, device, full)
    set_seed(0)
    teacher = Teacher(whitening(next(iter(loaders[0]))[0].cpu()), widths).to(device)
    if file.exists():
        teacher.load_state_dict(torch.load(file, map_location=device))
    else:
        ablations.learn(teacher, RECIPE | augmentation | {"smoothing": 0.0}, loaders, epochs)
        file.parent.mkdir(exist_ok=True)
        torch.save(teacher.state_dict(), file)
    return teacher.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("change", choices=CHANGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    root, device = find_cifar10(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = RECIPE | CHANGES[given.change]
    if "teacher" in recipe:
        teacher = teacher_of(recipe["teacher"], root, device, given.full)
        training_utils.gradient_step = taught_step(teacher, recipe["share"], recipe["temperature"])
    loaders = loaders_of(recipe, given.seed, root, device, given.full)
    loaders[0].views = recipe.get("views")
    set_seed(given.seed)
    net, start = Net().to(device), time.perf_counter()
    last = ablations.learn(net, recipe, loaders, given.epochs)[-1] | vars(given)
    last |= dict(zip(("accuracy", "loss"), judged(net, loaders[1])))
    plain = copy.deepcopy(net)
    take_statistics(plain, plain_images(root, device, given.full))
    last |= dict(zip(("plain_accuracy", "plain_loss"), judged(plain, loaders[1])))
    print(json.dumps(last | {"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()

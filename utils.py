"""Questions asked of a model or a data set, whichever they are. No answer changes the model."""

import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from checks import to_device
from hardware import evaluation_mode, split_for_cache
from receptive import SIZE, Size, evaluation_copy
from receptive import receptive_field as receptive_field  # part of this module's names


def set_seed(seed: int) -> None:
    """Seeds `random`, NumPy's global generator and torch. Raises ValueError outside [0, 2**32 - 1]."""
    np.random.seed(seed)  # first, because its range is the narrowest
    random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- layers


def model_summary(model: nn.Module, input_size: Size = SIZE) -> None:
    """Prints torchsummary's table, in megabytes of float32. The random state does not change."""
    import torchsummary  # here, so that the other functions work without it

    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # torchsummary draws a random input
        torchsummary.summary(evaluation_copy(model), tuple(input_size), device="cpu")


# ---------------------------------------------------------------- data and predictions


def channel_statistics(images, name: str = "Train") -> dict[str, tuple[float, ...]]:
    """Prints and returns min, max, mean, std and var of each channel of images / 255.

    The results are exact: integers are summed, and divided once in float64. The variance is the
    population's (divided by the number of pixels). A few megabytes are needed beside the images.

    Args:
        images: uint8 (N, H, W, 3), N at least 1, RGB, an array or a tensor.
        name: the name of the images in the printed heading.

    Returns:
        {"min", "max", "mean", "std", "var"}: tuples of three floats, one a channel, in [0, 1].

    Raises:
        ValueError: images are not uint8 (N, H, W, 3), or there are none.
    """
    images = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images in 0..255, found {images.dtype}: convert them first")
    if images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
        expected = "images (N, H, W, 3), N at least 1"
        raise ValueError(f"expected {expected}, found {images.shape}: put the channels last")
    counts = np.zeros((3, 256), np.int64)  # of each value in each channel
    chunks = -(-images.size // 2**22)  # because bincount turns its input into int64
    for chunk in np.array_split(images, chunks):
        for channel in range(3):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    levels = np.arange(256)
    rows = []
    for count in counts:
        pixels, total, squares = (int(count @ levels**power) for power in (0, 1, 2))
        # Python's integers are exact.
        variance = (pixels * squares - total**2) / (pixels * 255) ** 2
        present = (levels[count > 0] / 255).tolist()
        rows.append((present[0], present[-1], total / (pixels * 255), variance**0.5, variance))
    result = dict(zip(("min", "max", "mean", "std", "var"), zip(*rows)))

    print(f"[{name}]\n - Total {name} Images: {len(images)}")
    print(f" - Tensor Shape: {(3, *images.shape[1:3])}")
    for key, numbers in result.items():
        texts = [str(round(x, 8)) if key in ("min", "max") else f"{x:.8f}" for x in numbers]
        print(f" - {key}: ({', '.join(texts)})")
    return result


def class_indices(name: str, values: torch.Tensor, count: int, classes: int | None) -> torch.Tensor:
    """The values as int64. ValueError unless they are `count` integers from 0 to classes - 1."""
    if values.shape != (count,) or values.is_floating_point() or values.dtype == torch.bool:
        found = f"{values.dtype} {tuple(values.shape)}"
        raise ValueError(f"{name}: expected {count} integers, found {found}: pass one class for each image")
    if classes is not None and count and not 0 <= values.min() <= values.max() < classes:
        found = f"{values.min()} to {values.max()}"
        raise ValueError(f"{name}: expected 0 to {classes - 1}, found {found}: pass the name of every class")
    return values.long()


def check_logits(logits: torch.Tensor) -> None:
    """Raises ValueError unless the model's answers are (N, classes) and no probabilities already."""
    if logits.ndim != 2:
        found = tuple(logits.shape)
        raise ValueError(f"expected logits (N, classes), found {found}: flatten the model's output")
    # Rows of zeros and a one are left alone, because a simple model may have such logits.
    if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 0.01 and logits.amax(1).min() < 0.99:
        raise ValueError("expected logits, found probabilities: take the softmax out of the model")


@torch.no_grad()
def predictions(model: nn.Module, loader: Iterable) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets int64 (N,) and softmax probabilities float32 (N, classes) of a whole loader, on the CPU.

    The model runs in evaluation mode on its own device. Afterwards each module has its own mode
    again.

    Args:
        model: images (N, C, H, W) to logits (N, classes).
        loader: gives batches (images, targets) on any device: float images as the model takes them, integer
            targets (N,). The results keep its order.

    Raises:
        ValueError: the loader is empty, its targets are no integers (N,), or the model ends in a
            softmax or has answers of another shape.
    """
    device = next(model.parameters(), torch.empty(0)).device
    targets, probabilities = [], []
    with evaluation_mode(model):
        for images, labels, *_ in loader:
            for part in split_for_cache(to_device(images, device)):
                logits = model(part).float()
                if not probabilities:
                    check_logits(logits)
                probabilities.append(logits.softmax(1))
            targets.append(class_indices("targets", labels, len(images), None))
    if not targets:
        expected = "at least one batch of (images, targets)"
        raise ValueError(f"expected {expected}, found an empty loader: an iterator in use?")
    # They move to the CPU at the end, so that no batch waits for the GPU.
    return torch.cat(targets).cpu(), torch.cat(probabilities).cpu()


def misclassified(model: nn.Module, loader: Iterable, limit: int | None = None) -> list[dict]:
    """The images that the model gets wrong, the most confident error first, at most `limit` of them.

    `model` and `loader` are as in `predictions`.

    Returns:
        One dict an image: `index` in the loader's order, `target` and `prediction` (integers), and
        `confidence`, the probability of the prediction, in [0, 1].

    Raises:
        ValueError: limit is below 0, or a target is no class of the model; also as `predictions`.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"expected limit None or at least 0, found {limit}: give the number of images")
    targets, probabilities = predictions(model, loader)
    class_indices("targets", targets, *probabilities.shape)
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != targets).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit]
    columns = [x.tolist() for x in (wrong, targets[wrong], predicted[wrong], confidence[wrong])]
    return [dict(zip(("index", "target", "prediction", "confidence"), row)) for row in zip(*columns)]


def class_accuracies(
    targets: torch.Tensor, predicted: torch.Tensor, classes: Sequence[str]
) -> dict[str, float]:
    """The accuracy of each class in percent, NaN if it has no images; both tensors are class indices (N,).

    Raises:
        ValueError: the tensors have another shape, dtype or range, or two classes have one name.
    """
    targets = class_indices("targets", targets, len(targets), len(classes))
    predicted = class_indices("predicted", predicted, len(targets), len(classes))
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise ValueError(f"classes: expected names that differ, found {twice!r} twice: rename one")
    images = torch.bincount(targets, minlength=len(classes)).double()
    right = torch.bincount(targets[predicted == targets], minlength=len(classes))
    return dict(zip(classes, (100 * right / images).tolist()))


def most_confused(
    targets: torch.Tensor, predicted: torch.Tensor, classes: Sequence[str], limit: int = 5
) -> list[tuple[str, str, int]]:
    """The pairs of classes with the most mistakes: (class, class, mistakes in both directions), most first.

    Equal pairs keep the order of the classes. Pairs without mistakes are left out. Both tensors
    are class indices (N,), or ValueError says what they are.
    """
    targets = class_indices("targets", targets, len(targets), len(classes))
    predicted = class_indices("predicted", predicted, len(targets), len(classes))
    pairs = torch.minimum(targets, predicted) * len(classes) + torch.maximum(targets, predicted)
    mistakes = torch.bincount(pairs[targets != predicted], minlength=len(classes) ** 2)
    result = []
    for pair in mistakes.argsort(descending=True, stable=True)[:limit].tolist():
        first, second = divmod(pair, len(classes))
        if mistakes[pair] > 0:
            result.append((classes[first], classes[second], mistakes[pair].item()))
    return result


def predict(
    model: nn.Module, images, transform, classes: Sequence[str], top_k: int | None = None
) -> list[list[tuple[str, float]]]:
    """The top_k most probable classes of each image: (class name, probability) pairs, most probable first.

    Args:
        model: as in `predictions`.
        images: one image or a list of them, or an array (N, H, W, 3). `dataset.test_transform()` takes paths,
            the bytes of files, PIL images and arrays, of any size. An empty list gives [].
        transform: the albumentations.Compose that the model was tested with, to float tensors (3, H, W).
        classes: their names, in the order of the logits.
        top_k: 1 to len(classes); by default 3, or all if there are fewer.

    Raises:
        ValueError: top_k is out of range, classes and logits differ in number, or the transform
            refuses an image. The message has the image's place in the list.
        FileNotFoundError: a path leads to no file.
    """
    count = len(classes)
    top_k = min(3, count) if top_k is None else top_k
    if not 1 <= top_k <= count:
        raise ValueError(f"expected top_k from 1 to {count}, the number of classes, found {top_k}: change it")
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) != 4:
        images = [images]
    if len(images) == 0:
        return []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(images), 256):  # one batch at a time is in memory
            tensors = []
            for i in range(start, min(start + 256, len(images))):
                try:
                    tensors.append(transform(image=images[i])["image"])
                except ValueError as error:
                    raise ValueError(f"image {i}: {error}") from None
            yield torch.stack(tensors), torch.zeros(len(tensors), dtype=torch.int64)

    _, probabilities = predictions(model, batches())
    logits = probabilities.shape[1]
    if logits != count:
        raise ValueError(f"expected as many classes as logits, {logits}, found {count}: give the model's own")
    answers = []
    for shares, indices in zip(*(x.tolist() for x in probabilities.topk(top_k))):
        answers.append([(classes[i], share) for i, share in zip(indices, shares)])
    return answers


def calibration(targets: torch.Tensor, probabilities: torch.Tensor) -> tuple[list[dict[str, float]], float]:
    """Compares how sure the model is with how often it is right.

    Its confidence in an image is the probability of the predicted class. Paper: Guo et al. 2017, On
    Calibration of Modern Neural Networks, arXiv:1706.04599.

    Args:
        targets, probabilities: as `predictions` returns them, for at least one image.

    Returns:
        One dict for each tenth of [0, 1] with images: `count`, and the means `confidence` and
        `accuracy`. The expected calibration error in [0, 1]: |confidence - accuracy|, weighted by
        the counts.

    Raises:
        ValueError: the arguments differ in length, or have another dtype or range. Logits are
            refused too: rows of probabilities have the sum 1.
    """
    targets = class_indices("targets", targets, *probabilities.shape)
    if not (probabilities.min() >= 0 and (probabilities.sum(1) - 1).abs().max() < 0.01):
        raise ValueError("probabilities: expected rows with the sum 1, found others: pass softmax(1)")
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == targets).double()
    tenth = (confidence * 10).long().clamp(max=9)
    rows = []
    for i in tenth.unique():
        inside = tenth == i
        means = {"confidence": confidence[inside].mean().item(), "accuracy": right[inside].mean().item()}
        rows.append({"count": int(inside.sum()), **means})
    differences = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    return rows, differences / len(targets)


def grad_cam(model: nn.Module, layer: str, images: torch.Tensor) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): where a layer's maps speak for the predicted class.

    Args:
        model: images (N, C, H, W) to logits (N, classes).
        layer: the dotted name of a module whose output is (N, channels, h, w).
        images: float (N, C, H, W), as the model takes them.

    Returns:
        float32 (N, H, W) on the CPU, in [0, 1]. The maximum of each image is 1. If nothing speaks
        for the predicted class, the whole image is 0.

    Raises:
        ValueError: the images are integers, such as pixels that are not normalised yet.
    """
    if not images.is_floating_point():
        raise ValueError(f"images: expected float tensors, found {images.dtype}: apply the test transform")
    probe = evaluation_copy(model)
    images = images.detach().cpu().float().requires_grad_()  # a frozen model has no other gradients
    maps = []

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        maps.append(output)
        return output.clone()  # because the next layer may work in place

    probe.get_submodule(layer).register_forward_hook(keep)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(probe(images).max(1).values.sum(), maps)
    heat = (gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True).relu().detach()
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)

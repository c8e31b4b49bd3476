"""Questions asked of a model or a data set, whichever they are. No answer changes the model."""

import copy
import importlib.util
import io
import itertools
import random
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from hardware import evaluation_mode, split_for_cache

Size = tuple[int, int, int]  # (channels, height, width) of one input
SIZE = (3, 32, 32)

# ---------------------------------------------------------------- a run

LIMITS = {  # the smallest and the largest value of the notebook's parameters
    "EPOCHS": (1, 10_000),
    "TEACHER_EPOCHS": (0, 10_000),
    "TEMPERATURE": (0.1, 100.0),
    "VIEWS": (1, 10_000),
    "BATCH_SIZE": (2, 50_000),
    "LEARNING_RATE": (1e-6, 100.0),
    "SGD_LEARNING_RATE": (1e-6, 100.0),
    "WEIGHT_DECAY": (0.0, 1.0),
    "DROPOUT": (0.0, 0.99),
    "EMA_DECAY": (0.0, 0.99999),
    "SEED": (0, 2**32 - 1),
    "RESUME": (False, True),
}


def check_parameters(values: dict[str, object]) -> None:
    """Raises ValueError if a parameter of the notebook is unknown, of the wrong type or out of range.

    `values` is the notebook's `globals()`. Unknown names are found only before the notebook imports torch:
    until then, parameters are its only numbers and texts.
    """
    if "torch" not in values:
        plain = {name for name, value in values.items() if isinstance(value, (int, float, str))}
        parameters = {name for name in plain if not name.startswith("_")}
        unknown = ", ".join(sorted(parameters - LIMITS.keys() - {"DATA", "DATA_ROOT"}))
        if unknown:
            expected = f"{', '.join(LIMITS)}, DATA or DATA_ROOT"
            raise ValueError(f"unknown parameter {unknown}: expected {expected}")
    for name, (low, high) in LIMITS.items():
        value = values[name]
        if not isinstance(value, (int, type(low))) or not low <= value <= high:
            kind = type(low).__name__
            raise ValueError(f"expected {name} to be {kind} from {low} to {high}, found {value!r}")


def check_installed(*names: str) -> None:
    """Raises ModuleNotFoundError for the first package that is not installed, and says how to add it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            how = f"pip install {name} adds it to what is there"
            raise ModuleNotFoundError(f"expected the module {name}, found none: {how}", name=name)


def describe_commit() -> str:
    """The commit of this code in at least 12 digits, with "-dirty" after edits; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def set_seed(seed: int) -> None:
    """Seeds `random`, NumPy's global generator and torch. Raises ValueError outside [0, 2**32 - 1]."""
    np.random.seed(seed)  # first, because its range is the narrowest
    random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- layers


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode. Nothing done with it changes the model."""
    return copy.deepcopy(model).cpu().float().eval()


def model_summary(model: nn.Module, input_size: Size = SIZE) -> None:
    """Prints torchsummary's table, in megabytes of float32. The random state does not change."""
    import torchsummary  # here, so that the other functions work without it

    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # torchsummary draws a random input
        torchsummary.summary(evaluation_copy(model), tuple(input_size), device="cpu")


def square_window(name: str, layer: nn.Module) -> dict[str, int]:
    """Kernel, stride, dilation and padding of a convolution or a pool, in pixels. ValueError: not square."""
    window = {}
    for key in ("kernel", "stride", "dilation", "padding"):
        attribute = "kernel_size" if key == "kernel" else key
        value = getattr(layer, attribute, 1)  # average pools have no dilation
        if value == "same":
            value = window["dilation"] * (window["kernel"] - 1) // 2
        elif value == "valid":
            value = 0
        sides = {value} if isinstance(value, int) else set(value)
        if len(sides) > 1:
            raise ValueError(f"expected a square {key} in {name}, found {value}: use a square one")
        window[key] = sides.pop()
    return window


def receptive_field(model: nn.Module, input_size: Size = SIZE) -> list[dict]:
    """The receptive field of each Conv2d, MaxPool2d and AvgPool2d, in the order in which they run.

        rf_out   = rf_in + (kernel - 1) * dilation * jump_in
        jump_out = jump_in * stride

    torch.fx traces the model, so branches count: a layer that joins them takes the largest receptive field.
    A global or adaptive pool, or flattening, sees the whole map. The layers after it have no row.

    Paper: Araujo, Norris and Sim 2019, Computing Receptive Fields of Convolutional Neural Networks, Distill.

    Args:
        model: has one input, and no control flow that depends on the data.
        input_size: (channels, side, side) of one input.

    Returns:
        One dict a layer. `name` is dotted; the other values are integers. `kernel`, `stride`, `padding`,
        `dilation`, `size_in` and `size_out` are in pixels of the layer's own map. `jump_in`, `jump_out`,
        `rf_in` and `rf_out` are in pixels of the model's input.

    Raises:
        ValueError: a map or a window is not square, or another operation changes the size of the map.
            The message names it.
    """
    if len(input_size) != 3 or input_size[1] != input_size[2]:
        found = tuple(input_size)
        raise ValueError(f"expected input_size (channels, side, side), found {found}: give a square map")
    traced = fx.symbolic_trace(evaluation_copy(model))
    modules = dict(traced.named_modules())
    with torch.no_grad():
        ShapeProp(traced).propagate(torch.zeros(1, *input_size))

    rows = []
    shapes = {}  # node: shape of its output, or () if that is no tensor
    fields = {}  # node: (jump, receptive field) of its output, or None if it sees the whole map
    for node in traced.graph.nodes:
        shapes[node] = tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))
        if node.op == "placeholder":
            fields[node] = 1, 1
        inputs = [source for source in node.all_input_nodes if source in fields]
        if not inputs or node.op == "output":
            continue
        if any(fields[source] is None for source in inputs):
            fields[node] = None
            continue
        jump = max(fields[source][0] for source in inputs)
        field = max(fields[source][1] for source in inputs)
        fields[node] = jump, field

        before, after = shapes[inputs[0]][-2:], shapes[node][-2:]
        module = modules.get(node.target) if node.op == "call_module" else None
        operation = type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))
        if type(module) in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d):
            window = square_window(node.target, module)
            reach = field + (window["kernel"] - 1) * window["dilation"] * jump
            fields[node] = jump * window["stride"], reach
            row = {"name": node.target, **window, "size_in": before[0], "size_out": after[0]}
            row |= {"jump_in": jump, "jump_out": jump * window["stride"], "rf_in": field, "rf_out": reach}
            rows.append(row)
        elif "adaptive" in operation.lower() or 0 < len(shapes[node]) < 4 or after == (1, 1) != before:
            fields[node] = None
        elif re.search("conv|pool", operation.lower()) or (before and after and before != after):
            expected = "Conv2d, MaxPool2d, AvgPool2d or layers that keep the map's size"
            found = f"{operation} ({node.name}: {before} to {after})"
            raise ValueError(f"expected {expected}, found {found}: write it as one of those modules")
    return rows


# ---------------------------------------------------------------- workbook

COLUMNS = ("name", "kernel", "stride", "padding", "dilation")
COLUMNS += ("size_in", "size_out", "jump_in", "jump_out", "rf_in", "rf_out")
LETTERS = "ABCDEFGHIJK"  # of the columns
HEADER = 5  # the row of the headings; the image is in the next row, and the layers follow
TINTS = ("DDEBF7", "E2EFDA", "FFF2CC", "FCE4D6", "EDE7F6")
EXPLANATION = """\
rf out = rf in + (kernel − 1) · dilation · jump in        jump out = jump in · stride        \
size out = ⌊(size in + 2 · padding − dilation · (kernel − 1) − 1) / stride⌋ + 1
Blue: read from the model. Black: computed by the formulas above. Jump and receptive field (rf) are in \
pixels of the image, size out in pixels of the layer's output, the rest in pixels of its input.
With the dilation left out of rf out, the last cell would say (wrong wherever a dilation is not 1):"""
FORMULAS = {  # of row {r}; {p} is the row above it
    "size_in": "=G{p}",
    "size_out": "=INT((F{r}+2*D{r}-E{r}*(B{r}-1)-1)/C{r})+1",
    "jump_in": "=I{p}",
    "jump_out": "=H{r}*C{r}",
    "rf_in": "=K{p}",
    "rf_out": "=J{r}+(B{r}-1)*E{r}*H{r}",
}


def write_receptive_field_workbook(model: nn.Module, path: str | Path, input_size: Size = SIZE) -> None:
    """Writes `receptive_field(model, input_size)` as an .xlsx file whose computed cells are live formulas.

    The last cell is the receptive field of the last layer. Layers of one part of the model share a colour.
    The same model gives the same bytes. `path` is replaced, and never holds half a file.

    Raises:
        ValueError: the model has no layers, has branches, or has a pool that rounds its size up.
    """
    import xlsxwriter  # here, so that the other functions work without it

    from checkpoint import write_file  # here, because it needs safetensors

    image = {"name": "image", "size_out": input_size[1], "jump_out": 1, "rf_out": 1}
    rows = [image, *receptive_field(model, input_size)]
    check_chain(rows)
    content = io.BytesIO()
    with xlsxwriter.Workbook(content, {"in_memory": True}) as book:
        author = "utils.write_receptive_field_workbook"
        book.set_properties({"author": author, "created": datetime(1980, 1, 1)})  # not now: files stay equal
        title = f"Receptive field of {type(model).__name__}, layer by layer"
        fill_sheet(book, book.add_worksheet("Receptive field"), title, rows)
    write_file(path, content.getvalue())


def check_chain(rows: list[dict]) -> None:
    """Raises ValueError unless each row is fed by the row before it and rounds its size down."""
    if len(rows) < 2:
        raise ValueError("expected a model with convolutions or pools, found none: there is nothing to write")
    for before, row in itertools.pairwise(rows):
        chained = all(row[f"{key}_in"] == before[f"{key}_out"] for key in ("size", "jump", "rf"))
        reach = row["size_in"] + 2 * row["padding"] - row["dilation"] * (row["kernel"] - 1) - 1
        if not chained or row["size_out"] != reach // row["stride"] + 1:
            found = f"{row['name']}, which is not fed by the layer before it or rounds up"
            raise ValueError(
                f"expected a chain of layers that round down, found {found}: use receptive_field"
            )


def fill_sheet(book, sheet, title: str, rows: list[dict]) -> None:
    """Writes the explanation, the headings, the image and the layers to an XlsxWriter sheet."""

    def style(**changes):
        font = {"font_name": "Calibri", "font_size": 11, "font_color": "#000000"}
        return book.add_format({**font, "align": "center", "valign": "vcenter", **changes})

    first, last = HEADER + 2, HEADER + len(rows)
    sheet.write_string("A1", title, style(bold=True, font_size=16, align="left"))
    for r, text in enumerate(EXPLANATION.splitlines(), 2):
        color = "#C00000" if r == 4 else "#000000"
        sheet.write_string(f"A{r}", text, style(align="left", font_color=color))
    undilated = 1 + sum((row["kernel"] - 1) * row["jump_in"] for row in rows[1:])
    formula = f"=K{first - 1}+SUMPRODUCT(B{first}:B{last}-1,H{first}:H{last})"
    sheet.write_formula("K4", formula, style(font_color="#C00000"), undilated)

    for letter, key in zip(LETTERS, COLUMNS):
        heading, width, align = f"{key.replace('_', ' ')} (px)", len(key) + 8, "center"
        if key == "name":
            heading, width, align = "layer", max(len(row["name"]) for row in rows[1:]) + 4, "left"
        heading_style = style(bold=True, font_color="#FFFFFF", bg_color="#1F3864", align=align)
        sheet.write_string(f"{letter}{HEADER}", heading, heading_style)
        sheet.set_column_pixels(f"{letter}:{letter}", 7 * width)  # a character of Calibri 11 has 7 pixels

    tints = {"image": "F2F2F2"}
    for r, row in enumerate(rows, HEADER + 1):
        tint = tints.setdefault(row["name"].split(".")[0], TINTS[(len(tints) - 1) % len(TINTS)])
        sheet.write_string(f"A{r}", row["name"], style(bg_color=tint, align="left"))
        for letter, key in zip(LETTERS[1:], COLUMNS[1:]):
            if key in FORMULAS and row is not rows[0]:
                formula = FORMULAS[key].format(r=r, p=r - 1)
                computed = style(bg_color=tint, bold=key == "rf_out")
                sheet.write_formula(f"{letter}{r}", formula, computed, row[key])
            else:
                sheet.write(f"{letter}{r}", row.get(key), style(bg_color=tint, font_color="#0000FF"))
    for r in range(last):
        points = 26 if r in (0, HEADER - 1) else 18
        sheet.set_row_pixels(r, points / 0.75)
    sheet.freeze_panes(HEADER, 1)


# ---------------------------------------------------------------- data and predictions


def channel_statistics(images, name: str = "Train") -> dict[str, tuple[float, ...]]:
    """Prints and returns min, max, mean, std and var of each channel of images / 255.

    The results are exact: integers are summed, and divided once in float64. The variance is the population's
    (divided by the number of pixels). A few megabytes are needed beside the images.

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


@torch.no_grad()
def predictions(model: nn.Module, loader: Iterable) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets int64 (N,) and softmax probabilities float32 (N, classes) of a whole loader, on the CPU.

    The model runs in evaluation mode on its own device. Afterwards each module has its own mode again.

    Args:
        model: images (N, C, H, W) to logits (N, classes).
        loader: gives batches (images, targets) on any device: float images as the model takes them, integer
            targets (N,). The results keep its order.

    Raises:
        ValueError: the loader is empty.
    """
    device = next(model.parameters(), torch.empty(0)).device
    targets, probabilities = [], []
    with evaluation_mode(model):
        for images, labels, *_ in loader:
            for part in split_for_cache(images.to(device, non_blocking=True)):
                probabilities.append(model(part).float().softmax(1))
            targets.append(labels)  # moved to the CPU at the end, so that no batch waits for the GPU
    if not targets:
        expected = "at least one batch of (images, targets)"
        raise ValueError(f"expected {expected}, found an empty loader: an iterator in use?")
    return torch.cat(targets).to("cpu", torch.int64), torch.cat(probabilities).cpu()


def misclassified(model: nn.Module, loader: Iterable, limit: int | None = None) -> list[dict]:
    """The images that the model gets wrong, the most confident error first, at most `limit` of them.

    `model` and `loader` are as in `predictions`.

    Returns:
        One dict an image: `index` in the loader's order, `target` and `prediction` (integers), and
        `confidence`, the probability of the prediction, in [0, 1].

    Raises:
        ValueError: limit is below 0, or the loader is empty.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"expected limit None or at least 0, found {limit}: give the number of images")
    targets, probabilities = predictions(model, loader)
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != targets).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit]
    columns = [x.tolist() for x in (wrong, targets[wrong], predicted[wrong], confidence[wrong])]
    return [dict(zip(("index", "target", "prediction", "confidence"), row)) for row in zip(*columns)]


def class_accuracies(
    targets: torch.Tensor, predicted: torch.Tensor, classes: Sequence[str]
) -> dict[str, float]:
    """The accuracy of each class in percent, NaN if it has no images; both tensors are class indices (N,)."""
    images = torch.bincount(targets, minlength=len(classes)).double()
    right = torch.bincount(targets[predicted == targets], minlength=len(classes))
    return dict(zip(classes, (100 * right / images).tolist()))


def most_confused(
    targets: torch.Tensor, predicted: torch.Tensor, classes: Sequence[str], limit: int = 5
) -> list[tuple[str, str, int]]:
    """The pairs of classes with the most mistakes: (class, class, mistakes in both directions), most first.

    Equal pairs keep the order of the classes. Pairs without mistakes are left out. Both tensors are class
    indices (N,).
    """
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
        ValueError: top_k is out of range, classes and logits differ in number, or the transform refuses an
            image. The message has the image's place in the list.
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
            yield torch.stack(tensors), torch.zeros(len(tensors))

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
        One dict for each tenth of [0, 1] with images: `count`, and the means `confidence` and `accuracy`.
        The expected calibration error in [0, 1]: |confidence - accuracy|, weighted by the counts.
    """
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
        float32 (N, H, W) on the CPU, in [0, 1]. The maximum of each image is 1. If nothing speaks for the
        predicted class, the whole image is 0.
    """
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

"""Inspection and prediction: nothing here knows which model or which data set it is given."""

import copy
import io
import os
import random
import re
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torchsummary
from openpyxl import Workbook
from openpyxl.styles import Alignment, Font, PatternFill
from openpyxl.utils import get_column_letter
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F


def set_seed(seed: int) -> None:
    """Seeds `random`, NumPy's global generator and torch on every device. ValueError outside [0, 2**32 - 1]."""
    np.random.seed(seed)  # the narrowest range first: a seed that it refuses leaves the others alone
    random.seed(seed)
    torch.manual_seed(seed)


def _probe(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode: what is asked of it leaves no trace in the model."""
    return copy.deepcopy(model).cpu().float().eval()


def model_summary(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> None:
    """Prints torchsummary's table for inputs (N, *input_size), input_size being (channels, height, width).

    The model may be on any device; its mode, weights, batch norm statistics and hooks stay as they are, and so
    does the random state. The megabytes are those of float32.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # torchsummary draws its input from the global generator
        torchsummary.summary(_probe(model), tuple(input_size), device="cpu")


# ---------------------------------------------------------------- receptive field


def _window(name: str, layer: nn.Module) -> dict[str, int]:
    """Kernel, stride, dilation and padding of a convolution or a pool, in pixels of its own input."""
    window = {}
    for key in ("kernel", "stride", "dilation", "padding"):
        value = getattr(layer, "kernel_size" if key == "kernel" else key, 1)  # average pools have no dilation
        if isinstance(value, str):
            value = window["dilation"] * (window["kernel"] - 1) // 2 if value == "same" else 0
        sides = {value} if isinstance(value, int) else set(value)
        if len(sides) > 1:
            raise ValueError(f"expected a square {key} in {name}, found {value}: only square windows are supported")
        window[key] = sides.pop()
    return window


def receptive_field(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> list[dict]:
    """The receptive field of each Conv2d, MaxPool2d and AvgPool2d, in the order in which they run.

        rf_out   = rf_in + (kernel - 1) * dilation * jump_in
        jump_out = jump_in * stride

    after Araujo, Norris and Sim 2019, Computing Receptive Fields of Convolutional Neural Networks, Distill. The
    model is traced with torch.fx, so branches count: where they join, the largest receptive field goes on. After
    a global or adaptive pool, or flattening, it is the whole map, and the layers that follow have no row.

    Args:
        model: one input, no control flow that depends on the data; left as it is.
        input_size: (channels, height, width), height equal to width.

    Returns:
        One dict a layer: name (dotted), then integers: kernel, stride, padding, dilation and size_in, size_out in
        pixels of the layer's own map; jump_in, jump_out, rf_in, rf_out in pixels of the model's input.

    Raises:
        ValueError: a map or a window that is not square, or an operation that changes the map's size and is none
            of the layers above. The message names it.
    """
    if len(input_size) != 3 or input_size[1] != input_size[2]:
        raise ValueError(f"expected input_size (channels, side, side), found {tuple(input_size)}: give a square map")
    traced = fx.symbolic_trace(_probe(model))
    layers = dict(traced.named_modules())
    with torch.no_grad():
        ShapeProp(traced).propagate(torch.zeros(1, *input_size))

    # Of each node (jump, receptive field), or None where every output sees the whole map.
    rows, state = [], {node: (1, 1) for node in traced.graph.nodes if node.op == "placeholder"}

    def shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))

    for node in traced.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in state]
        if not inputs or node.op == "output":
            continue
        if any(state[n] is None for n in inputs):
            state[node] = None
            continue
        jump, rf = state[node] = tuple(max(values) for values in zip(*(state[n] for n in inputs)))
        before, after = shape(inputs[0])[-2:], shape(node)[-2:]
        layer = layers.get(node.target) if node.op == "call_module" else None
        operation = type(layer).__name__ if layer else getattr(node.target, "__name__", str(node.target))
        if type(layer) in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d):
            window = _window(node.target, layer)
            reach = rf + (window["kernel"] - 1) * window["dilation"] * jump
            row = dict(name=node.target, **window, size_in=before[0], size_out=after[0])
            rows.append(row | dict(jump_in=jump, jump_out=jump * window["stride"], rf_in=rf, rf_out=reach))
            state[node] = jump * window["stride"], reach
        elif "adaptive" in operation.lower() or (shape(node) and (len(shape(node)) < 4 or after == (1, 1) != before)):
            state[node] = None
        elif re.search("conv|pool", operation.lower()) or (before and after and before != after):
            raise ValueError(
                f"expected Conv2d, MaxPool2d, AvgPool2d or layers that keep the map's size, found {operation} "
                f"({node.name}: {before} to {after}): write it as one of those modules"
            )
    return rows


COLUMNS = ("name", "kernel", "stride", "padding", "dilation", "size_in", "size_out", "jump_in", "jump_out", "rf_in", "rf_out")
HEADER = 5  # the row of the headings; the row below it is the input, then one row a layer
TINTS = ("DDEBF7", "E2EFDA", "FFF2CC", "FCE4D6", "EDE7F6")


def write_receptive_field_workbook(model: nn.Module, path: str | Path, input_size: tuple[int, int, int] = (3, 32, 32)) -> None:
    """Writes `receptive_field(model, input_size)` as a workbook in which every computed cell is a live formula.

    The last cell is the receptive field of the last layer. Layers whose names have one first part share a colour. The
    same model gives the same bytes; the file appears at `path` complete or not at all.

    Args:
        model: a chain of layers, each fed by the one before.
        path: the .xlsx file, replaced where it exists.
        input_size: (channels, side, side).

    Raises:
        ValueError: no layers, a branch, or a pool that rounds its size up.
    """
    rows = receptive_field(model, input_size)
    if not rows:
        raise ValueError("expected a model with convolutions or pools, found none: there is nothing to write")
    image = dict(name="image", size_out=input_size[1], jump_out=1, rf_out=1)
    for before, row in zip([image, *rows], rows):
        reach = row["size_in"] + 2 * row["padding"] - row["dilation"] * (row["kernel"] - 1) - 1
        chained = all(row[f"{key}_in"] == before[f"{key}_out"] for key in ("size", "jump", "rf"))
        if not chained or row["size_out"] != reach // row["stride"] + 1:
            raise ValueError(
                f"expected a chain of layers that round down, found {row['name']}, which is not fed by the layer "
                "before or rounds up: use receptive_field"
            )

    book = Workbook()
    sheet = book.active
    sheet.title = "Receptive field"
    first, last = HEADER + 2, HEADER + 1 + len(rows)

    def put(row: int, column: int, value, color="000000", bold=False, size=11, fill=None, left=False):
        cell = sheet.cell(row, column, value)
        cell.font = Font("Calibri", size, bold, color=color)
        cell.alignment = Alignment("left" if left else "center", "center")
        cell.fill = PatternFill("solid", fgColor=fill) if fill else PatternFill()
        return cell

    explanation = (
        f"Receptive field of {type(model).__name__}, layer by layer",
        "rf out = rf in + (kernel − 1) · dilation · jump in        jump out = jump in · stride        "
        "size out = ⌊(size in + 2 · padding − dilation · (kernel − 1) − 1) / stride⌋ + 1",
        "Blue: read from the model. Black: computed by the formulas above. Jump and receptive field (rf) are in pixels "
        "of the image, size out in pixels of the layer's output, the rest in pixels of its input.",
        "With the dilation left out of rf out, the last cell would say (wrong wherever a dilation is not 1):",
    )
    for r, text in enumerate(explanation, 1):
        put(r, 1, text, left=True, bold=r == 1, size=16 if r == 1 else 11, color="C00000" if r == 4 else "000000")
    put(4, len(COLUMNS), f"=K{first - 1}+SUMPRODUCT(B{first}:B{last}-1,H{first}:H{last})", color="C00000")
    values = {"K4": rows[0]["rf_in"] + sum((row["kernel"] - 1) * row["jump_in"] for row in rows)}

    for column, key in enumerate(COLUMNS, 1):
        heading = "layer" if key == "name" else f"{key.replace('_', ' ')} (px)"
        put(HEADER, column, heading, color="FFFFFF", bold=True, fill="1F3864", left=column == 1)
        width = max(len(row["name"]) for row in rows) + 4 if key == "name" else len(heading) + 3
        sheet.column_dimensions[get_column_letter(column)].width = width
    tints = {"image": "F2F2F2"}
    for r, row in enumerate([image, *rows], HEADER + 1):
        fill = tints.setdefault(row["name"].split(".")[0], TINTS[(len(tints) - 1) % len(TINTS)])
        formulas = dict(
            size_in=f"=G{r - 1}",
            size_out=f"=INT((F{r}+2*D{r}-E{r}*(B{r}-1)-1)/C{r})+1",
            jump_in=f"=I{r - 1}",
            jump_out=f"=H{r}*C{r}",
            rf_in=f"=K{r - 1}",
            rf_out=f"=J{r}+(B{r}-1)*E{r}*H{r}",
        )
        for column, key in enumerate(COLUMNS, 1):
            if row is not image and key in formulas:
                cell = put(r, column, formulas[key], bold=key == "rf_out", fill=fill)
                values[cell.coordinate] = row[key]
            else:
                name = key == "name"
                put(r, column, row.get(key), color="000000" if name else "0000FF", fill=fill, left=name)
    for r in range(1, last + 1):
        sheet.row_dimensions[r].height = 26 if r in (1, HEADER) else 18
    sheet.freeze_panes = sheet.cell(HEADER + 1, 2)
    book.properties.creator, book.properties.created = "utils.write_receptive_field_workbook", datetime(1980, 1, 1)

    # openpyxl stamps the time of writing into the archive, and leaves the results of formulas to the program that
    # opens the file, so previews and pandas would show empty cells: fix the time, and put the results in.
    def result(cell: re.Match) -> str:
        return f"{cell[1]}<v>{values[cell[2]]}</v>"

    written, fixed = io.BytesIO(), io.BytesIO()
    book.save(written)
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(fixed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            text = old.read(name).decode()
            if name == "docProps/core.xml":
                text = re.sub(r"(<dcterms:modified[^>]*>)[^<]*", r"\g<1>1980-01-01T00:00:00Z", text)
            if name == "xl/worksheets/sheet1.xml":
                text = re.sub(r'(<c r="(\w+)"[^>]*><f>[^<]*</f>)<v ?(?:/>|></v>)', result, text)
            new.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)  # ZipInfo's own date is 1980-01-01
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(fixed.getvalue())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------- data and predictions


def channel_statistics(images: np.ndarray | torch.Tensor, name: str = "Train") -> dict[str, tuple[float, ...]]:
    """Prints and returns min, max, mean, std and var of each channel of images / 255.

    Exact: whole numbers are summed, and divided once in float64. The variance is that of the population (divided
    by the number of pixels). Takes a few megabytes beside the images.

    Args:
        images: uint8 (N, H, W, 3), N at least 1, RGB, an array or a tensor.
        name: what the images are, for the printed heading.

    Returns:
        {"min", "max", "mean", "std", "var"}: tuples of three floats, one a channel, in [0, 1].

    Raises:
        ValueError: images are not uint8 (N, H, W, 3), or there are none.
    """
    images = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images in 0..255, found {images.dtype}: convert them first")
    if images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
        raise ValueError(f"expected images (N, H, W, 3), N at least 1, found {images.shape}: put the channels last")
    counts = np.zeros((3, 256), np.int64)  # how often each channel takes each value: all the statistics follow
    for chunk in np.array_split(images, -(-images.size // 2**22)):  # bincount makes int64 of what it counts
        counts += [np.bincount(chunk[..., c].ravel(), minlength=256) for c in range(3)]
    rows = []
    for channel in counts.tolist():  # Python's integers: nothing is rounded before the divisions
        n, total, squares = (sum(k * v**power for v, k in enumerate(channel)) for power in (0, 1, 2))
        present = [v / 255 for v, k in enumerate(channel) if k]
        variance = (n * squares - total**2) / (n * 255) ** 2
        rows.append((present[0], present[-1], total / (n * 255), variance**0.5, variance))
    result = dict(zip(("min", "max", "mean", "std", "var"), zip(*rows)))
    print(f"[{name}]\n - Total {name} Images: {len(images)}")
    print(f" - Tensor Shape: {(3, *images.shape[1:3])}")
    for key, numbers in result.items():
        texts = (str(round(x, 8)) if key in ("min", "max") else f"{x:.8f}" for x in numbers)
        print(f" - {key}: ({', '.join(texts)})")
    return result


@torch.no_grad()
def predictions(model: nn.Module, loader) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets int64 (N,) and softmax probabilities float32 (N, classes) of a whole loader, on the CPU.

    The model runs in evaluation mode on its own device, and each of its modules is in its old mode afterwards.

    Args:
        model: images (N, C, H, W) to logits (N, classes).
        loader: any iterable of (images, targets): float images as the model takes them, integer targets (N,), on
            any device. The order of the result is the loader's.

    Raises:
        ValueError: the loader is empty.
    """
    device = next(model.parameters(), torch.empty(0)).device
    modes = [(module, module.training) for module in model.modules()]  # some may be frozen: not all have one mode
    targets, probabilities = [], []
    model.eval()
    try:
        for images, labels, *_ in loader:
            # Both stay on their devices until the end: no waiting for the GPU between batches.
            # A large batch is what a GPU wants; a CPU is fastest while the activations stay in its cache.
            for part in images.split(100) if device.type == "cpu" else [images]:
                probabilities.append(model(part.to(device, non_blocking=True)).float().softmax(1))
            targets.append(labels)
    finally:
        for module, mode in modes:
            module.training = mode
    if not targets:
        raise ValueError("expected at least one batch of (images, targets), found an empty loader: an iterator in use?")
    return torch.cat(targets).to("cpu", torch.int64), torch.cat(probabilities).cpu()


def misclassified(model: nn.Module, loader, limit: int | None = None) -> list[dict]:
    """The images that the model gets wrong, the most confident error first, at most `limit` of them.

    Args:
        model, loader: as `predictions` takes them.
        limit: how many to return, at least 0; None for all. ValueError below 0.

    Returns:
        Dicts of index (the image's place in the loader's order), target, prediction (integers) and confidence (the
        softmax probability of the prediction, in [0, 1]).
    """
    if limit is not None and limit < 0:
        raise ValueError(f"expected limit None or at least 0, found {limit}: give the number of images")
    targets, probabilities = predictions(model, loader)
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != targets).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit]
    columns = (x.tolist() for x in (wrong, targets[wrong], predicted[wrong], confidence[wrong]))
    return [dict(zip(("index", "target", "prediction", "confidence"), row)) for row in zip(*columns)]


def predict(model: nn.Module, images, transform, classes, top_k: int | None = None) -> list[list[tuple[str, float]]]:
    """The top_k most probable (class name, probability) pairs of each image, most probable first.

    Args:
        model: as `predictions` takes it.
        images: one or a list of what the transform takes, or an array (N, H, W, 3) of them; none gives [].
            `dataset.test_transform()` takes paths, the bytes of files, PIL images and arrays of any size.
        transform: an albumentations.Compose that ends in a float tensor (3, H, W), the one that the model was
            tested with.
        classes: the names, in the order of the logits.
        top_k: 1 to len(classes); by default 3, or all where there are fewer.

    Raises:
        ValueError: top_k out of range, classes that are not as many as the logits, or what the transform raises, with
            the place of the image in the list.
        FileNotFoundError: a path at which there is no file.
    """
    top_k = min(3, len(classes)) if top_k is None else top_k
    if not 1 <= top_k <= len(classes):
        raise ValueError(f"expected top_k from 1 to {len(classes)}, the number of classes, found {top_k}: change it")
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) != 4:
        images = [images]

    def transformed(i: int) -> torch.Tensor:
        try:
            return transform(image=images[i])["image"]
        except ValueError as error:
            raise ValueError(f"image {i}: {error}") from None

    if not len(images):
        return []
    # A generator: only one batch of transformed images is in memory at a time.
    batches = (range(i, min(i + 256, len(images))) for i in range(0, len(images), 256))
    tensors = (torch.stack([transformed(i) for i in batch]) for batch in batches)
    _, probabilities = predictions(model, ((batch, torch.zeros(len(batch))) for batch in tensors))
    if probabilities.shape[1] != len(classes):
        raise ValueError(f"expected as many classes as logits, {probabilities.shape[1]}, found {len(classes)}: give the model's own")
    top = probabilities.topk(top_k)
    return [[(classes[c], p) for p, c in zip(*pair)] for pair in zip(top.values.tolist(), top.indices.tolist())]


def calibration(targets: torch.Tensor, probabilities: torch.Tensor) -> tuple[list[dict[str, float]], float]:
    """Whether the model is right as often as it says, by its confidence, the probability of the class that it names.

    Args:
        targets, probabilities: as `predictions` gives them, of one image at least.

    Returns:
        A dict for each tenth of [0, 1] in which a confidence lies: count, confidence and accuracy (means over its images,
        in [0, 1]); and the expected calibration error, the mean of their difference over all images, in [0, 1] (Guo et
        al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599).
    """
    confidence, named = probabilities.double().max(1)
    right = (named == targets).double()
    place = (confidence * 10).long().clamp(max=9)
    rows = [
        {"count": len(inside), "confidence": confidence[inside].mean().item(), "accuracy": right[inside].mean().item()}
        for inside in ((place == i).nonzero().flatten() for i in range(10))
        if len(inside)
    ]
    return rows, sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(targets)


def grad_cam(model: nn.Module, layer: str, images: torch.Tensor) -> torch.Tensor:
    """Where the maps of a layer speak for the class that the model names: Selvaraju et al. 2017, Grad-CAM, arXiv:1610.02391.

    The model stays as it is, gradients and mode included.

    Args:
        model: images (N, C, H, W) to logits (N, classes).
        layer: the dotted name of a module of it whose output is (N, channels, h, w).
        images: float (N, C, H, W), as the model takes them.

    Returns:
        float32 (N, H, W) on the CPU, in [0, 1], 1 at the largest of each image; zeros where nothing speaks for it.
    """
    probe, images, maps = _probe(model), images.detach().cpu().float().requires_grad_(), []  # the model may be frozen

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        maps.append(output)
        return output.clone()  # what follows may work in place

    probe.get_submodule(layer).register_forward_hook(keep)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(probe(images).max(1).values.sum(), maps)
    heat = (slope.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True).relu().detach()
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)

"""The receptive field of a model's layers, from a trace of its operations."""

import copy
import re

import torch
from torch import fx, nn

Size = tuple[int, int, int]  # (channels, height, width) of one input
SIZE = (3, 32, 32)
WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode. Nothing done with it changes the model."""
    return copy.deepcopy(model).cpu().float().eval()


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


class Tracer(fx.Interpreter):
    """Runs a traced model, and finds the operations that carry pixels of a map to other places.

    `shapes` has the shape of each node's (first) tensor, or () if it has none. `moving` has the
    nodes whose output at one pixel depends on another pixel of their input.
    """

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.extra_traceback = False  # it would make each error many lines long
        self.shapes, self.moving = {}, set()

    def run_node(self, node: fx.Node):
        if node.op.startswith("call") and type(self.submodules.get(node.target)) not in WINDOWS:
            # NaN stays NaN in nearly every operation, so it shows where one pixel goes.
            args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(node), with_nan)
            output = first_tensor(getattr(self, node.op)(node.target, args, kwargs))
            if output is not None and output.ndim > 3:
                reached = output.isnan().flatten(0, -3).any(0)
                reached[:1, 1:2] = False
                if reached.any():
                    self.moving.add(node)
        result = super().run_node(node)
        tensor = first_tensor(result)
        self.shapes[node] = () if tensor is None else tuple(tensor.shape)
        return result


def first_tensor(value) -> torch.Tensor | None:
    """The value itself if it is a tensor, else the first tensor of a tuple or a list, else None."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return next((x for x in values if isinstance(x, torch.Tensor)), None)


def with_nan(value):
    """A copy of maps (..., H, W) with NaN in the second pixel of the first row. Other values stay."""
    if (
        isinstance(value, torch.Tensor)
        and value.ndim > 3
        and value.shape[-1] > 1
        and value.is_floating_point()
    ):
        value = value.clone()
        value[..., 0, 1] = torch.nan
    return value


def receptive_field(model: nn.Module, input_size: Size = SIZE) -> list[dict]:
    """The receptive field of each Conv2d, MaxPool2d and AvgPool2d, in the order in which they run.

        rf_out   = rf_in + (kernel - 1) * dilation * jump_in
        jump_out = jump_in * stride

    torch.fx traces the model, so branches count: a layer that joins them sees what any of them
    sees. A global or adaptive pool, or flattening, sees the whole map. The layers after it, such
    as a classifier, have no row: a transformer has the row of its patches alone.

    Paper: Araujo, Norris and Sim 2019, Computing Receptive Fields of Convolutional Neural
    Networks, Distill.

    Args:
        model: has one input, and no control flow that depends on the data.
        input_size: (channels, side, side) of one input.

    Returns:
        One dict a layer. `name` is dotted; the other values are integers. `kernel`, `stride`,
        `padding`, `dilation`, `size_in` and `size_out` are in pixels of the layer's own map.
        `jump_in`, `jump_out`, `rf_in` and `rf_out` are in pixels of the model's input.

    Raises:
        ValueError: a map or a window is not square, another operation changes the size of the map
            or moves its pixels, or a window slides over a map of which each pixel has seen the
            whole image, as behind squeeze-and-excitation. The message names the operation.
    """
    if len(input_size) != 3 or input_size[1] != input_size[2]:
        found = tuple(input_size)
        raise ValueError(f"expected input_size (channels, side, side), found {found}: give a square map")
    try:
        traced = fx.symbolic_trace(evaluation_copy(model))
    except Exception as error:  # the model's own code runs on objects that it does not expect
        found = f"{type(model).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"expected a model that torch.fx can trace, found {found}") from error
    tracer = Tracer(traced)
    with torch.no_grad():
        tracer.run(torch.ones(1, *input_size))

    rows = []
    # Of each node's output: (jump, first, last), because pixel 0 sees the image's pixels first to last.
    # If each pixel sees the whole map: the name of the operation that did it.
    fields = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            fields[node] = 1, 0, 0
        inputs = [source for source in node.all_input_nodes if source in fields]
        if not inputs or node.op == "output":
            continue
        module = tracer.submodules.get(node.target) if node.op == "call_module" else None
        operation = type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))
        slides = re.search("conv|pool", operation.lower()) and "adaptive" not in operation.lower()
        before, after = tracer.shapes[inputs[0]][-2:], tracer.shapes[node][-2:]
        whole = [fields[source] for source in inputs if isinstance(fields[source], str)]
        if whole and slides and after != (1, 1):
            found = f"{operation} ({node.name}) behind {whole[0]}"
            raise ValueError(f"expected no window behind a look at the whole map, found {found}: take it out")
        if whole:
            fields[node] = whole[0]
            continue
        jumps, firsts, lasts = zip(*(fields[source] for source in inputs))
        jump, first, last = fields[node] = max(jumps), min(firsts), max(lasts)

        if type(module) in WINDOWS:
            window = square_window(node.target, module)
            first -= window["padding"] * jump
            last += ((window["kernel"] - 1) * window["dilation"] - window["padding"]) * jump
            row = {"name": node.target, **window, "size_in": before[0], "size_out": after[0]}
            row |= {"jump_in": jump, "jump_out": jump * window["stride"]}
            row |= {"rf_in": max(lasts) - min(firsts) + 1, "rf_out": last - first + 1}
            fields[node] = row["jump_out"], first, last
            rows.append(row)
        elif "adaptive" in operation.lower() or 0 < len(tracer.shapes[node]) < 4 or after == (1, 1) != before:
            fields[node] = f"{operation} ({node.name})"
        elif slides or node in tracer.moving or (before and after and before != after):
            expected = "Conv2d, MaxPool2d, AvgPool2d or layers that keep each pixel in its place"
            found = f"{operation} ({node.name}: {before} to {after})"
            raise ValueError(f"expected {expected}, found {found}: write it as one of those modules")
    return rows

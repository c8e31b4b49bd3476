"""Net: a CIFAR-10 classifier of 193,535 parameters, without pooling between its layers.

Each stage has four blocks:

1. separable: a depthwise 3x3 convolution, then a pointwise 1x1 convolution
2. dilated1: a 3x3 convolution with dilation 2
3. dilated2: the same again
4. transition: a 3x3 convolution with stride 2, which halves the map; stride 1 in the last stage

Each block ends in ReLU, batch norm and dropout, in that order. The convolutions have no biases,
because the batch norms add them.

    stage   channels   map in    map out   parameters   receptive field at its end
    1       3 -> 32    32 x 32   16 x 16       28,027     13 px
    2       32 -> 40   16 x 16     8 x 8       45,088     37 px
    3       40 -> 44     8 x 8     4 x 4       54,744     85 px
    4       44 -> 48     4 x 4     4 x 4       65,100    181 px
    head    48 -> 10     4 x 4     1 x 1          576    (the whole map)

The receptive field counts the dilation: rf_out = rf_in + (kernel - 1) * dilation * jump_in.

This file stands alone: copy it into another experiment and it works. It needs torch, and
safetensors to load weights. For the trained weights, copy net.safetensors too:
`Net.from_pretrained("net.safetensors")`.

Papers:
    Depthwise-separable convolutions: Howard et al. 2017, MobileNets, arXiv:1704.04861.
    Dilated convolutions: Yu and Koltun 2016, arXiv:1511.07122.
    Strides instead of pooling: Springenberg et al. 2015, arXiv:1412.6806.
    Weights that start near the identity: Zagoruyko and Komodakis 2017, DiracNets, arXiv:1706.00388.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

WIDTHS = (32, 40, 44, 48)
WEIGHTS = Path(__file__).resolve().parent / "assets" / "net.safetensors"


def convolution(inputs: int, outputs: int, kernel_size: int, **kwargs) -> nn.Conv2d:
    """A convolution without bias that keeps the map's size at stride 1.

    Its weights start as torch's random weights plus twice the identity. Rounding errors grow from
    one convolution to the next, because no shortcut bypasses them. The identity at least halves
    the error of the first gradients in bfloat16; tests/test_model.py measures it.
    """
    padding = kwargs.get("dilation", 1) * (kernel_size // 2)
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=False, **kwargs)
    with torch.no_grad():
        conv.weight += 2 * nn.init.dirac_(torch.empty_like(conv.weight), conv.groups)
    return conv


def block(dropout: float, **convolutions: nn.Conv2d) -> nn.Sequential:
    """The named convolutions one after another, then ReLU, batch norm and dropout."""
    *_, last = convolutions.values()
    layers = OrderedDict(convolutions)
    layers["relu"] = nn.ReLU(inplace=True)
    layers["norm"] = nn.BatchNorm2d(last.out_channels)
    layers["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(layers)


def stage(in_channels: int, channels: int, stride: int, dropout: float) -> nn.Sequential:
    """The four blocks: (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
    depthwise = convolution(in_channels, in_channels, 3, groups=in_channels)
    pointwise = convolution(in_channels, channels, 1)
    blocks = OrderedDict()
    blocks["separable"] = block(dropout, depthwise=depthwise, pointwise=pointwise)
    blocks["dilated1"] = block(dropout, conv=convolution(channels, channels, 3, dilation=2))
    blocks["dilated2"] = block(dropout, conv=convolution(channels, channels, 3, dilation=2))
    blocks["transition"] = block(dropout, conv=convolution(channels, channels, 3, stride=stride))
    return nn.Sequential(blocks)


class Net(nn.Module):
    """Classifies images: float (N, in_channels, H, W), normalised, to logits (N, num_classes).

    H and W are at least 16. The trained weights expect RGB in [0, 1], normalised by the mean and
    the standard deviation in their metadata.

    Args:
        num_classes: number of classes.
        in_channels: 3 for colour, 1 for grey, or any other number.
        dropout: probability in [0, 1) that an activation is zeroed in training.

    Raises:
        ValueError: dropout is outside [0, 1].
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0):
        super().__init__()
        self.stage1 = stage(in_channels, WIDTHS[0], stride=2, dropout=dropout)
        self.stage2 = stage(WIDTHS[0], WIDTHS[1], stride=2, dropout=dropout)
        self.stage3 = stage(WIDTHS[1], WIDTHS[2], stride=2, dropout=dropout)
        self.stage4 = stage(WIDTHS[2], WIDTHS[3], stride=1, dropout=dropout)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = nn.BatchNorm2d(WIDTHS[3])
        self.reset_classifier(num_classes)

    @classmethod
    def from_pretrained(cls, path: str | Path = WEIGHTS, dropout: float = 0.0) -> "Net":
        """The network with the weights of a safetensors file, in evaluation mode.

        The default file holds the weights that were trained here. `num_classes` and `in_channels`
        follow from the shapes in the file. `metadata`, a dict of texts, becomes an attribute of
        the network. Ours names the classes, the mean and std of the training images, and the test
        accuracy in percent.

        For another number of classes, call `reset_classifier` afterwards.

        Raises:
            FileNotFoundError: there is no such file.
            RuntimeError: the weights are those of another network; the message names the keys.
            safetensors.SafetensorError: the file is of another kind, or holds less than it announces.
        """
        # Here, because a network without saved weights needs only torch.
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"expected weights at {path}, found no file: pass net.safetensors's path")
        try:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        except SafetensorError as error:  # it may quote the whole file
            raise SafetensorError(f"expected safetensors, found {path}: {str(error)[:200]}") from None
        num_classes, in_channels = 10, 3  # for another network's weights: load_state_dict names the keys
        head = state.get("classifier.weight", torch.empty(0))
        if head.shape[1:] == (WIDTHS[3], 1, 1):  # a huge number of empty tensors is a short file too
            num_classes = len(head)
        depthwise = state.get("stage1.separable.depthwise.weight", torch.empty(0))
        if depthwise.shape[1:] == (1, 3, 3):
            in_channels = len(depthwise)
        net = cls(num_classes, in_channels, dropout)
        net.load_state_dict(state)
        net.metadata = metadata
        return net.eval()

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the last layer by a new one for `num_classes` classes; device and dtype stay."""
        place = {"device": self.norm.weight.device, "dtype": self.norm.weight.dtype}
        self.classifier = nn.Conv2d(WIDTHS[3], num_classes, 1, bias=False, **place)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_channels, H, W) to pooled features (N, 48), before the last batch norm."""
        x = self.stage1(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.stage4(x)
        return self.pool(x).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes); their softmax gives probabilities."""
        x = self.features(x)[:, :, None, None]
        return self.classifier(self.norm(x)).flatten(1)


class Teacher(nn.Module):
    """A larger network that teaches `Net`: images (N, 3, H, W), normalised, to logits (N, num_classes).

    H and W are at least 9. It has three groups of two convolutions, like airbench (K. Jordan 2024,
    arXiv:2404.00498), and 1,161,808 parameters for ten classes. The first layer is not trained.

    Args:
        filters: float (F, 3, 2, 2), the weights of the first layer; `whitening` gives good ones.
        num_classes: number of classes.
    """

    def __init__(self, filters: torch.Tensor, num_classes: int = 10):
        super().__init__()
        first = nn.Conv2d(3, len(filters), 2, bias=False).requires_grad_(False)
        first.weight.copy_(filters)
        layers = [first, nn.BatchNorm2d(len(filters)), nn.GELU()]
        channels = len(filters)
        for width in (64, 128, 256):
            layers += [convolution(channels, width, 3), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
            layers += [convolution(width, width, 3), nn.BatchNorm2d(width), nn.GELU()]
            channels = width
        layers += [nn.AdaptiveMaxPool2d(1), nn.BatchNorm2d(channels), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        return self.classifier(self.features(x))


def whitening(images: torch.Tensor) -> torch.Tensor:
    """Filters (24, 3, 2, 2) that whiten the 2x2 patches of images (N, 3, H, W).

    The outputs of the first twelve filters are uncorrelated. Their variance is 1 in the
    directions in which the patches vary by much more than 5e-3. The other twelve filters are the
    negatives of the first.
    """
    patches = nn.functional.unfold(images, 2).movedim(1, 0).flatten(1)
    variances, directions = torch.linalg.eigh(torch.cov(patches))
    filters = (directions / (variances + 5e-3).sqrt()).T.reshape(-1, 3, 2, 2)
    return torch.cat([filters, -filters])

"""Net: a CIFAR-10 classifier of 193,535 parameters, without pooling between its layers.

Every stage is four blocks in turn: a depthwise-separable convolution (depthwise 3x3, then pointwise
1x1), two 3x3 convolutions with dilation 2, and a 3x3 convolution that halves the map with stride 2
(in the last stage stride 1, which keeps it). Each block ends in ReLU, batch norm and dropout, in that order. No convolution
has a bias: the batch norms carry the offsets. Each but the classifier begins with twice the identity added to torch's
random weights.

    stage   channels   map in    map out   parameters   receptive field at its end
    1       3 -> 32    32 x 32   16 x 16       28,027     13 px
    2       32 -> 40   16 x 16     8 x 8       45,088     37 px
    3       40 -> 44     8 x 8     4 x 4       54,744     85 px
    4       44 -> 48     4 x 4     4 x 4       65,100    181 px
    head    48 -> 10     4 x 4     1 x 1          576    (the whole map)

The receptive field counts the dilation: rf_out = rf_in + (kernel - 1) * dilation * jump_in.

This file needs torch and nothing else, and safetensors where weights are loaded: copy it into another experiment and
it works; for the trained weights copy net.safetensors too: `Net.from_pretrained("net.safetensors")`.

Depthwise-separable convolution: Howard et al. 2017, MobileNets, arXiv:1704.04861.
Dilated convolution: Yu and Koltun 2016, arXiv:1511.07122.
Strides in place of pooling: Springenberg et al. 2015, arXiv:1412.6806.
Filters that begin with the identity in them: Zagoruyko and Komodakis 2017, DiracNets, arXiv:1706.00388.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

WIDTHS = (32, 40, 44, 48)
WEIGHTS = Path(__file__).resolve().parent / "assets" / "net.safetensors"


class Dropout(nn.Dropout):
    """`nn.Dropout` with a mask that is cheap on the CPU too, where torch draws it on one core, a number an activation.

    Four activations share the 64 bits of a random number, so p is rounded to a multiple of 1 / 65,536.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * 65536)
        if not self.training or not 0 < dropped < 65536 or x.device.type != "cpu":
            return super().forward(x)
        if not x.is_contiguous() and not (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()] >= dropped - 32768
        # In the order in which x lies in memory: contiguous or channels-last.
        return x * kept.as_strided(x.shape, x.stride()) * (65536 / (65536 - dropped))


def convolution(inputs: int, outputs: int, kernel_size: int, **kwargs) -> nn.Conv2d:
    """A convolution that keeps the map's size at stride 1, without bias; torch's random weights, and twice the identity added.

    Twenty convolutions follow one another without a way around them, and each adds to the rounding errors of those
    before it: of a first batch of 100 images the gradients in bfloat16 are over 40 % off those in float64 with random
    weights alone, under 20 % with the identity (median over the layers; tests/test_model.py measures it).
    """
    padding = kwargs.get("dilation", 1) * (kernel_size // 2)
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=False, **kwargs)
    with torch.no_grad():
        conv.weight += 2 * nn.init.dirac_(torch.empty_like(conv.weight), conv.groups)
    return conv


def block(dropout: float, **convolutions: nn.Conv2d) -> nn.Sequential:
    """The named convolutions in turn, then ReLU, batch norm and dropout on the last one's output."""
    channels = list(convolutions.values())[-1].out_channels
    return nn.Sequential(OrderedDict(**convolutions, relu=nn.ReLU(inplace=True), norm=nn.BatchNorm2d(channels), dropout=Dropout(dropout)))


def stage(in_channels: int, channels: int, stride: int, dropout: float) -> nn.Sequential:
    """One row of the table above: (N, in_channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
    return nn.Sequential(
        OrderedDict(
            separable=block(
                dropout,
                depthwise=convolution(in_channels, in_channels, 3, groups=in_channels),
                pointwise=convolution(in_channels, channels, 1),
            ),
            dilated1=block(dropout, conv=convolution(channels, channels, 3, dilation=2)),
            dilated2=block(dropout, conv=convolution(channels, channels, 3, dilation=2)),
            transition=block(dropout, conv=convolution(channels, channels, 3, stride=stride)),
        )
    )


class Net(nn.Module):
    """Images (N, in_channels, H, W), normalised float, H and W at least 32, to logits (N, num_classes).

    The trained weights expect RGB in [0, 1], minus the mean and divided by the standard deviation in their metadata.

    Args:
        num_classes: classes to tell apart.
        in_channels: 3 for colour, 1 for grey, any other number for other sensors.
        dropout: probability of zeroing an activation while training, in [0, 1); 0 costs nothing.
            `nn.Dropout` raises ValueError outside [0, 1].
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
        """The network with the weights in a safetensors file, by default those trained here, in evaluation mode.

        `num_classes` and `in_channels` follow from the file; what it tells of itself is in `metadata`, a dict of
        texts: the classes, mean and std that it was trained with, and its test accuracy in percent.
        Raises FileNotFoundError, what safetensors raises for another kind of file, and RuntimeError, naming the keys,
        for another network's weights.
        """
        from safetensors import safe_open  # here, so that who loads no weights needs torch alone

        with safe_open(path, "pt") as file:
            state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        shape = {key: tuple(value.shape) for key, value in state.items()}
        classes, channels = (shape.get(key, (10,))[0] for key in ("classifier.weight", "stage1.separable.depthwise.weight"))
        net = cls(classes, channels, dropout)
        net.load_state_dict(state)
        net.metadata = metadata
        return net.eval()

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer, for that many classes, on the device and in the dtype of the rest; the rest stays."""
        like = self.norm.weight
        self.classifier = nn.Conv2d(WIDTHS[3], num_classes, 1, bias=False, device=like.device, dtype=like.dtype)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_channels, H, W) to pooled features (N, 48), before the last batch norm."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.pool(x).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes); softmax makes them probabilities."""
        x = self.features(x)[:, :, None, None]
        return self.classifier(self.norm(x)).flatten(1)


class Teacher(nn.Module):
    """A larger network for `Net` to learn from: images (N, 3, H, W), normalised float, H and W at least 9, to logits (N, num_classes).

    Three groups of two convolutions, as airbench has them (K. Jordan 2024, arXiv:2404.00498); 1,161,808 parameters for ten
    classes. Its first layer stays as it is: the filters (F, 3, 2, 2) that it is given, such as `whitening` finds.
    """

    def __init__(self, filters: torch.Tensor, num_classes: int = 10):
        super().__init__()
        first = nn.Conv2d(3, len(filters), 2, bias=False).requires_grad_(False)
        first.weight.copy_(filters)
        layers, channels = [first, nn.BatchNorm2d(len(filters)), nn.GELU()], len(filters)
        for width in (64, 128, 256):
            layers += [convolution(channels, width, 3), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
            layers += [convolution(width, width, 3), nn.BatchNorm2d(width), nn.GELU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.BatchNorm2d(channels), nn.Flatten())
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        return self.classifier(self.features(x))


def whitening(images: torch.Tensor) -> torch.Tensor:
    """Filters (24, 3, 2, 2), the second half the negative of the first, that whiten 2x2 patches of images (N, 3, H, W) like these.

    The answers of each half have no correlation, and variance 1 where the patches vary by much more than 5e-3.
    """
    patches = nn.functional.unfold(images, 2).movedim(1, 0).flatten(1)
    variances, directions = torch.linalg.eigh(torch.cov(patches))
    filters = (directions / (variances + 5e-3).sqrt()).T.reshape(-1, 3, 2, 2)
    return torch.cat([filters, -filters])

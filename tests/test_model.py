from pathlib import Path

import pytest
import torch

import model
from model import Dropout, Net


def test_parameters_and_shapes():
    net = Net()
    assert sum(p.numel() for p in net.parameters()) == 193_535
    for size in (32, 40, 96):
        images = torch.randn(2, 3, size, size)
        assert net(images).shape == (2, 10) and net.features(images).shape == (2, 48)
    assert Net(num_classes=100, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 100)


def test_model_needs_torch_alone():
    source = Path(model.__file__).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"collections", "torch"}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_the_share_it_says_and_keeps_the_mean(memory_format):
    torch.manual_seed(0)
    ones = torch.ones(8, 32, 33, 31).contiguous(memory_format=memory_format).requires_grad_()
    dropped = Dropout(0.1)(ones)
    assert dropped.is_contiguous(memory_format=memory_format)
    share = (dropped == 0).float().mean().item()
    assert abs(share - 0.1) < 0.002  # three standard deviations of 261,888 draws
    assert dropped[dropped > 0].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-5)
    # No neighbours share a fate: along every axis two in a row are dropped as often as chance has it.
    for axis in range(4):
        zeros = (dropped == 0).float()
        both = (zeros.narrow(axis, 1, zeros.shape[axis] - 1) * zeros.narrow(axis, 0, zeros.shape[axis] - 1)).mean().item()
        assert abs(both - 0.01) < 0.0012
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped.detach())


def test_dropout_where_the_cheap_mask_does_not_fit():
    ones = torch.ones(4, 8, 6, 6)
    assert (Dropout(0.999999)(ones) == 0).all()  # 1,152 draws at one in a million
    strided = Dropout(0.5)(ones[:, ::2])
    assert strided.shape == (4, 4, 6, 6) and set(strided.unique().tolist()) == {0.0, 2.0}


def test_dropout_draws_nothing_where_there_is_nothing_to_drop():
    images = torch.randn(2, 3, 4, 4)
    before = torch.get_rng_state()
    assert torch.equal(Dropout(0.0)(images), images)
    assert torch.equal(Dropout(0.5).eval()(images), images)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError):
        Net(dropout=1.5)

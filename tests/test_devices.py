"""Any accelerator that torch knows: nothing here needs CUDA, or float64 on the device."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import hardware
import training_utils
from batches import BatchLoader, TaughtLoader
from checks import to_device
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform
from dataset import test_transform as no_augmentation
from hardware import best_device, describe_processor, processor
from model import Net, Teacher, whitening
from muon import plan
from training_utils import fit, soft_targets
from utils import predictions


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors, as a Mac's GPU does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{function} with float64")
        return result


def test_the_mode_refuses_float64():
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()


def test_a_run_with_its_teacher_needs_no_float64(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "PRECISIONS", {"cpu": torch.float32})
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    images.data, images.targets = images.data[:96], images.targets[:96]
    tests = AlbumentationsCIFAR10(ASSETS, train=False, transform=no_augmentation())
    tests.data, tests.targets = tests.data[:50], tests.targets[:50]

    def run(epochs):
        loader = BatchLoader(images, 32, shuffle=True)
        torch.manual_seed(0)
        teacher = Teacher(whitening(next(iter(loader))[0]))
        taught = TaughtLoader(loader, partial(soft_targets, [teacher], temperature=2.0), views=2)
        net = Net()
        test_loader, plain = BatchLoader(tests, 25, shuffle=False), BatchLoader(tests, 25, shuffle=True)
        optimizer, schedule = plan(net, 6)
        options = {"epochs": 2, "ema_decay": 0.9, "statistics": plain, "checkpoint": tmp_path / "net.pt"}

        def stop(row):
            if row["epoch"] == epochs:
                raise KeyboardInterrupt

        history = fit(net, taught, test_loader, optimizer, schedule, on_epoch=stop, **options)
        predictions(net, test_loader)
        return history

    with NoFloat64():
        assert len(run(1)) == 1
        assert len(run(3)) == 2


def test_the_best_device_is_torch_s_accelerator(monkeypatch):
    found = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert best_device() == found
    found = None
    assert best_device() == torch.device("cpu")


def test_only_cuda_is_not_waited_for():
    tensor = Mock()
    for kind in ("cuda", "mps", "xpu", "cpu"):
        to_device(tensor, torch.device(kind))
        assert tensor.to.call_args.kwargs == {"non_blocking": kind == "cuda"}


@pytest.mark.parametrize(
    "kind, float16, several, expected",
    [
        ("cuda", False, False, ["compiled", "GraphedStep"]),
        ("cuda", True, False, ["compiled"]),
        ("cuda", False, True, ["synchronize_batch_norm"]),
        ("xpu", False, False, ["compiled"]),
        ("xpu", False, True, ["synchronize_batch_norm"]),
        ("mps", False, False, []),
    ],
)
def test_an_accelerator_trains_in_the_way_it_can(kind, float16, several, expected, monkeypatch):
    made = []
    for name in ("compiled", "GraphedStep", "synchronize_batch_norm"):
        monkeypatch.setattr(training_utils, name, lambda *arguments, name=name: made.append(name))
    monkeypatch.setattr(training_utils, "tensors_of", lambda batch, device: [batch])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: several)
    model = Mock(parameters=lambda: iter([Mock(device=torch.device(kind))]))
    scaler = Mock(is_active=lambda: float16)
    training_utils.build_steps(model, model, Mock(), scaler, [Mock()], [Mock()], compile=True)
    assert made == expected


@pytest.mark.parametrize("kind, count", [("mps", 1), ("xpu", 2)])
def test_the_random_state_of_an_accelerator_is_kept(kind, count, monkeypatch):
    states = [torch.tensor([number], dtype=torch.uint8) for number in range(count)]

    def set_state(state, device=0):
        states[device] = state

    module = SimpleNamespace(
        get_rng_state=lambda device=0: states[device], set_rng_state=set_state, device_count=lambda: count
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    before, saved = list(states), checkpoint.random_state([])
    states[:] = [torch.zeros(1, dtype=torch.uint8) + 9] * count
    checkpoint.set_random_state(saved, [])
    assert all(torch.equal(*pair) for pair in zip(states, before))
    states[:] = [torch.zeros(44, dtype=torch.uint8)] * count  # as of another kind of GPU
    checkpoint.set_random_state(saved, [])
    assert all(len(state) == 44 for state in states)


def test_an_accelerator_has_a_name(monkeypatch):
    monkeypatch.setattr(hardware, "PRECISIONS", {"mps": torch.float32, "xpu": torch.bfloat16})
    monkeypatch.setattr(hardware, "cpu_model", lambda: "Apple M4")
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert processor(torch.device("mps")) == "1 x MPS on Apple M4"
    module = SimpleNamespace(get_device_name=lambda device: "Intel Arc")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert describe_processor(torch.device("xpu")) == "Intel Arc, in bfloat16"

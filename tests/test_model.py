import copy
import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

import model
from batches import BatchLoader
from dataset import ASSETS, AlbumentationsCIFAR10, image_folder
from dataset import test_transform as no_augmentation
from model import Dropout, Net, Teacher, whitening


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
    assert imported == {"collections", "pathlib", "torch"}


def test_the_names_of_the_weights_stay():
    """Whoever keeps weights relies on them."""
    norm = [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    blocks = {"separable": ["depthwise.weight", "pointwise.weight"]}
    blocks |= dict.fromkeys(("dilated1", "dilated2", "transition"), ["conv.weight"])
    stage = [f"{block}.{name}" for block, weights in blocks.items() for name in weights + norm]
    stages = [f"stage{i}.{name}" for i in (1, 2, 3, 4) for name in stage]
    assert list(Net().state_dict()) == [*stages, *norm, "classifier.weight"]


def rounding_error(net, inputs, targets) -> float:
    """How far a batch's gradients in bfloat16 are from those in float64, as a share: the median over the convolutions."""
    found = []
    for dtype, low in ((torch.float32, True), (torch.float64, False)):
        net.to(dtype).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = net(inputs.to(dtype))
        torch.nn.functional.cross_entropy(logits.to(dtype), targets).backward()
        found.append([p.grad.double() for p in net.parameters() if p.ndim > 1])
    return torch.stack([(rough - exact).norm() / exact.norm() for rough, exact in zip(*found)]).median().item()


def test_gradients_survive_low_precision_from_the_first_step(images):
    torch.manual_seed(0)
    random = Net()
    for module in random.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    assert rounding_error(Net(), *images) < 0.2 < 0.4 < rounding_error(random, *images)


@pytest.fixture(scope="module")
def pretrained():
    return Net.from_pretrained()


@pytest.fixture(scope="module")
def images():
    """A hundred test images, ten of each class, as the network takes them, and their classes."""
    sample = AlbumentationsCIFAR10(ASSETS, train=False, transform=no_augmentation())
    inputs, targets = next(iter(BatchLoader(sample, 500, shuffle=False)))
    return inputs[::5], targets[::5]


def test_pretrained_by_path_by_hub_and_with_the_file_alone(pretrained, images, tmp_path, monkeypatch):
    inputs, targets = images
    logits = pretrained(inputs)
    assert (logits.argmax(1) == targets).float().mean() > 0.75 and not pretrained.training
    assert pretrained.metadata["classes"].split(",")[3] == "cat" and len(pretrained.metadata["mean"].split(",")) == 3
    monkeypatch.setitem(sys.modules, "model", ModuleType("the caller's own"))
    hub = torch.hub.load(str(REPOSITORY), "net", source="local", pretrained=True)
    assert torch.equal(hub(inputs), logits) and torch.equal(pickle.loads(pickle.dumps(hub))(inputs), logits)
    assert torch.hub.load(str(REPOSITORY), "net", source="local", num_classes=7)(inputs).shape == (100, 7)
    for file in (model.__file__, ASSETS / "net.safetensors"):
        shutil.copy(file, tmp_path)
    code = "import torch; from model import Net; print(Net.from_pretrained('net.safetensors')(torch.ones(1, 3, 32, 32))[0, 0].item())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(pretrained(torch.ones(1, 3, 32, 32))[0, 0].item(), abs=1e-5)
    with pytest.raises(FileNotFoundError):
        Net.from_pretrained(tmp_path / "none")


def test_as_a_backbone(pretrained, images):
    net = copy.deepcopy(pretrained)
    features = net.features(images[0])
    net.reset_classifier(2)
    assert net(images[0]).shape == (100, 2) and torch.equal(net.features(images[0]), features)
    assert pretrained(images[0]).shape == (100, 10)
    double = Net().double()
    double.reset_classifier(3)
    assert double(images[0].double()).dtype == torch.float64


def compiled(net, inputs):
    return torch.compile(net)(inputs)


def exported(net, inputs):
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(net, (inputs[:2],), dynamic_shapes=({0: batch},)).module()(inputs)


def in_onnx(net, inputs):
    file = io.BytesIO()
    batch = torch.export.Dim("batch", min=2)
    torch.onnx.export(net, (inputs[:2],), file, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


def pickled(net, inputs):
    return pickle.loads(pickle.dumps(net))(inputs)


def channels_last(net, inputs):
    return copy.deepcopy(net).to(memory_format=torch.channels_last)(inputs.contiguous(memory_format=torch.channels_last))


def half(net, inputs):
    return copy.deepcopy(net).bfloat16()(inputs.bfloat16()).float()


@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize("way", [compiled, exported, in_onnx, pickled, channels_last, half], ids=lambda way: way.__name__)
def test_the_same_answers_by_other_ways(way, pretrained, images):
    with torch.no_grad():
        expected, found = (function(images[0]) for function in (pretrained, lambda inputs: way(pretrained, inputs)))
    if way is half:
        assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.95
    else:
        assert (found - expected).abs().max() < 1e-4


def test_a_folder_of_folders_is_a_data_set(tmp_path):
    from PIL import Image

    sample = AlbumentationsCIFAR10(ASSETS, train=False)
    for i in (0, 50, 51):
        folder = tmp_path / sample.classes[sample.targets[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(sample.data[i]).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    found = image_folder(tmp_path, no_augmentation())
    assert found.classes == ["airplane", "automobile"] and found.targets == [0, 1, 1]
    assert np.abs(found.data.astype(int) - sample.data[[0, 50, 51]]).mean() < 12  # scaled up and down again
    inputs, targets = next(iter(BatchLoader(found, 3, shuffle=False)))
    assert inputs.shape == (3, 3, 32, 32) and targets.tolist() == [0, 1, 1]
    assert torch.allclose(found[1][0], inputs[1], atol=1e-5)
    (tmp_path / "automobile/bad.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match="bad.png"):
        image_folder(tmp_path)


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


def test_the_teacher_sees_whitened_patches_and_learns_the_rest():
    loader = BatchLoader(AlbumentationsCIFAR10(ASSETS, transform=no_augmentation()), 100, shuffle=True)
    images, targets = next(iter(loader))
    teacher = Teacher(whitening(images))
    assert sum(p.numel() for p in teacher.parameters()) == 1_161_808
    answers = teacher.features[0](images).movedim(1, 0).flatten(1)
    assert torch.allclose(answers[:12], -answers[12:])
    covariance = torch.cov(answers[:12])
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert 0 < covariance.diag().min() and 0.99 < covariance.diag().max() <= 1.001
    torch.nn.functional.cross_entropy(teacher(images), targets).backward()
    assert [name for name, p in teacher.named_parameters() if p.grad is None] == ["features.0.weight"]


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

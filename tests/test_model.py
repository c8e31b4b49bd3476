"""The networks: shapes, weights, files, and the same answers whichever way a model is used."""

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

import model
from batches import BatchLoader
from conftest import REPOSITORY
from dataset import ASSETS, AlbumentationsCIFAR10, image_folder
from dataset import test_transform as no_augmentation
from model import Net, Teacher, whitening


def test_parameters_and_shapes():
    net = Net()
    assert sum(p.numel() for p in net.parameters()) == 193_535
    for size in (32, 40, 96):
        images = torch.randn(2, 3, size, size)
        assert net(images).shape == (2, 10) and net.features(images).shape == (2, 48)
    assert Net(num_classes=100, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 100)


def test_model_needs_torch_alone():
    source = Path(model.__file__).read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    imported = {line.split()[1].split(".")[0] for line in imports}
    assert imported == {"collections", "pathlib", "torch"}


def test_the_names_of_the_weights_stay():
    """Files of weights rely on them."""
    norm = [
        f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    blocks = {"separable": ["depthwise.weight", "pointwise.weight"]}
    blocks |= dict.fromkeys(("dilated1", "dilated2", "transition"), ["conv.weight"])
    stage = [f"{block}.{name}" for block, weights in blocks.items() for name in weights + norm]
    stages = [f"stage{i}.{name}" for i in (1, 2, 3, 4) for name in stage]
    assert list(Net().state_dict()) == [*stages, *norm, "classifier.weight"]


def rounding_error(net, inputs, targets) -> float:
    """The relative error of the gradients in bfloat16 against float64, as the median of the convolutions."""
    gradients = []
    for dtype, low in ((torch.float32, True), (torch.float64, False)):
        net.to(dtype).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = net(inputs.to(dtype))
        torch.nn.functional.cross_entropy(logits.to(dtype), targets).backward()
        gradients.append([p.grad.double() for p in net.parameters() if p.ndim > 1])
    errors = [(rough - exact).norm() / exact.norm() for rough, exact in zip(*gradients)]
    return torch.stack(errors).median().item()


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
    """100 test images, ten of each class, as the network takes them, and their classes."""
    sample = AlbumentationsCIFAR10(ASSETS, train=False, transform=no_augmentation())
    inputs, targets = next(iter(BatchLoader(sample, 500, shuffle=False)))
    return inputs[::5], targets[::5]


def test_pretrained_weights_classify_and_tell_of_themselves(pretrained, images, tmp_path):
    inputs, targets = images
    assert not pretrained.training
    assert (pretrained(inputs).argmax(1) == targets).float().mean() > 0.75
    assert pretrained.metadata["classes"].split(",")[3] == "cat"
    assert len(pretrained.metadata["mean"].split(",")) == 3
    with pytest.raises(FileNotFoundError, match="none, found no file: pass"):
        Net.from_pretrained(tmp_path / "none")
    fresh = Net.from_pretrained()
    fresh.metadata.clear()  # it is that network's own
    assert pretrained.metadata and Net.from_pretrained().metadata == pretrained.metadata


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match=r"classifier\.weight(.|\n)*fc\.weight"):
        Net.from_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("a text of some length")
    with pytest.raises(SafetensorError):
        Net.from_pretrained(tmp_path / "text.safetensors")


def header(shape, end):
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    return json.dumps({"classifier.weight": tensor}).encode()


@pytest.mark.parametrize(
    "content, message",
    [
        ((2**30).to_bytes(8, "little") + b"{}", "header too large"),
        ((2**63).to_bytes(8, "little") + b"{}", "header too large"),
        (header([2**40, 48, 1, 1], 2**40), "invalid"),  # no such data follow
        (header([2**62, 48, 1, 1], 8), "overflow"),
        (b'{"a": "' + b"long " * 10_000 + b'"}', "invalid JSON"),
    ],
)
def test_weights_that_announce_too_much_are_refused_in_a_line(content, message, tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_bytes(content if content[8:] == b"{}" else len(content).to_bytes(8, "little") + content)
    with pytest.raises(
        SafetensorError, match=f"expected safetensors, found .*net.safetensors: .*{message}"
    ) as error:
        Net.from_pretrained(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("shape", [[10**12, 0, 1, 1], [0], []])
def test_weights_of_another_shape_make_no_network_of_that_size(shape, tmp_path):
    content = header(shape, 0 if shape else 4)
    file = tmp_path / "net.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content + bytes(0 if shape else 4))
    with pytest.raises(RuntimeError, match="size mismatch for classifier.weight"):
        Net.from_pretrained(file)


def test_pretrained_from_the_hub(pretrained, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "model", ModuleType("the caller's own"))
    logits = pretrained(images[0])
    hub = torch.hub.load(str(REPOSITORY), "net", source="local", pretrained=True)
    assert torch.equal(hub(images[0]), logits)
    assert torch.equal(pickle.loads(pickle.dumps(hub))(images[0]), logits)
    with pytest.raises(TypeError, match=r"found num_classes=100: call reset_classifier\(100\)"):
        torch.hub.load(str(REPOSITORY), "net", source="local", pretrained=True, num_classes=100)
    fresh = torch.hub.load(str(REPOSITORY), "net", source="local", num_classes=7)
    assert fresh(images[0]).shape == (100, 7)


def test_pretrained_with_the_two_files_alone(pretrained, tmp_path):
    for file in (model.__file__, ASSETS / "net.safetensors"):
        shutil.copy(file, tmp_path)
    code = """
import torch
from model import Net
print(Net.from_pretrained("net.safetensors")(torch.ones(1, 3, 32, 32))[0, 0].item())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = pretrained(torch.ones(1, 3, 32, 32))[0, 0].item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-5)


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
    if sys.platform == "win32":
        pytest.skip("torch.compile may have no compiler here")
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
    net = copy.deepcopy(net).to(memory_format=torch.channels_last)
    return net(inputs.contiguous(memory_format=torch.channels_last))


def half(net, inputs):
    return copy.deepcopy(net).bfloat16()(inputs.bfloat16()).float()


WAYS = (compiled, exported, in_onnx, pickled, channels_last, half)


@pytest.mark.filterwarnings("ignore")  # the exporters warn of themselves
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_same_answers_in_other_ways(way, pretrained, images):
    with torch.no_grad():
        expected, answer = pretrained(images[0]), way(pretrained, images[0])
    if way is half:
        assert (answer.argmax(1) == expected.argmax(1)).float().mean() >= 0.95
    else:
        assert (answer - expected).abs().max() < 1e-4


def test_a_folder_of_folders_is_a_data_set(tmp_path):
    sample = AlbumentationsCIFAR10(ASSETS, train=False)
    for i in (0, 50, 51):
        folder = tmp_path / sample.classes[sample.targets[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(sample.data[i]).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    data = image_folder(tmp_path, no_augmentation())
    assert data.classes == ["airplane", "automobile"] and data.targets == [0, 1, 1]
    assert np.abs(data.data.astype(int) - sample.data[[0, 50, 51]]).mean() < 12  # scaled up and down again
    inputs, targets = next(iter(BatchLoader(data, 3, shuffle=False)))
    assert inputs.shape == (3, 3, 32, 32) and targets.tolist() == [0, 1, 1]
    assert torch.allclose(data[1][0], inputs[1], atol=1e-5)
    (tmp_path / "automobile/bad.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match="bad.png"):
        image_folder(tmp_path)


def test_the_teacher_gets_whitened_patches_and_learns_the_rest():
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


def test_dropout_ends_each_block_and_acts_in_training_only(images):
    torch.manual_seed(0)
    net = Net(dropout=0.2)
    blocks = [block for stage in (net.stage1, net.stage2, net.stage3, net.stage4) for block in stage]
    assert [list(block._modules)[-3:] for block in blocks] == [["relu", "norm", "dropout"]] * 16
    maps = net.stage1.separable(images[0])
    assert abs((maps == 0).float().mean().item() - 0.2) < 0.01
    assert not torch.equal(net(images[0]), net(images[0]))
    net.eval()
    assert torch.equal(net(images[0]), net(images[0]))
    with pytest.raises(ValueError):
        Net(dropout=1.5)


def test_without_dropout_nothing_is_random(images):
    net = Net()
    before = torch.get_rng_state()
    assert torch.equal(net(images[0]), net(images[0]))
    assert torch.equal(torch.get_rng_state(), before)

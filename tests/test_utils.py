"""Each answer of utils against one worked out by hand, published, or computed in another way."""

import copy
import math
import pickle
import random
import shutil
import subprocess
import sys
import time
import tracemalloc

import albumentations as A
import numpy as np
import openpyxl
import pytest
import torch
import torchvision
from albumentations.pytorch import ToTensorV2
from torch import nn

from conftest import REPOSITORY
from dataset import MEAN, STD
from model import Net
from utils import (
    calibration,
    channel_statistics,
    class_accuracies,
    grad_cam,
    misclassified,
    model_summary,
    most_confused,
    predict,
    predictions,
    receptive_field,
    set_seed,
)
from workbook import COLUMNS, HEADER, write_receptive_field_workbook

WORKBOOK = REPOSITORY / "RF Calculations.xlsx"
PUBLISHED_STATISTICS = {  # of the original project, which summed in float32
    "Train": dict(
        mean=(0.49139968, 0.48215827, 0.44653124),
        std=(0.24703233, 0.24348505, 0.26158768),
        var=(0.061024975, 0.05928497, 0.06842812),
    ),
    "Test": dict(
        mean=(0.49421427, 0.48513183, 0.45040932),
        std=(0.24665256, 0.24289224, 0.26159248),
        var=(0.06083748, 0.058996636, 0.06843062),
    ),
}


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_utils_can_be_imported_while_packages_are_missing():
    missing = ["albumentations", "filelock", "safetensors", "torchsummary", "xlsxwriter"]
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import utils"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_set_seed_seeds_three_generators():
    draws = []
    for seed in (3, 3, 4):
        set_seed(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[1], draws[2]))


def test_summary_is_the_golden_table_and_the_model_stays(capsys):
    net = Net(dropout=0.1)
    net.stage2.eval()  # the modes differ, and must stay
    calls = []
    net.stage1.register_forward_hook(lambda *_: calls.append(1))
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    assert model_summary(net) is None
    assert lines(capsys.readouterr().out) == lines((REPOSITORY / "tests/golden_summary.txt").read_text())
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert sum(len(m._forward_hooks) for m in net.modules()) == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    model_summary(Net(in_channels=1), (1, 32, 32))
    assert "Conv2d-1 [-1, 1, 32, 32] 9" in lines(capsys.readouterr().out)


def test_receptive_field_of_net():
    net = Net(dropout=0.1).train()
    state = copy.deepcopy(net.state_dict())
    rows = receptive_field(net)
    assert len(rows) == 20 and rows[-1] == dict(
        name="stage4.transition.conv", kernel=3, stride=1, padding=1, dilation=1,
        size_in=4, size_out=4, jump_in=8, jump_out=8, rf_in=165, rf_out=181,
    )  # fmt: skip
    assert [row["rf_out"] for row in rows if row["name"].endswith("transition.conv")] == [13, 37, 85, 181]
    assert net.training and all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_receptive_field_by_hand_with_pools():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 5, padding="same"),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, dilation=3, padding=3),
        nn.AvgPool2d(3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(4, 2, 1),
        nn.Flatten(),
    )
    keys = ("name", "size_in", "size_out", "jump_in", "jump_out", "rf_in", "rf_out")
    assert [tuple(row[key] for key in keys) for row in receptive_field(net)] == [
        ("0", 32, 32, 1, 1, 1, 5),
        ("1", 32, 16, 1, 2, 5, 6),
        ("2", 16, 8, 2, 4, 6, 18),  # (3 - 1) * 3 * 2 = 12 more
        ("3", 8, 6, 4, 4, 18, 26),
    ]


def test_receptive_field_follows_branches():
    rows = {row["name"]: row for row in receptive_field(torchvision.models.resnet18(), (3, 224, 224))}
    # Araujo et al. 2019 give 435 for ResNet-18. Shortcuts have strides, so a plain sum would be wrong.
    assert rows["layer4.1.conv2"]["rf_out"] == 435 and rows["layer4.1.conv2"]["jump_out"] == 32
    assert rows["layer2.0.downsample.0"]["rf_in"] == rows["layer2.0.conv1"]["rf_in"] == 43
    assert rows["layer2.0.downsample.0"]["rf_out"] == 43 and rows["layer2.1.conv1"]["rf_in"] == 67


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.max_pool2d(x, 3, 1, 1)  # keeps the size: only its name tells that it is a pool


@pytest.mark.parametrize(
    "model, size, message",
    [
        (nn.Sequential(nn.Conv2d(3, 4, (3, 5))), (3, 32, 32), r"square kernel in 0, found \(3, 5\)"),
        (nn.Sequential(nn.Upsample(scale_factor=2)), (3, 32, 32), "found Upsample"),
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 1)), (3, 32, 32), "found ConvTranspose2d"),
        (Functional(), (3, 32, 32), "max_pool2d"),
        (Net(), (3, 32, 48), "square map"),
    ],
)
def test_receptive_field_refuses_other_windows_and_operations(model, size, message):
    with pytest.raises(ValueError, match=message):
        receptive_field(model, size)


class Between(nn.Module):
    """Two convolutions with an operation between them."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.operation = operation

    def forward(self, x):
        return self.last(self.operation(self.first(x)))


class Gate(nn.Module):
    """Squeeze-and-excitation without its layers."""

    def forward(self, x):
        return x * nn.functional.adaptive_avg_pool2d(x, 1)


OTHER_PLACES = {
    "roll": lambda x: x.roll(1, 3),
    "flip": lambda x: x.flip(2),
    "transpose": lambda x: x.transpose(2, 3),
    "fft_fft2": lambda x: torch.fft.fft2(x).real,
    "cumsum": lambda x: x.cumsum(3),
    "softmax": lambda x: x.softmax(3),
    "Linear": nn.Linear(8, 8),
    "GroupNorm": nn.GroupNorm(2, 8),
    "chunk": lambda x: torch.cat(x.chunk(2, 3)[::-1], 3),
    r"Conv2d \(last\) behind adaptive_avg_pool2d": Gate(),
    r"Conv2d \(last\) behind mean": lambda x: x - x.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", OTHER_PLACES)
def test_receptive_field_refuses_what_carries_pixels_to_other_places(name):
    with pytest.raises(ValueError, match=f"found {name}") as error:
        receptive_field(Between(OTHER_PLACES[name]), (3, 8, 8))
    assert "\n" not in str(error.value)


def pixel_by_pixel(x):
    x = nn.functional.hardswish(x).clamp(-1, 1) + torch.where(x > 0, x, 0) + nn.functional.normalize(x)
    shuffled = x.view(1, 2, 4, 8, 8).transpose(1, 2).reshape(1, 8, 8, 8)
    return torch.cat(shuffled.chunk(2, 1)[::-1], 1) / (1 + x.softmax(1))


@pytest.mark.parametrize("operation", [pixel_by_pixel, nn.BatchNorm2d(8), nn.GELU()])
def test_receptive_field_passes_what_works_pixel_by_pixel(operation):
    assert [row["rf_out"] for row in receptive_field(Between(operation), (3, 8, 8))] == [3, 5]


def test_receptive_field_has_no_rows_behind_a_gate_in_front_of_the_classifier():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Gate(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1))
    assert [row["name"] for row in receptive_field(net)] == ["0"]


def test_receptive_field_of_a_model_with_control_flow_is_refused_in_a_line():
    with pytest.raises(ValueError, match="torch.fx can trace, found Between: .*control flow") as error:
        receptive_field(Between(lambda x: x if x.sum() > 0 else -x))
    assert "\n" not in str(error.value)


class Shifted(nn.Module):
    """The two branches see windows of three pixels that begin at different places: four pixels together."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 1, 3, 2, 1), nn.AvgPool2d(3, 2, ceil_mode=True)
        self.last = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.last(self.conv(x) + self.pool(x))


def test_receptive_field_of_branches_is_all_that_any_of_them_sees():
    net, image = Shifted(), torch.ones(1, 1, 32, 32, requires_grad=True)
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    net(image)[0, 0, 8, 8].backward()
    columns = image.grad[0, 0].any(0).nonzero()
    assert receptive_field(net, (1, 32, 32))[-1]["rf_out"] == len(columns) == 8


def test_receptive_field_is_the_extent_of_the_gradient():
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():  # all positive, so that no path ends at a ReLU and no two cancel
            parameter.fill_(1 / parameter[0].numel() if parameter.ndim == 4 else 1)
    image = torch.ones(1, 3, 256, 256, requires_grad=True)
    maps = net.stage4(net.stage3(net.stage2(net.stage1(image))))
    maps[0, 0, 16, 16].backward()
    reached = image.grad[0].sum(0).nonzero()
    extent = reached.max(0).values - reached.min(0).values + 1
    assert extent.tolist() == [181, 181] == [receptive_field(net)[-1]["rf_out"]] * 2
    assert reached.min() > 0 and reached.max() < 255  # inside the border


def test_committed_workbook_is_the_one_of_the_model(tmp_path):
    write_receptive_field_workbook(Net(), tmp_path / "fresh.xlsx")
    for data_only in (False, True):  # the formulas, then their results, which previews and pandas show
        committed = openpyxl.load_workbook(WORKBOOK, data_only=data_only).active
        fresh = openpyxl.load_workbook(tmp_path / "fresh.xlsx", data_only=data_only).active
        for row, fresh_row in zip(committed.iter_rows(), fresh.iter_rows(), strict=True):
            assert [cell.value for cell in row] == [cell.value for cell in fresh_row]


def test_workbook_computes_every_result_with_a_formula():
    formulas = openpyxl.load_workbook(WORKBOOK).active
    for row in formulas.iter_rows(min_row=HEADER + 2):
        assert [str(cell.value).startswith("=") for cell in row] == [False] * 5 + [True] * 6
        dilation = f"E{row[0].row}"
        assert dilation in row[6].value and dilation in row[10].value  # of size out and rf out
    results = openpyxl.load_workbook(WORKBOOK, data_only=True).active
    rows = [dict(zip(COLUMNS, row)) for row in results.iter_rows(min_row=HEADER + 2, values_only=True)]
    assert rows == receptive_field(Net())
    assert results["K4"].value == 121  # without the dilation


def test_workbook_looks_as_designed():
    sheet = openpyxl.load_workbook(WORKBOOK).active
    assert sheet.freeze_panes == f"B{HEADER + 1}"
    fonts = {name: sheet[name].font.color.rgb[-6:] for name in ("A4", "K4", "A5", "B7", "F7")}
    assert fonts == {"A4": "C00000", "K4": "C00000", "A5": "FFFFFF", "B7": "0000FF", "F7": "000000"}
    fills = [sheet.cell(row, 1).fill.fgColor.rgb[-6:] for row in (HEADER, *range(HEADER + 1, 27, 5))]
    assert fills == ["1F3864", "F2F2F2", "DDEBF7", "E2EFDA", "FFF2CC", "FCE4D6"]
    assert sheet.column_dimensions["A"].width == 30 and sheet.column_dimensions["E"].width == 16
    assert [sheet.row_dimensions[row].height for row in (1, 2, HEADER, 26)] == [26, 18, 26, 18]


def test_workbook_has_the_same_bytes_at_any_time_and_place(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    first, second = tmp_path / "first.xlsx", tmp_path / "folder" / "second.xlsx"
    write_receptive_field_workbook(Net(), first)
    later = time.time() + 1e8
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(later))
    write_receptive_field_workbook(Net(), second)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in second.parent.iterdir()] == ["second.xlsx"]


def test_workbook_recalculated_by_libreoffice(tmp_path):
    if not shutil.which("soffice"):
        pytest.skip("LibreOffice (soffice) is not installed: nothing can recalculate the workbook")
    book = openpyxl.load_workbook(WORKBOOK)  # openpyxl saves formulas only, so every result is computed
    book.active[f"G{HEADER + 1}"] = 64
    book.save(tmp_path / "rf.xlsx")
    profile = f"-env:UserInstallation=file://{tmp_path}/profile"
    command = ["soffice", profile, "--headless", "--convert-to", "csv", "--outdir", str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "rf.xlsx")], check=True, capture_output=True, timeout=180)
    table = [line.split(",") for line in (tmp_path / "rf.csv").read_bytes().decode("latin1").splitlines()]
    assert table[-1][-1] == "181"
    rows = [dict(zip(COLUMNS, [row[0], *map(int, row[1:])])) for row in table[-20:]]
    assert rows == receptive_field(Net(), (3, 64, 64))
    assert table[3][-1] == "121"  # without the dilation


def test_workbook_refuses_branches_and_the_old_file_stays(tmp_path):
    path = tmp_path / "rf.xlsx"
    path.write_text("old")
    with pytest.raises(ValueError, match="layer2.0.downsample|layer1"):
        write_receptive_field_workbook(torchvision.models.resnet18(), path)
    with pytest.raises(ValueError, match="expected a chain .* found 0"):
        write_receptive_field_workbook(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), path, (3, 33, 33))
    with pytest.raises(ValueError, match="convolutions or pools, found none"):
        write_receptive_field_workbook(nn.Sequential(nn.ReLU()), path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_channel_statistics_are_those_of_numpy(capsys):
    images = np.random.default_rng(0).integers(3, 250, (700, 32, 40, 3), dtype=np.uint8)
    images[..., 1] //= 2
    found = channel_statistics(images, "Noise")
    for key in ("min", "max", "mean", "std", "var"):
        expected = getattr(images / 255, key)((0, 1, 2))
        assert np.allclose(found[key], expected, rtol=1e-9, atol=0), key  # numpy rounds as it sums
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["[Noise]", " - Total Noise Images: 700", " - Tensor Shape: (3, 32, 40)"]
    assert printed[5] == f" - mean: ({', '.join(f'{x:.8f}' for x in found['mean'])})"
    assert channel_statistics(torch.from_numpy(images)) == found


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 8, 8, 3)), "uint8 images .* found float64"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(N, H, W, 3\).* found \(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least 1"),
    ],
)
def test_channel_statistics_refuse_other_images(images, message):
    with pytest.raises(ValueError, match=message):
        channel_statistics(images)


def test_channel_statistics_need_less_memory_than_the_images():
    images = np.zeros((10_000, 32, 32, 3), np.uint8)
    tracemalloc.start()
    channel_statistics(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes


def test_full_data_set_agrees_with_the_published_statistics(cifar10_root, capsys):
    files = {"Train": [f"data_batch_{i}" for i in range(1, 6)], "Test": ["test_batch"]}
    for name, published in PUBLISHED_STATISTICS.items():
        batches = []
        for file in files[name]:
            content = (cifar10_root / "cifar-10-batches-py" / file).read_bytes()
            batches.append(pickle.loads(content, encoding="bytes"))
        images = np.concatenate([batch[b"data"] for batch in batches])
        images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found = channel_statistics(images, name)
        assert found["min"] == (0.0,) * 3 and found["max"] == (1.0,) * 3
        for key, expected in published.items():
            assert np.abs(np.subtract(found[key], expected)).max() < 1e-6, (name, key)
        if name == "Train":
            assert found["mean"] == MEAN and found["std"] == STD
        labels = np.concatenate([batch[b"labels"] for batch in batches])
        assert np.bincount(labels).tolist() == [len(images) // 10] * 10
    assert " - Total Test Images: 10000" in capsys.readouterr().out


class Lookup(nn.Module):
    """The logits are the channel means of the image, so every answer is known."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(x)).mean((2, 3))


def batches():
    logits = torch.tensor([[9.0, 0, 0], [0, 2, 0], [0, 0, 5], [1, 0, 0], [7, 0, 0]])
    images, targets = logits[:, :, None, None].expand(-1, -1, 4, 4), torch.tensor([0, 0, 0, 1, 1])
    return logits, targets, [(images[:3], targets[:3]), (images[3:], targets[3:])]


def test_predictions_run_in_evaluation_mode_and_restore_every_module():
    logits, targets, loader = batches()
    model = Lookup().train()
    model.norm.eval()
    found, probabilities = predictions(model, iter(loader))
    assert torch.equal(found, targets) and found.dtype == torch.int64
    assert (
        torch.allclose(probabilities, logits.softmax(1), atol=1e-4) and probabilities.dtype == torch.float32
    )
    assert not probabilities.requires_grad
    assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)
    with pytest.raises(ValueError, match="empty loader"):
        predictions(model, [])
    with pytest.raises(RuntimeError):
        predictions(model, [(torch.zeros(1, 5, 4, 4), torch.zeros(1))])  # five channels are too many
    assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)


def test_misclassified_are_sorted_by_confidence():
    logits, _, loader = batches()
    rows = misclassified(Lookup(), loader)
    found = [(row["index"], row["target"], row["prediction"]) for row in rows]
    assert found == [(4, 1, 0), (2, 0, 2), (1, 0, 1), (3, 1, 0)]
    assert rows[1]["confidence"] == pytest.approx(math.exp(5) / (math.exp(5) + 2), abs=1e-4)
    assert (
        misclassified(Lookup(), loader, limit=2) == rows[:2]
        and misclassified(Lookup(), loader, limit=0) == []
    )
    with pytest.raises(ValueError, match="found -1"):
        misclassified(Lookup(), loader, limit=-1)


def test_class_accuracies_and_confusions_by_hand():
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    predicted = torch.tensor([0, 1, 1, 2, 0, 1, 2, 1, 0, 0])
    classes = ("cat", "dog", "frog", "ship")
    accuracies = class_accuracies(targets, predicted, classes)
    assert list(accuracies) == list(classes) and math.isnan(accuracies.pop("ship"))
    assert accuracies == pytest.approx({"cat": 25, "dog": 100 / 3, "frog": 0})
    # Three times cat and dog, three times cat and frog, twice dog and frog.
    expected = [("cat", "dog", 3), ("cat", "frog", 3), ("dog", "frog", 2)]
    assert most_confused(targets, predicted, classes) == expected
    assert most_confused(targets, predicted, classes, limit=1) == expected[:1]
    assert most_confused(targets, targets, classes) == []
    many = [str(i) for i in range(200)]
    small = torch.tensor([199, 150], dtype=torch.uint8), torch.tensor([150, 199], dtype=torch.uint8)
    assert most_confused(*small, many) == [("150", "199", 2)]


@pytest.mark.parametrize("question", [class_accuracies, most_confused])
@pytest.mark.parametrize(
    "targets, predicted, message",
    [
        ([0, 1, 3], [0, 1, 2], "targets: expected 0 to 2, found 0 to 3"),
        ([0, 1, 2], [0, 1, -1], "predicted: expected 0 to 2, found -1 to 1"),
        ([0, 1, 2], [0], r"predicted: expected 3 integers, found torch.int64 \(1,\)"),
        ([0, 1, 2], [0.9, 0.2, 0.4], "predicted: expected 3 integers, found torch.float32"),
    ],
)
def test_answers_by_class_are_of_indices_of_the_classes(question, targets, predicted, message):
    with pytest.raises(ValueError, match=message):
        question(torch.tensor(targets), torch.tensor(predicted), ("cat", "dog", "frog"))


def test_class_accuracies_of_two_classes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="found 'crane' twice"):
        class_accuracies(torch.tensor([0, 1]), torch.tensor([0, 1]), ("crane", "crane"))


@pytest.mark.parametrize(
    "model, targets, message",
    [
        (nn.Flatten(), [[1.0, 0.0]], r"targets: expected 1 integers, found torch.float32 \(1, 2\)"),
        (nn.Flatten(), [0.9], "targets: expected 1 integers, found torch.float32"),
        (nn.Flatten(), [0, 1], "targets: expected 1 integers"),
        (nn.Identity(), [0], r"logits \(N, classes\), found \(1, 3, 1, 1\)"),
        (nn.Sequential(nn.Flatten(), nn.Softmax(1)), [0], "expected logits, found probabilities"),
    ],
)
def test_predictions_need_integer_targets_and_logits(model, targets, message):
    images = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    with pytest.raises(ValueError, match=message):
        predictions(model, [(images, torch.tensor(targets))])
    with pytest.raises(ValueError, match="targets: expected 0 to 2, found 3 to 3"):
        misclassified(nn.Flatten(), [(images, torch.tensor([3]))])


def test_predict_names_the_most_probable_classes():
    transform = A.Compose([A.Normalize((0, 0, 0), (1, 1, 1)), ToTensorV2()])
    names = ("red", "green", "blue")
    red, teal = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], teal[..., 1], teal[..., 2] = 255, 200, 255
    (answer,) = predict(Lookup(), red, transform, names, top_k=1)
    assert answer[0][0] == "red" and answer[0][1] == pytest.approx(math.e / (math.e + 2), abs=1e-4)
    many = predict(Lookup(), np.stack([red, teal] * 150), transform, names)  # two batches
    assert [[name for name, _ in pairs] for pairs in many[-2:]] == [
        ["red", "green", "blue"],
        ["blue", "green", "red"],
    ]
    assert len(many) == 300 and predict(Lookup(), [red, teal], transform, names) == many[:2]
    assert predict(Lookup(), [], transform, names) == []

    for images, classes, top_k, message in (
        (red, names, 4, "top_k from 1 to 3.* found 4"),
        (red, names, 0, "found 0"),
        (red, names[:2], None, "as many classes as logits, 3, found 2"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(Lookup(), images, transform, classes, top_k)


def test_calibration_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.15, 0.85], [1.0, 0.0]])
    rows, error = calibration(torch.tensor([0, 0, 1, 0]), probabilities)
    assert [row["count"] for row in rows] == [1, 3]  # 0.85; then 0.95 twice and 1.0
    assert [row["accuracy"] for row in rows] == [1, pytest.approx(2 / 3)]
    assert rows[1]["confidence"] == pytest.approx((0.95 + 0.95 + 1) / 3)
    assert error == pytest.approx((abs(1 - 0.85) + abs(2 - 2.9)) / 4)


@pytest.mark.parametrize(
    "targets, probabilities, message",
    [
        ([0, 1], [[3.0, -2.0], [0.5, 0.5]], "rows with the sum 1"),
        ([0, 1], [[0.9, 0.1], [math.nan, 0.5]], "rows with the sum 1"),
        ([0], [[0.9, 0.1], [0.5, 0.5]], "targets: expected 2 integers"),
        ([0, 2], [[0.9, 0.1], [0.5, 0.5]], "targets: expected 0 to 1, found 0 to 2"),
    ],
)
def test_calibration_refuses_logits_and_targets_of_others(targets, probabilities, message):
    with pytest.raises(ValueError, match=message):
        calibration(torch.tensor(targets), torch.tensor(probabilities))


def test_grad_cam_refuses_pixels_that_are_not_normalised():
    with pytest.raises(ValueError, match="expected float tensors, found torch.uint8"):
        grad_cam(Net(), "stage4", torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_grad_cam_is_hot_at_the_class_and_the_model_stays():
    class Corners(nn.Module):
        """Class 0 is the brightness of the image, class 1 its darkness."""

        def __init__(self):
            super().__init__()
            self.map, self.norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)
            nn.init.ones_(self.map.weight)

        def forward(self, x):
            bright = self.norm(self.map(x)).mean((1, 2, 3))
            return torch.stack([bright, -bright], 1)

    model, images = Corners().train(), -torch.ones(2, 1, 8, 8)
    images[:, :, 1, 5] = 100.0
    images[1] *= -1  # predicted: the first bright, the second dark
    heat = grad_cam(model, "map", images)
    assert heat.shape == (2, 8, 8) and heat.dtype == torch.float32
    assert (heat[:, 1, 5] == 1).all() and (heat > 0).sum() == 2
    assert model.training and model.norm.running_mean == 0
    assert model.map.weight.grad is None and not model.map._forward_hooks

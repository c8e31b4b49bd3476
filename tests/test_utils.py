import copy
import hashlib
import math
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import albumentations as A
import numpy as np
import openpyxl
import pytest
import torch
import torchvision
from albumentations.pytorch import ToTensorV2
from torch import nn

from dataset import MEAN, STD
from model import Net
from utils import (
    COLUMNS,
    HEADER,
    calibration,
    channel_statistics,
    grad_cam,
    misclassified,
    model_summary,
    predict,
    predictions,
    receptive_field,
    set_seed,
    write_receptive_field_workbook,
)

REPOSITORY = Path(__file__).resolve().parent.parent
WORKBOOK = REPOSITORY / "RF Calculations.xlsx"
SEED_STATISTICS = {
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


def test_set_seed_covers_the_three_generators():
    draws = []
    for seed in (3, 3, 4):
        set_seed(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[1], draws[2]))


def test_summary_is_the_golden_table_and_leaves_the_model_alone(capsys):
    net = Net(dropout=0.1)
    net.stage2.eval()  # mixed modes must survive
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
    # Araujo et al. 2019 give 435 for ResNet-18; summed in order of execution, the strided shortcuts would spoil it.
    assert rows["layer4.1.conv2"]["rf_out"] == 435 and rows["layer4.1.conv2"]["jump_out"] == 32
    assert rows["layer2.0.downsample.0"]["rf_in"] == rows["layer2.0.conv1"]["rf_in"] == 43
    assert rows["layer2.0.downsample.0"]["rf_out"] == 43 and rows["layer2.1.conv1"]["rf_in"] == 67


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.max_pool2d(x, 3, 1, 1)  # keeps the size, so only its name gives it away


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
def test_receptive_field_refuses_what_it_would_get_wrong(model, size, message):
    with pytest.raises(ValueError, match=message):
        receptive_field(model, size)


def test_receptive_field_is_the_extent_of_the_gradient():
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():  # positive everywhere: no path is cut by a ReLU, and no two cancel
            parameter.fill_(1 / parameter[0].numel() if parameter.ndim == 4 else 1)
    image = torch.ones(1, 3, 256, 256, requires_grad=True)
    maps = net.stage4(net.stage3(net.stage2(net.stage1(image))))
    maps[0, 0, 16, 16].backward()
    reached = image.grad[0].sum(0).nonzero()
    extent = reached.max(0).values - reached.min(0).values + 1
    assert extent.tolist() == [181, 181] == [receptive_field(net)[-1]["rf_out"]] * 2
    assert reached.min() > 0 and reached.max() < 255  # the border did not cut it


def test_workbook_is_what_the_model_gives_and_all_its_results_are_formulas(tmp_path):
    fresh, again = tmp_path / "fresh.xlsx", tmp_path / "again.xlsx"
    for path in (fresh, again):
        write_receptive_field_workbook(Net(), path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.xlsx", "fresh.xlsx"]
    assert hashlib.md5(fresh.read_bytes()).digest() == hashlib.md5(again.read_bytes()).digest()
    committed, written = (openpyxl.load_workbook(path).active for path in (WORKBOOK, fresh))
    assert [[c.value for c in row] for row in committed] == [[c.value for c in row] for row in written]
    for row in committed.iter_rows(min_row=HEADER + 2):
        assert [str(cell.value).startswith("=") for cell in row] == [False] * 5 + [True] * 6
        assert f"E{row[0].row}" in row[6].value and f"E{row[0].row}" in row[10].value  # the dilation counts
    assert committed.freeze_panes == f"B{HEADER + 1}"
    results = openpyxl.load_workbook(WORKBOOK, data_only=True).active  # what previews and pandas see
    rows = [dict(zip(COLUMNS, row)) for row in results.iter_rows(min_row=HEADER + 2, values_only=True)]
    assert rows == receptive_field(Net())


def test_workbook_recalculated_by_libreoffice(tmp_path):
    if not shutil.which("soffice"):
        pytest.skip("LibreOffice (soffice) is not installed: nothing here can recalculate the workbook")
    book = openpyxl.load_workbook(WORKBOOK)  # saved again by openpyxl, it has formulas and no results to fall back on
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


def test_workbook_refuses_what_is_not_a_chain_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "rf.xlsx"
    path.write_text("old")
    with pytest.raises(ValueError, match="layer2.0.downsample|layer1"):
        write_receptive_field_workbook(torchvision.models.resnet18(), path)
    with pytest.raises(ValueError, match="expected a chain .* found 0"):
        write_receptive_field_workbook(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), path, (3, 33, 33))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_channel_statistics_are_those_of_numpy(capsys):
    images = np.random.default_rng(0).integers(3, 250, (700, 32, 40, 3), dtype=np.uint8)
    images[..., 1] //= 2
    found = channel_statistics(images, "Noise")
    for key, expected in ((key, getattr(images / 255, key)((0, 1, 2))) for key in ("min", "max", "mean", "std", "var")):
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


MEASURE = """
import pickle, re, sys
import numpy as np
from utils import channel_statistics
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
images, start = np.empty((50000, 32, 32, 3), np.uint8), peak()
for i in range(5):
    batch = pickle.load(open(f"{sys.argv[1]}/cifar-10-batches-py/data_batch_{i + 1}", "rb"), encoding="bytes")
    images[i * 10000 : (i + 1) * 10000] = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
loaded = peak()
channel_statistics(images)
print(f"{loaded - start:.0f} {peak() - start:.0f}")
"""


def test_full_data_set_agrees_with_the_published_statistics(cifar10_root, capsys):
    files = dict(Train=[f"data_batch_{i}" for i in range(1, 6)], Test=["test_batch"])
    for name, published in SEED_STATISTICS.items():
        batches = [
            pickle.loads((cifar10_root / "cifar-10-batches-py" / file).read_bytes(), encoding="bytes")
            for file in files[name]
        ]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found = channel_statistics(images, name)
        assert found["min"] == (0.0,) * 3 and found["max"] == (1.0,) * 3
        for key, expected in published.items():  # the published figures were summed in float32
            assert np.abs(np.subtract(found[key], expected)).max() < 1e-6, (name, key)
        if name == "Train":
            assert found["mean"] == MEAN and found["std"] == STD
        labels = np.concatenate([batch[b"labels"] for batch in batches])
        assert np.bincount(labels).tolist() == [len(images) // 10] * 10
    assert " - Total Test Images: 10000" in capsys.readouterr().out
    command = [sys.executable, "-c", MEASURE, str(cifar10_root)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    assert int(output.split()[-1]) < 500, "MB, the 150 MB of images included"


class Lookup(nn.Module):
    """Logits are the channel means of the image: what it answers can be written down."""

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
    assert torch.allclose(probabilities, logits.softmax(1), atol=1e-4) and probabilities.dtype == torch.float32
    assert not probabilities.requires_grad
    assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)
    with pytest.raises(ValueError, match="empty loader"):
        predictions(model, [])
    assert model.training


def test_misclassified_are_sorted_by_confidence():
    logits, _, loader = batches()
    rows = misclassified(Lookup(), loader)
    found = [(row["index"], row["target"], row["prediction"]) for row in rows]
    assert found == [(4, 1, 0), (2, 0, 2), (1, 0, 1), (3, 1, 0)]
    assert rows[1]["confidence"] == pytest.approx(math.exp(5) / (math.exp(5) + 2), abs=1e-4)
    assert misclassified(Lookup(), loader, limit=2) == rows[:2] and misclassified(Lookup(), loader, limit=0) == []
    with pytest.raises(ValueError, match="found -1"):
        misclassified(Lookup(), loader, limit=-1)


def test_predict_names_the_most_probable_classes():
    transform = A.Compose([A.Normalize((0, 0, 0), (1, 1, 1)), ToTensorV2()])
    names = ("red", "green", "blue")
    red, teal = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], teal[..., 1], teal[..., 2] = 255, 200, 255
    (answer,) = predict(Lookup(), red, transform, names, top_k=1)
    assert answer[0][0] == "red" and answer[0][1] == pytest.approx(math.e / (math.e + 2), abs=1e-4)
    many = predict(Lookup(), np.stack([red, teal] * 150), transform, names)  # more than one batch
    assert [[name for name, _ in pairs] for pairs in many[-2:]] == [["red", "green", "blue"], ["blue", "green", "red"]]
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
    assert [row["count"] for row in rows] == [1, 3]  # 0.85 alone; 0.95 twice and 1.0, which has no bin of its own
    assert [row["accuracy"] for row in rows] == [1, pytest.approx(2 / 3)]
    assert rows[1]["confidence"] == pytest.approx((0.95 + 0.95 + 1) / 3)
    assert error == pytest.approx((abs(1 - 0.85) + abs(2 - 2.9)) / 4)


def test_grad_cam_is_hot_where_the_class_was_seen_and_leaves_the_model_alone():
    class Corners(nn.Module):
        """Class 0 counts what is bright, class 1 what is dark."""

        def __init__(self):
            super().__init__()
            self.map, self.norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)
            nn.init.ones_(self.map.weight)

        def forward(self, x):
            bright = self.norm(self.map(x)).mean((1, 2, 3))
            return torch.stack([bright, -bright], 1)

    model, images = Corners().train(), -torch.ones(2, 1, 8, 8)
    images[:, :, 1, 5] = 100.0
    images[1] *= -1  # the first is named bright, the second dark
    heat = grad_cam(model, "map", images)
    assert heat.shape == (2, 8, 8) and heat.dtype == torch.float32
    assert (heat[:, 1, 5] == 1).all() and (heat > 0).sum() == 2
    assert model.training and model.norm.running_mean == 0 and model.map.weight.grad is None and not model.map._forward_hooks

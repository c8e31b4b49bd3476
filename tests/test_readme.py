"""The README says nothing that a recorded run did not produce, and its snippets work."""

import csv
import re
from urllib.parse import unquote

import nbformat
import pytest
import torch
from conftest import REPOSITORY
from safetensors import safe_open
from safetensors.torch import load_file
from test_notebook import text_of

import training_utils
from dataset import ASSETS, AlbumentationsCIFAR10, BatchLoader
from dataset import test_transform as no_augmentation
from model import Net

README = (REPOSITORY / "README.md").read_text()
NOTEBOOK = nbformat.read(REPOSITORY / "S8.ipynb", as_version=4)
PRINTED = "".join(text_of(cell) for cell in NOTEBOOK.cells if cell.cell_type == "code")
with open(REPOSITORY / "assets/history.csv") as file:
    HISTORY = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)


def test_exactly_two_set_up_commands():
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make notebook", "make test"]


def test_snippets_run(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert len(blocks("python")) >= 2
    names = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["net"](torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert names["history"][-1]["test_accuracy"] > 70  # of 100 cats and dogs


def test_every_output_shown_is_the_recorded_run_s():
    shown = blocks("text")
    assert len(shown) >= 4
    for block in shown:
        assert block.strip("\n") in PRINTED


def test_numbers_are_the_history_s():
    last = HISTORY[-1]
    table = dict(re.findall(r"(?m)^\| ([^|]+?) \| ([^|]+?) \|$", README))
    minutes = round(sum(row["seconds"] for row in HISTORY) / 60)
    assert table["Test accuracy"] == f"**{last['test_accuracy']:.2f} %**"
    assert table["Test loss"] == f"{last['test_loss']:.4f}"
    assert table["Training accuracy, on augmented images"] == f"{last['train_accuracy']:.2f} %"
    assert table["Epochs"] == str(len(HISTORY))
    assert table["Training and testing"] == f"{minutes} minutes"
    assert table["Parameters"] == f"{sum(p.numel() for p in Net().parameters()):,}"
    reached = next(row["epoch"] for row in HISTORY if row["test_accuracy"] > 86.15)
    assert table["First epoch above 86.15 %"] == f"{reached:.0f}"
    seconds = [row["seconds"] for row in HISTORY]
    slow = [row["epoch"] for row in HISTORY if row["seconds"] >= 36]
    sentence = f"{len(HISTORY) - len(slow)} epochs took less than 36 s; the other {len(slow)}, among the first {slow[-1]:.0f}, took up to {max(seconds):.0f} s"
    assert sentence in README
    assert set(re.findall(r"\d\d\.\d\d ?%", README)) <= {
        f"{last['test_accuracy']:.2f} %", f"{last['test_accuracy']:.2f}%", f"{last['train_accuracy']:.2f} %", "86.15 %",
        *re.findall(r"\d\d\.\d\d%", PRINTED),
    }


def test_links_and_pictures_are_there():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / unquote(link)).exists(), link


def weights_accuracy(root) -> float:
    net = Net()
    net.load_state_dict(load_file(ASSETS / "net.safetensors"))
    images = AlbumentationsCIFAR10(root, train=False, transform=no_augmentation())
    return training_utils.test(net, BatchLoader(images, 500, shuffle=False))[1]


def test_weights_reach_the_history_s_accuracy_on_the_test_set(cifar10_root):
    # Another processor rounds differently: a few images of 10,000 may change sides.
    assert weights_accuracy(cifar10_root) == pytest.approx(HISTORY[-1]["test_accuracy"], abs=0.1)


def test_weights_on_the_sample_and_their_metadata():
    with safe_open(ASSETS / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["test_accuracy"] == f"{HISTORY[-1]['test_accuracy']:.2f}" and metadata["epochs"] == str(len(HISTORY))
    # 500 images: two standard deviations of a share are 3 points.
    assert weights_accuracy(ASSETS) == pytest.approx(HISTORY[-1]["test_accuracy"], abs=3)

"""The pages: their figures come from recorded files, their snippets run, their links lead somewhere."""

import csv
import hashlib
import json
import pickle
import re
import sys
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.datasets import CIFAR100

import frontier
import held_out
import tables
from batches import BatchLoader
from conftest import REPOSITORY
from dataset import ASSETS, AlbumentationsCIFAR10
from dataset import test_transform as no_augmentation
from model import Net
from utils import predictions

TEXTS = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in tables.PAGES}
README = TEXTS["README.md"]


def blocks(language: str, page: str) -> list[str]:
    """A page's fenced blocks of one language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", TEXTS[page])


def prose(page: str) -> str:
    """A page without what is generated, without code and links."""
    text = re.sub(r"(?ms)^<!-- \w+ -->.*?^<!-- end -->$", "", TEXTS[page])
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", "", text)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_recorded_files(page):
    assert tables.render(TEXTS[page]) == TEXTS[page], "run python benchmarks/tables.py"


# Accuracies and times in prose, which no record changes: what others report, and earlier recipes.
KNOWN = {
    "README.md": ["94.03", "86.15"],
    "docs/results.md": (
        "86.15 90.10 90.27 90.68 90.69 90.91 90.93 90.98 91.04 91.20 91.25 91.40 91.45 91.48 91.80".split()
    ),
    "docs/comparison.md": "91.25 92.60 92.56 94.03 92.8 93.57 90.10 94.4 93.02 94.01 90.29".split(),
    "RECIPE.md": "4 98 40 20 91.60 91.08 87.88 87.42".split(),
}


@pytest.mark.parametrize("page", tables.PAGES)
def test_prose_has_no_measured_figure_of_its_own(page):
    measured = re.findall(r"([\d.]*\d) ?(?:%|points|minutes|s a|images/s)", prose(page))
    assert [number for number in measured if number not in KNOWN.get(page, [])] == []


def test_every_recorded_run_names_its_command_and_commit():
    for run in tables.table("runs.csv"):
        assert run["command"].startswith(("make notebook", "make record"))
        assert re.fullmatch("[0-9a-f]{7,}", run["commit"])
        assert len(tables.history(run)) == int(run["epochs"])
        assert len(tables.history(run, "Teacher")) == int(run["teacher_epochs"])
    scripts = "python ablations.py", "python benchmarks/", "python h200.py", "make "
    for run in tables.table("ablations.csv") + tables.table("frontier.csv"):
        assert run["command"].startswith(scripts) and re.fullmatch("[0-9a-f]{7,}", run["commit"])


@pytest.mark.parametrize("name", ["ablations.png", "frontier.png"])
def test_pictures_are_drawn_from_their_tables(name, tmp_path):
    if name == "ablations.png":
        held_out.plot(held_out.TABLE, tmp_path / name)
    else:
        frontier.plot(tmp_path / name)
    pictures = [Image.open(path).convert("L") for path in (tmp_path / name, ASSETS / name)]
    drawn, shown = (np.asarray(picture, float) for picture in pictures)
    assert drawn.shape == shown.shape and np.abs(drawn - shown).max() < 64


# ---------------------------------------------------------------- the README


def test_the_readme_has_two_set_up_commands():
    (block,) = blocks("sh", "README.md")
    assert [line.split("#")[0].strip() for line in block.splitlines()] == ["make notebook", "make test"]


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_000
    text = re.sub(r"(?ms)^```.*?^```$|^\|.*?$|<[^>]+>", "", README)
    sentences = re.split(r"(?<=[.:?!])\s+", text)
    assert [sentence for sentence in sentences if len(sentence.split()) > 30] == []
    assert not re.search(r"\b[0-9a-f]{7}\b", README), "a commit belongs into docs/results.md"


@pytest.mark.parametrize("page", tables.PAGES)
def test_links_and_pictures_are_there(page):
    folder = (REPOSITORY / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = unquote(link).partition("#")
        if path.startswith("http"):
            continue
        target = folder / path if path else REPOSITORY / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8"))
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, link


def test_test_files_that_ci_and_the_pages_name_are_there():
    workflow = (REPOSITORY / ".github/workflows/test.yml").read_text(encoding="utf-8")
    names = set(re.findall(r"tests/\w+\.py", "".join([workflow, *TEXTS.values()])))
    assert len(names) >= 10 and all((REPOSITORY / name).exists() for name in names)


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """torchvision's own CIFAR100, on files of its format with 300 random images each."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    files = {}
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        labels = np.arange(300) % 100
        files[name] = pickle.dumps(
            {"data": rng.integers(0, 256, (300, 3072), np.uint8), "fine_labels": labels.tolist()}
        )
    files["meta"] = pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    original = CIFAR100.__init__
    monkeypatch.setattr(
        CIFAR100, "__init__", lambda self, root, train, download: original(self, tmp_path, train)
    )


@pytest.fixture
def logged(monkeypatch):
    """What the snippets for TensorBoard and Weights & Biases log. Neither is installed here."""
    written = []
    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter = lambda folder: SimpleNamespace(
        add_scalar=lambda name, value, step: written.append((name, value, step))
    )
    wandb.init, wandb.log = lambda project: None, written.append
    monkeypatch.setitem(sys.modules, board.__name__, board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return written


def test_snippets_run(monkeypatch, capsys, small_cifar100, logged):
    monkeypatch.chdir(REPOSITORY)
    names = {}
    for page in ("README.md", "docs/howto.md"):
        assert len(blocks("python", page)) >= 1
        for snippet in blocks("python", page):
            exec(compile(snippet, page, "exec"), names)
            if "log" in names:
                names.pop("log")({"epoch": 1, "test_loss": 0.5})
    assert logged == [("epoch", 1, 1), ("test_loss", 0.5, 1), {"epoch": 1, "test_loss": 0.5}]


# ---------------------------------------------------------------- the weights


def weights_accuracy(root) -> float:
    images = AlbumentationsCIFAR10(root, train=False, transform=no_augmentation())
    targets, probabilities = predictions(Net.from_pretrained(), BatchLoader(images, 500, shuffle=False))
    return 100 * (probabilities.argmax(1) == targets).double().mean().item()


def test_weights_are_the_record_s():
    with safe_open(ASSETS / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    with open(ASSETS / "history.csv") as file:
        history = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert json.loads(metadata["history"]) == history
    assert metadata["test_accuracy"] == f"{history[-1]['test_accuracy']:.2f}"
    assert re.fullmatch(r"[0-9a-f]{12}", metadata["commit"])  # of a clean work tree
    size = [int(number) for number in metadata["input_size"].split(",")]
    logits = Net.from_pretrained()(torch.zeros(1, *size))
    assert logits.shape == (1, len(metadata["classes"].split(",")))
    # 500 images: two standard deviations of a share are 3 points.
    assert weights_accuracy(ASSETS) == pytest.approx(history[-1]["test_accuracy"], abs=3)


def test_weights_reach_the_record_s_accuracy_on_the_test_set(cifar10_root):
    # Another precision or processor rounds differently: a few images of 10,000 may change sides.
    expected = float(Net.from_pretrained().metadata["test_accuracy"])
    assert weights_accuracy(cifar10_root) == pytest.approx(expected, abs=0.1)

import csv
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from PIL import Image

from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty test images as files, two of each class, in a folder with a folder in it, and a text among them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    (folder / "album.png").mkdir()
    sample = AlbumentationsCIFAR10(ASSETS, train=False)
    for i in range(0, 500, 25):
        Image.fromarray(sample.data[i]).save(folder / ("more" if i % 50 else ".") / f"{CLASSES[sample.targets[i]]}{i}.png")
    (folder / "readme.txt").write_text("no picture, and not taken for one")
    return folder


def run(*arguments):
    return subprocess.run(
        [sys.executable, REPOSITORY / "predict.py", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_a_folder_to_a_table(pictures, tmp_path):
    done = run(pictures, "--top", 2, "--csv", tmp_path / "out.csv")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    with open(tmp_path / "out.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "class1", "probability1", "class2", "probability2"] and len(rows) == 20
    assert sum(row[1] in row[0].rsplit("/", 1)[1] for row in rows) >= 15
    assert all(1 >= float(row[2]) >= float(row[4]) >= 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_bad_files_are_named_the_others_predicted_and_the_status_tells(pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    good = next(path for path in pictures.glob("*.png") if path.is_file())
    done = run(good, tmp_path / "bad.png", tmp_path / "none.png", good)
    assert done.returncode == 1 and done.stdout.count(f"{good}: ") == 2
    assert "bad.png" in done.stderr and "none.png" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["--top", "11", "a.png"], [REPOSITORY / "tests"], ["a.png", "--csv", "no/out.csv"], ["a.png", "--csv", "/"]],
)
def test_a_call_without_sense_is_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr

"""The command line that predicts pictures: its table, its lines and its exit status."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import REPOSITORY, needs_links, needs_proc
from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10
from predict import files_in, main, parse


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with 20 test images, two of each class, half of them a folder deeper, and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    (folder / "album.png").mkdir()
    sample = AlbumentationsCIFAR10(ASSETS, train=False)
    for i in range(0, 500, 25):
        place = folder / "more" if i % 50 else folder
        Image.fromarray(sample.data[i]).save(place / f"{CLASSES[sample.targets[i]]}{i}.png")
    (folder / "readme.txt").write_text("a text is no picture")
    return folder


def call(*arguments):
    return main([str(argument) for argument in arguments])


def test_folder_becomes_a_table(pictures, tmp_path, capsys):
    assert call(pictures, "--top", 2, "--csv", tmp_path / "out.csv") == 0
    assert capsys.readouterr().out == ""
    with open(tmp_path / "out.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "class1", "probability1", "class2", "probability2"] and len(rows) == 20
    right = [row for row in rows if row[1] in Path(row[0]).name]
    assert len(right) >= 15
    assert all(1 >= float(row[2]) >= float(row[4]) >= 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


@needs_proc
def test_a_table_goes_through_a_link_or_to_standard_output(pictures, tmp_path, capfd, monkeypatch):
    picture = next(pictures.glob("more/*.png"))
    (tmp_path / "link.csv").symlink_to(tmp_path / "disk" / "out.csv")
    with pytest.raises(SystemExit):
        call(picture, "--csv", tmp_path / "link.csv")
    assert "expected a folder for" in capfd.readouterr().err
    (tmp_path / "disk").mkdir()
    assert call(picture, "--csv", tmp_path / "link.csv") == 0
    table = (tmp_path / "disk" / "out.csv").read_bytes().decode()
    assert table.startswith("file,class1") and (tmp_path / "link.csv").is_symlink()
    monkeypatch.setattr("os.access", lambda folder, mode: False)  # as of /dev, for most people
    assert call(picture, "--csv", "/proc/self/fd/1") == 0
    assert capfd.readouterr().out.splitlines() == table.splitlines()
    with pytest.raises(SystemExit):
        call(picture, "--csv", tmp_path / "link.csv")


def test_files_keep_their_order_and_folders_are_sorted(pictures):
    last = pictures / "more" / "airplane25.png"
    files = files_in([last, pictures, last])
    assert files[0] == files[-1] == last and files[1:-1] == sorted(files[1:-1])
    assert len(files) == 22 and all(file.is_file() for file in files)


@needs_links
def test_hidden_files_are_left_out_and_links_to_nothing_are_named(tmp_path, capsys):
    for name in (".hidden.png", ".ipynb_checkpoints/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert files_in([tmp_path]) == [] and files_in([tmp_path / ".hidden.png"]) == [tmp_path / ".hidden.png"]
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert call(tmp_path) == 1
    assert "gone.png" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_named(tmp_path, capsys, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(SystemExit):
        call(tmp_path)
    assert f"Permission denied: {str(tmp_path)!r}" in capsys.readouterr().err


def test_home_is_expanded(home):
    (home / "more").mkdir()
    (home / "more/a.png").touch()
    options, files = parse(["~/more", "--csv=~/out.csv"])
    assert files == [home / "more/a.png"] and options.csv == home / "out.csv"


def test_bad_files_are_named_and_the_others_predicted(pictures, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"bad")
    good = next(path for path in pictures.glob("*.png") if path.is_file())
    assert call(good, tmp_path / "bad.png", tmp_path / "none.png", good) == 1
    printed = capsys.readouterr()
    assert printed.out.count(f"{good}: ") == 2 and printed.out.count(" %") == 6
    assert "bad.png" in printed.err and "none.png" in printed.err


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on other systems")
def test_command_line_in_a_process_of_its_own(pictures, tmp_path):
    name = tmp_path / b"caf\xe9.png".decode(errors="surrogateescape")  # no UTF-8
    name.write_bytes(next(pictures.glob("more/*.png")).read_bytes())
    command = [sys.executable, REPOSITORY / "predict.py", name, tmp_path / "none.png"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 1 and b"caf\xe9.png: " in done.stdout
    assert b"none.png" in done.stderr and b"Traceback" not in done.stderr


def test_a_name_beyond_the_terminal_s_characters_is_printed(pictures, tmp_path):
    name = tmp_path / "猫.png"
    name.write_bytes(next(pictures.glob("more/*.png")).read_bytes())
    command = [sys.executable, REPOSITORY / "predict.py", name]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}  # as of a pipe on Windows
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0 and "猫.png: ".encode() in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: FILE_OR_FOLDER"),
        (["--top", "11", "a.png"], "--top: invalid choice"),
        ([REPOSITORY / "tests"], "expected pictures, found none in"),
        (["a.png", "--csv", "no/out.csv"], f"a folder for {Path('no/out.csv')}, found none: make no"),
        (["a.png", "--csv", REPOSITORY], f"a file for the table, found the folder {REPOSITORY}"),
    ],
)
def test_wrong_call_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        call(*arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err

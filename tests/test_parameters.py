"""The notebook's parameters: what is refused, and which folder a run gets."""

import ast
import math
import re
import subprocess
import sys

import nbformat
import pytest
import torch

import parameters
from conftest import REPOSITORY
from parameters import (
    PARAMETERS,
    TEXTS,
    check_installed,
    check_parameters,
    describe_commit,
    run_folder,
    teacher_epochs,
)

DEFAULTS = {name: default for name, (default, _, _) in PARAMETERS.items()} | TEXTS


def test_defaults_are_the_notebook_s():
    notebook = nbformat.read(REPOSITORY / "S8.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assignments = ast.parse(cell.source).body
    assert {line.targets[0].id: ast.literal_eval(line.value) for line in assignments} == DEFAULTS


def test_parameters_of_a_fresh_notebook_pass():
    notebook = {"__name__": "__main__", "_i1": "code", "In": [], "json": math}  # what Jupyter adds
    check_parameters(DEFAULTS | notebook)
    check_parameters(DEFAULTS | {"WEIGHT_DECAY": 0, "RESUME": 0})  # whole numbers serve as floats
    check_parameters(DEFAULTS | {"TEACHER_EPOCHS": 3})
    check_parameters(DEFAULTS | {"torch": torch, "note": "a variable"})  # the cell runs a second time


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"EPOCHS": 0}, "expected EPOCHS to be int from 1 to 10000, found 0"),
        ({"EPOCHS": "many"}, "expected EPOCHS to be int from 1 to 10000, found 'many'"),
        ({"EPOCHS": 2.0}, "expected EPOCHS to be int from 1 to 10000, found 2.0"),
        ({"TEACHER_EPOCHS": "none"}, "expected TEACHER_EPOCHS to be 'auto' or int from 0 to 10000, found"),
        ({"DROPOUT": 1.0}, "expected DROPOUT to be float from 0.0 to 0.99, found 1.0"),
        ({"LEARNING_RATE": math.nan}, "expected LEARNING_RATE to be float from 1e-06 to 100.0, found nan"),
        ({"RESUME": 2}, "expected RESUME to be bool from False to True, found 2"),
        ({"DATA": "some"}, "expected DATA to be 'auto', 'full' or 'sample', found 'some'"),
        ({"DATA_ROOT": 3}, "expected DATA_ROOT to be a folder's name, found 3"),
        ({"EPOCH": 3}, "unknown parameter EPOCH: expected EPOCHS, TEACHER_EPOCHS, "),
    ],
)
def test_wrong_parameters_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_parameters(DEFAULTS | changes)


@pytest.mark.parametrize(
    "wanted, epochs, expected",
    [("auto", 100, 20), ("auto", 60, 20), ("auto", 59, 0), ("auto", 1, 0), (0, 100, 0), (3, 2, 3)],
)
def test_short_runs_have_no_teacher_unless_it_is_asked_for(wanted, epochs, expected):
    assert teacher_epochs(wanted, epochs) == expected


def test_a_missing_package_is_named(monkeypatch):
    check_installed()
    monkeypatch.setattr(parameters, "PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(ModuleNotFoundError, match="package no_such_package, found none: pip install no_such"):
        check_installed()


def test_parameters_need_the_standard_library_alone():
    code = "import sys; before = set(sys.modules); import parameters; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert {name.split(".")[0] for name in done.stdout.split()} <= {"parameters", *sys.stdlib_module_names}


def test_every_set_of_parameters_has_a_folder_with_a_readable_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def name(is_sample=False, **changes):
        folder = run_folder(DEFAULTS | changes, is_sample)
        assert folder.is_dir() and folder.parent.name == "runs"
        return folder.name

    assert name() == "100-epochs-seed-0"
    assert name(is_sample=True, EPOCHS=2) == "sample-2-epochs-seed-0"
    assert name(BATCH_SIZE=128, EMA_DECAY=0.0) == "100-epochs-seed-0-batch-size-128-ema-decay-0.0"
    same = name(RESUME=False), name(DATA="full"), name(DATA_ROOT="/data")
    assert set(same) == {name()}
    different = [{key: high} for key, (_, _, high) in PARAMETERS.items() if key != "RESUME"]
    assert len({name(**change) for change in different}) == len(different)


def test_the_commit_is_described(tmp_path, monkeypatch):
    file = tmp_path / "parameters.py"
    monkeypatch.setattr(parameters, "__file__", str(file))
    assert describe_commit() == "unknown"  # a folder without git
    file.write_text("old")
    table = tmp_path / "assets" / "runs.csv"
    table.parent.mkdir()
    table.write_text("")
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    commit = describe_commit()
    assert re.fullmatch("[0-9a-f]{12,}", commit)
    table.write_text("a new line")
    assert describe_commit() == commit
    file.write_text("new")
    assert describe_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert describe_commit() == "unknown"

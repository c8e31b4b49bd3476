"""The notebook: the committed one as a record, and real runs of it on a small sample."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import nbformat
import numpy as np
import psutil
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from safetensors.torch import load_file

import run_notebook as run_notebook_module
from conftest import REPOSITORY, needs_links, not_on_windows
from parameters import PARAMETERS, TEXTS

FIGURES = 9
OPTIONS = ["DATA=sample", "EPOCHS=2", "BATCH_SIZE=60", "TEACHER_EPOCHS=1"]
RUN = "runs/sample-2-epochs-seed-0-teacher-epochs-1-batch-size-60"
FILES = {
    "S8.ipynb", "RF Calculations.xlsx", "kernel.log", "history.csv", "teacher_history.csv",
    "net.pt", "net.previous.pt", "net.safetensors", "teacher.pt", "augmentation.png", "confusion_matrix.png",
    "grad_cam.png", "misclassified.png", "reliability.png", "robustness.png", "training_logs.png",
}  # fmt: skip


def text_of(cell) -> str:
    """What a code cell printed."""
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")


def code_cells(path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def digests(folder) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def small_clone(folder, damage=lambda image: image):
    """The repository, committed, with 240 training and 60 test images, the latter damaged."""
    for path in [*REPOSITORY.glob("*.py"), REPOSITORY / "S8.ipynb", REPOSITORY / ".gitignore"]:
        shutil.copy(path, folder)
    shutil.copytree(REPOSITORY / "assets", folder / "assets")
    shutil.copy(REPOSITORY / "RF Calculations.xlsx", folder)
    for name, per_class in (("train", 24), ("test", 6)):
        path = str(folder / f"assets/cifar10_sample_{name}.webp")
        sheet = cv2.imread(path)
        images = sheet.reshape(len(sheet) // 32, 32, -1, 32, 3).swapaxes(1, 2).reshape(10, -1, 32, 32, 3)
        images = images[:, :per_class].reshape(10, per_class, 32, 32, 3)
        if name == "test":
            images = damage(images)
        small = images.swapaxes(1, 2).reshape(10 * 32, per_class * 32, 3)
        cv2.imwrite(path, np.ascontiguousarray(small), [cv2.IMWRITE_WEBP_QUALITY, 101])  # lossless
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "clone"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def changes(folder) -> str:
    """What git sees."""
    command = ["git", "status", "--porcelain"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def run_notebook(folder, *arguments):
    command = [sys.executable, "run_notebook.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def results(folder) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The history of a run without seconds, and its weights."""
    with open(folder / RUN / "history.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows, load_file(folder / RUN / "net.safetensors")


# ---------------------------------------------------------------- the committed notebook


def test_committed_notebook_is_one_complete_run_on_the_full_data():
    path = REPOSITORY / "S8.ipynb"
    assert path.stat().st_size < 2e6
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.display_name == "Python 3 (ipykernel)"  # what Jupyter itself writes
    code = code_cells(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert not re.search(r"Warning|Traceback|/(root|work|tmp|home)/", json.dumps(outputs))
    printed = "".join(map(text_of, code))
    assert printed.startswith("CIFAR-10, complete: 50,000 training and 10,000 test images")
    # Each epoch that it shows, the teacher's first, is in the histories.
    rows = []
    for name in ("teacher_history.csv", "history.csv"):
        with open(REPOSITORY / "assets" / name) as file:
            rows += csv.DictReader(file)
    epoch = (
        r"Epoch (\d+)\nTrain: .*100%.*\nTest set: Average loss: ([\d.]+), Accuracy: \d+/10000 \(([\d.]+)%\)"
    )
    expected = [
        (row["epoch"], f"{float(row['test_loss']):.4f}", f"{float(row['test_accuracy']):.2f}") for row in rows
    ]
    assert re.findall(epoch, printed) == expected
    last = rows[-1]
    assert int(last["epoch"]) >= 20 and float(last["test_accuracy"]) >= 86.2
    assert float(re.search(r"Expected calibration error: ([\d.]+) points", printed)[1]) <= 2
    after = f"{float(last['test_accuracy']):.2f} % on test after {last['epoch']} epochs"
    assert after in printed.splitlines()[-1]


def test_cells_are_short_and_explained():
    cells = nbformat.read(REPOSITORY / "S8.ipynb", as_version=4).cells
    for before, cell in zip(cells, cells[1:]):
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert before.cell_type == "markdown", cell.source
            assert len(lines) <= 25 and max(map(len, lines)) <= 96, cell.source
    outputs = [cell.outputs for cell in code_cells(REPOSITORY / "S8.ipynb")]
    shown = [any("image/png" in output.get("data", {}) for output in cell) for cell in outputs]
    assert shown.index(True) == 2, "a picture by the third code cell"


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A clone in which the notebook ran once, from the first cell to the last; and the finished process."""
    clone = small_clone(tmp_path_factory.mktemp("a clone"))  # whose path has a space in it
    return clone, run_notebook(clone, *OPTIONS)


def test_a_run_has_its_own_folder_and_changes_nothing_that_git_tracks(whole):
    clone, done = whole
    assert done.returncode == 0, done.stderr[-2000:]
    assert changes(clone) == ""
    assert {path.name for path in (clone / RUN).iterdir()} == FILES
    assert re.fullmatch(
        rf"{re.escape(str(Path(RUN)))} holds the result: [\d.]+ % on test after 2 epochs, .*",
        done.stdout.splitlines()[-1],
    )
    code = code_cells(clone / RUN / "S8.ipynb")
    assert "EPOCHS = 2\n" in code[0].source and "BATCH_SIZE = 60\n" in code[0].source  # what was passed
    assert text_of(code[1]) == "SAMPLE, not CIFAR-10: 240 training and 60 test images\n"
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert (clone / RUN / "RF Calculations.xlsx").read_bytes() == (
        clone / "RF Calculations.xlsx"
    ).read_bytes()


def scale_of_answers(folder) -> float:
    """By what the last layer's weights were multiplied after the training."""
    trained = torch.load(folder / "net.pt")["average"]["classifier.weight"]
    saved = load_file(folder / "net.safetensors")["classifier.weight"]
    return (saved / trained).mean().item()


def test_a_network_that_learnt_softened_answers_is_made_surer(whole):
    clone, _ = whole
    assert scale_of_answers(clone / RUN) == pytest.approx(1.5)


def test_a_short_run_learns_the_labels_of_growing_images(whole):
    clone, _ = whole
    done = run_notebook(clone, "DATA=sample", "EPOCHS=3", "BATCH_SIZE=60")  # of 16, 24 and 32 pixels
    assert done.returncode == 0, done.stderr[-2000:]
    run = clone / "runs/sample-3-epochs-seed-0-batch-size-60"
    missing = {name for name in FILES if name.startswith("teacher")}
    assert {path.name for path in run.iterdir()} == FILES - missing
    assert "ProgressiveLoader" in torch.load(run / "net.pt")["recipe"]["loaders"]
    assert scale_of_answers(run) == 1


def test_the_terminal_shows_where_the_run_is_on_lines_of_its_own(whole):
    _, done = whole
    cells = re.findall(r"(?m)^--- cell (\d+) of (\d+)$", done.stdout)
    count = len(code_cells(REPOSITORY / "S8.ipynb"))
    assert cells == [(str(i), str(count)) for i in range(1, count + 1)]


def test_a_killed_run_continues_to_the_same_end_and_takes_nothing_from_the_test_set(whole, tmp_path):
    """The test images of this clone are dark, in other colours. Only the scores may differ by that."""
    clone = small_clone(tmp_path, damage=lambda images: images[..., ::-1] // 2)
    command = [sys.executable, "run_notebook.py", *OPTIONS]
    run = subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    epochs = 0
    for line in run.stdout:
        epochs += line.startswith("Epoch ")
        if epochs == 3:  # the teacher has one epoch, so this is the second of the network
            process = psutil.Process(run.pid)
            for part in [*process.children(recursive=True), process]:
                part.kill()
            break
    run.wait()
    done = run_notebook(clone, *OPTIONS)
    assert "teacher.pt holds 1 of 1 epochs of this run" in done.stdout
    assert "net.pt holds 1 of 2 epochs of this run" in done.stdout
    rows, weights = results(clone)
    expected_rows, expected = results(whole[0])
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row["train_loss"] == expected_row["train_loss"]
        assert row["test_loss"] != expected_row["test_loss"]


@not_on_windows
def test_another_seed_leaves_a_finished_run_which_is_then_loaded(whole):
    clone, _ = whole
    before = digests(clone / RUN)
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "S8.py"]
    assert run_notebook(clone, "--script", *OPTIONS, "SEED=1").returncode == 0
    assert "get_ipython" not in (clone / "S8.py").read_text(encoding="utf-8")
    done = subprocess.run(script, cwd=clone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    # One process prints, of all the test images: after the teacher's epoch and after each of the network's.
    assert len(re.findall(r"Test set: .*/60 \(", done.stdout)) == 3
    other = clone / RUN.replace("seed-0", "seed-1")
    assert {path.name for path in other.iterdir()} == FILES - {"S8.ipynb", "kernel.log"}
    assert done.stdout.splitlines()[-1].startswith(f"{other.relative_to(clone)} holds the result: ")
    assert digests(clone / RUN) == before and changes(clone) == ""
    shutil.rmtree(other)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("EPOCHS=0", "ValueError: expected EPOCHS to be int from 1"),
        ("EPOCHS=many", "ValueError: expected EPOCHS to be int from 1"),
        ("EPOCH=3", "ValueError: unknown parameter EPOCH: expected EPOCHS, "),
        ("EPOCHS", "ValueError: expected NAME=VALUE, found 'EPOCHS'"),
        ("--fast", "ValueError: expected --record or --script, found --fast: use one of them"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(argument, message):
    done = run_notebook(REPOSITORY, argument)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(message)


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    stand_in(tmp_path)
    (tmp_path / "runs").touch()  # a file, which stops root, too
    done = run_notebook(tmp_path, "DATA=sample")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "runs" in done.stderr


@not_on_windows
def test_make_passes_parameters_and_nothing_else():
    given = ["PYTHON=python3.12", "CIFAR10_ROOT=/data", "EPOCHS=3"]
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/installed", "notebook", *given]
    asked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert asked.split() == [".venv/bin/python", "run_notebook.py", "EPOCHS=3"]


@not_on_windows
@pytest.mark.parametrize("given, threads", [({}, "3"), ({"OMP_NUM_THREADS": "5"}, "5")])
def test_make_divides_the_usable_cores_among_the_processes(given, threads, tmp_path):
    python = tmp_path / ".venv/bin/python"  # one that counts eight cores and tells its threads
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 8 || echo "$1 $2 $OMP_NUM_THREADS"\n')
    python.chmod(0o755)
    command = ["make", "-f", REPOSITORY / "Makefile", "-o", ".venv/installed", "distributed", "N=3"]
    environment = {"PATH": os.environ["PATH"], **given}
    printed = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert f"-m torch.distributed.run {threads}" in printed.splitlines()


# ---------------------------------------------------------------- stopping


def stand_in(folder, *sources: str):
    """A clone with a notebook of these cells, behind the parameters, in place of ours."""
    for name in ("run_notebook.py", "parameters.py", "checkpoint.py"):
        shutil.copy(REPOSITORY / name, folder)
    defaults = {name: default for name, (default, _, _) in PARAMETERS.items()} | TEXTS
    lines = [f"{name} = {value!r}  # a comment" for name, value in defaults.items()]
    cells = [nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "S8.ipynb")
    return folder


@not_on_windows
@pytest.mark.parametrize(
    "resume, again", [("true", "the same command continues"), ("false", "without RESUME=false, continues")]
)
def test_ctrl_c_says_how_to_continue(tmp_path, resume, again):
    stand_in(tmp_path, "import time\nprint('under way', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "run_notebook.py", "DATA=sample", f"RESUME={resume}"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("under way"):
            break
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and errors.splitlines()[-1].startswith("interrupted: ")
    assert again in errors.splitlines()[-1]
    assert "Traceback" not in errors and "ERROR" not in errors


def test_characters_that_the_terminal_lacks_stop_no_run(tmp_path):
    stand_in(tmp_path, "import sys\nprint('32→16 █')\nprint('→', file=sys.stderr)")
    command = [sys.executable, "run_notebook.py", "DATA=sample"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}  # as of a pipe on Windows
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"32?16 ?" in done.stdout and rb"\u2192" in done.stderr


def test_a_cell_that_fails_says_why_in_the_last_line(tmp_path):
    done = run_notebook(stand_in(tmp_path, "raise ValueError('too blue')"), "DATA=sample")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: too blue"
    assert not (tmp_path / "runs/sample-100-epochs-seed-0/S8.ipynb").exists()


STOPPED = """
import torch
from torch import nn
from training_utils import fit

batches = [(torch.randn(64, 3, 8, 8), torch.randint(10, (64,))) for _ in range(20)]
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
history = fit(model, batches, batches[:1], torch.optim.SGD(model.parameters(), lr=0.01), epochs=1_000_000)
"""


def test_the_stop_button_keeps_the_finished_epochs():
    manager, client = start_new_kernel(cwd=str(REPOSITORY))
    try:
        client.execute(STOPPED)
        while "Epoch 3" not in str(client.get_iopub_msg(timeout=60)["content"]):
            pass
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
        reply = client.execute_interactive("assert 2 <= len(history) < 1000", timeout=60)
        assert reply["content"]["status"] == "ok"
    finally:
        manager.shutdown_kernel(now=True)


# ---------------------------------------------------------------- the record


def committed(folder):
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    (folder / ".gitignore").write_text("runs/\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "clone"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_a_record_takes_no_parameters_and_needs_a_clean_tree(tmp_path):
    committed(stand_in(tmp_path))
    done = run_notebook(tmp_path, "--record", "EPOCHS=3")
    assert (
        done.stderr
        == "ValueError: expected a record without parameters, found EPOCHS: make notebook takes it\n"
    )
    (tmp_path / "parameters.py").write_text((tmp_path / "parameters.py").read_text() + "\n")
    done = run_notebook(tmp_path, "--record")
    assert (
        done.stderr
        == "ValueError: expected a clean tree for a record, found parameters.py changed: commit it first\n"
    )


WRITE = """
from pathlib import Path

folder = Path("runs/100-epochs-seed-0")
assert not (folder / "old").exists()
for name in ("net.safetensors", "net.pt", "augmentation.png", "RF Calculations.xlsx"):
    (folder / name).write_text("new")
(folder / "history.csv").write_text("epoch\\n" * (1 + FINISHED))
(folder / "S8.ipynb").symlink_to("elsewhere.ipynb")
"""
STUB = "ASSETS = None\n\n\ndef find_cifar10(root, data):\n    return data\n"


@needs_links
def test_a_record_replaces_what_git_tracks_when_it_is_complete(tmp_path):
    stand_in(tmp_path, WRITE.replace("FINISHED", "100"))
    (tmp_path / "cifar10.py").write_text(STUB)
    (tmp_path / "assets").mkdir()
    for name in ("assets/history.csv", "assets/runs.csv"):
        (tmp_path / name).write_text("old")
    committed(tmp_path)
    folder = tmp_path / "runs/100-epochs-seed-0"
    folder.mkdir(parents=True)
    (folder / "old").touch()  # an earlier run's: a record starts over, and keeps it
    done = run_notebook(tmp_path, "--record")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("runs/100-epochs-seed-0.*/*")] == ["old"]
    assets = {path.name: path.read_text() for path in (tmp_path / "assets").iterdir()}
    new = {"history.csv": "epoch\n" * 101, "net.safetensors": "new", "augmentation.png": "new"}
    assert assets == new | {"runs.csv": "old"}
    assert (tmp_path / "RF Calculations.xlsx").read_text() == "new"
    assert [cell.execution_count for cell in code_cells(tmp_path / "S8.ipynb")] == [1, 2]
    assert (tmp_path / "S8.ipynb").read_bytes() == (folder / "elsewhere.ipynb").read_bytes()
    assert (folder / "S8.ipynb").is_symlink() and not (folder / "S8.partial.ipynb").exists()


@needs_links
@pytest.mark.parametrize(
    "cells, message",
    [
        ([WRITE.replace("FINISHED", "100"), "raise ValueError('too late')"], "ValueError: too late"),
        (
            [WRITE.replace("FINISHED", "7")],
            "ValueError: expected 100 epochs, found 7: the result is in runs/",
        ),
        (
            [WRITE.replace("FINISHED", "100"), "open('S8.ipynb', 'a').write(' ')"],
            "ValueError: expected S8.ipynb as when the run began, found another",
        ),
    ],
)
def test_a_record_that_fails_stops_or_is_edited_replaces_nothing(cells, message, tmp_path):
    stand_in(tmp_path, *cells)
    (tmp_path / "cifar10.py").write_text(STUB)
    committed(tmp_path)
    done = run_notebook(tmp_path, "--record")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message)
    assert not (tmp_path / "assets").exists() and not (tmp_path / "RF Calculations.xlsx").exists()


def test_a_record_needs_git(tmp_path):
    done = run_notebook(stand_in(tmp_path), "--record")
    assert done.stderr == "ValueError: expected a git clone for a record, found none: clone the repository\n"


def test_values_take_the_place_of_the_notebook_s_and_the_comments_stay(tmp_path):
    notebook = nbformat.read(stand_in(tmp_path) / "S8.ipynb", as_version=4)
    values = {"EPOCHS": 3, "DATA_ROOT": "a # b", "EMA_DECAY": 0.5, "RESUME": False}
    changed = run_notebook_module.with_values(notebook, values)
    assert run_notebook_module.values_of(changed) == run_notebook_module.values_of(notebook) | values
    source = changed.cells[0].source
    assert "EPOCHS = 3  # a comment\n" in source and "DATA_ROOT = 'a # b'  # a comment" in source

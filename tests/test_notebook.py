import csv
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys

import nbformat
import psutil
import pytest
import torch
from conftest import REPOSITORY
from jupyter_client.manager import start_new_kernel
from safetensors.torch import load_file

FIGURES = 9


def text_of(cell) -> str:
    """What a code cell printed."""
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that the notebook needs, apart from the repository, so that a run here changes nothing there."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*REPOSITORY.glob("*.py"), REPOSITORY / "S8.ipynb"]:
        shutil.copy(path, folder)
    shutil.copytree(REPOSITORY / "assets", folder / "assets")
    return folder


def run_notebook(folder, *arguments):
    return subprocess.run(
        [sys.executable, "run_notebook.py", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_committed_notebook_is_one_complete_run_on_the_full_data():
    path = REPOSITORY / "S8.ipynb"
    assert path.stat().st_size < 2e6
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(notebook.cells[i - 1].cell_type == "markdown" for i, cell in enumerate(notebook.cells)
               if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", []))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    everything = json.dumps(outputs)
    assert not re.search(r"Warning|Traceback|/(root|work|tmp|home)/", everything)
    printed = "".join(map(text_of, code))
    assert printed.startswith("CIFAR-10, complete: 50,000 training and 10,000 test images")
    # Each epoch that it shows, the teacher's first, is the histories', and the last line is the last epoch's.
    taught, history = (list(csv.DictReader((REPOSITORY / "assets" / name).open())) for name in ("teacher_history.csv", "history.csv"))
    shown = re.findall(r"Epoch (\d+)\nTrain: .*100%.*\nTest set: Average loss: ([\d.]+), Accuracy: \d+/10000 \(([\d.]+)%\)", printed)
    assert shown == [(row["epoch"], f"{float(row['test_loss']):.4f}", f"{float(row['test_accuracy']):.2f}") for row in taught + history]
    assert len(history) >= 20 and float(history[-1]["test_accuracy"]) >= 86.2
    assert f"{float(history[-1]['test_accuracy']):.2f} % on test after {len(history)} epochs" in printed.splitlines()[-1]


PICTURES = ["augmentation", "confusion_matrix", "grad_cam", "misclassified", "reliability", "robustness", "training_logs"]
PICTURES = [f"{name}.png" for name in PICTURES]
WRITTEN = sorted([*PICTURES, "history.csv", "net.pt", "net.safetensors"])


@pytest.fixture(scope="module")
def sample_run(clone):
    """One epoch on the sample: the finished process, and the published files as they were before it."""
    before = digests(clone / "assets")
    return run_notebook(clone, "DATA=sample", "EPOCHS=1", "BATCH_SIZE=128"), before


def test_notebook_runs_on_the_sample_and_leaves_the_published_files_alone(clone, sample_run):
    done, before = sample_run
    assert done.returncode == 0, done.stderr[-2000:]
    assert digests(clone / "assets") == before
    assert "SAMPLE, not CIFAR-10" in done.stdout and "Test set: Average loss" in done.stdout
    notebook = nbformat.read(clone / "S8.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first_output = next(text for text in map(text_of, code) if text)
    assert first_output.startswith("SAMPLE, not CIFAR-10: 2,000 training and 500 test images")
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES
    assert not [output for output in outputs if output.get("name") == "stderr"]
    files = sorted(path.name for path in (clone / "runs/sample").iterdir())
    assert files == WRITTEN  # one epoch is too short a run for a teacher
    # What this run was given is no default of the next.
    assert run_notebook(clone, "EPOCHS=0").stderr.splitlines()[-1].startswith("ValueError: expected EPOCHS")
    assert "injected-parameters" in (clone / "S8.ipynb").read_text()


def test_same_seed_same_history_and_pictures_and_another_seed_others(clone, sample_run):
    def results():
        with open(clone / "runs/sample/history.csv") as file:
            history = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
        pictures = digests(clone / "runs/sample")
        return history, load_file(clone / "runs/sample/net.safetensors"), [pictures[name] for name in PICTURES]

    first = results()
    for seed, same in ((0, True), (1, False)):
        options = ["DATA=sample", "EPOCHS=1", "BATCH_SIZE=128", "RESUME=false", f"SEED={seed}"]
        assert run_notebook(clone, *options).returncode == 0
        history, weights, pictures = results()
        assert (history == first[0]) == same
        assert all(torch.equal(weights[key], first[1][key]) for key in weights) == same
        assert [a == b for a, b in zip(pictures, first[2])] == [same] * len(PICTURES)
    cells = nbformat.read(clone / "S8.ipynb", as_version=4).cells
    (given,) = [cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert "\nSEED = 1" in given and "\n# RESUME = False" in given  # the next to run all cells wants to go on


def test_after_a_crash_all_cells_again_go_on_and_a_finished_run_is_said(clone):
    options = ["DATA=sample", "EPOCHS=3", "BATCH_SIZE=500"]
    run = subprocess.Popen(
        [sys.executable, "run_notebook.py", *options], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in run.stdout:
        if line.startswith("Epoch 3"):
            process = psutil.Process(run.pid)
            for part in [*process.children(recursive=True), process]:  # the kernel, and what waits for it
                part.kill()
            break
    run.wait()
    printed = run_notebook(clone, *options).stdout
    assert "net.pt holds 2 of 3 epochs of this run" in printed and "\nEpoch 3\n" in printed and "\nEpoch 2\n" not in printed
    again = run_notebook(clone, *options).stdout
    assert again.count("Nothing is left to train") == 2 and "on test after 3 epochs" in again  # the teacher's run, and the network's


def test_make_hands_on_parameters_and_nothing_else():
    given = ["PYTHON=python3.12", "CIFAR10_ROOT=/data", "EPOCHS=3"]
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/installed", "notebook", *given]
    asked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert asked.split() == [".venv/bin/python", "run_notebook.py", "EPOCHS=3"]


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("EPOCHS=0", "ValueError: expected EPOCHS to be int from 1"),
        ("EPOCHS=many", "ValueError: expected EPOCHS to be int from 1"),
        ("BATCH_SIZE=-4", "ValueError: expected BATCH_SIZE to be int from 2"),
        ("EPOCH=3", "ValueError: unknown parameter EPOCH: expected EPOCHS, "),
        ("DATA=some", "ValueError: expected data to be 'auto', 'full' or 'sample', found 'some'"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line_and_the_notebook_stays(clone, argument, expected):
    before = (clone / "S8.ipynb").read_bytes()
    done = run_notebook(clone, argument)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(expected)
    assert (clone / "S8.ipynb").read_bytes() == before


@pytest.mark.parametrize(
    "argument, again", [("RESUME=true", "the same command goes on"), ("RESUME=false", "without RESUME=false, goes on")]
)
def test_an_interrupted_run_leaves_the_notebook(clone, argument, again):
    before = (clone / "S8.ipynb").read_bytes()
    run = subprocess.Popen(
        [sys.executable, "run_notebook.py", "DATA=sample", argument], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in run.stdout:  # the notebook's own first line: it is under way
        if line.startswith("SAMPLE"):
            break
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and errors.splitlines()[-1].startswith("interrupted: S8.ipynb is as it was")
    assert again in errors.splitlines()[-1]
    assert "Traceback" not in errors and "ERROR" not in errors
    assert (clone / "S8.ipynb").read_bytes() == before


def test_a_notebook_that_was_changed_while_it_ran_stays(tmp_path):
    shutil.copy(REPOSITORY / "run_notebook.py", tmp_path)
    parameters = nbformat.v4.new_code_cell("TEXT = ''", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell("open('S8.ipynb', 'a').write(TEXT)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "S8.ipynb")
    assert run_notebook(tmp_path).returncode == 0
    ran = (tmp_path / "S8.ipynb").read_text()
    done = run_notebook(tmp_path, "TEXT=' '")
    assert done.returncode == 1 and "it stays, and the result is runs/S8.ipynb" in done.stderr.splitlines()[-1]
    assert (tmp_path / "S8.ipynb").read_text() == ran + " " and (tmp_path / "runs/S8.ipynb").exists()


STOPPED = """
import torch
from torch import nn
from training_utils import fit

batches = [(torch.randn(64, 3, 8, 8), torch.randint(10, (64,))) for _ in range(20)]
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
history = fit(model, batches, batches[:1], torch.optim.SGD(model.parameters(), lr=0.01), epochs=1_000_000)
"""


def test_the_stop_button_keeps_the_finished_epochs(clone):
    manager, client = start_new_kernel(cwd=str(clone))
    try:
        client.execute(STOPPED)
        while "Epoch 3" not in str(client.get_iopub_msg(timeout=60)["content"]):
            pass
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
        assert client.execute_interactive("assert len(history) >= 2 and len(history) < 1000", timeout=60)["content"]["status"] == "ok"
    finally:
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]])
def test_notebook_runs_as_a_script_on_one_process_or_two(clone, launcher):
    options = ["DATA=sample", "EPOCHS=2", "BATCH_SIZE=500", "RESUME=false"]
    assert run_notebook(clone, "--script", *options).returncode == 0
    assert "get_ipython" not in (clone / "S8.py").read_text()
    before = digests(clone / "assets")
    shutil.rmtree(clone / "runs", ignore_errors=True)
    done = subprocess.run([sys.executable, *launcher, "S8.py"], cwd=clone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "embedded sample of 2,500 images" in done.stdout.splitlines()[-1]
    # One process prints, of all the test images: after the teacher's epoch and after each of the network's.
    assert len(re.findall(r"Test set: .*/500 \(", done.stdout)) == 3
    expected = [*WRITTEN, "net.previous.pt", "teacher.pt", "teacher_history.csv"]
    assert sorted(path.name for path in (clone / "runs/sample").iterdir()) == sorted(expected)
    assert digests(clone / "assets") == before

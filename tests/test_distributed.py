"""Several processes train as one does: gloo on CPUs, real processes, launched by torchrun."""

import csv
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import REPOSITORY

from batches import BatchLoader
from dataset import ASSETS, AlbumentationsCIFAR10, AlbumentationsImages, train_transform

EPOCHS = 3
RUN = """
import sys

import torch
from torch import nn

import training_utils
from batches import BatchLoader
from dataset import ASSETS, AlbumentationsCIFAR10, test_transform, train_transform
from model import Net

network, folder, fail_in = sys.argv[1], sys.argv[2], int(sys.argv[3])
training_utils.precision = lambda device: torch.float32  # so that what differs is not rounding
device, rank, processes = training_utils.join_processes()
torch.manual_seed(0)
between = (nn.BatchNorm2d(8), nn.Dropout(0.1)) if network == "small" else ()
small = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), *between, nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
net = Net() if network == "Net" else small


class Loader(BatchLoader):
    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        if rank == 1 and epoch == fail_in:
            raise RuntimeError("the second worker has failed")


sample = AlbumentationsCIFAR10(ASSETS, True, train_transform())
train_loader = Loader(sample, 200, True, device, rank, processes)
test_loader = BatchLoader(AlbumentationsCIFAR10(ASSETS, False, test_transform()), 125, False, device, rank, processes)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
files = {"history_file": f"{folder}/history.csv", "checkpoint": f"{folder}/net.pt"}
recipe = {"network": network, "data": rank * (network == "different")}
training_utils.fit(net, train_loader, test_loader, optimizer, epochs=EPOCHS, ema_decay=0.9, recipe=recipe, **files)
""".replace("EPOCHS", str(EPOCHS))


def start(processes: int, tmp_path, network: str, fail_in: int = 0) -> subprocess.Popen:
    """The script above on so many processes; one is not launched at all."""
    (tmp_path / "run.py").write_text(RUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(tmp_path / "run.py"), network, str(tmp_path), str(fail_in)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
    )


def finish(run: subprocess.Popen) -> tuple[str, str]:
    printed, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors[-3000:]
    return printed, errors


def history_of(folder) -> list[dict[str, float]]:
    with open(folder / "history.csv") as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("processes, size", [(2, 64), (3, 48)])
def test_the_shares_are_one_process_s_batches_without_overlap(shuffle, processes, size):
    sample = AlbumentationsCIFAR10(ASSETS, True)
    images = AlbumentationsImages(sample.data[:200], list(range(200)), range(200), train_transform())  # the target is the index
    loaders = [BatchLoader(images, size, shuffle, "cpu", rank, processes) for rank in range(processes)]
    whole = BatchLoader(images, size, shuffle)
    for loader in (whole, *loaders):
        loader.set_epoch(3)
    pictures = {int(target): image for batch, targets in whole for image, target in zip(batch, targets)}
    seen = []
    for together in zip(whole, *loaders):
        (_, expected), *shares = together
        found = torch.cat([targets for _, targets in shares])
        assert set(found.tolist()) <= set(expected.tolist())
        seen += found.tolist()
        for batch, targets in shares:
            assert all(torch.equal(image, pictures[int(target)]) for image, target in zip(batch, targets))
        if shuffle:
            assert len({len(targets) for _, targets in shares}) == 1
    assert len(set(seen)) == len(seen) >= 200 - (processes - 1) * shuffle
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]


def test_a_batch_that_cannot_be_shared_is_refused():
    images = AlbumentationsCIFAR10(ASSETS, True, train_transform())
    with pytest.raises(ValueError, match="expected batch_size >= 1, a multiple of the 3 processes, found 64"):
        BatchLoader(images, 64, True, processes=3)


@pytest.mark.parametrize("network, tolerance", [("small, without batch norm", 1e-4), ("Net", 0.1)])
def test_two_processes_with_half_the_batch_follow_one_s_curve(tmp_path, network, tolerance):
    histories = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        printed, errors = finish(start(processes, folder, network))
        assert printed.count("Test set: ") == EPOCHS and printed.count("/500 (") == EPOCHS  # one prints, of all the images
        assert "Warning" not in errors
        histories.append(history_of(folder))
    for one, two in zip(*histories, strict=True):
        # Batch norm sees half a batch: the training losses stay close, those of its running averages need not in 40 steps.
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=tolerance)
        if network != "Net":
            assert two["test_loss"] == pytest.approx(one["test_loss"], abs=tolerance)
            assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.21)  # one image of 500


def test_a_worker_that_fails_ends_the_run_with_its_traceback_and_any_number_goes_on(tmp_path):
    (tmp_path / "whole").mkdir()
    finish(start(2, tmp_path / "whole", "small"))
    run = start(2, tmp_path, "small", fail_in=2)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "Traceback" in errors and "RuntimeError: the second worker has failed" in errors
    assert len(history_of(tmp_path)) == 1
    saved = (tmp_path / "net.pt").read_bytes()
    printed, _ = finish(start(2, tmp_path, "small"))
    assert "holds 1 of 3 epochs of this run" in printed
    assert history_of(tmp_path) == history_of(tmp_path / "whole")  # to the last bit, batch norm's statistics and dropout's masks included
    (tmp_path / "net.pt").write_bytes(saved)
    printed, _ = finish(start(1, tmp_path, "small"))
    assert "holds 1 of 3 epochs of this run" in printed and len(history_of(tmp_path)) == EPOCHS


def test_processes_with_different_data_are_refused(tmp_path):
    run = start(2, tmp_path, "different")
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0 and "ValueError: expected one run on all processes, found several by 'data'" in errors
    assert not (tmp_path / "net.pt").exists()


def test_a_worker_that_is_killed_ends_the_run(tmp_path):
    run = start(2, tmp_path, "small")
    for line in run.stdout:
        if line.startswith("Epoch 2"):
            break
    workers = [child for child in psutil.Process(run.pid).children(recursive=True) if "run.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    started = time.monotonic()
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0 and re.search(rf"exitcode\s*: -{signal.SIGKILL.value}\b", errors)
    assert time.monotonic() - started < 60 and not any(worker.is_running() for worker in workers)
    printed, _ = finish(start(1, tmp_path, "small"))
    assert re.search(r"holds [12] of 3 epochs of this run", printed)

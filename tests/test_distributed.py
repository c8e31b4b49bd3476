"""Several processes train as one does: gloo on CPUs, real processes, started by torchrun.

Each launch takes seconds, so three of them serve all assertions. This file is also the script that torchrun
runs, in this order: `test_distributed.py train FOLDER`, the same with `fail`, and then with `resume`.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import dataset
import hardware
import processes
import training_utils
from batches import BatchLoader
from conftest import REPOSITORY, not_on_windows
from dataset import ASSETS, AlbumentationsCIFAR10, AlbumentationsImages, train_transform
from hardware import best_device
from processes import join_processes, synchronize_batch_norm
from training_utils import fit

pytestmark = not_on_windows
EPOCHS = 3
PROCESSES = 3  # two would not tell in which order their gradients are summed: a + b = b + a, to the last bit


# ---------------------------------------------------------------- the script


def train_in(
    folder, device="cpu", rank=0, processes=1, *, norm=True, data="", before_epoch=lambda epoch: None
):
    """A run of a small network, with or without batch norm and dropout, with its files in this folder."""
    torch.manual_seed(rank)  # rank 0's weights must reach the others
    between = (nn.BatchNorm2d(8), nn.Dropout(0.1)) if norm else ()
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), *between, nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(392, 10))
    train_set = AlbumentationsCIFAR10(ASSETS, True, train_transform())
    train_set.data, train_set.targets = train_set.data[:1998], train_set.targets[:1998]  # equal shares
    train_loader = BatchLoader(train_set, 240, True, device, rank, processes)
    test_set = AlbumentationsCIFAR10(ASSETS, False, dataset.test_transform())
    test_loader = BatchLoader(test_set, 125, False, device, rank, processes)

    def set_epoch(epoch):
        before_epoch(epoch)
        BatchLoader.set_epoch(train_loader, epoch)

    train_loader.set_epoch = set_epoch
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    options = {
        "epochs": EPOCHS,
        "ema_decay": 0.9,
        "history_file": folder / "history.csv",
        "checkpoint": folder / "net.pt",
        "recipe": {"data": data},
    }
    fit(net, train_loader, test_loader, optimizer, **options)


def check_unequal_shares(rank):
    """Known from a sampler they are refused at the start, else after the first epoch."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    images, targets = torch.zeros(10 - rank // 2, 1, 2, 2), torch.zeros(10 - rank // 2, dtype=int)
    by_sampler = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, targets), 5)
    with pytest.raises(ValueError, match="found several by 'images of a process'"):
        fit(net, by_sampler, by_sampler, optimizer, epochs=1)
    with pytest.raises(ValueError, match="expected equal shares on 3 processes, found .* of 29 images"):
        fit(net, [(images, targets)], [(images, targets)], optimizer, epochs=1)
    # A test counts every image once, whatever the shares.
    training_utils.test(net, [(images, targets)] * (rank + 1))


def check_overflow_on_one(rank):
    """In float16, a step that overflows on one process is skipped on all."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    images, targets = torch.full((4, 6, 1, 2, 2), rank / 10), torch.zeros(4, 6, dtype=int)
    images[2, 0] = float("nan") if rank == 1 else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "precision", lambda device: torch.float16)
        scaler = hardware.LossScaler(net)
        steps = []
        training_utils.train(
            net,
            list(zip(images, targets)),
            optimizer,
            step=training_utils.gradient_step(net, optimizer, scaler=scaler),
            after_step=lambda: steps.append(1),
        )
    assert scaler.skipped == 1 and len(steps) == 3 and net[1].weight.isfinite().all()


def history_of(folder):
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in rows]


def main(scenario, folder):
    hardware.precision = lambda device: torch.float32
    device, rank, processes = join_processes()

    def train(name, **options):
        train_in(folder / name, device, rank, processes, **options)

    def wait_for_epochs(count):
        while not (folder / "broken/history.csv").exists() or len(history_of(folder / "broken")) < count:
            time.sleep(0.01)

    def fail(epoch):
        if (rank, epoch) == (1, 2):
            wait_for_epochs(1)
            raise RuntimeError("the second worker has failed")

    def kill_itself(epoch):
        if (rank, epoch) == (2, 3):
            wait_for_epochs(2)
            os.kill(os.getpid(), signal.SIGKILL)

    if scenario == "train":
        message = "expected one run on all processes, found several by 'data'"
        with pytest.raises(ValueError, match=message):
            train("refused", data=rank)
        check_unequal_shares(rank)
        check_overflow_on_one(rank)
        train("plain", norm=False)
        train("whole")
    elif scenario == "fail":
        train("broken", before_epoch=fail)
    else:
        train("broken", before_epoch=kill_itself)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))


# ---------------------------------------------------------------- the tests


def launch(scenario, folder):
    """Run the script above to its end; returns its exit code, what it printed, and its errors."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    environment = {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    command = [sys.executable, *launcher, __file__, scenario, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(folder) in command for command in commands), "no worker is left"
    return done.returncode, done.stdout, done.stderr


def test_processes_train_as_one_and_a_broken_run_is_resumed(tmp_path, monkeypatch, capsys):
    code, printed, errors = launch("train", tmp_path)
    assert code == 0, errors[-3000:]
    assert "Warning" not in errors
    assert not (tmp_path / "refused/net.pt").exists()
    # Rank 0 alone prints, and of all images.
    assert printed.count("/57 (") == 1  # images 10, 2 x 10 and 3 x 9
    assert printed.count("Test set: ") - 1 == printed.count("/500 (") == 2 * EPOCHS

    # One process has the same curve. Batch norm sees smaller batches in several, so it may differ a little.
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    for name, norm, tolerance in (("plain", False, 1e-4), ("whole", True, 0.1)):
        train_in(tmp_path / "one" / name, norm=norm)
        histories = history_of(tmp_path / "one" / name), history_of(tmp_path / name)
        for one, several in zip(*histories, strict=True):
            assert several["train_loss"] == pytest.approx(one["train_loss"], abs=tolerance)
            assert several["test_loss"] == pytest.approx(one["test_loss"], abs=tolerance)
            if not norm:
                one_image = 100 / 500 + 1e-9
                assert several["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=one_image)

    # A worker that fails ends the run.
    code, _, errors = launch("fail", tmp_path)
    assert code != 0
    assert "Traceback" in errors and "RuntimeError: the second worker has failed" in errors
    assert len(history_of(tmp_path / "broken")) == 1

    # The same number of processes continues to the last bit, with dropout's masks and the running averages.
    # A worker that is killed ends the run, too.
    code, printed, errors = launch("resume", tmp_path)
    assert code != 0
    assert re.search(rf"exitcode\s*: -{signal.SIGKILL.value}\b", errors), errors[-3000:]
    assert "holds 1 of 3 epochs of this run" in printed
    assert history_of(tmp_path / "broken") == history_of(tmp_path / "whole")[:2]

    # Another number continues, too.
    capsys.readouterr()
    train_in(tmp_path / "broken")
    assert "holds 2 of 3 epochs of this run" in capsys.readouterr().out
    assert len(history_of(tmp_path / "broken")) == EPOCHS


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "processes, size, count, left_out", [(2, 64, 200, 0), (3, 48, 200, 2), (2, 64, 67, 3)]
)
def test_shares_are_one_process_s_batches_without_overlap(shuffle, processes, size, count, left_out):
    pixels = AlbumentationsCIFAR10(ASSETS, True).data[:count]
    indices = list(range(count))
    images = AlbumentationsImages(pixels, indices, indices, train_transform())  # the target is the index
    loaders = [BatchLoader(images, size, shuffle, "cpu", rank, processes) for rank in range(processes)]
    whole = BatchLoader(images, size, shuffle)
    for loader in (whole, *loaders):
        loader.set_epoch(3)
    pictures = {int(target): image for batch, targets in whole for image, target in zip(batch, targets)}
    visited = []
    for (_, expected), *shares in zip(whole, *loaders):
        together = torch.cat([targets for _, targets in shares]).tolist()
        assert set(together) <= set(expected.tolist())
        visited += together
        for batch, targets in shares:
            assert all(torch.equal(image, pictures[int(target)]) for image, target in zip(batch, targets))
        if shuffle:
            (length,) = {len(targets) for _, targets in shares}
            assert length > 1, "batch norm cannot train on a single image"
    assert len(set(visited)) == len(visited) == count - (left_out if shuffle else 0)
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]


@pytest.mark.parametrize("processes, size, count", [(3, 100, 200), (2, 1, 5), (4, 1000, 7)])
def test_shares_for_a_test_hold_every_image_once_whatever_the_batch_size(processes, size, count):
    pixels = AlbumentationsCIFAR10(ASSETS, True).data[:count]
    images = AlbumentationsImages(pixels, range(count), range(count), train_transform())
    loaders = [BatchLoader(images, size, False, "cpu", rank, processes) for rank in range(processes)]
    visited = [torch.cat([targets for _, targets in loader]).tolist() for loader in loaders]
    assert sorted(sum(visited, [])) == list(range(count))
    assert max(map(len, visited)) - min(map(len, visited)) <= 1


def test_a_batch_that_cannot_be_shared_is_refused():
    images = AlbumentationsCIFAR10(ASSETS, True, train_transform())
    message = "expected batch_size >= 1, a multiple of the 3 processes, found "
    for size in (64, 0):
        with pytest.raises(ValueError, match=f"{message}{size}:"):
            BatchLoader(images, size, True, processes=3)
    with pytest.raises(ValueError, match="expected a rank below the number of processes, 1, found 2:"):
        BatchLoader(images, 64, True, rank=2, processes=1)


# ---------------------------------------------------------------- processes.py without processes


def test_without_torchrun_there_is_one_process():
    assert join_processes() == (best_device(), 0, 1)


@pytest.mark.parametrize(
    "kind, backend, expected", [("mps", "gloo", "cpu"), ("xpu", "xccl", "xpu:1"), ("cuda", "nccl", "cuda:1")]
)
def test_each_process_takes_its_own_accelerator(kind, backend, expected, monkeypatch):
    """A Mac's GPU works for one process only."""
    called = []
    monkeypatch.setattr(processes, "best_device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", called.append)
    monkeypatch.setattr(processes.atexit, "register", lambda function: None)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", called.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert join_processes() == (torch.device(expected), 0, 2)
    assert called == ([backend] if expected == "cpu" else [1, backend])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="expected a GPU for each process, found 1: lower --nproc"):
        join_processes()


def test_synchronized_batch_norms_share_the_model_s_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network = synchronize_batch_norm(model)
    assert type(network[1]) is nn.SyncBatchNorm
    assert type(model[1]) is nn.BatchNorm2d
    shared = network.state_dict()
    assert all(shared[key].data_ptr() == tensor.data_ptr() for key, tensor in model.state_dict().items())

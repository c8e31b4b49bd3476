"""The number of cores that a process may use: those of its affinity, or fewer in a limited container."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import training_utils
from conftest import REPOSITORY
from hardware import usable_cores


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "900000 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_a_container_s_limit_is_rounded_up_to_whole_cores(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == expected


@pytest.mark.parametrize("count, expected", [(6, 6), (None, 1)])
def test_systems_without_affinity_count_the_cores(count, expected, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert usable_cores(tmp_path) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_is_bound_to_one_core_has_one():
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    command = [sys.executable, "-c", f"{bind}; import hardware; print(hardware.usable_cores())"]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.strip() == b"1"


def test_training_takes_no_more_threads_than_there_are_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for cores, threads in ((3, 2), (1, 1)):
            monkeypatch.setattr(training_utils, "usable_cores", lambda: cores)
            training_utils.prepare(nn.Linear(1, 1))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)

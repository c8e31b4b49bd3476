"""Getting CIFAR-10 from real servers on loopback that fail in all the ways that servers do. The servers are soak.py's."""

import hashlib
import re
import resource
import shutil
import tarfile
import threading
import time

import pytest

import soak


@pytest.fixture
def world(tmp_path):
    """What to believe the data set is, a server's address, how many bytes it sent by path, and a function to download."""
    (tmp_path / "served").mkdir()
    with soak.fault_server(tmp_path / "served") as (facts, address, sent):

        def get(*faults, root=tmp_path / "root", function=soak.download_it):
            sources = [f"{address}/{fault}" for fault in faults]
            get.process = process = soak.start(function, facts, sources, root, tmp_path / "log")
            process.join(30)
            return process.exitcode == 0 and soak.complete(root, facts), (tmp_path / "log").read_text()

        yield facts, sent, get


REASONS = {
    "404": "HTTP Error 404",
    "500": "HTTP Error 500",
    "stall": "timed out",
    "trickle": "kB/s for 0 s, too slow",
    "truncated": r"broke off after 1\.0 of 3\.0 MB",
    "wrong": "found other bytes",
    "redirect": r"expected \d+ bytes, from 0, found 36 of text/html",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_faulty_source_is_left_for_the_next_in_one_line(fault, world):
    facts, sent, get = world
    arrived, log = get(fault, "whole")
    assert arrived and len(log.splitlines()) == 1
    assert re.match(rf"CIFAR-10 not from http://127\.0\.0\.1:\d+/{fault} \(.*{REASONS[fault]}", log), log
    kept = sent[fault] if fault in ("stall", "trickle", "truncated") else 0
    assert sent["whole"] <= facts["size"] - kept + 100, "what has arrived is not fetched again"


def test_each_source_and_each_start_goes_on_where_the_last_one_stopped(world, tmp_path):
    facts, sent, get = world
    arrived, log = get("truncated", "stall", "truncated", "404")
    assert not arrived and not (tmp_path / "root/cifar-10-batches-py").exists()
    assert [float(found) for found in re.findall(r"broke off after ([\d.]+)", log)] == [1.0, 2.1]
    arrived, _ = get("whole")
    assert arrived and sum(sent.values()) == facts["size"]


def test_a_source_without_ranges_sends_all_of_it_again(world):
    facts, sent, get = world
    assert get("truncated", "noranges")[0] and sent["noranges"] == facts["size"]


def test_wrong_bytes_from_an_earlier_day_are_fetched_again(world, tmp_path):
    facts, sent, get = world
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cifar-10-python.tar.gz.partial").write_bytes(b"\0" * 1_000_000)
    arrived, log = get("whole")
    assert arrived and log == "" and sent["whole"] == 2 * facts["size"] - 1_000_000
    shutil.rmtree(tmp_path / "root/cifar-10-batches-py")
    (tmp_path / "root/cifar-10-python.tar.gz.partial").write_bytes(b"\0" * facts["size"])
    assert get("whole")[0]


def test_the_last_source_may_be_slow(world):
    _, _, get = world
    assert "broke off" in get("trickle")[1]  # but not left before that


def test_an_archive_put_there_by_hand_is_used_and_kept(world, tmp_path):
    _, _, get = world
    (tmp_path / "root").mkdir()
    shutil.copy(tmp_path / "served/cifar-10-python.tar.gz", tmp_path / "root")
    assert get("404")[1] == ""
    assert {path.name for path in (tmp_path / "root").iterdir()} == {
        ".cifar-10.lock", "cifar-10-batches-py", "cifar-10-python.tar.gz",
    }  # fmt: skip


def test_a_killed_download_never_looks_complete_and_is_continued(world, tmp_path):
    facts, sent, get = world
    root = tmp_path / "root"
    killer = threading.Thread(target=get, args=("slow",))
    killer.start()
    while sent["slow"] < 1_500_000:
        time.sleep(0.01)
    get.process.kill()
    killer.join()
    assert not (root / "cifar-10-batches-py").exists()
    (root / ".cifar-10-left").mkdir()  # as a kill while unpacking leaves
    assert get("whole")[0]
    assert sent["whole"] < facts["size"] - 1_000_000, "but for what was on its way when it died"


def test_two_at_once_download_once(world, tmp_path):
    facts, sent, get = world
    second = threading.Thread(target=get, args=("slow",))
    second.start()
    assert get("slow")[0]
    second.join()
    assert sent["slow"] == facts["size"]
    assert (tmp_path / "log").read_text() == f"Another process is downloading CIFAR-10 into {tmp_path / 'root'}: waiting for it\n"


def on_a_small_disk(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    soak.download_it(*arguments)


def test_a_full_disk_is_one_line_and_what_arrived_stays(world):
    facts, sent, get = world
    arrived, log = get("whole", "404", function=on_a_small_disk)
    assert not arrived and re.fullmatch(r"CIFAR-10 cannot be put into \S+: .*File too large\n", log)
    sent.clear()
    assert get("whole")[0] and sent["whole"] == facts["size"] - 1_000_000


def test_members_that_would_land_elsewhere_are_refused(world, tmp_path):
    facts, _, get = world
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "served/cifar-10-batches-py", "cifar-10-batches-py")
        tar.add(__file__, "../escaped")
    archive = (tmp_path / "evil.tar.gz").read_bytes()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cifar-10-python.tar.gz").write_bytes(archive)
    facts |= {"tgz_md5": hashlib.md5(archive).hexdigest()}
    arrived, log = get("404")
    assert not arrived and "outside the destination" in log
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path / "root/cifar-10-batches-py").exists()

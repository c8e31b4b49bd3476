"""Downloads of a small CIFAR-10 from servers on loopback that fail as servers do. soak.py has the servers."""

import hashlib
import re
import shutil
import tarfile
import time

import pytest

import cifar10
import soak

ARCHIVE = "cifar-10-python.tar.gz"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small data set's folder and facts."""
    folder = tmp_path_factory.mktemp("served")
    return folder, soak.small_archive(folder)


@pytest.fixture
def server(served):
    """An address, and the bytes sent by path. One for all tests may still send to a killed client."""
    with soak.faulty_server(served[0] / ARCHIVE) as server:
        yield server


@pytest.fixture
def world(served, server, tmp_path, monkeypatch, capsys):
    """The data set's facts, the bytes that were sent in this test, and two functions that download."""
    facts, (address, sent) = dict(served[1]), server
    # `soak.download` changes these. After the test they come back.
    for name in ("tgz_md5", "train_list", "test_list", "meta"):
        monkeypatch.setattr(cifar10.CIFAR10, name, getattr(cifar10.CIFAR10, name))
    for name in ("SOURCES", "ARCHIVE_SIZE", "STALL_SECONDS"):
        monkeypatch.setattr(cifar10, name, getattr(cifar10, name))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    root = tmp_path / "root"
    root.mkdir()

    def sources(faults):
        return [f"{address}/{fault}" for fault in faults]

    def get(*faults):
        """Downloads here. Returns whether the data set is complete, and what was printed."""
        try:
            soak.download(facts, sources(faults), root)
        except FileNotFoundError:
            return False, capsys.readouterr().out
        return soak.is_complete(root, facts), capsys.readouterr().out

    def start(*faults):
        """Downloads in another process."""
        return soak.start(soak.download, facts, sources(faults), root)

    return facts, sent, get, start


REASONS = {
    "404": "HTTP Error 404",
    "500": "HTTP Error 500",
    "stall": "timed out",
    "trickle": r"kB/s for \d s, too slow",
    "truncated": r"broke off after 1\.0 of 3\.0 MB",
    "wrong": "found other bytes",
    "redirect": r"expected \d+ bytes, from 0, found 36 of text/html",
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_faulty_source_is_left_for_the_next_in_one_line(fault, world):
    facts, sent, get, _ = world
    complete, log = get(fault, "whole")
    parts = [part for part in re.split(r"[\r\n]", log) if part.strip()]
    lines = [part for part in parts if "B/s]" not in part]  # what is not the progress bar
    assert complete and len(lines) == 1
    pattern = rf"CIFAR-10 not from http://127\.0\.0\.1:\d+/{fault} \(.*{REASONS[fault]}"
    assert re.match(pattern, lines[0]), lines
    reused = sent[fault] if fault in ("stall", "trickle", "truncated") else 0
    assert sent["whole"] <= facts["size"] - reused + 100, "bytes that arrived are not fetched again"


def test_each_source_and_each_call_resumes_where_the_last_one_stopped(world, tmp_path):
    facts, sent, get, _ = world
    complete, log = get("truncated", "stall", "truncated", "404")
    assert not complete and not (tmp_path / "root/cifar-10-batches-py").exists()
    assert re.findall(r"broke off after ([\d.]+)", log) == ["1.0", "2.1"]
    complete, _ = get("whole")
    assert complete and sent["truncated"] + sent["stall"] + sent["whole"] == facts["size"]


def test_a_source_without_ranges_sends_all_of_it_again(world):
    facts, sent, get, _ = world
    assert get("truncated", "noranges")[0] and sent["noranges"] == facts["size"]


def test_wrong_bytes_from_an_earlier_day_are_fetched_again(world, tmp_path):
    facts, sent, get, _ = world
    partial = tmp_path / f"root/{ARCHIVE}.partial"
    partial.write_bytes(b"\0" * 1_000_000)
    complete, log = get("whole")
    assert complete and log == "" and sent["whole"] == 2 * facts["size"] - 1_000_000
    shutil.rmtree(tmp_path / "root/cifar-10-batches-py")
    partial.write_bytes(b"\0" * facts["size"])
    assert get("whole")[0]


def test_the_last_source_may_be_slow(world):
    _, _, get, _ = world
    assert "broke off" in get("trickle")[1]  # and not "too slow" before that


def test_an_archive_in_the_folder_is_used_and_stays(served, world, tmp_path):
    _, _, get, _ = world
    shutil.copy(served[0] / ARCHIVE, tmp_path / "root")
    assert get("404")[1] == ""
    names = {path.name for path in (tmp_path / "root").iterdir()}
    assert names - {".cifar-10.lock"} == {"cifar-10-batches-py", ARCHIVE}


def test_another_archive_in_the_folder_stays_and_the_right_one_is_downloaded(world, tmp_path):
    _, _, get, _ = world
    (tmp_path / "root" / ARCHIVE).write_bytes(b"another")
    _, log = get("whole")
    assert re.fullmatch(r"Expected \S+ with MD5 \w+, found another: downloading beside it\n", log)
    assert (tmp_path / "root" / ARCHIVE).read_bytes() == b"another"
    assert (tmp_path / "root/cifar-10-batches-py/test_batch").exists()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_download_never_looks_complete_and_resumes(world, tmp_path):
    facts, sent, get, start = world
    process = start("slow")
    wait_for(lambda: sent["slow"] >= 1_500_000)
    process.kill()
    process.join()
    root = tmp_path / "root"
    assert not (root / "cifar-10-batches-py").exists()
    (root / ".cifar-10-left").mkdir()  # as a process leaves it that is killed while unpacking
    assert get("whole")[0]
    assert sent["whole"] < facts["size"] - 1_000_000, "only the bytes on their way are fetched again"


def test_two_processes_at_once_download_once(world, tmp_path):
    facts, sent, get, start = world
    process = start("slow")
    wait_for(lambda: sent["slow"])
    complete, log = get("slow")
    process.join()
    assert complete and process.exitcode == 0 and sent["slow"] == facts["size"]
    assert log == f"Another process is downloading CIFAR-10 into {tmp_path / 'root'}: waiting for it\n"


def test_a_full_disk_is_one_line_and_the_bytes_on_it_stay(world):
    facts, sent, get, _ = world
    resource = pytest.importorskip("resource", reason="this system has no limit for the size of a file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        complete, log = get("first", "404")  # the server may be sending still when this ends
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not complete and re.fullmatch(r"CIFAR-10 cannot be put into \S+: .*File too large\n", log)
    assert get("whole")[0]
    # A chunk that did not fit as a whole may be fetched again.
    assert facts["size"] - 1_000_000 <= sent["whole"] <= facts["size"] - 1_000_000 + 2**16


def test_members_that_would_land_elsewhere_are_refused(served, world, tmp_path):
    facts, _, get, _ = world
    archive = tmp_path / "root" / ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(served[0] / "cifar-10-batches-py", "cifar-10-batches-py")
        tar.add(__file__, "../escaped")
    facts["tgz_md5"] = hashlib.md5(archive.read_bytes()).hexdigest()
    complete, log = get("404")
    assert not complete and "outside the destination" in log
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path / "root/cifar-10-batches-py").exists()

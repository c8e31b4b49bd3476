"""Files are written whole or not at all, also behind links; pipes and devices are written into."""

import os
import stat

import pytest

from checkpoint import Run, load_checkpoint, previous, save_checkpoint, set_aside, write_csv, write_file
from conftest import needs_links, needs_proc, not_on_windows


@pytest.fixture
def disk(tmp_path):
    """A folder of other files than those that link to them."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@needs_links
def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path, disk):
    (tmp_path / "link.csv").symlink_to("other.csv")
    (tmp_path / "other.csv").symlink_to(disk / "history.csv")  # of which there is none yet
    for epoch in (1, 2):
        write_csv([{"epoch": epoch}], tmp_path / "link.csv")
        assert (disk / "history.csv").read_text().split() == ["epoch", str(epoch)]
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "other.csv").is_symlink()
    assert [path.name for path in disk.iterdir()] == ["history.csv"]


@pytest.fixture
def pipe(tmp_path):
    """A pipe, and its end to read from."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes with a name")
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    yield tmp_path / "pipe", end
    os.close(end)


@not_on_windows
@pytest.mark.parametrize("mode", [0o664, 0o600, 0o444])
def test_a_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "history.csv"
    path.touch()
    path.chmod(mode)
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_pipe_is_written_into(tmp_path, pipe):
    path, end = pipe
    write_file(path, b"new", backup=tmp_path / "old")
    assert os.read(end, 100) == b"new" and path.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_pipe_is_no_checkpoint_or_history_to_read_or_to_set_aside(pipe):
    path, end = pipe
    assert Run({}, {}, [], path, None, "").find(resume=True) is None
    assert Run({}, {}, [], path, None, "").find(resume=False) is None
    run = Run({}, {}, [], None, path, "")
    assert run.find(resume=False) is None and path.is_fifo()
    run.complete_history([{"epoch": 1}])
    assert os.read(end, 100) == b"epoch\r\n1\r\n"


@needs_proc
def test_standard_output_keeps_what_was_printed_before(capfd):
    print("before", flush=True)  # into a regular file, here
    write_file("/proc/self/fd/1", b"table\n")  # what /dev/stdout links to, and nothing can replace
    write_file("/proc/self/fd/2", b"errors\n")
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("before\ntable\nafter\n", "errors\n")


STATE = dict.fromkeys(("recipe", "model", "average", "optimizer", "random", "history"), "")


@needs_links
def test_a_checkpoint_behind_a_link_has_the_one_before_it_beside_itself(tmp_path, disk):
    link = tmp_path / "net.pt"
    link.symlink_to(disk / "net.pt")
    for epoch in (1, 2):
        save_checkpoint(STATE | {"history": epoch}, link)
    assert previous(link) == disk / "net.previous.pt" and link.is_symlink()
    assert load_checkpoint(link)["history"] == 2
    aside = set_aside(link)
    assert link.is_symlink() and aside.parent == disk
    assert load_checkpoint(link)["history"] == 1

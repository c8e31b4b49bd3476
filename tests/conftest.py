"""What the tests share. Those that need the full CIFAR-10, or another system, are skipped without it."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def can_link() -> bool:
    """Whether symbolic links can be made. On Windows they need a right, or the developer mode."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            (Path(folder) / "link").symlink_to("nowhere")
        except OSError:
            return False
    return True


needs_links = pytest.mark.skipif(not can_link(), reason="symbolic links cannot be made here")
not_on_windows = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C as in a terminal: a shell that starts the tests in its background makes them ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, for "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows asks this one
    return tmp_path


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """A folder with the full CIFAR-10: CIFAR10_ROOT, the repository's data, or ../shared/data beside it."""
    for root in (os.environ.get("CIFAR10_ROOT"), REPOSITORY / "data", REPOSITORY / "../shared/data"):
        if root and (Path(root) / "cifar-10-batches-py").exists():
            return Path(root)
    pytest.skip("the full CIFAR-10 is neither at CIFAR10_ROOT nor in data or ../shared/data")

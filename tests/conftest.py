"""What the tests share. Without the full CIFAR-10 those that need it are skipped, and the others pass."""

import os
import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C as in a terminal: a shell that starts the tests in its background makes them ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """A folder with the full CIFAR-10: CIFAR10_ROOT, the repository's data, or ../shared/data beside it."""
    for root in (os.environ.get("CIFAR10_ROOT"), REPOSITORY / "data", REPOSITORY / "../shared/data"):
        if root and (Path(root) / "cifar-10-batches-py").exists():
            return Path(root)
    pytest.skip("the full CIFAR-10 is neither at CIFAR10_ROOT nor in data or ../shared/data")

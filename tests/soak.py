"""Faults on purpose, for twenty minutes: `make soak`. `python tests/soak.py MINUTES` takes another time.

    kills      A training run is killed at random moments and started again each time. It must end with the
               weights and the history of a run that was never killed, bit for bit.
    downloads  Servers fail in many ways, a download is killed, and two run at once. The published bytes must
               arrive.
    files      PNG, JPEG, GIF and WebP files are mutated. Each must be predicted, or refused with ValueError,
               within a second.

The table says how often each fault was tried and survived. It is written to assets/soak.csv. A failure prints
the seed of its round, so that the round can be repeated.
"""

import contextlib
import csv
import hashlib
import http.server
import io
import multiprocessing
import os
import random
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

import cifar10
from batches import BatchLoader
from checkpoint import save_weights, write_csv
from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10, test_transform, train_transform
from model import Net
from training_utils import fit
from utils import predict, set_seed

TABLE = ROOT / "assets" / "soak.csv"
Result = tuple[str, int, int]  # a kind of fault, how often it was tried, how often it was survived

# A process that has imported the slow packages forks the processes to kill, so that each starts quickly.
# Windows, which cannot fork, starts each from nothing.
PROCESSES = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
PROCESSES.set_forkserver_preload(["albumentations", "safetensors.torch", "torchvision"])
tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which a killed process never gives back


def start(function: Callable, *arguments) -> multiprocessing.Process:
    """Start the function in a process of its own, on one thread and without its prints."""
    process = PROCESSES.Process(target=run_quietly, args=(function, *arguments), daemon=True)
    process.start()
    return process


def run_quietly(function: Callable, *arguments) -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        function(*arguments)


# ---------------------------------------------------------------- kills


def small_run(folder: Path, seed: int, epochs: int) -> None:
    """A training run on part of the sample, with everything in it that draws random numbers."""
    set_seed(seed)
    images = AlbumentationsCIFAR10(ASSETS, True, train_transform(), seed)
    tests = AlbumentationsCIFAR10(ASSETS, False, test_transform())
    images.data, images.targets = images.data[::32], images.targets[::32]
    tests.data, tests.targets = tests.data[::20], tests.targets[::20]
    train_loader = BatchLoader(images, 25, shuffle=True)
    test_loader = BatchLoader(tests, 25, shuffle=False)
    net = Net(dropout=0.1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(train_loader))
    files = {"checkpoint": folder / "net.pt", "history_file": folder / "history.csv"}
    options = {"epochs": epochs, "ema_decay": 0.9, "recipe": {"seed": seed}}
    fit(net, train_loader, test_loader, optimizer, scheduler, **options, **files)
    save_weights(net, folder / "net.safetensors", {})


def history_of(folder: Path) -> list[dict[str, str]]:
    """The rows of the run's history so far."""
    file = folder / "history.csv"
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.exists() else []


def result_of(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The history without its seconds, and the weights; no weights if the run did not end."""
    history = history_of(folder)
    for row in history:
        del row["seconds"]
    file = folder / "net.safetensors"
    return history, load_file(file) if file.exists() else {}


def round_of_kills(seed: int, epochs: int = 20, kills: int = 10) -> list[Result]:
    """One run is killed this many times, one never."""
    chance = random.Random(seed)
    done = 0
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        whole.mkdir()
        killed.mkdir()
        start(small_run, whole, seed, epochs).join()
        for epoch in sorted(chance.choices(range(epochs - 2), k=kills)):
            process = start(small_run, killed, seed, epochs)
            while process.is_alive() and len(history_of(killed)) < epoch:
                time.sleep(0.01)
            history = history_of(killed)
            seconds = float(history[-1]["seconds"]) if history else 0.3
            process.join(
                chance.uniform(0, seconds)
            )  # into the next epoch, or while the run is being restored
            done += process.is_alive()
            process.kill()
            process.join()
        start(small_run, killed, seed, epochs).join()
        expected_history, expected_weights = result_of(whole)
        history, weights = result_of(killed)
    same = (
        len(history) == epochs and history == expected_history and weights.keys() == expected_weights.keys()
    )
    same = same and all(torch.equal(weights[name], expected) for name, expected in expected_weights.items())
    if not same:
        print(f"kills, round {seed}: the result differs from that of the run that was never killed")
    return [("SIGKILL while training", done, done * same)]


# ---------------------------------------------------------------- downloads


def small_archive(folder: Path) -> dict:
    """Make a CIFAR-10 of 3 MB of noise, as an archive in the folder. Returns its checksums and size."""
    noise = np.random.default_rng(0)
    published = cifar10.CIFAR10
    batches = folder / published.base_folder
    batches.mkdir()
    sums = {}
    meta = published.meta["filename"]
    for name in (*dict(published.train_list), *dict(published.test_list), meta):
        content = noise.bytes(430_000)
        (batches / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    archive = folder / published.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)
    return {
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "train_list": [[name, sums[name]] for name, _ in published.train_list],
        "test_list": [[name, sums[name]] for name, _ in published.test_list],
        "meta": published.meta | {"md5": sums[meta]},
        "size": archive.stat().st_size,
        "sums": sums,
    }


def download(facts: dict, sources: list[str], root: Path) -> None:
    """Find the small archive, with little patience. It changes `cifar10`, so it needs its own process."""
    for name in ("tgz_md5", "train_list", "test_list", "meta"):
        setattr(cifar10.CIFAR10, name, facts[name])
    cifar10.ARCHIVE_SIZE = facts["size"]
    cifar10.SOURCES = tuple(sources)
    cifar10.STALL_SECONDS = 1.5  # a busy machine may take a second to answer
    os.environ["no_proxy"] = "127.0.0.1"
    cifar10.find_cifar10(root, "full")


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """Serves the archive in the way that the path names: /whole, or with a fault, such as /stall."""

    archive: bytes
    sent: Counter  # bytes by path

    def do_GET(self) -> None:
        fault = self.path.strip("/")
        if fault in ("404", "500"):
            self.send_error(int(fault))
        elif fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "/html")
            self.end_headers()
        elif fault == "html":
            self.serve(b"<html>Please try again later.</html>", 0, "text/html")
        elif fault == "wrong":
            self.serve(self.archive[:-9] + bytes(9), 0)
        elif fault == "noranges" or not self.headers["Range"]:
            self.serve(self.archive, 0)
        else:
            begin = self.headers["Range"].removeprefix("bytes=").removesuffix("-")
            self.serve(self.archive, int(begin))

    def serve(self, body: bytes, begin: int, kind: str = "application/gzip") -> None:
        fault = self.path.strip("/")
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        end = len(body)
        if fault in ("truncated", "stall", "trickle"):
            end = begin + (len(body) - begin) // 3
        with contextlib.suppress(ConnectionError):  # the client has left
            self.send(body[begin:end], 65_536, 0.02 if fault == "slow" else 0)
            if fault == "stall":
                time.sleep(4)
            if fault == "trickle":
                self.send(body[end : end + 40], 1, 0.1)

    def send(self, content: bytes, size: int, pause: float) -> None:
        for place in range(0, len(content), size):
            part = content[place : place + size]
            self.sent[self.path.strip("/")] += len(part)  # before the client can be done with it
            self.wfile.write(part)
            time.sleep(pause)

    def log_message(self, *args) -> None:
        pass


FAULTS = ("404", "500", "stall", "trickle", "truncated", "wrong", "redirect")


@contextlib.contextmanager
def faulty_server(archive: Path) -> Iterator[tuple[str, Counter]]:
    """The server's address, and how many bytes it sent by path."""
    handler = type("Handler", (FaultyServer,), {"archive": archive.read_bytes(), "sent": Counter()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.sent
    finally:
        server.shutdown()
        server.server_close()


def is_complete(root: Path, facts: dict) -> bool:
    """Whether root holds exactly the data set, and nothing unfinished beside it."""
    folder = root / cifar10.CIFAR10.base_folder
    for name, md5 in facts["sums"].items():
        if not (folder / name).exists() or hashlib.md5((folder / name).read_bytes()).hexdigest() != md5:
            return False
    return {path.name for path in root.iterdir()} <= {folder.name, ".cifar-10.lock"}


def round_of_downloads(seed: int) -> list[Result]:
    """Each fault before a source that works, some in a row, a download that is killed, and two at once."""
    chance = random.Random(seed)
    chains = {f"server: {fault}": [fault] for fault in FAULTS}
    chains["server: four faults in a row"] = chance.sample(FAULTS, 4)
    chains["server: no ranges, after a broken one"] = ["truncated", "noranges"]
    survived = {}
    with tempfile.TemporaryDirectory() as name:
        folder, served = Path(name), Path(name) / "served"
        served.mkdir()
        facts = small_archive(served)
        with faulty_server(served / cifar10.CIFAR10.filename) as (address, sent):
            for what, faults in chains.items():
                root = folder / str(len(survived))
                start(download, facts, [f"{address}/{fault}" for fault in [*faults, "whole"]], root).join()
                survived[what] = is_complete(root, facts)

            root = folder / "killed"
            process = start(download, facts, [f"{address}/slow"], root)
            time.sleep(chance.uniform(0.05, 0.6))
            process.kill()
            process.join()
            half = (root / cifar10.CIFAR10.base_folder).exists() and not is_complete(root, facts)
            start(download, facts, [f"{address}/slow"], root).join()
            survived["SIGKILL while downloading"] = not half and is_complete(root, facts)

            root = folder / "both"
            sent.clear()
            pair = [start(download, facts, [f"{address}/slow"], root) for _ in range(2)]
            for process in pair:
                process.join()
            survived["two downloads at once"] = is_complete(root, facts) and sent["slow"] == facts["size"]
    for what, success in survived.items():
        if not success:
            print(f"downloads, round {seed}: {what} was not survived")
    return [(what, 1, int(success)) for what, success in survived.items()]


# ---------------------------------------------------------------- files


def pictures() -> list[bytes]:
    """Small files of the kinds that people have: formats, modes, animations, EXIF."""
    sample = AlbumentationsCIFAR10(ASSETS, train=False).data
    files = []

    def add(image: Image.Image, kind: str, **options) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())

    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    for i, size in enumerate((32, 57, 160)):
        image = Image.fromarray(sample[37 * i]).resize((size, size + 9 * i))
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
            add(image.convert(mode), "PNG")
        add(image.convert("L").convert("I;16"), "PNG")
        add(image, "JPEG", exif=exif)
        add(image, "JPEG", progressive=True)
        add(image.convert("CMYK"), "JPEG")
        add(image.convert("L"), "JPEG", quality=40)
        frames = [image, image.rotate(90), image.rotate(180)]
        add(image, "GIF", save_all=True, append_images=frames, duration=50)
        add(image, "WEBP", quality=60)
        add(image.convert("RGBA"), "WEBP", lossless=True)
        add(image, "WEBP", save_all=True, append_images=frames)
    return files


def mutate(files: list[bytes], seed: int) -> bytes:
    """One of the files with one to four mutations."""
    chance = random.Random(seed)
    data = bytearray(chance.choice(files))
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(data)), chance.randint(1, 64)
        kind = chance.choice(("bytes", "bits", "header", "cut", "remove", "repeat", "noise", "splice"))
        if kind == "bytes":
            for _ in range(chance.randint(1, 8)):
                value = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
                data[chance.randrange(len(data))] = value
        elif kind == "bits":
            data[place] ^= 1 << chance.randrange(8)
        elif kind == "header":
            data[chance.randrange(min(64, len(data)))] = chance.randrange(256)
        elif kind == "cut":
            del data[max(1, place) :]
        elif kind == "remove" and len(data) > length + 1:
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length] * chance.randint(1, 9)
        elif kind == "noise":
            data[place : place + length] = chance.randbytes(length)
        elif kind == "splice":
            data[place:] = chance.choice(files)[place:] or b"\0"
    return bytes(data)


def resident_memory() -> float:
    """The memory of this process, in MB."""
    return psutil.Process().memory_info().rss / 1e6


def predict_mutated(first: int, count: int, results) -> None:
    """Predict `count` mutated files. Sends the outcomes, the seconds of the slowest, and the growth in MB."""
    net = Net.from_pretrained()
    files, outcomes, slowest = pictures(), Counter(), 0.0
    for data in files:  # the first of a kind takes memory, which is no leak
        predict(net, data, test_transform(), CLASSES)
    before = resident_memory()
    for seed in range(first, first + count):
        data = mutate(files, seed)
        began = time.monotonic()
        try:
            (answer,) = predict(net, data, test_transform(), CLASSES)
            outcomes["predicted"] += sum(share for _, share in answer) <= 1.001
        except ValueError:
            outcomes["refused"] += 1
        except BaseException as error:
            outcomes[f"{type(error).__name__} at seed {seed}"] += 1
        slowest = max(slowest, time.monotonic() - began)
    results.send((outcomes, slowest, resident_memory() - before))


def round_of_files(seed: int, count: int = 2_000) -> list[Result]:
    """One process predicts `count` mutated files. It must not crash, hang or grow."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = start(predict_mutated, seed * count, count, sender)
    sender.close()
    outcomes, slowest, growth = Counter(), float("inf"), 0.0  # of a process that crashes or hangs
    with contextlib.suppress(EOFError):
        if receiver.poll(count):
            outcomes, slowest, growth = receiver.recv()
    process.kill()
    process.join()
    right = outcomes["predicted"] + outcomes["refused"]
    healthy = slowest <= 1 and growth <= 50
    if right < count or not healthy:
        numbers = f"slowest {slowest:.2f} s, {growth:.0f} MB more"
        print(f"files, seeds from {seed * count}: {dict(outcomes)}, {numbers}")
    return [
        ("mutated files: predicted, or ValueError", count, right),
        ("2,000 of them: none over a second, memory flat to 50 MB", 1, int(healthy)),
    ]


# ---------------------------------------------------------------- all of it


PARTS = {"kills": round_of_kills, "downloads": round_of_downloads, "files": round_of_files}


def soak(minutes: float) -> list[dict]:
    """Rounds of all parts, at least one, until the next would take too long. Returns a row for each fault."""
    rows = {}
    began, seed, longest = time.monotonic(), 0, 0.0
    while seed == 0 or time.monotonic() - began + longest < 60 * minutes:
        round_began = time.monotonic()
        for part, play in PARTS.items():
            passed = (time.monotonic() - began) / 60
            print(f"\rminute {passed:.0f} of {minutes:g}, round {seed}: {part:<12}", end="", flush=True)
            for what, tried, survived in play(seed):
                row = rows.setdefault(what, {"part": part, "what": what, "tried": 0, "survived": 0})
                row["tried"] += tried
                row["survived"] += survived
        longest = max(longest, time.monotonic() - round_began)
        seed += 1
    print()
    return list(rows.values())


def main(minutes: float) -> None:
    """Soak, print the table and write it. Exits with 1 if a fault was not survived."""
    rows = soak(minutes)
    for row in rows:
        print(f"{row['part']:<11}{row['what']:<58}{row['survived']:>7,} of {row['tried']:,}")
    write_csv(rows, TABLE)
    sys.exit(any(row["survived"] < row["tried"] for row in rows))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 20)

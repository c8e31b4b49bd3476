"""What can go wrong with a run, on purpose, for a while: `make soak` (20 minutes), `python soak.py MINUTES`.

    kills      a training run in a process of its own, killed with SIGKILL at ten random moments, started again each
               time, beside one that never was: the same weights, bit for bit, and the same history
    downloads  a data set behind servers that fail in all the ways that servers do, and a last one that works;
               downloads killed half-way; two at once: the published bytes, or none
    files      PNG, JPEG, GIF and WebP files, mutated: each is predicted, or refused with ValueError, within a second

It prints what was tried and what survived and writes assets/soak.csv; `make test` runs two minutes of it. Each round
has its own seed, so a failure can be had again: its line names it.
"""

import contextlib
import csv
import hashlib
import http.server
import io
import multiprocessing
import os
import random
import resource
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

import cifar10
from batches import BatchLoader
from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10, test_transform, train_transform
from model import Net
from checkpoint import save_weights, write_csv
from training_utils import fit
from utils import predict, set_seed

TABLE = Path("assets/soak.csv")
FIELDS = ("part", "what", "tried", "survived")
# Processes forked from one that has done the imports: real ones, that can be killed, in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["soak"])
tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore that a killed process leaves to the system


def start(function: Callable, *args) -> multiprocessing.Process:
    """The function in a process of its own."""
    process = PROCESSES.Process(target=quietly, args=(function, *args), daemon=True)
    process.start()
    return process


def quietly(function: Callable, *args) -> None:
    """Call it on one thread, without its prints."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        function(*args)


# ---------------------------------------------------------------- kills


EPOCHS = 20


def small_run(folder: Path, seed: int) -> None:
    """A whole training run on a part of the sample, with everything in it that draws at random."""
    set_seed(seed)
    images = AlbumentationsCIFAR10(ASSETS, True, train_transform(), seed)
    tests = AlbumentationsCIFAR10(ASSETS, False, test_transform())
    images.data, images.targets = images.data[::16], images.targets[::16]
    tests.data, tests.targets = tests.data[::10], tests.targets[::10]
    net = Net(dropout=0.1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    loaders = BatchLoader(images, 50, shuffle=True), BatchLoader(tests, 50, shuffle=False)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * len(loaders[0]))
    files = {"checkpoint": folder / "net.pt", "history_file": folder / "history.csv"}
    fit(net, *loaders, optimizer, scheduler, epochs=EPOCHS, ema_decay=0.9, recipe={"seed": seed}, **files)
    save_weights(net, folder / "net.safetensors", {})


def result_of(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The weights that a run ended with, and its history but for the seconds; nothing where it did not end."""
    if not (folder / "net.safetensors").exists():
        return {}, []
    with open(folder / "history.csv") as file:
        history = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return load_file(folder / "net.safetensors"), history


def round_of_kills(seed: int, kills: int = 10) -> Counter:
    """One run killed `kills` times, one never: how many kills there were, and how many the result survived."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        whole.mkdir()
        killed.mkdir()
        began = time.monotonic()
        start(small_run, whole, seed).join()
        seconds = time.monotonic() - began
        done = 0
        while done < kills:
            process = start(small_run, killed, seed)
            process.join(moments.uniform(0, seconds / kills))
            if not process.is_alive():  # this time it was faster, and is over
                break
            process.kill()
            process.join()
            done += 1
        start(small_run, killed, seed).join()
        (weights, history), (expected, expected_history) = result_of(killed), result_of(whole)
    same = weights.keys() == expected.keys() and all(torch.equal(expected[key], weights[key]) for key in expected)
    same = same and history == expected_history and len(history) == EPOCHS
    if not same:
        print(f"kills, round {seed}: the result differs from that of a run that was never killed")
    return Counter({("SIGKILL while training", "tried"): done, ("SIGKILL while training", "survived"): done * same})


# ---------------------------------------------------------------- downloads


def small_archive(folder: Path) -> dict:
    """A CIFAR-10 of 3 MB, noise, as an archive in the folder, and what `dataset` has to believe for it to be the one."""
    noise = np.random.default_rng(0)
    batches = folder / cifar10.CIFAR10.base_folder
    batches.mkdir()
    names = [*cifar10.CIFAR10.train_list, *cifar10.CIFAR10.test_list, [cifar10.CIFAR10.meta["filename"]]]
    for name, *_ in names:
        (batches / name).write_bytes(noise.bytes(430_000))
    archive = folder / cifar10.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)
    sums = {name: hashlib.md5((batches / name).read_bytes()).hexdigest() for name, *_ in names}
    return {
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "train_list": [[name, sums[name]] for name, _ in cifar10.CIFAR10.train_list],
        "test_list": [[name, sums[name]] for name, _ in cifar10.CIFAR10.test_list],
        "meta": cifar10.CIFAR10.meta | {"md5": sums[cifar10.CIFAR10.meta["filename"]]},
        "size": archive.stat().st_size,
    }


def believe(facts: dict, sources: list[str], patience: float = 0.3) -> None:
    """Have `dataset` look for that archive, there, with that patience: in a process of its own, for it stays so."""
    for name in ("tgz_md5", "train_list", "test_list", "meta"):
        setattr(cifar10.CIFAR10, name, facts[name])
    cifar10.ARCHIVE_SIZE, cifar10.SOURCES, cifar10.PATIENCE = facts["size"], tuple(sources), patience
    os.environ["no_proxy"] = "127.0.0.1"


def download_it(facts: dict, sources: list[str], root: Path, log: Path) -> None:
    """`find_cifar10` in the small world; what it printed goes to the log."""
    believe(facts, sources)
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        cifar10.find_cifar10(root, "full")


class Faults(http.server.BaseHTTPRequestHandler):
    """Serves the archive in the way that the path names: /whole, or with a fault, /stall, say."""

    archive: bytes
    sent: Counter  # bytes by path

    def do_GET(self) -> None:
        fault = self.path.strip("/")
        body, begin = self.archive, 0
        if fault in ("404", "500"):
            return self.send_error(int(fault))
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "/html")
            return self.end_headers()
        if fault == "html":
            body = b"<html>Please try again later.</html>"
        elif fault == "wrong":
            body = body[:-9] + b"\0" * 9
        elif self.headers["Range"] and fault != "noranges":
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/gzip")
        self.send_header("Content-Length", str(len(body) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        end = begin + (len(body) - begin) // 3 if fault in ("truncated", "stall", "trickle") else len(body)
        with contextlib.suppress(ConnectionError):
            for place in range(begin, end, 65_536):
                self.send(body[place : min(end, place + 65_536)])
                if fault == "slow":
                    time.sleep(0.02)
            if fault == "stall":
                time.sleep(1.5)
            for place in range(end, end + 40 * (fault == "trickle")):
                self.send(body[place : place + 1])
                time.sleep(0.05)

    def send(self, part: bytes) -> None:
        self.wfile.write(part)
        self.sent[self.path.strip("/")] += len(part)

    def log_message(self, *args) -> None:
        pass


FAULTS = ("404", "500", "stall", "trickle", "truncated", "wrong", "redirect")


@contextlib.contextmanager
def fault_server(folder: Path) -> Iterator[tuple[dict, str, Counter]]:
    """What to believe, the server's address, and a count of the bytes it sent by path."""
    facts = small_archive(folder)
    handler = type("Handler", (Faults,), {"archive": (folder / cifar10.CIFAR10.filename).read_bytes(), "sent": Counter()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield facts, f"http://127.0.0.1:{server.server_port}", handler.sent
    finally:
        server.shutdown()
        server.server_close()


def complete(root: Path, facts: dict) -> bool:
    """Whether root holds exactly the data set, and nothing half-done beside it."""
    files = [*facts["train_list"], *facts["test_list"], [facts["meta"]["filename"], facts["meta"]["md5"]]]
    there = root / cifar10.CIFAR10.base_folder
    if not all((there / name).exists() for name, _ in files):
        return False
    right = all(hashlib.md5((there / name).read_bytes()).hexdigest() == md5 for name, md5 in files)
    return right and {path.name for path in root.iterdir()} <= {there.name, ".cifar-10.lock"}


def round_of_downloads(seed: int) -> Counter:
    """Each fault before a source that works, some in a row, a download that is killed, two at once."""
    draw, found = random.Random(seed), Counter()

    def note(what: str, survived: bool) -> None:
        found[what, "tried"] += 1
        found[what, "survived"] += survived
        if not survived:
            print(f"downloads, round {seed}: {what} was not survived")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "served").mkdir()
        with fault_server(folder / "served") as (facts, address, sent):
            chains = [[fault] for fault in FAULTS] + [draw.sample(FAULTS, 4), ["truncated", "noranges"]]
            for i, chain in enumerate(chains):
                root = folder / f"root{i}"
                start(download_it, facts, [f"{address}/{fault}" for fault in [*chain, "whole"]], root, folder / "log").join()
                name = {1: chain[0], 2: "no ranges, after a broken one", 4: "four faults in a row"}[len(chain)]
                note(f"server: {name}", complete(root, facts))

            root = folder / "killed"
            arguments = download_it, facts, [f"{address}/slow"], root, folder / "log"
            process = start(*arguments)
            time.sleep(draw.uniform(0.05, 0.6))
            process.kill()
            process.join()
            never_half = not (root / cifar10.CIFAR10.base_folder).exists() or complete(root, facts)
            start(*arguments).join()
            note("SIGKILL while downloading", never_half and complete(root, facts))

            sent.clear()
            pair = [start(download_it, facts, [f"{address}/slow"], folder / "both", folder / "log") for _ in range(2)]
            for process in pair:
                process.join()
            note("two downloads at once", complete(folder / "both", facts) and sent["slow"] == facts["size"])
    return found


# ---------------------------------------------------------------- files


def pictures() -> list[bytes]:
    """Small files of the kinds that people have: formats, modes, animations, EXIF."""
    sample = AlbumentationsCIFAR10(ASSETS, train=False).data
    files = []

    def keep(image: Image.Image, kind: str, **options) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())

    for i, size in enumerate((32, 57, 160)):
        image = Image.fromarray(sample[37 * i]).resize((size, size + 9 * i))
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
            keep(image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode), "PNG")
        exif = Image.Exif()
        exif[0x0112] = 6  # turned to the right
        keep(image, "JPEG", exif=exif)
        keep(image, "JPEG", progressive=True)
        keep(image.convert("CMYK"), "JPEG")
        keep(image.convert("L"), "JPEG", quality=40)
        frames = [image, image.rotate(90), image.rotate(180)]
        keep(image, "GIF", save_all=True, append_images=frames, duration=50)
        keep(image, "WEBP", quality=60)
        keep(image.convert("RGBA"), "WEBP", lossless=True)
        keep(image, "WEBP", save_all=True, append_images=frames)
    return files


def mutated(files: list[bytes], seed: int) -> bytes:
    """One of the files with one to four things done to it."""
    draw = random.Random(seed)
    data = bytearray(draw.choice(files))
    for _ in range(draw.randint(1, 4)):
        here, length = draw.randrange(len(data)), draw.randint(1, 64)
        kind = draw.choice(("bytes", "bits", "header", "cut", "remove", "repeat", "noise", "splice"))
        if kind == "bytes":
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        elif kind == "bits":
            data[here] ^= 1 << draw.randrange(8)
        elif kind == "header":
            data[draw.randrange(min(64, len(data)))] = draw.randrange(256)
        elif kind == "cut":
            del data[max(1, here) :]
        elif kind == "remove" and len(data) > length + 1:
            del data[here : here + length]
        elif kind == "repeat":
            data[here:here] = data[here : here + length] * draw.randint(1, 9)
        elif kind == "noise":
            data[here : here + length] = draw.randbytes(length)
        elif kind == "splice":
            data[here:] = draw.choice(files)[here:] or b"\0"
    return bytes(data)


def resident() -> float:
    """The memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def predict_mutated(first: int, count: int, results) -> None:
    """Predict `count` mutated files; send the outcomes, the slowest's seconds and how many MB the memory grew."""
    net = Net.from_pretrained()
    files, found, slowest = pictures(), Counter(), 0.0
    for data in files:  # as they are, all are good; and the memory that the first of a kind takes is no leak
        predict(net, data, test_transform(), CLASSES)
    before = resident()
    for seed in range(first, first + count):
        data = mutated(files, seed)
        began = time.monotonic()
        try:
            (answer,) = predict(net, data, test_transform(), CLASSES)
            found["predicted"] += abs(sum(p for _, p in answer)) <= 1.001
        except ValueError:
            found["refused"] += 1
        except BaseException as error:
            found[f"{type(error).__name__} at seed {seed}"] += 1
        slowest = max(slowest, time.monotonic() - began)
    results.send((found, slowest, resident() - before))


def round_of_files(seed: int, count: int = 2_000) -> Counter:
    """`count` files from seeds of their own, in one process, which may not die, hang or grow."""
    receiving, sending = PROCESSES.Pipe(duplex=False)
    process = start(predict_mutated, seed * count, count, sending)
    sending.close()
    try:
        found, slowest, grown = receiving.recv() if receiving.poll(count) else (Counter(), count, 0)
    except EOFError:  # it has crashed
        found, slowest, grown = Counter(), float("inf"), 0.0
    process.kill()
    process.join()
    well = found["predicted"] + found["refused"]
    if well < count or slowest > 1 or grown > 50:
        print(f"files, seeds {seed * count} and on: {dict(found)}, slowest {slowest:.2f} s, {grown:.0f} MB more")
    return Counter(
        {
            ("mutated files: predicted, or ValueError", "tried"): count,
            ("mutated files: predicted, or ValueError", "survived"): well,
            ("2,000 of them: none over a second, memory flat to 50 MB", "tried"): 1,
            ("2,000 of them: none over a second, memory flat to 50 MB", "survived"): int(slowest <= 1 and grown <= 50),
        }
    )


# ---------------------------------------------------------------- all of it


PARTS = {"kills": round_of_kills, "downloads": round_of_downloads, "files": round_of_files}


def run(minutes: float) -> list[dict]:
    """Rounds of each part in turn, at least one, until the time is over; a row for each thing that was done."""
    found = {part: Counter() for part in PARTS}
    began, longest, seed = time.monotonic(), 0.0, 0
    with tqdm(total=round(60 * minutes), desc="soak", bar_format="{desc}: {n:.0f} of {total} s |{bar:20}|{postfix}") as bar:
        while not seed or bar.n + longest < bar.total:
            before = bar.n
            for part, round_ in PARTS.items():
                bar.set_postfix_str(f" round {seed}, {part}")
                found[part].update(round_(seed))
                bar.update(time.monotonic() - began - bar.n)
            longest, seed = max(longest, bar.n - before), seed + 1
    return [
        dict(zip(FIELDS, (part, what, count[what, "tried"], count[what, "survived"])))
        for part, count in found.items()
        for what in dict.fromkeys(what for what, _ in count)
    ]


def main(minutes: float) -> None:
    """Soak, print the table and write it; exit with 1 if something was not survived."""
    rows = run(minutes)
    for row in rows:
        print("{part:<11}{what:<58}{survived:>7,} of {tried:,}".format(**row))
    write_csv(rows, TABLE)
    sys.exit(any(row["survived"] < row["tried"] for row in rows))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)
    import soak  # under this name the processes know its functions

    soak.main(float(sys.argv[1]) if len(sys.argv) > 1 else 20)

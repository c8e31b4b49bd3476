"""Names what pictures show: airplane, automobile, bird, cat, deer, dog, frog, horse, ship or truck.

Anything else gets the name that fits best. The exit status is 0 if every picture was predicted. It is 1 if a
picture could not be read; standard error says why. It is 2 if the call is wrong.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path

from tqdm import tqdm

from checkpoint import behind_links, stream_at, write_file
from dataset import CLASSES, read_image, test_transform
from hardware import best_device
from images import FORMATS, pictures_in
from model import Net
from utils import predict

BATCH = 256  # pictures in memory


def files_in(paths: list[Path]) -> list[Path]:
    """The files in the order of `paths`. A folder stands for all pictures in it and its folders, by name."""
    files = []
    for path in paths:
        files += pictures_in(path) if path.is_dir() else [path]
    return files


def home_expanded(name: str) -> Path:
    """The path with "~" expanded, as no shell does in --csv=~/out.csv."""
    return Path(os.path.expanduser(name))


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Path]]:
    """The options and the files to predict. A wrong call exits with status 2."""
    description, epilog = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=epilog)
    formats = ", ".join(FORMATS)
    parser.add_argument("paths", nargs="+", type=home_expanded, metavar="FILE_OR_FOLDER", help=formats)
    ranks = range(1, len(CLASSES) + 1)
    parser.add_argument(
        "--top", type=int, default=3, metavar="K", choices=ranks, help="classes a picture (3)"
    )
    columns = "file, class1, probability1, class2, ..."
    parser.add_argument("--csv", type=home_expanded, metavar="OUT", help=f"write a table instead: {columns}")
    options = parser.parse_args(argv)

    try:
        files = files_in(options.paths)
    except OSError as error:  # a folder that cannot be read
        parser.error(str(error))
    if not files:
        parser.error(f"expected pictures, found none in {', '.join(map(str, options.paths))}")
    if options.csv:
        folder = behind_links(options.csv).parent
        if not folder.is_dir():
            parser.error(f"expected a folder for {options.csv}, found none: make {folder}")
        if options.csv.is_dir():
            parser.error(f"expected a file for the table, found the folder {options.csv}: name another")
        if stream_at(options.csv) is None and not os.access(folder, os.W_OK):
            parser.error(f"expected a folder that can be written, found {folder}: name another")
    return options, files


def table(rows: list[tuple[Path, list[tuple[str, float]]]], top: int) -> bytes:
    """The answers as CSV. A file name that is no text keeps its bytes."""
    header = ["file"]
    for k in range(1, top + 1):
        header += [f"class{k}", f"probability{k}"]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    for file, answer in rows:
        cells = [cell for pair in answer for cell in pair]
        writer.writerow([file, *cells])
    return text.getvalue().encode(errors="surrogateescape")


def main(argv: list[str] | None = None) -> int:
    """Predicts the pictures named in argv, by default the command line's. Returns the exit status."""
    options, files = parse(argv)
    net = Net.from_pretrained().to(best_device())
    rows = []  # (file, answer) of the pictures that could be read
    with tqdm(total=len(files), unit="picture", delay=2) as bar:
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            readable, images = [], []
            for file in batch:
                try:
                    images.append(read_image(file))
                    readable.append(file)
                except (OSError, ValueError) as error:
                    print(error, file=sys.stderr)
            rows += zip(readable, predict(net, images, test_transform(), CLASSES, options.top))
            bar.update(len(batch))

    if options.csv:
        write_file(options.csv, table(rows, options.top))
    else:
        for file, answer in rows:
            shares = [f"{name} {100 * probability:.1f} %" for name, probability in answer]
            print(f"{file}: {', '.join(shares)}")
    return int(len(rows) < len(files))


if __name__ == "__main__":
    # The name of a file may be no text, or have characters that the terminal lacks.
    sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors())
    sys.exit(main())

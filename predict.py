"""Name what is in pictures, files or folders of them: airplane, automobile, bird, cat, deer, dog, frog, horse, ship or
truck, whatever else a picture may show.

The exit status is 0 where every picture was predicted, 1 where one could not be (why is on standard error), 2 for a
call that makes no sense.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from dataset import CLASSES, SUFFIXES, read_image, test_transform
from model import Net
from checkpoint import write_file
from utils import predict

BATCH = 256


def files_in(paths: list[Path]) -> list[Path]:
    """The files as they are named, and of folders, and the folders in them, the pictures by name."""

    def pictures(folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())

    return [file for path in paths for file in (pictures(path) if path.is_dir() else [path])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1])
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="PNG, JPEG, GIF, WebP, BMP, TIFF or PPM")
    parser.add_argument("--top", type=int, default=3, metavar="K", choices=range(1, len(CLASSES) + 1), help="classes a picture (3)")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write file, class1, probability1, class2, ... there")
    given = parser.parse_args()
    files = files_in(given.paths)
    if not files:
        parser.error(f"expected pictures, found none in {', '.join(map(str, given.paths))}")
    if given.csv and not given.csv.parent.is_dir():
        parser.error(f"expected a folder for {given.csv}, found none: make {given.csv.parent}")
    if given.csv and (given.csv.is_dir() or not os.access(given.csv.parent, os.W_OK)):
        parser.error(f"expected a file that can be written, found {given.csv}, a folder or in one that is read-only: name another")
    sys.stdout.reconfigure(errors="surrogateescape")  # a file's name need not be text

    net = Net.from_pretrained().to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with tqdm(total=len(files), unit="picture", delay=2) as bar:
        for start in range(0, len(files), BATCH):
            good, images = [], []
            for file in files[start : start + BATCH]:
                try:
                    images.append(read_image(file))
                    good.append(file)
                except (OSError, ValueError) as error:
                    print(error, file=sys.stderr)
            answers = predict(net, images, test_transform(), CLASSES, given.top)
            rows += [[file, *sum(answer, ())] for file, answer in zip(good, answers)]
            bar.update(len(files[start : start + BATCH]))

    if given.csv:
        columns = [f"{name}{k}" for k in range(1, given.top + 1) for name in ("class", "probability")]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["file", *columns], *rows])
        write_file(given.csv, text.getvalue().encode(errors="surrogateescape"))
    else:
        for file, *answer in rows:
            print(f"{file}: {', '.join(f'{name} {100 * share:.1f} %' for name, share in zip(answer[::2], answer[1::2]))}")
    return int(len(rows) < len(files))


if __name__ == "__main__":
    sys.exit(main())

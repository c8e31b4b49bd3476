"""What people have instead of 32x32 arrays, through the transforms and `predict`. The mutated files are in soak.py."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10, read_image, train_transform
from dataset import test_transform as no_augmentation
from model import Net
from utils import predict

# One picture, of two colours that are easy to tell: the left half red, the right half blue.
PICTURE = np.zeros((32, 32, 3), np.uint8)
PICTURE[:, :16, 0] = PICTURE[:, 16:, 2] = 255


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_file(mode="RGB", kind="PNG", **options) -> bytes:
    return encoded(Image.fromarray(PICTURE).convert(mode), kind, **options)


def turned() -> bytes:
    """Stored lying on its side, with the EXIF that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(PICTURE).rotate(90), "JPEG", exif=exif, quality=95)


def animated(kind) -> bytes:
    other = Image.new("RGB", (32, 32), "green")
    return as_file(kind=kind, save_all=True, append_images=[other, other], duration=9, **{"lossless": True} if kind == "WEBP" else {})


SAME = {
    "array": PICTURE,
    "PIL image": Image.fromarray(PICTURE),
    "PNG": as_file(),
    "RGBA": as_file("RGBA"),
    "palette": as_file("P"),
    "BMP": as_file(kind="BMP"),
    "TIFF": as_file(kind="TIFF"),
    "WebP": as_file(kind="WEBP", lossless=True),
    "animated GIF": animated("GIF"),
    "animated WebP": animated("WEBP"),
    "array with alpha": np.dstack([PICTURE, np.full((32, 32), 255, np.uint8)]),
    "broken EXIF": as_file(exif=b"Exif\0\0nonsense"),
    "PIL image with broken EXIF": Image.open(io.BytesIO(as_file(exif=b"Exif\0\0nonsense"))),
    "16-bit array": PICTURE.astype(np.uint16) << 8,
    "twice as large": np.repeat(np.repeat(PICTURE, 2, 0), 2, 1),
    "wide": np.hstack([np.zeros((32, 40, 3), np.uint8), PICTURE, np.zeros((32, 40, 3), np.uint8)]),
}
ALIKE = {
    "JPEG": as_file(kind="JPEG", quality=95),
    "CMYK": as_file("CMYK", "JPEG", quality=95),
    "turned by EXIF": turned(),
    "12 megapixels": encoded(Image.fromarray(PICTURE).resize((4000, 3000), 0), "JPEG"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_picture_from_whatever_holds_it(name):
    before = np.array(SAME[name]).tobytes()
    found = read_image(SAME[name])
    assert np.array(SAME[name]).tobytes() == before
    assert found.dtype == np.uint8 and found.shape == (32, 32, 3)
    edge = slice(15, 17) if name == "twice as large" else slice(0, 0)  # scaling mixes the colours where they meet
    assert np.array_equal(np.delete(found, edge, 1), np.delete(PICTURE, edge, 1))


@pytest.mark.parametrize("name", ALIKE)
def test_nearly_the_same_from_lossy_files(name):
    found = read_image(ALIKE[name]).astype(int)
    assert np.abs(found[:, 2:14] - PICTURE[:, 2:14]).max() < 30 and np.abs(found[:, 18:30] - PICTURE[:, 18:30]).max() < 30


def test_grey_sixteen_bits_and_transparency():
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2)
    pgm = encoded(Image.fromarray(grey), "PPM")
    files = (encoded(Image.fromarray(grey)), pgm, Image.open(io.BytesIO(pgm)))
    for source in (grey, grey.astype(">u2"), grey[..., None], Image.fromarray(grey), *files, expected[..., 0], expected[..., :1]):
        assert np.array_equal(read_image(source), expected)
    clear = np.dstack([PICTURE, np.zeros((32, 32), np.uint8)])
    assert (read_image(clear) == 255).all() and (read_image(Image.fromarray(clear)) == 255).all()
    some = Image.fromarray(grey)
    found = read_image(encoded(some, transparency=int(grey[9, 9])))
    assert (found[9, 9] == 255).all() and np.array_equal(found[10:], expected[10:])
    palette = encoded(Image.fromarray(PICTURE).convert("P"), transparency=Image.fromarray(PICTURE).convert("P").getpixel((0, 0)))
    assert (read_image(palette)[:, :16] == 255).all() and np.array_equal(read_image(palette)[:, 16:], PICTURE[:, 16:])


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (31, 33), (3000, 2)])
def test_any_size(size):
    image = np.full((*size, 3), 200, np.uint8)
    for source in (image, encoded(Image.fromarray(image))):
        assert (read_image(source) == 200).all()
    assert train_transform()(image=image)["image"].shape == (3, 32, 32)


def test_threads_leave_the_warnings_of_the_process_alone():
    before, png = list(warnings.filters), as_file()
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(found, PICTURE) for found in threads.map(read_image, [png] * 200))
    assert warnings.filters == before


def test_an_image_that_was_given_stays_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = Image.fromarray(PICTURE).resize((2000, 3000))
    (tmp_path / "turned.jpg").write_bytes(encoded(tall, "JPEG", exif=exif))
    with Image.open(tmp_path / "turned.jpg") as image, Image.open(tmp_path / "turned.jpg") as untouched:
        found = read_image(image)
        assert image.size == (2000, 3000) and image.getexif()[0x0112] == 6
        assert np.array_equal(np.asarray(image), np.asarray(untouched))
        assert np.abs(found.astype(int) - np.rot90(PICTURE, -1)).mean() < 20  # red above blue


def bomb() -> bytes:
    """A PNG of 100 million pixels in 120 kB."""
    return encoded(Image.new("1", (10_000, 10_000)))


BAD = {
    "text.png": b"this is not an image",
    "empty.jpg": b"",
    "cut.png": as_file()[:70],
    "cut.jpg": as_file(kind="JPEG")[:-200],
    "bomb.png": bomb(),
    "huge.png": as_file()[:16] + b"\xff" * 8 + as_file()[24:],
    "script.eps": encoded(Image.fromarray(PICTURE), "EPS"),  # Pillow would run Ghostscript
    "long.tiff": encoded(Image.fromarray(np.full((8, 8), 9, np.int32)), "TIFF"),
    "float.tiff": encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error")
def test_what_is_no_image_is_refused_by_its_name(name, tmp_path):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(ValueError, match=rf"expected an image, found .*{name}: .") as error:
        no_augmentation()(image=tmp_path / name)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)
    with pytest.raises(ValueError, match=f"found {len(BAD[name])} bytes"):
        no_augmentation()(image=BAD[name])


def test_no_image_and_no_file(tmp_path):
    for wrong in (None, 5, [1, 2]):
        with pytest.raises(ValueError, match="expected a path, bytes, a PIL image or an array, found"):
            no_augmentation()(image=wrong)
    for wrong in (PICTURE / 255, PICTURE[..., :2], PICTURE[None], PICTURE[:0], PICTURE[0, 0]):
        with pytest.raises(ValueError, match="expected an image, found an array"):
            no_augmentation()(image=wrong)
    with pytest.raises(FileNotFoundError):
        no_augmentation()(image=tmp_path / "none.png")


def test_predict_takes_them_all_and_says_which_is_bad(tmp_path):
    net = Net.from_pretrained()
    stored = AlbumentationsCIFAR10(ASSETS, train=False).data[::50]
    expected = predict(net, stored, no_augmentation(), CLASSES)
    assert sum(answer[0][0] == name for answer, name in zip(expected, CLASSES)) >= 8
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for path, image in zip(paths, stored):
        path.write_bytes(encoded(Image.fromarray(image)))
    bytes_of = [path.read_bytes() for path in paths]
    for images in (list(stored), paths, list(map(str, paths)), bytes_of, [Image.open(path) for path in paths]):
        found = predict(net, images, no_augmentation(), CLASSES)
        assert [[name for name, _ in answer] for answer in found] == [[name for name, _ in answer] for answer in expected]
        assert predict(net, images[3], no_augmentation(), CLASSES)[0][0][0] == expected[3][0][0]
    assert predict(net, [], no_augmentation(), CLASSES) == []
    with pytest.raises(ValueError, match="image 1: expected an image, found 3 bytes"):
        predict(net, [paths[0], b"bad"], no_augmentation(), CLASSES)
    with pytest.raises(ValueError, match=f"image 0: expected an image, found {Path(ASSETS)}/history.csv"):
        predict(net, ASSETS / "history.csv", no_augmentation(), CLASSES)

"""Files, bytes, PIL images and arrays through `read_image`, transforms and `predict`."""

import io
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import numpy as np
import pytest
from PIL import Image

from conftest import needs_links
from dataset import ASSETS, CLASSES, AlbumentationsCIFAR10, read_image, train_transform
from dataset import test_transform as no_augmentation
from images import pictures_in
from model import Net
from utils import predict

# The left half is red, the right half blue.
PICTURE = np.zeros((32, 32, 3), np.uint8)
PICTURE[:, :16, 0] = PICTURE[:, 16:, 2] = 255


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_file(mode="RGB", kind="PNG", **options) -> bytes:
    return encoded(Image.fromarray(PICTURE).convert(mode), kind, **options)


LYING = Image.Exif()
LYING[0x0112] = 6  # to be turned to the right


def animated(kind, **options) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("green", "white")]
    return as_file(kind=kind, save_all=True, append_images=frames, duration=9, **options)


def tiff(*strips, order="<", photometric=1, bits=(8,), compress=bytes, **tags):
    """A TIFF of 32x32 pixels that Pillow could not write. Further tags are named t and their number."""
    strips = [compress(bytes(strip)) for strip in strips]
    lengths = [len(strip) for strip in strips]
    offsets = [8 + sum(lengths[:i]) for i in range(len(strips))]
    coding = 1 if compress is bytes else 8  # none, or deflate
    values = {256: [32], 257: [32], 258: bits, 259: [coding], 262: [photometric], 273: offsets}
    values |= {277: [len(bits)], 278: [32], 279: lengths}
    values |= {int(name[1:]): value for name, value in tags.items()}
    start = 8 + sum(lengths)
    long_values, place = b"", start + 6 + 12 * len(values)
    directory = struct.pack(order + "H", len(values))
    for number in sorted(values):
        numbers = struct.pack(f"{order}{len(values[number])}I", *values[number])
        directory += struct.pack(order + "HHI", number, 4, len(values[number]))
        directory += numbers if len(numbers) == 4 else struct.pack(order + "I", place + len(long_values))
        long_values += numbers if len(numbers) > 4 else b""
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, start)
    return head + b"".join(strips) + directory + bytes(4) + long_values


PLANES = [PICTURE[..., i] for i in range(3)]
RGB_8, IN_PLANES = (8, 8, 8), {"t284": [2]}
EXACT = {
    "array": PICTURE,
    "PIL image": Image.fromarray(PICTURE),
    "PNG": as_file(),
    "RGBA": as_file("RGBA"),
    "palette": as_file("P"),
    "BMP": as_file(kind="BMP"),
    "TIFF": as_file(kind="TIFF"),
    "TIFF in planes": tiff(*PLANES, photometric=2, bits=RGB_8, **IN_PLANES),
    "TIFF in compressed planes of 16 bits": tiff(
        *[plane.repeat(2) for plane in PLANES],
        photometric=2,
        bits=(16,) * 3,
        compress=zlib.compress,
        **IN_PLANES,
    ),
    "TIFF turned by EXIF": encoded(Image.fromarray(np.rot90(PICTURE)), "TIFF", exif=LYING),
    "APNG": animated("PNG"),
    "WebP": as_file(kind="WEBP", lossless=True),
    "animated GIF": animated("GIF"),
    "animated WebP": animated("WEBP", lossless=True),
    "array with alpha": np.dstack([PICTURE, np.full((32, 32), 255, np.uint8)]),
    "broken EXIF": as_file(exif=b"Exif\0\0nonsense"),
    "PIL image with broken EXIF": Image.open(io.BytesIO(as_file(exif=b"Exif\0\0nonsense"))),
    "16-bit array": PICTURE.astype(np.uint16) << 8,
    "twice as large": np.repeat(np.repeat(PICTURE, 2, 0), 2, 1),
    "wide": np.pad(PICTURE, ((0, 0), (40, 40), (0, 0))),
}
LOSSY = {
    "JPEG": as_file(kind="JPEG", quality=95),
    "CMYK": as_file("CMYK", "JPEG", quality=95),
    "AVIF": as_file(kind="AVIF", quality=95),
    "turned by EXIF": encoded(Image.fromarray(PICTURE).rotate(90), "JPEG", exif=LYING, quality=95),
    "12 megapixels": encoded(Image.fromarray(PICTURE).resize((4000, 3000), 0), "JPEG"),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_same_picture_from_every_source(name):
    before = np.array(EXACT[name]).tobytes()
    image = read_image(EXACT[name])
    assert np.array(EXACT[name]).tobytes() == before
    assert image.dtype == np.uint8 and image.shape == (32, 32, 3)
    mixed = [15, 16] if name == "twice as large" else []  # scaling mixes the colours where they meet
    assert np.array_equal(np.delete(image, mixed, 1), np.delete(PICTURE, mixed, 1))


@pytest.mark.parametrize("name", LOSSY)
def test_nearly_the_same_picture_from_lossy_files(name):
    difference = np.abs(read_image(LOSSY[name]).astype(int) - PICTURE)
    assert difference[:, 2:14].max() < 30 and difference[:, 18:30].max() < 30


GREY = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
GREY_8 = (GREY >> 8).astype(np.uint8)
PGM = encoded(Image.fromarray(GREY), "PPM")
GREY_12_BITS = np.unpackbits(GREY.astype(">u2").view(np.uint8)).reshape(1024, 16)[:, :12]
GREYS = {
    "TIFF of 12 bits": tiff(np.packbits(GREY_12_BITS).tobytes(), bits=[12]),
    "TIFF of 16 bits": tiff(GREY.tobytes(), bits=[16]),
    "TIFF of 16 bits, big-endian": tiff(GREY.astype(">u2").tobytes(), bits=[16], order=">"),
    "TIFF of 16 bits, white is 0": tiff((~GREY).tobytes(), bits=[16], photometric=0),
    "PIL image of a TIFF, white is 0": Image.open(
        io.BytesIO(tiff((~GREY).tobytes(), bits=[16], photometric=0))
    ),
    "16 bits": GREY,
    "16 bits, big-endian": GREY.astype(">u2"),
    "16 bits, one channel": GREY[..., None],
    "PIL image": Image.fromarray(GREY),
    "PNG": encoded(Image.fromarray(GREY)),
    "PNG turned by EXIF": encoded(Image.fromarray(np.rot90(GREY)), exif=LYING),
    "PGM": PGM,
    "PIL image of a PGM": Image.open(io.BytesIO(PGM)),
    "8 bits": GREY_8,
    "8 bits, one channel": GREY_8[..., None],
}


@pytest.mark.parametrize("name", GREYS)
def test_grey_becomes_rgb_with_its_upper_eight_bits(name):
    assert np.array_equal(read_image(GREYS[name]), np.dstack([GREY_8] * 3))


def test_transparency_becomes_white():
    clear = np.dstack([PICTURE, np.zeros((32, 32), np.uint8)])
    assert (read_image(clear) == 255).all() and (read_image(Image.fromarray(clear)) == 255).all()
    for row in (0, 9):
        grey = read_image(encoded(Image.fromarray(GREY), transparency=int(GREY[row, 1])))
        assert (grey[row, 1] == 255).all() and np.array_equal(grey[row + 1 :, :, 0], GREY_8[row + 1 :])
    palette = Image.fromarray(PICTURE).convert("P")
    image = read_image(encoded(palette, transparency=palette.getpixel((0, 0))))
    assert (image[:, :16] == 255).all() and np.array_equal(image[:, 16:], PICTURE[:, 16:])
    palette = Image.fromarray(clear).quantize(4)
    assert (read_image(palette) == 255).all()
    premultiplied = Image.new("LA", (32, 32), (100, 255)).convert("La")
    assert (read_image(premultiplied) == 100).all()


def chunk(kind, content, checksum=None):
    """A chunk of a PNG file, by default with the right checksum."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(rows, bits, colour_type, *chunks):
    """A PNG of 32x32 pixels that Pillow could not write, from its packed rows."""
    header = struct.pack(">IIBBBBB", 32, 32, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("bits, scale", [(1, 255), (2, 85), (4, 17), (8, 1)])
def test_a_transparent_grey_is_white_at_every_depth(bits, scale):
    levels = (np.arange(1024) % 2**bits).astype(np.uint8).reshape(32, 32)
    rows = np.unpackbits(levels[..., None], 2)[..., 8 - bits :].reshape(32, -1)
    file = png(map(bytes, np.packbits(rows, 1)), bits, 0, chunk(b"tRNS", b"\0\1"))
    expected = np.where(levels == 1, 255, levels * np.uint8(scale))
    for source in (file, Image.open(io.BytesIO(file))):
        assert np.array_equal(read_image(source)[..., 0], expected)
    assert source.info["transparency"] == Image.open(io.BytesIO(file)).info["transparency"]


def test_a_transparent_colour_of_16_bits_is_refused():
    rows = [b"\0\0\0\1\0\2" * 32] * 32
    assert (read_image(png(rows, 16, 2)) == 0).all()
    with pytest.raises(ValueError, match="a transparent colour of 16 bits"):
        read_image(png(rows, 16, 2, chunk(b"tRNS", bytes(6))))


BOMB = zlib.compress(bytes(3_000_000))
METADATA = {
    "large profile": chunk(b"iCCP", b"a\0\0" + BOMB),
    "profile with a wrong checksum": chunk(b"iCCP", b"a\0\0" + zlib.compress(b"a"), 1),
    "large text": chunk(b"zTXt", b"a\0\0" + BOMB),
    "large international text": chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB),
    "text with a wrong checksum": chunk(b"tEXt", b"a\0b", 1),
    "short resolution": chunk(b"pHYs", b"1"),
    "broken EXIF": chunk(b"eXIf", b"nonsense", 1),
    "broken animation": chunk(b"acTL", b"1"),
}


@pytest.mark.parametrize("name", METADATA)
def test_damaged_metadata_of_a_png_breaks_no_picture(name):
    turned = encoded(Image.fromarray(PICTURE).rotate(90), exif=LYING)
    for file, mark in (
        (as_file(), b"IDAT"),
        (as_file(), b"IEND"),
        (turned, b"IDAT"),
        (animated("PNG"), b"IDAT"),
    ):
        place = file.index(mark) - 4
        broken = file[:place] + METADATA[name] + file[place:]
        assert np.array_equal(read_image(broken), PICTURE)


def segment(marker, content):
    """A segment of a JPEG file."""
    return marker + struct.pack(">H", len(content) + 2) + content


JFIF = segment(b"\xff\xe0", b"JFIF\0\1\1\0\0\1\0\1\0\0")
NOT_YCBCR = segment(b"\xff\xee", b"Adobe" + bytes(7))  # JFIF overrules it
SEGMENTS = {
    "JFIF": segment(b"\xff\xe0", b"JFIF\0"),
    "profile": segment(b"\xff\xe2", b"ICC_PROFILE\0"),
    "Photoshop": segment(b"\xff\xed", b"Photoshop 3.0\x008BIM\3\xed\xff"),
    "Adobe": segment(b"\xff\xee", b"Adobe"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_damaged_metadata_of_a_jpeg_breaks_no_picture(name):
    start, rest = LOSSY["JPEG"].split(JFIF)
    others = start + NOT_YCBCR + rest, start + JFIF + NOT_YCBCR + rest
    assert not np.array_equal(*map(read_image, others))
    for whole in (*[LOSSY[other] for other in ("JPEG", "CMYK", "turned by EXIF")], *others):
        broken = whole[:2] + SEGMENTS[name] + whole[2:]
        assert np.array_equal(read_image(broken), read_image(whole))


def test_what_follows_the_pixels_of_a_png_may_be_missing_or_anything():
    for file in (as_file()[:-14], as_file() + b"\0\0\0\0JUNKwith no checksum"):
        assert np.array_equal(read_image(file), PICTURE)


def test_no_wrong_bit_of_a_png_s_pixels_gives_another_picture():
    file = as_file()
    start = file.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", file[start - 8 : start - 4])
    for i in range(8 * length):
        broken = bytearray(file)
        broken[start + i // 8] ^= 1 << i % 8
        with pytest.raises(ValueError, match="a wrong checksum in IDAT"):
            read_image(bytes(broken))


MISREAD = {
    "of signed numbers": tiff(bytes(1024), t339=[2]),
    "a TIFF of signed numbers": tiff(bytes(2048), bits=[16], t339=[2]),
    "of RGB in planes of 16": tiff(*[bytes(2048)] * 3, photometric=2, bits=(16, 16, 16), **IN_PLANES),
    "of LA in planes": tiff(*[bytes(1024)] * 2, bits=(8, 8), compress=zlib.compress, t338=[2], **IN_PLANES),
    "of RGBA in planes": tiff(*[bytes(1024)] * 4, photometric=2, bits=(8, 8, 8, 8), **IN_PLANES),
    "of RGB in planes of 8": tiff(*PLANES, photometric=2, bits=RGB_8, t266=[2], **IN_PLANES),
    "of LAB in planes": tiff(*PLANES, photometric=8, bits=RGB_8, **IN_PLANES),
    "of subsampled colours": tiff(bytes(3072), photometric=6, bits=RGB_8),
    "with a palette of 8 bits": tiff(bytes(1024), photometric=3, t320=[200] * 768),
    "a TIFF of a kind that Pillow does not read": tiff(bytes(1280), bits=[10]),
    "its pixels are damaged or cut off": tiff(b"no deflate", compress=lambda strip: strip),
}


@pytest.mark.parametrize("reason", MISREAD)
def test_a_tiff_that_pillow_would_misread_is_refused(reason):
    with pytest.raises(ValueError, match=f"expected an image, found .*{reason}"):
        read_image(MISREAD[reason])


def test_a_closed_picture_says_so(tmp_path):
    (tmp_path / "closed.png").write_bytes(as_file())
    with Image.open(tmp_path / "closed.png") as image:
        pass
    with pytest.raises(ValueError, match=r"closed\.png: closed before its pixels were read: call its load"):
        read_image(image)
    with Image.open(tmp_path / "closed.png") as image:
        image.load()
    assert np.array_equal(read_image(image), PICTURE)


@needs_links
def test_pictures_in_a_folder_have_any_suffix_of_their_formats_and_are_not_hidden(tmp_path):
    names = ["a.jfif", "b.JPE", "c.apng", "d.pnm", "e.avif", "sub/f.tif", "sub.png"]
    for name in (*names, ".hidden.png", "._a.jpg", ".ipynb_checkpoints/a.png", "text.txt", "script.eps"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    (tmp_path / "sub/gone").symlink_to(tmp_path / "nowhere")
    found = [path.relative_to(tmp_path).as_posix() for path in pictures_in(tmp_path)]
    assert found == [*names[:6], "sub/gone", "sub.png"]


def test_home_is_expanded(home):
    (home / "a.jfif").touch()
    with pytest.raises(ValueError, match="found .*/a.jfif: none of"):
        read_image("~/a.jfif")


def test_the_order_of_pictures_is_the_same_where_paths_ignore_case(tmp_path, monkeypatch):
    monkeypatch.setattr(PurePath, "__lt__", lambda a, b: str(a).lower() < str(b).lower())  # as on Windows
    names = ["B.png", "C/a.png", "a.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in pictures_in(tmp_path)] == names


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (31, 33), (3000, 2)])
def test_any_size_is_scaled(size):
    image = np.full((*size, 3), 200, np.uint8)
    for source in (image, encoded(Image.fromarray(image))):
        assert (read_image(source) == 200).all()
    assert train_transform()(image=image)["image"].shape == (3, 32, 32)


def test_threads_leave_the_warnings_of_the_process_alone():
    before, png = list(warnings.filters), as_file()
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(read_image, [png] * 200))
    assert all(np.array_equal(image, PICTURE) for image in images)
    assert warnings.filters == before


def test_a_pil_image_stays_as_it_is():
    jpeg = encoded(Image.fromarray(PICTURE).resize((600, 900)), "JPEG", exif=LYING)
    image, untouched = Image.open(io.BytesIO(jpeg)), Image.open(io.BytesIO(jpeg))
    result = read_image(image)
    assert image.size == (600, 900) and image.getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(image), np.asarray(untouched))
    assert np.abs(result.astype(int) - np.rot90(PICTURE, -1)).mean() < 20  # red above blue


BAD = {
    "text.png": b"this is not an image",
    "empty.jpg": b"",
    "cut.png": as_file()[:70],
    "cut.jpg": as_file(kind="JPEG")[:-200],
    "bomb.png": encoded(Image.new("1", (10_000, 10_000))),  # 100 million pixels in 120 kB
    "huge.png": as_file()[:16] + b"\xff" * 8 + as_file()[24:],
    "script.eps": encoded(Image.fromarray(PICTURE), "EPS"),  # Pillow would run Ghostscript
    "long.tiff": encoded(Image.fromarray(np.full((8, 8), 9, np.int32)), "TIFF"),
    "float.tiff": encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error")
def test_a_file_that_is_no_image_is_refused_by_its_name(name, tmp_path):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(ValueError, match=rf"expected an image, found .*{name}: .") as error:
        no_augmentation()(image=tmp_path / name)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)
    with pytest.raises(ValueError, match=f"found {len(BAD[name])} bytes"):
        no_augmentation()(image=BAD[name])


def test_other_types_other_arrays_and_missing_files_are_refused(tmp_path):
    for wrong in (None, 5, [1, 2]):
        with pytest.raises(ValueError, match="expected a path, bytes, a PIL image or an array, found"):
            no_augmentation()(image=wrong)
    for wrong in (PICTURE / 255, PICTURE[..., :2], PICTURE[None], PICTURE[:0], PICTURE[0, 0]):
        with pytest.raises(ValueError, match="expected an image, found an array"):
            no_augmentation()(image=wrong)
    with pytest.raises(FileNotFoundError):
        no_augmentation()(image=tmp_path / "none.png")


def classes_of(answers):
    return [[name for name, _ in answer] for answer in answers]


def test_predict_takes_every_source_and_names_a_bad_one(tmp_path):
    net, transform = Net.from_pretrained(), no_augmentation()
    arrays = list(AlbumentationsCIFAR10(ASSETS, train=False).data[::50])
    expected = classes_of(predict(net, arrays, transform, CLASSES))
    assert sum(names[0] == name for names, name in zip(expected, CLASSES)) >= 8
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    for path, image in zip(paths, arrays):
        path.write_bytes(encoded(Image.fromarray(image)))
    files = [path.read_bytes() for path in paths]
    for images in (arrays, paths, list(map(str, paths)), files, [Image.open(path) for path in paths]):
        assert classes_of(predict(net, images, transform, CLASSES)) == expected
        assert classes_of(predict(net, images[3], transform, CLASSES)) == expected[3:4]
    assert predict(net, [], transform, CLASSES) == []
    with pytest.raises(ValueError, match="image 1: expected an image, found 3 bytes"):
        predict(net, [paths[0], b"bad"], transform, CLASSES)
    text = ASSETS / "history.csv"
    with pytest.raises(ValueError, match=re.escape(f"image 0: expected an image, found {text}")):
        predict(net, text, transform, CLASSES)

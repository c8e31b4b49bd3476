"""Pictures in the shape that the network takes, from files, bytes, PIL images and arrays.

Needs Pillow and numpy only: copied alone into another project, it works.
"""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff

# Formats that Pillow decodes by itself. For others, such as EPS, it would run another program.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")

SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)

# What turns a picture upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

PNG_SIGNATURE, JPEG_SIGNATURE, START_OF_SCAN = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xda"


def read_image(source: str | Path | bytes | Image.Image | np.ndarray, size: int = 32) -> np.ndarray:
    """Returns the picture as the network takes it: uint8 (size, size, 3), RGB, read-only.

    Takes the central square, scaled with antialiasing (bicubic), and turned upright as its EXIF
    says. Transparency becomes white, 16 bits lose their lower 8, and an animation gives its first
    frame. An array that already is uint8 (size, size, 3) is returned itself.

    Args:
        source: one of
            - the path of a PNG, JPEG, GIF, WebP, BMP, TIFF, PPM or AVIF file, or its bytes
            - a PIL image
            - an array uint8 or uint16 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): grey, RGB or RGBA
        size: height and width of the result, in pixels.

    Raises:
        ValueError: `source` is no image, is damaged, or is an array of another kind. So is a file
            of more than Image.MAX_IMAGE_PIXELS (89 million: a decompression bomb). So is a file
            whose pixels Pillow would misread, such as a TIFF of signed numbers. The message names
            the file.
        OSError: the file is missing or cannot be opened.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape == (size, size, 3):
        return source
    name, image = open_image(source, size)
    with value_error(name):
        if 0 in image.size:
            raise ValueError("no pixels")
        image = on_white(upright(eight_bits(image)))
        return np.asarray(ImageOps.fit(image, (size, size)))


def pictures_in(folder: str | Path, around: frozenset[Path] = frozenset()) -> list[Path]:
    """Returns the files in a folder and its folders whose suffix names a picture, by name.

    Hidden files and folders (".name") are left out. A link to nothing is in the list: reading it
    names it. `around` are the folders that a link must not lead back to.

    Raises OSError if a folder cannot be read.
    """
    place = Path(folder).resolve()
    if place in around:
        return []
    pictures = []
    for path in by_name(folder):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            pictures += pictures_in(path, around | {place})
        elif not path.exists() or (path.suffix.lower() in SUFFIXES and path.is_file()):
            pictures.append(path)
    return pictures


def by_name(folder: str | Path) -> list[Path]:
    """What is in a folder, in the same order on every system. Windows' own order ignores case."""
    return sorted(Path(folder).iterdir(), key=lambda path: path.name)


def open_image(source: str | Path | bytes | Image.Image | np.ndarray, size: int) -> tuple[str, Image.Image]:
    """Returns a name for messages, and the image, decoded, as it is stored."""
    if isinstance(source, np.ndarray):
        name = f"an array {source.dtype} {source.shape}"
        with value_error(name):
            return name, from_array(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"a PIL image {source.mode} {source.size}"
        with value_error(name):
            if getattr(source, "tile", None) and source.fp is None:
                raise ValueError("closed before its pixels were read: call its load() first")
            return name, load(source)
    if isinstance(source, bytes):
        name = f"{len(source)} bytes"
        with value_error(name):
            return name, decode(io.BytesIO(source), size)
    if isinstance(source, (str, Path)):
        name = os.path.expanduser(source)
        with open(name, "rb") as file, value_error(name):
            return name, decode(file, size)
    kind = type(source).__name__
    raise ValueError(f"expected a path, bytes, a PIL image or an array, found {kind}: convert it")


@contextlib.contextmanager
def value_error(name: str) -> Iterator[None]:
    """Turns every error within into a ValueError of one line that names the image."""
    try:
        yield
    except Exception as error:  # Pillow raises whatever its parsers stumble over
        reason = str(error) or type(error).__name__
        if reason.startswith("decoder error"):  # and a number
            reason = "its pixels are damaged or cut off"
        message = f"expected an image, found {name}: {reason}"
        raise ValueError(message.partition("\n")[0]) from None


def from_array(pixels: np.ndarray) -> Image.Image:
    """Returns an array uint8 or uint16 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as an image of 8 bits."""
    if pixels.dtype in ("<u2", ">u2"):
        pixels = (pixels >> 8).astype(np.uint8)
    channels = pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in ((), (1,), (3,), (4,)):
        raise ValueError("neither uint8 nor uint16 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if channels == (1,):
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)


def decode(file: io.BufferedIOBase, size: int) -> Image.Image:
    """Returns the first frame of an image file. A PNG or JPEG may have damaged metadata."""
    file_start = file.read(8)
    bare = None
    if file_start == PNG_SIGNATURE:
        bare = bare_png(file_start + file.read())
    file.seek(0)
    try:
        return open_and_load(file, size)
    except Exception:
        file.seek(0)
        if file_start[:2] == JPEG_SIGNATURE:
            bare = bare_jpeg(file.read())
        if bare is None:
            raise
    return open_and_load(io.BytesIO(bare), size)


def bare_png(png: bytes) -> bytes:
    """Returns a PNG of those chunks that decide its pixels and turn it upright.

    Raises ValueError if one that decides pixels has another checksum. Pillow ignores that of IDAT.
    """
    bare, start = [png[:8]], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])  # length, kind, content, checksum
        chunk = png[start:end]
        kind = chunk[4:8]
        valid = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        critical = kind[:1].isupper() or kind == b"tRNS"
        if critical and not valid and end <= len(png):
            raise ValueError(f"a damaged PNG, with a wrong checksum in {kind.decode(errors='replace')}")
        if critical or (kind == b"eXIf" and valid):
            bare.append(chunk)
        if kind == b"IEND":
            break
        start = end
    return b"".join(bare)


def bare_jpeg(jpeg: bytes) -> bytes:
    """Returns a JPEG of what decides its pixels and turns it upright, without its other metadata."""
    # The least length of JFIF and Adobe, which decide the colours, and of EXIF.
    useful = {0xE0: 16, 0xEE: 14, 0xE1: 2}
    bare, start = [jpeg[:2]], 2
    while jpeg[start : start + 1] == b"\xff" and jpeg[start + 1 : start + 2] not in (b"", START_OF_SCAN):
        marker, length = jpeg[start + 1], int.from_bytes(jpeg[start + 2 : start + 4])
        end = start + 2 + length
        metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not metadata or length >= useful.get(marker, 2**16):
            bare.append(jpeg[start:end])
        start = end
    return b"".join(bare) + jpeg[start:]


def open_and_load(file: io.BufferedIOBase, size: int) -> Image.Image:
    """Returns the first frame of an image file, a large JPEG scaled down."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(why_unidentified(file)) from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:  # Pillow only warns up to twice as many
        raise ValueError(f"{image.width * image.height:,} pixels, over {limit:,}: a decompression bomb?")
    image.draft(None, (8 * size, 8 * size))  # a large JPEG is decoded at an eighth of its size, or a quarter
    return load(image)


def why_unidentified(file: io.BufferedIOBase) -> str:
    """Returns why Pillow opens the file as none of FORMATS."""
    file.seek(0)
    start = file.read(16)
    for kind in FORMATS:
        parser, accepts = Image.OPEN[kind]
        if accepts(start):
            file.seek(0)
            try:
                parser(file, None)
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                return f"a {kind} of a kind that Pillow does not read, or damaged ({error})"
    return f"none of {', '.join(FORMATS)}, or damaged"


def load(image: Image.Image) -> Image.Image:
    """Returns the image, decoded. Its transparent value, if it has one, is on the scale of its pixels."""
    rawmode = image.tile[0].args if image.format == "PNG" and image.tile else None
    image.load()
    if rawmode in ("L;2", "L;4") and "transparency" in image.info:  # Pillow scales the pixels alone
        image = image.copy()
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}[rawmode]
    if rawmode == "RGB;16B" and "transparency" in image.info:
        raise ValueError("a transparent colour of 16 bits, which Pillow misreads: save it with alpha")
    return image


def eight_bits(image: Image.Image) -> Image.Image:
    """Returns 16-bit grey as the upper 8 bits, with its transparent value as white. Other images stay.

    Raises ValueError for pixels of 32 bits, and for a TIFF that Pillow misreads.
    """
    tags = getattr(image, "tag_v2", None)  # of a TIFF
    if tags:
        check_layout(image)
    # Pillow gives a PPM of 16 bits the mode of 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        pixels = np.asarray(image).astype(np.uint16)
        transparent = image.info.get("transparency")
        if transparent is not None:
            pixels[pixels == transparent] = 65535
        if tags:
            pixels <<= 16 - tags[tiff.BITSPERSAMPLE][0]
            if tags.get(tiff.PHOTOMETRIC_INTERPRETATION, 0) == 0:  # white is zero
                pixels = ~pixels
        grey = from_array(pixels)
        grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
        return grey
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, of unknown range")
    return image


def check_layout(image: tiff.TiffImageFile) -> None:
    """Raises ValueError for a TIFF of a layout that Pillow decodes without knowing it."""
    tags = image.tag_v2
    raw = image.info.get("compression") == "raw"
    bits = max(tags.get(tiff.BITSPERSAMPLE, (1,)))
    fault = None
    if 2 in tags.get(tiff.SAMPLEFORMAT, ()):
        fault = "of signed numbers"
    elif tags.get(tiff.PLANAR_CONFIGURATION) == 2:
        no_alpha = image.mode == "RGBA" and tiff.EXTRASAMPLES not in tags
        raw_fault = raw and (bits > 8 or tags.get(tiff.FILLORDER) == 2)
        if raw_fault or no_alpha or image.mode in ("LA", "La", "PA", "LAB"):
            fault = f"of {image.mode} in planes of {bits} bits"
    elif image.mode == "YCbCr" and raw and tags.get(tiff.YCBCRSUBSAMPLING) != (1, 1):
        fault = "of subsampled colours without compression"
    elif image.mode in ("P", "PA") and 0 < max(tags[tiff.COLORMAP]) < 256:
        fault = "with a palette of 8 bits"
    if fault:
        raise ValueError(f"a TIFF {fault}, which Pillow misreads: save it as PNG")


def upright(image: Image.Image) -> Image.Image:
    """Returns the image, turned as its EXIF says. A broken EXIF breaks no picture."""
    turn = None
    with contextlib.suppress(Exception):
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def on_white(image: Image.Image) -> Image.Image:
    """Returns the image in RGB, with transparency on white."""
    if image.mode == "La":  # Pillow converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

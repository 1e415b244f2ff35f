"""Reading one picture, whatever its mode, as the 8-bit RGB that was meant."""

from __future__ import annotations

import os
import stat
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from ..errors import DataError
from .buckets import Cut, plan_cut
from .kinds import HEAD_BYTES, tell_kind

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_WHITE = (255, 255, 255, 255)
_TRY = "replace it with a whole picture or delete it"


def read_picture(path: Path) -> Image.Image:
    """The picture in RGB: turned as its EXIF says, transparency on white, 16-bit grey rescaled, a film's first frame.

    Raises: DataError, naming the file and the fix, where it cannot be decoded.
    """
    with strict_warnings([path]):
        try:
            return decode_picture(path)
        except ValueError as error:
            problem, fix = error.args
            raise DataError(f"{path}: {problem}; {fix}") from None


@contextmanager
def strict_warnings(paths: Iterable[Path]) -> Iterator[None]:
    """Makes Pillow's warning of a decompression bomb an error; not to be entered from several threads at once.

    Where one of the pictures to be read is a TIFF by its name, what libtiff says of damage on stderr is not heard.
    """
    quiet = _closed_stderr() if any(path.suffix.lower() in (".tif", ".tiff") for path in paths) else nullcontext()
    with quiet, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # A damaged tag is no news: a picture that is cut short fails when its pixels are read.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


@contextmanager
def _closed_stderr() -> Iterator[None]:
    """Nothing reaches stderr, whatever writes there: libtiff does so by itself, past Python."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed already
        yield
        return
    try:
        sys.stderr.flush()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def decode_picture(path: Path) -> Image.Image:
    """As `read_picture`, for many threads inside one `strict_warnings`.

    Raises: ValueError with two arguments, the problem and the fix.
    """
    image = _decode(path, _to_rgb)
    assert image is not None
    return image


def decode_grey(path: Path) -> Image.Image:
    """As `decode_picture`, a grey picture as 8-bit grey. Raises: as it, and where it has colours or clear parts."""
    image = _decode(path, _to_grey)
    assert image is not None
    return image


def decode_alpha(path: Path) -> Image.Image | None:
    """As `decode_picture`, how opaque it is, as 8-bit grey; None where it has no alpha channel. Raises: as it."""
    return _decode(path, _to_alpha)


def _decode(path: Path, convert: Callable[[Image.Image], Image.Image | None]) -> Image.Image | None:
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"cannot be read ({_reason(error)})", "mend the link or the rights, or delete it") from None
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise ValueError("is not a plain file", "replace it with a picture or delete it")
    if found.st_size == 0:
        raise ValueError("is empty (0 bytes)", _TRY)
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            if image.format == "PNG":
                _check_png(path)
            if image.format in ("JPEG", "MPO"):
                _check_jpeg(path)
            return convert(_scale_tiff(ImageOps.exif_transpose(image), image))
    except PermissionError as error:
        raise ValueError(f"cannot be read ({_reason(error)})", "give yourself the right to read it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("is too large to be a training picture", "scale it down") from None
    except Image.UnidentifiedImageError:
        raise ValueError(*tell_kind(_read_head(path))) from None
    except MemoryError:
        raise ValueError("does not fit in memory", "scale it down") from None
    except UnsupportedMode as error:
        raise ValueError(str(error), error.fix) from None
    # A damaged file can make a decoder fail in any way: OSError, SyntaxError, struct.error, EOFError, …
    except Exception as error:
        raise ValueError(f"cannot be decoded ({_reason(error)})", _TRY) from None


def fit_picture(image: Image.Image, resolution_px: int) -> Image.Image:
    """The centre square of an RGB picture, scaled to resolution_px a side (Lanczos); its shorter side is kept whole."""
    return cut_picture(image, plan_cut(image.size, (resolution_px, resolution_px)))


def cut_picture(image: Image.Image, cut: Cut) -> Image.Image:
    """The part of an RGB picture that its cut keeps, scaled to the cut's size (Lanczos)."""
    # Crop before scaling: a picture of 1 x 60000 would otherwise grow to gigabytes on the way.
    part = image.crop(cut.box)
    return part if part.size == cut.size else part.resize(cut.size, Image.Resampling.LANCZOS)


class UnsupportedMode(Exception):
    """A picture whose numbers have no agreed meaning as 8-bit colours, or as a mask."""

    def __init__(self, problem: str, fix: str = "save it as 8-bit RGB") -> None:
        super().__init__(problem)
        self.fix = fix


_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_MOST_TINT = 24  # of 255: how far a grey picture's channels may lie apart, as JPEG leaves them


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I":  # where white lies is known of 16 bits without a sign alone
        raise UnsupportedMode("is a picture of signed or 32-bit numbers")
    if image.mode in _16_BIT:
        image = _grey_from_16_bit(image)
    if image.mode in ("F", "LAB"):
        raise UnsupportedMode(f"is a picture of {'floating-point numbers' if image.mode == 'F' else 'L*a*b* colours'}")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture).convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    alpha = _to_alpha(image)
    if alpha is not None and alpha.getextrema() != (255, 255):
        raise UnsupportedMode("has transparent parts, so is no mask", "save it as a grey picture, black there")
    image = _to_rgb(image)
    channels = np.asarray(image).astype(np.int16)
    if int((channels.max(-1) - channels.min(-1)).max()) > _MOST_TINT:
        raise UnsupportedMode("has colours, so is no mask", "save it as a grey picture: white is learnt, black is not")
    return image.convert("L")


def _to_alpha(image: Image.Image) -> Image.Image | None:
    clear = image.info.get("transparency")
    if image.mode in _16_BIT:
        grey = np.asarray(image)
        return Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or clear is not None:
        return image.convert("RGBA").getchannel("A")
    return None


def _scale_tiff(image: Image.Image, read: Image.Image) -> Image.Image:
    """A grey TIFF of 12 bits, or whose white is 0, as 16-bit grey whose white is 65535; any other as it is.

    `read` is the picture as Pillow read it, whose tags are not lost yet.
    """
    if not isinstance(read, TiffImagePlugin.TiffImageFile) or image.mode not in _16_BIT:
        return image
    values = np.asarray(image).astype(np.uint32)
    if read.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] == 12:
        values = values * 65535 // 4095
    if read.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        values = 65535 - values
    return Image.fromarray(values.astype(np.uint16))


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:  # it went away meanwhile
        return b"?"


def _check_png(path: Path) -> None:
    """Holds the pixels' chunks against their checksums, which Pillow does not. Raises: OSError where one is wrong."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            (length,) = struct.unpack(">I", head[:4])
            if head[4:] != b"IDAT":
                if head[4:] == b"IEND":
                    return
                file.seek(length + 4, 1)
                continue
            total = zlib.crc32(head[4:])
            while length:
                part = file.read(min(length, 1 << 20))
                if not part:
                    raise OSError("it ends within its pixels")
                total, length = zlib.crc32(part, total), length - len(part)
            if file.read(4) != struct.pack(">I", total):
                raise OSError("the checksum of its pixels is wrong")


def _check_jpeg(path: Path) -> None:
    """Raises OSError where a JPEG has no end but zero bytes, which decode as grey: it was never written in full."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _ZEROS))
        if file.read().strip(b"\0"):
            return
        file.seek(0)
        data = file.read()
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):  # to where the pixels begin
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big") if data[at + 1] != 0xFF else 1
    if b"\xff\xd9" not in data[at:]:
        raise OSError("it ends in zero bytes")


_ZEROS = 64
"""How many zero bytes no whole JPEG ends in, but for what comes after its end."""


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    """8-bit grey of a 16-bit picture: v / 257 rounded, so that white stays white (Pillow's own way clips at 255)."""
    values = np.asarray(image).astype(np.int64)
    grey = (values + 128) // 257
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__

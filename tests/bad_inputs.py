"""A corpus of pictures, captions, metadata rows, TOML files and flags that are wrong in one way each, and what is said.

Beside them pictures and captions that are odd but good, and what they must be read as.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WHOLE = "replace it with a whole picture or delete it"
OTHER = "replace it with a picture or delete it"
SAVE = "save it as png or jpg, or delete it"
RGB = "save it as 8-bit RGB"
LINK = "mend the link or the rights, or delete it"
UTF8 = "save it as UTF-8 text"
ROW = 'write {"file_name": "a.png", "text": "a caption"} on each line'
RELATIVE = "name the picture relative to the metadata file"
Content = bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Bad:
    """A file that is wrong: what it is called, what is in it, and the problem and the fix that must be named."""

    what: str
    name: str
    content: Content
    problem: str
    """How the problem begins."""
    fix: str

    def put(self, folder: Path) -> Path:
        path = folder / self.name
        write(path, self.content)
        return path


@dataclass(frozen=True)
class Good:
    """A file that is odd: what it is called, what is in it, and what it must be read as."""

    what: str
    name: str
    content: Content
    expected: Any
    most_off: int = 0
    """How far a value of a picture may lie from the expected one."""


def write(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


# --- pictures as bytes ----------------------------------------------------------------------------------------------


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noisy(kind: str, side_px: int = 32, **options: Any) -> bytes:
    """A picture of noise, which no coder makes small."""
    return save(Image.fromarray(noise(side_px, side_px)), kind, **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, interlaced: bool = False, *more: bytes) -> bytes:
    """A PNG written by hand, so that no library's conversion is in the way; the rows with their filter bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def interlaced(pixels: np.ndarray) -> bytes:
    """A PNG of 8-bit RGB in Adam7's seven passes."""
    height, width, _ = pixels.shape
    rows = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        part = pixels[y::dy, x::dx]
        rows += b"".join(b"\0" + row.tobytes() for row in part if part.shape[1])
    return png(width, height, 8, 2, rows, True)


def tiff(
    width: int, height: int, bits: int, data: bytes, white: int = 1, number: int = 1, samples: int = 1,
    order: str = "<", tile_px: int = 0, **tags: int,
) -> bytes:  # fmt: skip
    """A TIFF written by hand: white is 0 (at 0), 1 (at the top), 2 RGB; number is 1 unsigned, 2 signed, 3 floating."""
    rows = {256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * samples), 259: (3, [1]), 262: (3, [white])}
    rows |= {277: (3, [samples]), 339: (3, [number] * samples)} | {int(k[1:]): (3, [v]) for k, v in tags.items()}
    at, size = (324, 325) if tile_px else (273, 279)
    tiles = -(-width // tile_px) * -(-height // tile_px) if tile_px else 1
    each = len(data) // tiles
    start = 8 + 2 + 12 * (len(rows) + 2 + 2 * bool(tile_px)) + 4
    outside = b""

    def pack(kind: int, values: list[int]) -> bytes:
        return struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)

    longest = 2 * (2 * samples if samples > 2 else 0) + (8 * tiles if tiles > 1 else 0)
    rows |= {at: (4, [start + longest + each * n for n in range(tiles)]), size: (4, [each] * tiles)}
    rows |= {322: (3, [tile_px]), 323: (3, [tile_px])} if tile_px else {278: (3, [height])}
    if not tile_px:
        start += 12  # one row more than was counted: rows per strip
        rows[at] = (4, [start + longest])
    entries = b""
    for tag, (kind, values) in sorted(rows.items()):
        packed = pack(kind, values)
        if len(packed) > 4:
            outside, packed = outside + packed, struct.pack(order + "I", start + len(outside))
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    assert len(outside) == longest
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(rows))
    return head + entries + struct.pack(order + "I", 0) + outside + data


def jpeg_with(marker: int, data: bytes, whole: bytes) -> bytes:
    """A JPEG with one more segment at its start."""
    return whole[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + whole[2:]


def orientation(value: int, kind: int = 3) -> bytes:
    """EXIF that says how the picture is turned."""
    packed = struct.pack("<HH", value, 0) if kind == 3 else b"%d\0\0\0" % value
    return b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI", 0x112, kind, 1 if kind == 3 else 2) + packed + bytes(4)


def flip_bit(content: bytes, at: int, bit: int = 2) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.png", b"x")
    return out.getvalue()


# --- bad pictures ---------------------------------------------------------------------------------------------------


def bad_pictures() -> list[Bad]:
    red = Image.new("RGB", (16, 16), "red")
    whole = {kind: noisy(kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")}
    suffixes = {"PNG": "png", "JPEG": "jpg", "BMP": "bmp", "TIFF": "tif", "GIF": "gif", "WEBP": "webp"}
    found = []

    def bad(what: str, name: str, content: Content, problem: str, fix: str = WHOLE) -> None:
        found.append(Bad(what, name, content, problem, fix))

    for kind, suffix in suffixes.items():
        content = whole[kind]
        bad(f"{kind} of 0 bytes", f"x.{suffix}", b"", "is empty (0 bytes)")
        bad(f"{kind} cut to one byte", f"x.{suffix}", content[:1], "is not a picture, whatever its name says", OTHER)
        bad(f"{kind} of zero bytes", f"x.{suffix}", bytes(len(content)), "holds nothing but zero bytes")
    for kind in ("PNG", "JPEG", "BMP", "GIF"):
        content = whole[kind]
        for part in (0.5, 0.9):
            what = f"{kind} cut at {part:.0%}"
            bad(what, f"x.{suffixes[kind]}", content[: int(part * len(content))], "cannot be decoded (")
    damaged = "that is damaged or of a kind that is not read"
    anew = f"{RGB}, or {OTHER}"
    bad("WebP cut at half", "x.webp", whole["WEBP"][: len(whole["WEBP"]) // 2], "cannot be decoded (")
    bad("TIFF cut at half", "x.tif", tiff(32, 32, 8, bytes(1024))[:600], "cannot be decoded (")
    bad("TIFF cut in its tags", "x.tif", tiff(32, 32, 8, bytes(1024))[:40], f"is a TIFF {damaged}", anew)
    bad("PNG cut in its header", "x.png", whole["PNG"][:20], "cannot be decoded (")
    bad("JPEG cut in its header", "x.jpg", whole["JPEG"][:30], "cannot be decoded (")
    bad("GIF cut in its header", "x.gif", whole["GIF"][:8], f"is a GIF {damaged}", anew)
    bad("BMP cut in its header", "x.bmp", whole["BMP"][:20], "cannot be decoded (")
    # bit rot
    at = whole["PNG"].index(b"IDAT")
    bad("PNG, a bit of its pixels", "x.png", flip_bit(whole["PNG"], at + 1000), "cannot be decoded (")
    crc = "cannot be decoded (the checksum of its pixels is wrong)"
    bad("PNG, a bit of its pixels' checksum", "x.png", flip_bit(whole["PNG"], len(whole["PNG"]) - 13), crc)
    stored = save(Image.fromarray(noise(32, 32)), "PNG", compress_level=0)
    bad("PNG, a bit of stored pixels", "x.png", flip_bit(stored, stored.index(b"IDAT") + 2000), "cannot be decoded (")
    bad("PNG, a bit of its width", "x.png", flip_bit(whole["PNG"], 19), f"is a PNG {damaged}", anew)
    bad("PNG, a bit of a chunk's name", "x.png", flip_bit(whole["PNG"], at), f"is a PNG {damaged}", anew)
    bad(
        "PNG, its second half zeros",
        "x.png",
        whole["PNG"][:1500].ljust(len(whole["PNG"]), b"\0"),
        "cannot be decoded (",
    )
    bad("PNG of 0 x 0", "x.png", png(0, 0, 8, 2, b""), f"is a PNG {damaged}", anew)
    bad("PNG without pixels", "x.png", whole["PNG"][: at - 4] + chunk(b"IEND", b""), "cannot be decoded (")
    bad("PNG of 3-bit colours", "x.png", png(2, 2, 3, 2, bytes(20)), f"is a PNG {damaged}", anew)
    middle = len(whole["JPEG"]) // 2
    markers = whole["JPEG"][:middle] + b"\xff\x99" * 20 + whole["JPEG"][middle + 40 :]
    bad("JPEG, markers in its body", "x.jpg", markers, "cannot be decoded (")
    bad("JPEG without its tables", "x.jpg", whole["JPEG"].replace(b"\xff\xdb", b"\xff\xfe"), "cannot be decoded (")
    bad(
        "JPEG, its second half zeros",
        "x.jpg",
        whole["JPEG"][:middle] + bytes(middle),
        "cannot be decoded (it ends in zero",
    )
    thumbnail = jpeg_with(0xE1, b"Exif\0\0" + noisy("JPEG", 8), whole["JPEG"])[:-500] + bytes(500)
    bad("JPEG with a thumbnail, its end zeros", "x.jpg", thumbnail, "cannot be decoded (it ends in zero")
    bad("GIF without its pixels", "x.gif", whole["GIF"][:800], "cannot be decoded (")
    # numbers without a meaning as 8-bit colours
    floats, ints = "is a picture of floating-point numbers", "is a picture of signed or 32-bit numbers"
    bad("TIFF of floats", "x.tif", tiff(2, 1, 32, struct.pack("<2f", 0, 1), number=3), floats, RGB)
    bad(
        "TIFF of big-endian floats", "x.tif", tiff(2, 1, 32, struct.pack(">2f", 0, 1), number=3, order=">"), floats, RGB
    )
    bad("TIFF of NaN", "x.tif", tiff(2, 1, 32, struct.pack("<2f", 0, float("nan")), number=3), floats, RGB)
    bad("TIFF of doubles", "x.tif", tiff(2, 1, 64, bytes(16), number=3), f"is a TIFF {damaged}", anew)
    rgb = tiff(1, 1, 32, bytes(12), white=2, number=3, samples=3)
    bad("TIFF of float RGB", "x.tif", rgb, f"is a TIFF {damaged}", anew)
    bad("TIFF of L*a*b*", "x.tif", save(Image.new("LAB", (4, 4)), "TIFF"), "is a picture of L*a*b* colours", RGB)
    bad("32-bit grey", "x.tif", tiff(2, 1, 32, struct.pack("<2I", 0, 2**32 - 1)), ints, RGB)
    bad("32-bit grey that would fit 16", "x.tif", tiff(2, 1, 32, struct.pack("<2I", 0, 255)), ints, RGB)
    bad("signed 32-bit grey", "x.tif", tiff(2, 1, 32, struct.pack("<2i", -1, 9), number=2), ints, RGB)
    bad("signed 16-bit grey", "x.tif", tiff(2, 1, 16, struct.pack("<2h", -1000, 9), number=2), ints, RGB)
    bad("signed 16-bit grey above 0", "x.tif", tiff(2, 1, 16, struct.pack("<2h", 0, 32767), number=2), ints, RGB)
    # too large
    big, scale = "is too large to be a training picture", "scale it down"
    bad("a bomb, PNG", "x.png", png(60_000, 60_000, 1, 0, b""), big, scale)
    bad("a small bomb, PNG", "x.png", png(10_000, 10_000, 1, 0, b""), big, scale)
    bad("a bomb, GIF", "x.gif", whole["GIF"][:6] + b"\xff\xff\xff\xff" + whole["GIF"][10:], big, scale)
    bad("a bomb, TIFF", "x.tif", tiff(65_535, 65_535, 8, b"\0"), big, scale)
    huge = bytearray(whole["BMP"])
    huge[18:26] = struct.pack("<ii", 100_000, 100_000)
    bad("a bomb, BMP", "x.bmp", bytes(huge), big, scale)
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))
    bad(
        "a bomb in a PNG's text",
        "x.png",
        whole["PNG"][:33] + bomb + whole["PNG"][33:],
        "cannot be decoded (Decompressed data",
    )
    # something else under a picture's name
    page = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>404</body></html>"
    bad("a page", "x.png", page, "is a web page, not a picture", "download the picture itself, or delete it")
    bad(
        "a page in capitals",
        "x.jpg",
        b"<HTML></HTML>",
        "is a web page, not",
        "download the picture itself, or delete it",
    )
    drawing = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
    bad("SVG", "x.jpg", drawing, "is an SVG drawing, which is not read", SAVE)
    bad("PDF", "x.jpg", b"%PDF-1.7\n1 0 obj", "is a PDF, not a picture", OTHER)
    bad("ZIP", "x.jpg", zipped(), "is a ZIP archive, not a picture", OTHER)
    tensors = struct.pack("<Q", 2) + b"{}"
    bad("safetensors", "x.jpg", tensors, "is a safetensors file, not a picture", OTHER)
    bad("a text", "x.png", b"I am a text", "is not a picture, whatever its name says", OTHER)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    bad("Git LFS", "x.png", pointer, "is a pointer of Git LFS, not the picture", "fetch it with git lfs pull")
    bad("gzip", "x.webp", b"\x1f\x8b\x08" + bytes(20), "is a gzip archive, not a picture", OTHER)
    bad("a video", "x.gif", b"\0\0\0\x20ftypisom" + bytes(20), "is a video, not a picture", OTHER)
    bad("HEIC", "x.jpg", b"\0\0\0\x18ftypheic" + bytes(20), "is a HEIC picture, which is not read", SAVE)
    bad("AVIF", "x.jpg", save(red, "AVIF"), "is an AVIF picture, which is not read", SAVE)
    bad("JPEG 2000", "x.jpg", save(red, "JPEG2000"), "is a JPEG 2000 picture, which is not read", SAVE)
    bad("JPEG XL", "x.png", b"\xff\n" + bytes(20), "is a JPEG XL picture, which is not read", SAVE)
    bad("ICO", "x.png", save(red, "ICO"), "is an ICO picture, which is not read", SAVE)
    bad("Photoshop", "x.tif", b"8BPS\0\1" + bytes(20), "is a Photoshop picture, which is not read", SAVE)
    bad("PPM", "x.png", save(red, "PPM"), "is a Netpbm picture, which is not read", SAVE)
    for suffix in ("heic", "HEIF", "avif", "jxl", "psd", "jp2", "apng", "tga", "dng"):
        bad(f"the suffix {suffix}", f"x.{suffix}", b"x", "is of a kind that is not read", SAVE)
    # no plain file
    bad("a pipe", "x.png", os.mkfifo, "is not a plain file", OTHER)
    bad("a link to nothing", "x.png", lambda p: p.symlink_to("gone"), "cannot be read (No such file", LINK)
    bad("a link to itself", "x.jpg", lambda p: p.symlink_to(p.name), "cannot be read (Too many levels", LINK)
    bad("a link to a device", "x.png", lambda p: p.symlink_to("/dev/zero"), "is not a plain file", OTHER)
    return found


# --- good pictures --------------------------------------------------------------------------------------------------


def _grey(*values: int) -> list[Any]:
    return [[[v] * 3 for v in values]]


def good_pictures() -> list[Good]:
    found: list[Good] = []
    pixels = noise(11, 9)
    image = Image.fromarray(pixels)

    def good(what: str, name: str, content: Content, expected: Any, most_off: int = 0) -> None:
        found.append(Good(what, name, content, expected, most_off))

    grey16 = struct.pack(">4H", 0, 257, 32896, 65535)
    good("16-bit grey PNG", "a.png", png(4, 1, 16, 0, b"\0" + grey16), _grey(0, 1, 128, 255))
    clear = chunk(b"tRNS", struct.pack(">H", 257))
    good("16-bit grey, one clear", "a.png", png(4, 1, 16, 0, b"\0" + grey16, False, clear), _grey(0, 255, 128, 255))
    good("16-bit grey TIFF", "a.tif", tiff(2, 1, 16, struct.pack("<2H", 32896, 65535)), _grey(128, 255))
    good("16-bit grey TIFF, big-endian", "a.tif", tiff(4, 1, 16, grey16, order=">"), _grey(0, 1, 128, 255))
    inverted = tiff(3, 1, 16, struct.pack("<3H", 0, 32896, 65535), white=0)
    good("16-bit grey TIFF, white at 0", "a.tif", inverted, _grey(255, 127, 0))
    turned = tiff(2, 1, 16, struct.pack("<2H", 0, 65535), white=0, t274=3)
    good("16-bit grey TIFF, white at 0, turned", "a.tif", turned, _grey(0, 255))
    good("12-bit grey TIFF", "a.tif", tiff(2, 1, 12, b"\xff\xf8\x00"), _grey(255, 128))
    good("8-bit grey TIFF, white at 0", "a.tif", tiff(3, 1, 8, b"\0\1\xff", white=0), _grey(255, 254, 0))
    good("4-bit grey TIFF", "a.tif", tiff(4, 1, 4, b"\x0f\x80"), _grey(0, 255, 136, 0))
    good("bilevel TIFF, white at 0", "a.tif", tiff(8, 1, 1, b"\x0f", white=0), _grey(*[255] * 4, *[0] * 4))
    rgb16 = struct.pack("<3H", 0, 32896, 65535)
    good("16-bit RGB TIFF", "a.tif", tiff(1, 1, 16, rgb16, white=2, samples=3), [[[0, 128, 255]]])
    good("16-bit RGB PNG", "a.png", png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0, 32896, 65535)), [[[0, 128, 255]]])
    rgba16 = b"\0" + struct.pack(">8H", 0, 0, 0, 0, 257, 514, 771, 65535)
    good("16-bit RGBA PNG", "a.png", png(2, 1, 16, 6, rgba16), [[[255] * 3, [1, 2, 3]]])
    la16 = b"\0" + struct.pack(">4H", 0, 0, 32896, 65535)
    good("16-bit grey with alpha", "a.png", png(2, 1, 16, 4, la16), _grey(255, 128))
    good("2-bit grey PNG", "a.png", png(4, 1, 2, 0, b"\0\x1b"), _grey(0, 85, 170, 255))
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    profile = b"\0\0\2\0lcms" + bytes(504)
    good("CMYK JPEG with a profile", "a.jpg", save(cyan, "JPEG", quality=100, icc_profile=profile),
         np.full((16, 16, 3), (0, 255, 255)), 2)  # fmt: skip
    good(
        "CMYK TIFF with a profile",
        "a.tif",
        save(cyan, "TIFF", icc_profile=profile),
        np.full((16, 16, 3), (0, 255, 255)),
    )
    good("RGB with a profile", "a.png", save(image, "PNG", icc_profile=profile), pixels)
    palette = Image.new("P", (4, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0, 200, 100, 0])
    palette.putdata([0, 1, 2, 3])
    half = save(palette, "PNG", transparency=b"\xff\x00\x33\xff")
    good("palette with alpha", "a.png", half, [[[10, 20, 30], [255] * 3, [204] * 3, [200, 100, 0]]])
    good("palette, one clear", "a.gif", save(palette, "GIF", transparency=3),
         [[[10, 20, 30], [40, 50, 60], [0, 0, 0], [255] * 3]])  # fmt: skip
    good("palette of 8-bit BMP", "a.bmp", save(palette, "BMP"), [[[10, 20, 30], [40, 50, 60], [0] * 3, [200, 100, 0]]])
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    film = {"save_all": True, "append_images": frames[1:]}
    first = np.full((4, 4, 3), (255, 0, 0))
    good("animated GIF", "a.gif", save(frames[0], "GIF", **film), first)
    good("animated WebP", "a.webp", save(frames[0], "WEBP", lossless=True, **film), first)
    good("animated PNG", "a.png", save(frames[0], "PNG", **film), first)
    good("TIFF of pages", "a.tif", save(frames[0], "TIFF", **film), first)
    good("MPO of a stereo camera", "a.jpg", save(frames[0], "MPO", quality=100, **film), first, 3)
    turns: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2), lambda a: a[::-1].transpose(1, 0, 2),
        lambda a: a[::-1, ::-1].transpose(1, 0, 2), lambda a: a.transpose(1, 0, 2)[::-1],
    ]  # fmt: skip
    for value, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x112] = value
        good(f"EXIF orientation {value}, PNG", "a.png", save(image, "PNG", exif=exif), turn(pixels))
        good(f"EXIF orientation {value}, WebP", "a.webp", save(image, "WEBP", lossless=True, exif=exif), turn(pixels))
    flat = Image.new("RGB", (16, 8), (200, 100, 50))
    jpeg, flat_pixels = save(flat, "JPEG", quality=100), np.full((8, 16, 3), (200, 100, 50))
    upright = flat_pixels.transpose(1, 0, 2)
    good("EXIF orientation 6, JPEG", "a.jpg", jpeg_with(0xE1, orientation(6), jpeg), upright, 2)
    good("EXIF orientation 9", "a.jpg", jpeg_with(0xE1, orientation(9), jpeg), flat_pixels, 2)
    good("EXIF orientation as a text", "a.jpg", jpeg_with(0xE1, orientation(6, 2), jpeg), flat_pixels, 2)
    good("EXIF of rubbish", "a.jpg", jpeg_with(0xE1, b"Exif\0\0rubbish!", jpeg), flat_pixels, 2)
    good("MPF of rubbish", "a.jpg", jpeg_with(0xE2, b"MPF\0rubbish!", jpeg), flat_pixels, 2)
    good("progressive JPEG", "a.jpg", save(flat, "JPEG", quality=100, progressive=True), flat_pixels, 2)
    good("grey JPEG", "a.jpeg", save(Image.new("L", (8, 8), 77), "JPEG", quality=100), np.full((8, 8, 3), 77), 1)
    good("JPEG with bytes behind", "a.jpg", jpeg + b"\0" * 100, flat_pixels, 2)
    good("JPEG called png", "a.png", jpeg, flat_pixels, 2)
    good("PNG called JPG, in capitals", "a.JPG", save(image, "PNG"), pixels)
    good("PNG with bytes behind", "a.png", save(image, "PNG") + b"rubbish", pixels)
    good("1 x 1", "a.png", png(1, 1, 8, 2, b"\0\1\2\3"), [[[1, 2, 3]]])
    wide = np.repeat(np.arange(20_000, dtype=np.uint16)[None, :, None] % 256, 3, 2).astype(np.uint8)
    good("20000 x 1", "a.png", save(Image.fromarray(wide), "PNG"), wide)
    good("1 x 20000", "a.webp.png", save(Image.fromarray(wide.transpose(1, 0, 2)), "PNG"), wide.transpose(1, 0, 2))
    good("interlaced PNG", "a.png", interlaced(pixels), pixels)
    squares = noise(32, 32)
    tiles = b"".join(squares[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16))
    good("tiled TIFF", "a.tif", tiff(32, 32, 8, tiles, white=2, samples=3, tile_px=16), squares)
    for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        good(f"TIFF by {how}", "a.tiff", save(image, "TIFF", compression=how), pixels)
    good("big TIFF", "a.tif", save(image, "TIFF", big_tiff=True), pixels)
    veil = Image.new("RGBA", (2, 2), (0, 100, 200, 51))
    pale = np.full((2, 2, 3), (204, 224, 244))
    good("lossless WebP with alpha", "a.webp", save(veil, "WEBP", lossless=True), pale)
    good("premultiplied TIFF", "a.tif", tiff(1, 1, 8, bytes([0, 20, 40, 51]), white=2, samples=4, t338=1),
         [[[204, 224, 244]]])  # fmt: skip
    good("bilevel PNG", "a.png", png(8, 1, 1, 0, b"\0\xf0"), _grey(*[255] * 4, *[0] * 4))
    return found


# --- captions -------------------------------------------------------------------------------------------------------


def bad_captions() -> list[Bad]:
    found = []

    def bad(what: str, content: Content, problem: str, fix: str, name: str = "a.txt") -> None:
        found.append(Bad(what, name, content, problem, fix))

    fox = "ein roter Fuchs über dem Zaun"
    bad("Latin-1", fox.encode("latin-1"), "is not UTF-8 at byte 16", UTF8)
    bad("Latin-1 in .caption", b"caf\xe9", "is not UTF-8 at byte 3", UTF8, "a.caption")
    bad("Latin-1 behind a byte order mark", b"\xef\xbb\xbfcaf\xe9", "is not UTF-8 at byte 6", UTF8)
    bad("UTF-16", fox.encode("utf-16"), "is not UTF-8 at byte 0 but UTF-16", UTF8)
    bad("UTF-16, big-endian", b"\xfe\xff" + fox.encode("utf-16-be"), "is not UTF-8 at byte 0 but UTF-16", UTF8)
    zero = "is not text: it has a zero byte at byte"
    bad("UTF-16 without a mark", b"a\0b\0", f"{zero} 1, as UTF-16 has", UTF8)
    bad("UTF-32 without a mark", "ab".encode("utf-32-be"), f"{zero} 0", UTF8)
    bad("a zero byte", b"a fox\0", f"{zero} 5", UTF8)
    bad("half a character at the end", "a €".encode()[:-1], "is not UTF-8 at byte 2", UTF8)
    bad("half a surrogate", b"a \xed\xa0\x80", "is not UTF-8 at byte 2", UTF8)
    bad("an overlong slash", b"\xc0\xaf", "is not UTF-8 at byte 0", UTF8)
    bad("beyond Unicode", b"a\xf5\x80\x80\x80", "is not UTF-8 at byte 1", UTF8)
    bad("a byte that goes on with nothing", b"abc\x80", "is not UTF-8 at byte 3", UTF8)
    bad("gzip", b"\x1f\x8b\x08", "is not UTF-8 at byte 1", UTF8)
    empty = "write a caption in it, or give --trigger"
    for what, content in (
        ("nothing", ""), ("spaces", "   "), ("line ends", "\r\n\n"), ("a byte order mark", "\ufeff"),
        ("no-break spaces", "\xa0\u2003"), ("a mark and a tab", "\ufeff\t"),
    ):  # fmt: skip
        bad(f"{what} only", content.encode(), "is empty", empty)
    delete = "delete that character"
    for what, content, problem in (
        ("a bell", "a fox\a", "U+0007) at byte 5"),
        ("a terminal's colours", "\x1b[31ma fox", "U+001B) at byte 0"),
        ("a backspace", "a\bb", "U+0008) at byte 1"),
        ("delete", "a fox\x7f", "U+007F) at byte 5"),
        ("a C1 control", "a\x9bb", "U+009B) at byte 1"),
        ("a control behind longer characters", "ü€\x01", "U+0001) at byte 5"),
        ("a control behind a byte order mark", "\ufeffa\x02", "U+0002) at byte 4"),
        ("a control on the second line", "a fox\r\nb\x03", "U+0003) at byte 8"),
    ):
        bad(what, content.encode(), f"has a control character ({problem}", delete)
    bad("2 MB", b"a " * 1_000_000, "is too long for a caption (2.0 MB)", "shorten it to less than 1 MB")
    no_file = "is not a plain file"
    bad("a pipe", os.mkfifo, no_file, "replace it with a text file or delete it")
    device = "replace it with a text file or delete it"
    bad("a link to a device", lambda p: p.symlink_to("/dev/zero"), no_file, device)
    bad("a link to nothing", lambda p: p.symlink_to("gone"), "cannot be read (No such file", LINK)
    bad("a link to itself", lambda p: p.symlink_to(p.name), "cannot be read (Too many levels", LINK)
    bad("a link to a folder's file", lambda p: p.symlink_to("a.png/x"), "cannot be read (Not a directory", LINK)
    return found


def good_captions() -> list[Good]:
    words = " ".join(f"word{n}" for n in range(10_000))
    return [
        Good(what, name, content.encode(), expected)
        for what, name, content, expected in (
            ("a byte order mark", "a.txt", "\ufeffa fox", "a fox"),
            ("Windows' line ends", "a.txt", "a fox,\r\nin snow\r\n", "a fox, in snow"),
            ("an old Mac's line ends", "a.txt", "a fox,\rin snow\r", "a fox, in snow"),
            ("10,000 words", "a.txt", words, words),
            ("tabs and form feeds", "a.txt", "\ta\t\tfox\f\vin snow", "a fox in snow"),
            ("no-break spaces", "a.txt", "a\xa0fox\u2003", "a fox"),
            ("other line ends", "a.txt", "a fox\u2028in\x85snow", "a fox in snow"),
            ("a family", "a.txt", "a 👨‍👩‍👧 fox", "a 👨‍👩‍👧 fox"),
            ("from right to left", "a.txt", "שועל \u200fאדום", "שועל \u200fאדום"),
            ("marks on letters", "a.txt", "u\u0308ber", "u\u0308ber"),
            ("a suffix in capitals", "a.TXT", "a fox", "a fox"),
            ("the suffix caption", "a.caption", "a fox", "a fox"),
            ("braces and quotes", "a.txt", "{\"a\": 'b'} %s \\n", "{\"a\": 'b'} %s \\n"),
            ("just under 1 MB", "a.txt", "a" * (1 << 20), "a" * (1 << 20)),
        )
    ]


# --- rows of metadata.jsonl -----------------------------------------------------------------------------------------


def bad_rows() -> list[tuple[str, bytes, str, str, str]]:
    """What is wrong, the file, and the place (`line 1`, or nothing for the whole file), problem and fix to be named."""

    def row(name: Any, text: Any = "a fox", **more: Any) -> str:
        return json.dumps({"file_name": name, "text": text, **more})

    absolute, climbs = "names the absolute path", "climbs out of the folder with"
    correct = "correct the name or delete the row"
    unicode = "has a text that is no string of Unicode"
    twice = "leave one of them out"
    lines = [
        ("an absolute path", row("/etc/a.png"), f"{absolute} /etc/a.png", RELATIVE),
        ("a Windows path", row("C:\\a.png"), f"{absolute} C:\\a.png", RELATIVE),
        ("a Windows path with slashes", row("c:/a.png"), f"{absolute} c:/a.png", RELATIVE),
        ("a share", row("\\\\host\\b\\a.png"), f"{absolute} \\\\host", RELATIVE),
        ("a root of Windows", row("\\a.png"), f"{absolute} \\a.png", RELATIVE),
        ("climbing out", row("../a.png"), f"{climbs} ../a.png", RELATIVE),
        ("climbing out within", row("b/../../a.png"), climbs, RELATIVE),
        ("climbing out as Windows does", row("..\\a.png"), f"{climbs} ..\\a.png", RELATIVE),
        ("climbing out and back", row("b/../a.png"), climbs, RELATIVE),
        ("naming nothing", row("b.png"), "names b.png, which is no picture here", correct),
        ("a name in other case", row("A.PNG"), "names A.PNG, which is no picture here", correct),
        ("a name without its suffix", row("a"), "names a, which is no picture here", correct),
        ("a folder", row("."), "names ., which is no picture here", correct),
        ("a drive's own path", row("C:a.png"), "names C:a.png, which is no picture here", correct),
        ("a name of 5000 letters", row("a" * 5000), "names aaa", correct),
        ("an address", row("https://example.org/a.png"), "names https://example.org/a.png, which", correct),
        ("no name", '{"text": "a fox"}', "has no file_name", ROW),
        ("an empty name", row(""), "has no file_name", ROW),
        ("a blank name", row(" "), "has no file_name", ROW),
        ("a name that is a number", row(3), "has no file_name", ROW),
        ("a name that is null", row(None), "has no file_name", ROW),
        ("a name that is a list", row(["a.png"]), "has no file_name", ROW),
        ("a name with a zero byte", row("a.png\0"), "has no file_name", ROW),
        ("a name of half a surrogate", row("\ud800.png"), "has no file_name", ROW),
        ("a text that is a number", row("a.png", 3), unicode, ROW),
        ("a text that is null", row("a.png", None), unicode, ROW),
        ("a text that is true", row("a.png", True), unicode, ROW),
        ("a text that is a list", row("a.png", ["a fox"]), unicode, ROW),
        ("a text that is NaN", row("a.png", float("nan")), unicode, ROW),
        ("a text of half a surrogate", row("a.png", "a \udc00"), unicode, ROW),
        ("a text with a bell", row("a.png", "a\a"), "has a control character (U+0007) in its text at character 1",
         "delete that character"),
        ("a text with a zero", row("a.png", "\0"), "has a control character (U+0000)", "delete that character"),
        ("a list", '["a.png", "a fox"]', "is not a JSON object", ROW),
        ("a text", '"a.png"', "is not a JSON object", ROW),
        ("a number", "3", "is not a JSON object", ROW),
        ("NaN", "NaN", "is not a JSON object", ROW),
        ("null", "null", "is not a JSON object", ROW),
        ("single quotes", "{'file_name': 'a.png'}", "is not JSON (", ROW),
        ("cut off", row("a.png")[:-3], "is not JSON (", ROW),
        ("a comma behind", row("a.png") + ",", "is not JSON (", ROW),
        ("two on a line", row("a.png") * 2, "is not JSON (", ROW),
        ("a raw tab", '{"file_name": "a.png", "text": "a\tb"}', "is not JSON (", ROW),
        ("CSV", "file_name,text", "is not JSON (", ROW),
        ("nested too deeply", "[" * 100_000, "is not JSON (", ROW),
        ("a number of 5000 digits", '{"n": ' + "9" * 5000 + "}", "is not JSON (", ROW),
        ("a name twice in a row", '{"file_name": "b.png", "file_name": "a.png"}', "has file_name twice", twice),
        ("a text twice in a row", '{"file_name": "a.png", "text": "a", "text": "b"}', "has text twice", twice),
    ]  # fmt: skip
    found = [(what, line.encode(), "line 1", problem, fix) for what, line, problem, fix in lines]
    again = "delete one of the rows"
    found.append(
        ("repeated", f"{row('a.png')}\n\n{row('a.png')}".encode(), "line 3", "names a.png a second time", again)
    )
    found.append(
        ("repeated otherwise", f"{row('a.png')}\n{row('./a.png')}".encode(), "line 2", "names ./a.png a second", again)
    )
    found.append(("Latin-1", '{"text": "é"}'.encode("latin-1"), "", "is not UTF-8 at byte 10", "save it as UTF-8"))
    behind = b'\xef\xbb\xbf{"text": "\xe9"}'
    found.append(("Latin-1 behind a mark", behind, "", "is not UTF-8 at byte 13", "save it as UTF-8"))
    found.append(("UTF-16", row("a.png").encode("utf-16"), "", "is not UTF-8 at byte 0", "save it as UTF-8"))
    return found


# --- TOML -----------------------------------------------------------------------------------------------------------


def bad_configs() -> list[tuple[bytes, tuple[str, ...]]]:
    """Files that are no recipe, and the parts that the line must have: the key, the value, the fix."""
    quotes = "write false without quotes"
    rows: list[tuple[str | bytes, tuple[str, ...]]] = [
        ("lerning_rate = 1", ("unknown key lerning_rate", "did you mean learning_rate?")),
        ("Steps = 3", ("unknown key Steps", "did you mean steps?")),
        ("batch-size = 3", ("unknown key batch-size", "did you mean batch_size?")),
        ("network_dim = 8", ("unknown key network_dim", "did you mean rank?")),
        ("resolutoin = 512", ("unknown key resolutoin", "did you mean resolution?")),
        ("qqqqqq = 1", ("unknown key qqqqqq", "known are base, ")),
        ('"" = 1', ('unknown key ""', "write key = value lines, such as rank = 8")),
        ('"a\\nb" = 1', ('unknown key "a\\nb"', "such as rank = 8")),
        (f"{'a' * 5000} = 1", ("unknown key", "such as rank = 8")),
        ("[train]\nsteps = 3", ("unknown key train", "put its keys at the top level")),
        ("train.steps = 3", ("unknown key train", "put its keys at the top level")),
        ("[steps]\na = 1", ("steps = {a = 1} is not a whole number", "give one such as 300")),
        ("[[preview]]\na = 1", ("preview = {a = 1} is not text in quotes", "put it in quotes")),
        ("trigger = {a = 1}", ("trigger = {a = 1} is not text in quotes", "put it in quotes")),
        ('flip = "false"', ('flip = "false" is not true or false', quotes)),
        ('flip = "FALSE"', ('flip = "FALSE" is not true or false', quotes)),
        ('buckets = "yes"', ('buckets = "yes" is not true or false', "write true or false")),
        ("dora = 1", ("dora = 1 is not true or false", "write true or false")),
        ("zero_terminal_snr = 0.0", ("zero_terminal_snr = 0.0 is not true or false", "write true or false")),
        ("flip = False", ("line 1, flip = False", "Invalid value", "write true or false")),
        ("learning_rate = nan", ("learning_rate = nan is not a finite number", "give one such as 0.001")),
        ("weight_decay = inf", ("weight_decay = inf is not a finite number", "give one such as 0.01")),
        ("alpha = -inf", ("alpha = -inf is not a finite number",)),
        ("learning_rate = 1e400", ("learning_rate = inf is not a finite number",)),
        ("steps = nan", ("steps = nan is not a whole number", "give one such as 300")),
        ("rank = 0", ("rank = 0 is out of range", "give 1 to 1024")),
        ("rank = 1025", ("rank = 1025 is out of range", "give 1 to 1024")),
        ("steps = -5", ("steps = -5 is out of range", "give 1 or more, such as 300")),
        ("dropout = 1.0", ("dropout = 1.0 is out of range", "give a share from 0 to below 1")),
        ("resolution = 513", ("resolution = 513 is out of range", "give a multiple of 8")),
        ("resolution = 512.0", ("resolution = 512.0 is not a whole number", "write 512")),
        ("caption_dropout = -0.1", ("caption_dropout = -0.1 is out of range", "give a share from 0 to 1")),
        ("clip_skip = 31", ("clip_skip = 31 is out of range", "give 0 to 30")),
        (f"seed = 0x{'f' * 5000}", ("seed = a very large number is out of range", "from 0 to 2^63 - 1")),
        (f"trigger = 0x{'f' * 5000}", ("trigger = a very large number is not text", "put it in quotes")),
        (f"preview = 0x{'f' * 5000}", ("preview = a very large number is not a list", "give a list of texts")),
        (f"preview = [0x{'f' * 5000}]", ("preview = a very large number is not text", "put it in quotes")),
        (f"seed = {'9' * 5000}", ("is not TOML", "a number that is too long", "write key = value lines")),
        (f"preview = {'[' * 450}{']' * 450}", ("preview = [[[[…]]]] is not text", "put it in quotes")),
        (f"steps = {'[' * 9000}", ("is not TOML", "nested too deeply")),
        (f'steps = "{"a" * 5000}"', ("steps = ", "…", "give one such as 300")),
        ('steps = "300"', ('steps = "300" is not a whole number', "write 300 without quotes")),
        ('steps = "many"', ('steps = "many" is not a whole number', "give one such as 300")),
        ('rank = "8.5"', ('rank = "8.5" is not a whole number', "give one such as 8")),
        ('learning_rate = "1e-4"', ('learning_rate = "1e-4" is not a number', "write 1e-4 without quotes")),
        ("steps = [300]", ("steps = [300] is not a whole number", "give one such as 300")),
        ("steps = true", ("steps = true is not a whole number", "give one such as 300")),
        ("steps = 2026-01-01", ("steps = 2026-01-01 is not a whole number", "give one such as 300")),
        ("alpha = 08:00:00", ("alpha = 08:00:00 is not a number",)),
        ("trigger = 3", ("trigger = 3 is not text in quotes", 'write "3"')),
        ('preview = "a fox"', ('preview = "a fox" is not a list', '["a fox"]')),
        ("preview = 3", ("preview = 3 is not a list", "give a list of texts")),
        ('preview = [["a"]]', ('preview = ["a"] is not text', "put it in quotes")),
        ('preview = ["a", " "]', ("preview", "leave out the empty prompt")),
        ('precision = "fp8"', ('precision = "fp8" is not known', "use fp32 or bf16 or fp16")),
        ('precision = "BF16"', ('precision = "BF16" is not known', "did you mean bf16?")),
        ("quantise = 8", ("quantise = 8 is not known", "use none or int8 or nf4")),
        ('tracker = ["mlflow"]', ('tracker = ["mlflow"] is out of range', "give tensorboard, wandb or trackio")),
        ('trigger = "a\\u0007"', ("trigger = 'a\\x07' holds a line break or a control character", "remove it")),
        ('base = ""', ('base = "" is out of range', "name a base, such as mini")),
        ('block_ranks = ["up"]', ("block_ranks has 'up'", "write BLOCK=RANK")),
        ("targets = []", ("targets = [] adapts nothing", "give at least one of")),
        ("preview_every = 5", ("preview_every = 5", "give a prompt with preview")),
        ("rank = 8\nrank = 4", ("line 2, rank = 4", "rank is given twice, leave one out")),
        ("rank = 8\nrank = 8\nsteps = 3", ("line 2, rank = 8", "rank is given twice, leave one out")),
        ("steps: 300", ("line 1, steps: 300", "write key = value lines")),
        ("steps = 300,", ("line 1, steps = 300,", "write key = value lines")),
        ("# ok\n\nsteps = ", ("line 3, steps =", "Invalid value")),
        ("trigger = fox", ("line 1, trigger = fox", "put text in quotes")),
        ('trigger = "fox', ('line 1, trigger = "fox', "write key = value lines")),
        ("learning_rate = .5", ("line 1, learning_rate = .5", "numbers as 0.5")),
        ('{"steps": 3}', ('line 1, {"steps": 3}', "write key = value lines")),
        ("steps = 3\0", ("line 1, ", "write key = value lines")),
        ("<html></html>", ("line 1, <html></html>", "write key = value lines")),
        (b"\xef\xbb\xbfsteps = 3 # \xe9", ("is not UTF-8 at byte 15", "save it as UTF-8")),
        (b"steps = 3 # \xe9", ("is not UTF-8 at byte 12", "save it as UTF-8")),
        ("steps = 3".encode("utf-16"), ("is not UTF-8 at byte 0", "save it as UTF-8")),
        (b"\x89PNG\r\n\x1a\n", ("is not UTF-8 at byte 0", "save it as UTF-8")),
    ]
    return [(text if isinstance(text, bytes) else text.encode(), parts) for text, parts in rows]


# --- flags ----------------------------------------------------------------------------------------------------------


def bad_flags() -> list[tuple[list[str], tuple[str, ...]]]:
    """Flags of `sdlora train` that are wrong, and the parts that the line must have."""
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("--lerning-rate 1", ("unknown flag --lerning-rate", "did you mean --learning-rate?")),
        ("--learning_rate=1", ("unknown flag --learning_rate", "did you mean --learning-rate?")),
        ("--STEPS 3", ("unknown flag --STEPS", "did you mean --steps?")),
        ("--lr 1", ("unknown flag --lr", "did you mean --learning-rate?")),
        ("--network-dim 8", ("unknown flag --network-dim", "did you mean --rank?")),
        ("--zzzz", ("unknown flag --zzzz", "see sdlora train --help")),
        ("-x", ("unknown flag -x", "see sdlora train --help")),
        ("--step 3", ("unknown flag --step", "did you mean --steps?")),
        ("--steps", ("--steps needs a value",)),
        ("--trigger --dora", ("--trigger needs a value",)),
        ("--steps=", ("--steps: '' is not a whole number",)),
        ("--steps many", ("--steps: 'many' is not a whole number",)),
        ("--steps 1e3", ("--steps: '1e3' is not a whole number",)),
        ("--steps 3.0", ("--steps: '3.0' is not a whole number",)),
        ("--steps 1_000", ("--steps: '1_000' is not a whole number",)),
        ("--steps ٣", ("--steps: '٣' is not a whole number",)),
        ("--steps 0x10", ("--steps: '0x10' is not a whole number",)),
        ("--steps 3 4", ("4 is one argument too many",)),
        ("--steps 0", ("steps = 0 is out of range", "give 1 or more, such as 300")),
        ("--steps -3", ("steps = -3 is out of range", "give 1 or more, such as 300")),
        ("--steps 99999999999999999999999", ("steps = a very large number is out of range", "give 1 or more")),
        ("--alpha nan", ("--alpha: 'nan' is not a finite number",)),
        ("--alpha inf", ("--alpha: 'inf' is not a finite number",)),
        ("--alpha 1e999", ("--alpha: '1e999' is not a finite number",)),
        ("--alpha 0", ("alpha = 0.0 is out of range", "give a number above 0")),
        ("--learning-rate 1,5", ("--learning-rate: '1,5' is not a finite number",)),
        ("--learning-rate -1e-3", ("learning_rate = -0.001 is out of range", "such as 0.001")),
        ("--caption-dropout 1.5", ("caption_dropout = 1.5 is out of range", "give a share from 0 to 1")),
        ("--rank 8.0", ("--rank: '8.0' is not a whole number",)),
        ("--rank 4096", ("rank = 4096 is out of range", "give 1 to 1024")),
        ("--resolution 100", ("resolution = 100 is out of range", "give a multiple of 8")),
        ("--seed -1", ("seed = -1 is out of range", "give a whole number from 0")),
        ("--seed 9223372036854775808", ("seed = 9223372036854775808 is out of range", "2^63 - 1")),
        ("--flip=false", ("--flip/--no-flip takes no value", "'false'", "alone")),
        ("--flip false", ("false is one argument too many",)),
        ("--no-dora=1", ("--dora/--no-dora", "'1'")),
        ("--precision int8", ('precision = "int8" is not known', "use fp32 or bf16 or fp16")),
        ("--precision bf61", ('precision = "bf61" is not known', "did you mean bf16?")),
        ("--optimizer sgd", ('optimizer = "sgd" is not known', "use adamw or")),
        ("--crop left", ('crop = "left" is not known', "use centre or random")),
        ("--device tpu", ("--device", "'tpu'", "'cpu'")),
        ("--tracker mlflow", ('tracker = ["mlflow"] is out of range', "give tensorboard, wandb or trackio")),
        ("--targets ,", ("target '' is not known", "use attention")),
        ("--blocks over", ("block 'over' is not known", "use down, mid, up")),
        ("--block-ranks up=zero", ("block_ranks has 'up=zero'", "write BLOCK=RANK")),
        ("--merge a.safetensors:nan", ("weight 'nan' is no finite number", "write FILE:WEIGHT")),
        ("--preview-every 5", ("preview_every = 5", "give a prompt with preview (--preview)")),
        ("--text-encoder-learning-rate 1e-4", ("text_encoder_learning_rate = 0.0001", "--text-encoder")),
        ("--huber-c 0.2", ("huber_c = 0.2 has no use", 'set loss = "huber"')),
        ("--t-min 0.9 --t-max 0.1", ("t_min = 0.9 and t_max = 0.1", "give a t_min below t_max")),
        ("--class-prompt fox", ("class_prompt", "class_images")),
        ("--config gone.toml", ("gone.toml: cannot be read (No such file", "give a TOML file")),
        ("--like gone.safetensors", ("gone.safetensors: there is no such file", "give the path")),
    ]
    found = [(words.split(), parts) for words, parts in rows]
    found += [
        (["--preview", ""], ('preview = [""] is out of range', "leave out the empty prompt")),
        (["--base", ""], ('base = "" is out of range', "name a base")),
        (["--trigger", "a\nb"], ("trigger = 'a\\nb' holds a line break", "remove it")),
        (["--trigger", "\x1b[31m"], ("control character", "remove it")),
        (["--preview", "\udcff"], ("preview = '\\udcff' holds", "remove it")),
        (["--learning-rate", "1e-3 "], ("'1e-3 ' is not a finite number",)),
        (["--steps\n", "3"], ("unknown flag --steps",)),
    ]
    return found


# --- damage at random -----------------------------------------------------------------------------------------------


def damage(content: bytes, seed: int) -> bytes:
    """A file with random bits changed, bytes cut off, put in, taken out or blanked."""
    draws, changed = random.Random(seed), bytearray(content)
    for _ in range(draws.choice((1, 1, 2, 8))):
        how, at = draws.choice(("flip", "flip", "cut", "insert", "remove", "blank")), draws.randrange(len(changed) + 1)
        at = min(at, 64) if draws.random() < 0.3 else at  # the header is where most of a decoder's choices are
        length = draws.choice((1, 4, 64))
        if how == "flip" and at < len(changed):
            changed[at] ^= 1 << draws.randrange(8)
        elif how == "cut":
            del changed[at:]
        elif how == "insert":
            changed[at:at] = draws.randbytes(length)
        elif how == "remove":
            del changed[at : at + length]
        elif how == "blank":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
    return bytes(changed)


def sound_pictures() -> Iterator[tuple[str, bytes]]:
    """A small picture of each format, of noise, to be damaged."""
    yield from ((f"{kind}", noisy(kind)) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"))
    yield "interlaced PNG", interlaced(noise(32, 32))
    yield "progressive JPEG", noisy("JPEG", progressive=True)
    yield "LZW TIFF", noisy("TIFF", compression="tiff_lzw")
    yield "EXIF JPEG", jpeg_with(0xE1, orientation(6), noisy("JPEG"))
    yield "16-bit TIFF", tiff(32, 32, 16, noise(32, 32, 2).tobytes())
    yield "film", save(Image.fromarray(noise(32, 32)), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    yield "tiled TIFF", tiff(32, 32, 8, noise(32, 32).tobytes(), white=2, samples=3, tile_px=16)

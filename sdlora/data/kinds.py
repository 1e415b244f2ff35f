"""What a file is by its first bytes, where that is no picture that is read."""

from __future__ import annotations

HEAD_BYTES = 512
"""How many bytes of a file tell its kind."""
_SAVE = "save it as png or jpg, or delete it"
_REPLACE = "replace it with a picture or delete it"
_READ = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"), (0, b"\xff\xd8\xff", "JPEG"), (8, b"WEBP", "WebP"), (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"II+\0", "TIFF"), (0, b"MM\0+", "TIFF"), (0, b"BM", "BMP"),
)  # fmt: skip
_UNREAD = (
    (4, b"ftypavi", "an AVIF"), (4, b"ftyphei", "a HEIC"), (4, b"ftyphev", "a HEIC"), (4, b"ftypmif1", "a HEIF"),
    (4, b"ftypmsf1", "a HEIF"), (4, b"JXL \r\n", "a JPEG XL"), (0, b"\xff\n", "a JPEG XL"), (4, b"jP  ", "a JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000"), (0, b"8BPS", "a Photoshop"), (0, b"\0\0\1\0", "an ICO"),
    (0, b"v/1\1", "an OpenEXR"), (0, b"DDS ", "a DDS"), (0, b"qoif", "a QOI"), (0, b"gimp xcf", "a GIMP"),
    *((0, b"P%d" % n + end, "a Netpbm") for n in range(1, 7) for end in (b"\n", b" ")),
)  # fmt: skip
_OTHER = (
    (0, b"%PDF", "a PDF"), (0, b"PK\3\4", "a ZIP archive"), (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"), (0, b"Rar!", "a RAR archive"), (4, b"ftyp", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"), (8, b"{", "a safetensors file"),
)  # fmt: skip


def tell_kind(head: bytes) -> tuple[str, str]:
    """What is wrong with a file that no decoder takes, by its first bytes, and the fix."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head.strip(b"\0"):
        return "holds nothing but zero bytes", "replace it with a whole picture or delete it"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the picture", "fetch it with git lfs pull"
    if b"<svg" in text and text.startswith(b"<"):
        return "is an SVG drawing, which is not read", _SAVE
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture", "download the picture itself, or delete it"
    if kind := _find(_READ, head):
        return f"is a {kind} that is damaged or of a kind that is not read", f"save it as 8-bit RGB, or {_REPLACE}"
    if kind := _find(_UNREAD, head):
        return f"is {kind} picture, which is not read", _SAVE
    if kind := _find(_OTHER, head):
        return f"is {kind}, not a picture", _REPLACE
    return "is not a picture, whatever its name says", _REPLACE


def _find(kinds: tuple[tuple[int, bytes, str], ...], head: bytes) -> str:
    return next((kind for at, magic, kind in kinds if head[at : at + len(magic)] == magic), "")

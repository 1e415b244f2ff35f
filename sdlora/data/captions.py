"""Captions as text: reading their bytes, cleaning them, and putting the trigger in front."""

from __future__ import annotations

import re
import stat
import unicodedata
from pathlib import Path

MOST_BYTES = 1 << 20
"""The longest file that can be a caption."""
MEND = "mend the link or the rights, or delete it"


class CaptionError(ValueError):
    """A file that is no caption: what is wrong, and the fix."""

    def __init__(self, problem: str, fix: str = "save it as UTF-8 text") -> None:
        super().__init__(problem)
        self.fix = fix


def read_caption(path: Path, *, lines: bool = False) -> str:
    """The cleaned caption of a file, as `decode_caption`. Raises: CaptionError; OSError."""
    data = read_plain(path)
    if len(data) > MOST_BYTES:
        raise CaptionError(f"is too long for a caption ({len(data) / 1e6:.1f} MB)", "shorten it to less than 1 MB")
    return decode_caption(data, lines=lines)


def read_plain(path: Path) -> bytes:
    """The bytes of a plain file. Raises: OSError; CaptionError for what is none: reading a pipe would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CaptionError("is not a plain file", "replace it with a text file or delete it")
    return path.read_bytes()


def decode_caption(data: bytes, *, lines: bool = False) -> str:
    """The cleaned caption of a file's bytes: UTF-8, with a byte order mark and any line ends taken away.

    With `lines`, the lines that are not empty stay apart.

    Raises: CaptionError, saying what is wrong and where, for bytes that are not UTF-8 text.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise CaptionError(f"is not UTF-8 at byte {error.start}" + (" but UTF-16" if utf16 else "")) from None
    if "\0" in text:
        raise CaptionError(f"is not text: it has a zero byte at byte {data.index(0)}, as UTF-16 has")
    at = find_control(text)
    if at is not None:
        offset = len(text[:at].encode())
        raise CaptionError(f"has a control character (U+{ord(text[at]):04X}) at byte {offset}", "delete that character")
    return clean_lines(text) if lines else clean_caption(text)


def find_control(text: str) -> int | None:
    """Where the first control character is that is no white space; None where there is none."""
    found = (i for i, c in enumerate(text) if unicodedata.category(c) == "Cc" and not c.isspace())
    return next(found, None)


def clean_caption(text: str) -> str:
    """The caption on one line: every run of white space becomes one space, none at the ends."""
    return " ".join(text.removeprefix("\ufeff").split())


def clean_lines(text: str) -> str:
    """The lines that are not empty, each cleaned as one caption."""
    lines = (clean_caption(line) for line in text.removeprefix("\ufeff").splitlines())
    return "\n".join(line for line in lines if line)


def add_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger in front, unless it holds it already as words of its own (whatever their case).

    Of several lines, each is a caption of its own.
    """
    if not trigger:
        return caption
    if "\n" in caption:
        return "\n".join(add_trigger(line, trigger) for line in caption.split("\n"))
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger

"""Captions as text: reading their bytes, cleaning them, and putting the trigger in front."""

from __future__ import annotations

import re


def decode_caption(data: bytes, *, lines: bool = False) -> str:
    """The cleaned caption of a file's bytes: UTF-8, with a byte order mark and any line ends taken away.

    With `lines`, the lines that are not empty stay apart.

    Raises: ValueError, saying what is wrong and where, for bytes that are not UTF-8 text.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise ValueError(f"is not UTF-8 at byte {error.start}" + (" but UTF-16" if utf16 else "")) from None
    if "\0" in text:
        raise ValueError(f"is not text: it has a zero byte at byte {data.index(0)}, as UTF-16 has")
    return clean_lines(text) if lines else clean_caption(text)


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

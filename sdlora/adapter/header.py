"""Checks a .safetensors file's header before any library reads it, and writes one whose bytes do not vary.

Source: the format's description in the safetensors package's documentation.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import AdapterFileError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as the format names it and its shape."""

    dtype: str
    shape: tuple[int, ...]


def printable(text: object, limit: int = 120) -> str:
    """Text from a file made safe to show: control, bidirectional and unprintable characters escaped, cut at `limit`."""
    shown = "".join(
        c if c == " " or unicodedata.category(c)[0] in "LMNPS" else c.encode("unicode_escape").decode("ascii")
        for c in str(text).encode("utf-8", "backslashreplace").decode("utf-8")[: 4 * limit]
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata that a file's header declares, every offset checked against the file's size.

    Raises: AdapterFileError where the file is missing, no file, a pickle, truncated, or its header breaks the format.
    """
    name = printable(path)

    def refuse(problem: str) -> NoReturn:
        raise AdapterFileError(f"{name} {problem}")

    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as f:
            info = os.fstat(f.fileno())
            if not stat.S_ISREG(info.st_mode):
                refuse("is no regular file; give a .safetensors file")
            size = info.st_size
            first, brace = f.read(8), f.read(1)
            if size == 0:
                refuse("is empty (0 bytes); copy or train it again")
            # A header of 640 bytes, say, has a length that begins as a pickle does; but JSON follows it.
            pickled = first[:1] == b"\x80" and first[1:2] in b"\x01\x02\x03\x04\x05" and brace != b"{"
            if first[:4] == b"PK\x03\x04" or pickled:
                refuse("is a pickle, which can run code when it is read; only .safetensors is read")
            if len(first) < 8:
                refuse(f"has only {size} bytes, too few for a .safetensors file")
            (length,) = struct.unpack("<Q", first)
            if length < 2 or length > MAX_HEADER_BYTES:
                refuse(f"is no .safetensors file: its header would be {length} bytes long")
            if 8 + length > size:
                refuse(f"is truncated or no .safetensors file: its header ends at byte {8 + length} of {size}")
            raw = brace + f.read(length - 1)
    except FileNotFoundError:
        refuse("does not exist; check the path")
    except IsADirectoryError:
        refuse("is a folder; give a .safetensors file")
    except (OSError, ValueError) as e:
        refuse(f"cannot be read: {printable(getattr(e, 'strerror', None) or e)}")
    return parse_header(raw, size - 8 - length, name)


def parse_header(raw: bytes, data_bytes: int, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """`read_header` for the header's bytes, with `data_bytes` bytes of tensors behind it."""

    def refuse(problem: str) -> NoReturn:
        raise AdapterFileError(f"{name} has a broken header: {problem}; copy or train it again")

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        refuse(printable(e) if isinstance(e, _Twin) else "it is no JSON in UTF-8")
    if not isinstance(header, dict):
        refuse("it is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse("__metadata__ is not made of strings")
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for key, row in header.items():
        shown = printable(key)
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            refuse(f"{shown} does not have dtype, shape and data_offsets")
        dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            refuse(f"{shown} has the unknown dtype {printable(dtype, 40)}")
        if not _is_sizes(shape):
            refuse(f"{shown} has the shape {printable(shape, 40)}")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            refuse(f"{shown} has the offsets {printable(offsets, 40)}")
        if offsets[1] > data_bytes:
            refuse(f"{shown} ends at byte {offsets[1]} of {data_bytes}: the file is truncated")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
            refuse(f"{shown} takes {offsets[1] - offsets[0]} bytes, which is not what its shape and dtype need")
        entries[key] = Entry(dtype, tuple(shape))
        spans.append((offsets[0], offsets[1], shown))
    end = 0
    for begin, stop, shown in sorted(spans):
        if begin != end:
            refuse(f"{shown} {'overlaps another tensor' if begin < end else 'leaves a hole before it'}")
        end = stop
    if end != data_bytes:
        refuse(f"{data_bytes - end} bytes follow the last tensor")
    return entries, metadata


def replace_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """A .safetensors file's bytes with this metadata and sorted keys (the library's order of metadata varies)."""
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header["__metadata__"] = metadata
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


class _Twin(ValueError):
    pass


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twin(f"{key} is in it twice")
        found[key] = value
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)


def _is_sizes(value: object) -> bool:
    """A list of whole numbers from 0 to 2^63, at most eight of them."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    )

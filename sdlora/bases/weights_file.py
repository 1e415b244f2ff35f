"""A `.safetensors` file of weights read and rewritten one tensor at a time, however large it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..adapter.header import printable, read_header
from ..errors import AdapterFileError, BaseModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The format's names of the dtypes that a weight can have."""
BLOCK_BYTES = 1 << 20
_HASH = re.compile(r"(0x)?[0-9a-f]{64}")

Change = Callable[[Tensor], Tensor | None]
"""What a stored tensor becomes, in its shape and dtype; None where it stays as it is."""


class WeightsFile:
    """One file, known from its header; nothing is kept open and no weight is kept in memory.

    Raises: BaseModelError where its header breaks the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries, self.metadata = read_header(path)
        except AdapterFileError as e:
            raise BaseModelError(str(e).replace("copy or train it again", "copy or download it again")) from None
        with self._open() as f:
            (length,) = struct.unpack("<Q", f.read(8))
            self.header = f.read(length)
        rows = json.loads(self.header)
        self.start = 8 + length
        """Where the first tensor begins."""
        self.spans = {key: tuple(rows[key]["data_offsets"]) for key in self.entries}
        """By key, where a tensor begins and ends, from `start`."""

    def _open(self) -> IO[bytes]:
        try:
            return open(self.path, "rb")
        except OSError as e:
            raise self._unreadable(e) from None

    def _unreadable(self, error: OSError) -> BaseModelError:
        reason = printable(error.strerror or error)
        return BaseModelError(f"{printable(self.path)} cannot be read: {reason}; copy or download it again")

    def read(self, key: str) -> Tensor:
        """A tensor in the file's shape and dtype, a copy.

        Raises: BaseModelError where its dtype is none of a weight's, or the disk fails.
        """
        entry = self.entries[key]
        if entry.dtype not in DTYPES:
            raise BaseModelError(
                f"{printable(self.path)}: {printable(key)} is {entry.dtype}; quantised bases are not supported, "
                "use one in F32, F16 or BF16"
            )
        begin, end = self.spans[key]
        data = bytearray(end - begin)
        with self._open() as f:
            try:
                f.seek(self.start + begin)
                got = f.readinto(data)  # type: ignore[attr-defined]
            except OSError as e:
                raise self._unreadable(e) from None
        if got != len(data):
            raise BaseModelError(f"{printable(self.path)} became shorter while it was read; copy or download it again")
        dtype = DTYPES[entry.dtype]
        return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)


def rewrite_weights(
    file: WeightsFile, out: Path, changes: Mapping[str, Change], report: Callable[[str], None] | None = None
) -> int:
    """Writes the file to `out` with some tensors changed, and returns how many did; the rest is the same to the byte.

    The header is the file's own: names, order, shapes, dtypes and metadata, but for a `modelspec.hash_sha256`, which
    becomes that of the new tensors. One tensor is in memory at a time. What was written is read back and compared.
    `report` is told each key that is changed, before it is. Raises: BaseModelError where the disk fails.
    """
    digest, changed = hashlib.sha256(), 0
    try:
        with file._open() as source, open(out, "wb") as target:
            target.write(len(file.header).to_bytes(8, "little") + file.header)
            source.seek(file.start)
            for key in sorted(file.entries, key=lambda k: file.spans[k]):
                begin, end = file.spans[key]
                value = None
                if key in changes:
                    if report is not None:
                        report(key)
                    value = changes[key](file.read(key))
                if value is not None:
                    changed += 1
                    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
                    target.write(data)
                    digest.update(data)
                    source.seek(end - begin, os.SEEK_CUR)
                    continue
                for block in _blocks(source, end - begin):
                    target.write(block)
                    digest.update(block)
            header = _with_hash(file, digest.hexdigest()) if changed else file.header
            target.seek(8)
            target.write(header)
            target.flush()
            os.fsync(target.fileno())
        with open(out, "rb") as written:
            same = written.read(file.start)[8:] == header
            if not same or hashlib.file_digest(written, "sha256").digest() != digest.digest():
                raise BaseModelError(f"{printable(out)} was not stored as written; check the disk")
    except OSError as e:
        raise BaseModelError(f"{printable(out)} cannot be written: {printable(e.strerror or e)}") from None
    return changed


def _blocks(source: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        block = source.read(min(size, BLOCK_BYTES))
        if not block:
            raise OSError("the file became shorter while it was read")
        size -= len(block)
        yield block


def _with_hash(file: WeightsFile, digest: str) -> bytes:
    """The header with another hash of the tensors, where it has one; it is as long as before."""
    old = file.metadata.get("modelspec.hash_sha256", "")
    if not _HASH.fullmatch(old) or file.header.count(old.encode()) != 1:
        return file.header
    return file.header.replace(old.encode(), old[:-64].encode() + digest.encode())


__all__ = ["DTYPES", "Change", "WeightsFile", "rewrite_weights"]

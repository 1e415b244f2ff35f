"""Files on the disk that are whole or not there: written under another name, synced, and only then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import DiskError

_FIXES = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room in your quota, or choose another place",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f), or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "give yourself the right to write there, or choose another place",
    errno.EPERM: "give yourself the right to write there, or choose another place",
}
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EISDIR}
"""How file systems say that a folder cannot be synced: then its files are as safe as they can be there."""


def write_atomic(path: Path, content: bytes, check: Callable[[Path], None] | None = None) -> None:
    """Writes a whole file, or leaves what was there; `check` sees it on the disk before it takes its name.

    Raises: DiskError where it cannot be written; what `check` raises.
    """
    with replacing(path, len(content), check) as file:
        file.write(content)


def write_new(path: Path, content: bytes) -> bool:
    """Writes a whole file where none is, and returns whether it did; of two processes at once only one does.

    Raises: DiskError where it cannot be written.
    """
    temporary = _beside(path)
    with _failing_as_disk_error(path, len(content)):
        make_folder(path.parent)
        try:
            write_synced(temporary, content)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if path.exists():
                    return False
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    return True


@contextmanager
def replacing(
    path: Path, size_bytes: int | None = None, check: Callable[[Path], None] | None = None
) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` when the block ends well; else what was there stays.

    `size_bytes` is how much will be written, for the message, where that is known.
    Raises: DiskError where it cannot be written; what `check` raises, which is given the file before it is renamed.
    """
    temporary = _beside(path)
    with _failing_as_disk_error(path, size_bytes):
        make_folder(path.parent)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # where removing fails too, what failed first is what to say
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk. Raises: OSError."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, and waits until their names are on the disk.

    Raises: OSError.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's names are on the disk, where its file system can. Raises: OSError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder may be written to and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def drop_half_written(folder: Path, name: str = "*") -> None:
    """Removes what a killed process left of `write_atomic` in a folder; for whoever alone writes there.

    `name` is the file's that was to be written, or a pattern.
    """
    for path in folder.glob(f".{name}.tmp-*"):
        path.unlink(missing_ok=True)


def check_room(folder: Path, size_bytes: int) -> None:
    """Finds a disk that has no room for so many bytes, before any is written. Raises: DiskError."""
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError:  # who cannot tell is asked by writing
        return
    if free_bytes < size_bytes:
        raise DiskError(
            f"{folder} has room for {free_bytes:,} bytes, and {size_bytes:,} are needed; {_FIXES[errno.ENOSPC]}"
        )


def describe_failure(path: Path, error: OSError, size_bytes: int | None = None) -> str:
    """One line: which file of how many bytes could not be written, why, and what to do."""
    size = "" if size_bytes is None else f", {size_bytes:,} bytes,"
    fix = _FIXES.get(error.errno or 0, "check the disk, or choose another place")
    return f"{path}{size} cannot be written: {error.strerror or error}; {fix}"


@contextmanager
def _failing_as_disk_error(path: Path, size_bytes: int | None) -> Iterator[None]:
    if "\0" in str(path):
        raise DiskError(f"{path} cannot be written: its name holds a zero byte; choose another")
    try:
        if path.is_dir():
            raise DiskError(f"{path} is a folder; give the name of a file")
        yield
    except OSError as error:
        raise DiskError(describe_failure(path, error, size_bytes)) from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")

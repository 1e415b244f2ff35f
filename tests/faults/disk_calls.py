"""Every call that changes the disk under a folder, seen one by one: counted, recorded, failed, or died in."""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch


@dataclass(frozen=True)
class Call:
    """One call: what it does, to which path, and for a rename or link to which other, for a write with which bytes."""

    kind: str
    """create, write, sync, sync folder, rename, link, unlink, mkdir or rmdir."""
    path: str
    target: str = ""
    content: bytes = b""


Do = Callable[[bytes | None], Any]
"""Makes the call; a write may be given other bytes than its own."""
Hook = Callable[[Call, int, Do], Any]
"""What happens in the place of a call, the number of which counts from 0."""


class _File:
    """A file that is written to, whose writes and syncs are seen."""

    def __init__(self, file: Any, path: str, see: Callable[[Call, Do], Any]) -> None:
        self._file, self._path, self._see = file, path, see

    def write(self, content: Any) -> Any:
        content = bytes(content) if not isinstance(content, str) else content.encode()

        def do(other: bytes | None = None) -> int:
            self._file.write(content if other is None else other)
            self._file.flush()
            return len(content)

        return self._see(Call("write", self._path, content=content), do)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def watching(root: Path, hook: Hook) -> Iterator[list[Call]]:
    """Sees the calls of this process under a folder; gives the list of those so far."""
    calls: list[Call] = []
    top = os.path.realpath(root)
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir")}
    real_open = builtins.open

    def see(call: Call, do: Do) -> Any:
        number = len(calls)
        calls.append(call)
        return hook(call, number, do)

    def inside(path: Any) -> str:
        full = os.path.join(os.path.realpath(os.path.dirname(os.fspath(path)) or "."), os.path.basename(path))
        return full if full == top or full.startswith(top + os.sep) else ""

    def open_seen(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        place = inside(path) if isinstance(path, str | Path) and set(mode) & set("wax+") else ""
        if not place or place.endswith("lock"):
            return real_open(path, mode, *args, **kwargs)
        if "w" not in mode:  # goes on with a file that is there
            return _File(real_open(path, mode, *args, **kwargs), place, see)
        found = see(Call("create", place), lambda _: real_open(path, mode, *args, **kwargs))
        return _File(found, place, see)

    def fsync(descriptor: int) -> None:
        path = inside(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path:
            return real["fsync"](descriptor)
        kind = "sync folder" if os.path.isdir(path) else "sync"
        return see(Call(kind, path), lambda _: real["fsync"](descriptor))

    def of_two(name: str) -> Callable[..., Any]:
        def call(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            if not inside(source):
                return real[name](source, target, *args, **kwargs)
            kind = "link" if name == "link" else "rename"
            return see(
                Call(kind, inside(source), inside(target)), lambda _: real[name](source, target, *args, **kwargs)
            )

        return call

    def of_one(name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            exists = os.path.lexists(path)
            if not inside(path) or exists == (name == "mkdir"):  # one that will fail changes nothing
                return real[name](path, *args, **kwargs)
            return see(Call(name, inside(path)), lambda _: real[name](path, *args, **kwargs))

        return call

    def rmtree(path: Any, ignore_errors: bool = False) -> None:
        """As shutil's, by paths: its own works by descriptors, which say less."""
        try:
            for entry in sorted(os.scandir(path), key=lambda e: e.name):
                if entry.is_dir(follow_symlinks=False):
                    rmtree(entry.path, ignore_errors)
                else:
                    os.unlink(entry.path)
            os.rmdir(path)
        except OSError:
            if not ignore_errors:
                raise

    seen = {name: of_two(name) for name in ("rename", "replace", "link")}
    seen |= {name: of_one(name) for name in ("unlink", "mkdir", "rmdir")} | {"fsync": fsync}
    with patch.multiple(os, **seen), patch.object(builtins, "open", open_seen), patch.object(shutil, "rmtree", rmtree):
        yield calls


def let(call: Call, number: int, do: Do) -> Any:
    """A hook that only watches."""
    return do(None)


def fail_at(number: int, error: int, for_ever: bool = False) -> Hook:
    """A hook that lets one call fail with an errno, a write after half its bytes; with `for_ever` every later too."""

    def hook(call: Call, at: int, do: Do) -> Any:
        if at == number or (for_ever and at > number):
            if call.kind == "write":
                do(call.content[: len(call.content) // 2])
            raise OSError(error, os.strerror(error), call.path)
        return do(None)

    return hook


def die_at(number: int, half: bool = False) -> Hook:
    """A hook in which the process is killed before one call, or in the middle of it where that is a write."""

    def hook(call: Call, at: int, do: Do) -> Any:
        if at == number:
            if half and call.kind == "write":
                do(call.content[: len(call.content) // 2])
            os.kill(os.getpid(), 9)
        return do(None)

    return hook

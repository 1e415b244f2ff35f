"""The folder of one training run: whose it is, what it was started with, and whether it is finished."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..adapter.file import file_sha256
from ..config import Recipe, compare, recipe_from_toml, recipe_to_toml
from ..errors import RunError
from .checkpoint import drop_half_written, write_atomic


class Run:
    """The run folder that belongs to the file `out`: `<out without suffix>.run/`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_suffix(".run")
        self.recipe = self.folder / "recipe.toml"
        self.origin = self.folder / "origin.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.loss = self.folder / "loss.png"
        self.previews = self.folder / "previews"
        self.checkpoints = self.folder / "checkpoints"
        self.trackers = self.folder / "trackers"
        self.done = self.folder / "done.json"

    def check_free(self) -> None:
        """Keeps a file that this run did not make from being replaced.

        Raises: RunError where `out` is there and no run to go on with.
        """
        if self.out.exists() and self.out.stat().st_size and not self.recipe.exists():
            raise RunError(f"{self.out} exists but no run to go on with; choose another --out, or add --restart")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run folder for this process; the system lets go of it however the process ends.

        Raises: RunError where another process holds it, naming its pid.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "a+")  # noqa: SIM115 (closed below)
        except OSError as e:
            raise RunError(f"{self.folder} cannot be written ({e.strerror}); choose another --out") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                pid = lock.read().strip() or "unknown"
                raise RunError(
                    f"{self.folder} is in use by another training run (pid {pid}); wait for it or choose another --out"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def start(self, recipe: Recipe, origin: dict[str, Any], *, restart: bool) -> bool:
        """Makes the folder ready for the recipe and returns whether the run is finished already.

        origin is what else decides the result: the digests of the data and the base. A folder that holds the same
        run is gone on with; `restart` empties it first.

        Raises: RunError where the folder holds another run, naming what differs, or where `out` is not the run's file.
        """
        drop_half_written(self.folder)
        drop_half_written(self.previews)
        if restart:
            self._clear()
        elif self.recipe.exists() and self.origin.exists():
            self._check_same(recipe, origin)
        else:
            self._clear()
        if self._is_finished():
            return True
        # The recipe comes last: a folder without one is not a run yet.
        write_atomic(self.origin, _to_json(origin))
        write_atomic(self.recipe, recipe_to_toml(recipe).encode())
        return False

    def finish(self) -> None:
        """Marks the run as done with the file it wrote."""
        write_atomic(self.done, _to_json({"sha256": file_sha256(self.out)}))

    def _check_same(self, recipe: Recipe, origin: dict[str, Any]) -> None:
        differing = compare(recipe_from_toml(self.recipe), recipe)
        before = json.loads(self.origin.read_bytes())
        for key in sorted(origin):
            old, new = before.get(key), origin[key]
            if old != new:
                counts = f" ({old or 1} -> {new or 1})" if isinstance(old or new, int) else ""
                differing.append(f"the {key} changed{counts}")
        if differing:
            raise RunError(
                f"{self.folder} holds a run with other settings: {', '.join(differing)}; "
                "use the same ones to go on, another --out, or --restart to start over"
            )

    def _is_finished(self) -> bool:
        if not self.done.exists() or not self.out.exists():
            return False
        if json.loads(self.done.read_bytes()).get("sha256") != file_sha256(self.out):
            raise RunError(
                f"{self.out} is not the file that {self.folder} made; move it away, or replace it with --restart"
            )
        return True

    def _clear(self) -> None:
        # In this order: whenever it is cut short, what is left is an unfinished run or none.
        for path in (self.done, self.recipe, self.origin, self.metrics, self.loss):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.previews, self.trackers):
            if folder.exists():
                shutil.rmtree(folder)


def open_run(folder: Path, out: Path, restart: bool) -> Run:
    """The run of the file `out`, looked at before any work. Raises: RunError where it cannot be, or be gone on with."""
    folder, out = Path(folder), Path(out)
    check_out(out)
    run = Run(out)
    if folder.is_dir() and run.folder.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{out} lies in the data folder, where its previews would count as data; choose another --out")
    if not restart:
        run.check_free()
    return run


def check_out(out: Path) -> None:
    """Finds an output that cannot be written before any work is done, and leaves nothing behind.

    Raises: RunError naming the path and the fix.
    """
    if out.suffix != ".safetensors":
        raise RunError(f"{out} does not end in .safetensors; name the file that the LoRA goes to")
    if out.is_dir():
        raise RunError(f"{out} is a folder; name the file that the LoRA goes to")
    place = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise RunError(f"{out} cannot be written: {place}: {e.strerror}; choose another --out") from None


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

"""The folder of one training run: whose it is, what it was started with, and whether it is finished."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapter.file import file_sha256
from ..bases.folder import fingerprint_source
from ..bases.source import resolve_source
from ..config import Recipe, compare, recipe_from_toml, recipe_to_toml
from ..disk import drop_half_written, make_folder, sync_folder, write_atomic
from ..errors import BaseModelError, ConfigError, RunError
from .progress import say

BASE = "base's weights"
"""What a run's origin calls the fingerprint of its base."""
HASH_SHOWN = 12
"""Characters of a hash that messages show."""


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
            make_folder(self.folder)
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
        run, or the same with fewer steps, is gone on with; `restart` empties it first.

        Raises: RunError where the folder holds another run, naming what differs, where a file of it is missing or
        damaged, or where `out` is not the run's file.
        """
        drop_half_written(self.folder)
        drop_half_written(self.previews)
        drop_half_written(self.out.parent, self.out.name)
        if restart:
            self._clear()
        elif self.recipe.exists() and self.origin.exists():
            if self._check_same(recipe, origin):
                self.done.unlink(missing_ok=True)
                sync_folder(self.folder)
        elif any(self.checkpoints.glob("step-*")):
            missing = self.origin if self.recipe.exists() else self.recipe
            raise RunError(
                f"{self.folder} has checkpoints but no {missing.name}, so none can tell whose they are; "
                "bring it back, choose another --out, or delete them by --restart"
            )
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

    def check_base(self, recipe: Recipe) -> None:
        """Finds a base that is gone, or another than the run was begun on, before anything is loaded.

        Raises: BaseModelError, or RunError, both naming the base and its hash.
        """
        begun = self.recipe.exists() and self.origin.exists() and not recipe.merge  # those that are merged count too
        before = str(self._read(self.origin).get(BASE) or "") if begun else ""
        same_name = bool(before) and self._read_recipe().base == recipe.base
        try:
            source, name, _ = resolve_source(recipe.base)
            now = fingerprint_source(source) if same_name else ""
        except BaseModelError as error:
            said = f"; {self.folder} was begun on a base of hash {before[:HASH_SHOWN]}" if same_name else ""
            raise BaseModelError(f"{error}{said}") from None
        if now != before and same_name:
            raise RunError(
                f"{self.folder} was begun on another base: {name} has hash {now[:HASH_SHOWN]} now and had "
                f"{before[:HASH_SHOWN]}; bring that one back, choose another --out, or start over with --restart"
            )

    def _check_same(self, recipe: Recipe, origin: dict[str, Any]) -> bool:
        """Whether the run gets more steps than it had. Raises: RunError where anything else differs."""
        held = self._read_recipe()
        longer = recipe.steps > held.steps
        differing = compare(replace(held, steps=recipe.steps) if longer else held, recipe)
        before = self._read(self.origin)
        for key in sorted(origin):
            old, new = before.get(key), origin[key]
            if old != new:
                differing.append(f"the {key} changed{_show_change(old, new)}")
        if differing:
            raise RunError(
                f"{self.folder} holds a run with other settings: {', '.join(differing)}; "
                "use the same ones to go on, another --out, or --restart to start over"
            )
        if longer:
            note = f"{self.folder} goes on from {held.steps} to {recipe.steps} steps"
            if recipe.schedule != "constant":
                note += f"; the learning rate so far was that of {held.steps}, from here it is that of {recipe.steps}"
            say(note)
        return longer

    def _read_recipe(self) -> Recipe:
        try:
            return recipe_from_toml(self.recipe)
        except ConfigError as error:
            raise RunError(f"{error}; it is this run's own: bring it back from a copy, or --restart") from None

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RunError(f"{path} is damaged; bring it back from a copy, choose another --out, or --restart")
        return found

    def _is_finished(self) -> bool:
        if not self.done.exists() or not self.out.exists():
            return False
        if self._read(self.done).get("sha256") != file_sha256(self.out):
            raise RunError(
                f"{self.out} is not the file that {self.folder} made; move it away, or replace it with --restart"
            )
        return True

    def _clear(self) -> None:
        # In this order: whenever it is cut short, what is left is the old run, unfinished, or none.
        self.done.unlink(missing_ok=True)
        sync_folder(self.folder)
        for folder in (self.checkpoints, self.previews, self.trackers):
            if folder.exists():
                shutil.rmtree(folder)
        for path in (self.metrics, self.loss, self.recipe, self.origin):
            path.unlink(missing_ok=True)


def _show_change(old: object, new: object) -> str:
    """What a part of a run's origin was and is, as far as a person can use it."""
    if isinstance(old or new, int):
        return f" ({old or 1} -> {new or 1})"
    if isinstance(old, str) and isinstance(new, str):
        return f" ({old[:HASH_SHOWN]} -> {new[:HASH_SHOWN]})"
    return ""


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

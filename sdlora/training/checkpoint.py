"""Checkpoints that are whole or not there: folders of safetensors and JSON with a manifest of sizes and sums."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import RunError

_NAME = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"
_PARTS = ("factors.safetensors", "optimizer.safetensors", "state.json")
KEPT = 2
"""How many whole checkpoints stay: the newest, and one to fall back on."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after `step` steps."""

    step: int
    factors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """JSON values: the thread count, the loss scale and the like."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `step-N` into the folder of checkpoints, whole or not at all, then drops all but the newest two.

    Raises: RunError where the disk does not give back what was written; OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drop_leftovers(folder)
    place = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / f"{place.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    state = _to_json(checkpoint.state | {"step": checkpoint.step})
    contents = (save(checkpoint.factors), save(checkpoint.optimizer), state)
    manifest = {}
    for name, content in zip(_PARTS, contents, strict=True):
        write_synced(temporary / name, content)
        manifest[name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_synced(temporary / _MANIFEST, _to_json(manifest))
    sync_folder(temporary)
    if place.exists():  # a damaged one, or the same step reached again: a folder cannot be renamed over a full one
        os.rename(place, folder / f"{place.name}.tmp-old-{os.getpid()}")
    os.rename(temporary, place)
    sync_folder(folder)
    problem = find_damage(place)
    if problem:
        raise RunError(f"checkpoint {place} was not written well ({problem}); check the disk and run the command again")
    _prune(folder, place)
    return place


def load_newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The highest step whose files match their manifest, or None; says one line for each damaged one it passes over."""
    damaged: list[str] = []
    for place in _newest_first(folder):
        problem = find_damage(place)
        if not problem:
            try:
                checkpoint = _read(place)
            except (SafetensorError, ValueError, KeyError) as e:
                problem = str(e)
            else:
                for line in damaged:
                    say(f"{line}; going on from {place.name}")
                return checkpoint
        damaged.append(f"checkpoint {place.name} is damaged ({problem})")
    for line in damaged:
        say(f"{line}; starting from step 0")
    return None


def find_damage(place: Path) -> str:
    """What is wrong with a checkpoint's files, in a few words; empty when each is as its manifest says."""
    try:
        manifest = json.loads((place / _MANIFEST).read_bytes())
        for name in _PARTS:
            content = (place / name).read_bytes()
            if len(content) != manifest[name]["size_bytes"]:
                return f"{name} has {len(content)} bytes instead of {manifest[name]['size_bytes']}"
            if hashlib.sha256(content).hexdigest() != manifest[name]["sha256"]:
                return f"{name} has another SHA-256 than its manifest says"
    except OSError as e:
        return f"{Path(e.filename or place).name} cannot be read"
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} is not a manifest"
    return ""


def drop_leftovers(folder: Path) -> None:
    """Removes what a killed run left half-written; only the holder of the run's lock may call it."""
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)


def drop_half_written(folder: Path) -> None:
    """Removes the temporary files that `write_atomic` leaves where a run is killed; for the holder of the lock too."""
    for path in folder.glob(".*.tmp-*"):
        path.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a whole file or leaves the old one: a temporary name in the same folder, fsync, os.replace."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(place: Path) -> Checkpoint:
    factors, optimizer, state = ((place / name).read_bytes() for name in _PARTS)
    values = json.loads(state)
    return Checkpoint(int(values["step"]), load(factors), load(optimizer), values)


def _newest_first(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _prune(folder: Path, newest: Path) -> None:
    """Keeps `newest`, which is known to be whole, and the next whole one before it; later ones can only be damaged."""
    places = _newest_first(folder)
    kept = {newest}
    for place in places[places.index(newest) + 1 :]:
        if len(kept) < KEPT and not find_damage(place):
            kept.add(place)
    for place in places:
        if place not in kept:
            shutil.rmtree(place)
    drop_leftovers(folder)


def _to_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

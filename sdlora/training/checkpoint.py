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

from ..disk import check_room, describe_failure, make_folder, sync_folder, write_synced
from ..errors import DiskError, RunError

_NAME = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_PARTS = ("factors.safetensors", "optimizer.safetensors", _STATE)
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

    Raises: RunError where the disk does not give back what was written; DiskError where it has no room for twice the
    size, or cannot be written. Whatever fails, the checkpoints before it are whole.
    """
    place = folder / f"step-{checkpoint.step:06d}"
    state = _to_json(checkpoint.state | {"step": checkpoint.step})
    contents = dict(zip(_PARTS, (save(checkpoint.factors), save(checkpoint.optimizer), state), strict=True))
    contents[_MANIFEST] = _to_json({name: _describe(content) for name, content in contents.items()})
    size_bytes = sum(map(len, contents.values()))
    try:
        make_folder(folder)
        drop_leftovers(folder)
        check_room(folder, 2 * size_bytes)
        _write(place, contents)
        problem = find_damage(place)
        if problem:
            fix = "check the disk and run the command again"
            raise RunError(f"checkpoint {place} was not written well ({problem}); {fix}")
        _prune(folder, place)
    except OSError as error:
        raise DiskError(describe_failure(place, error, size_bytes)) from error
    return place


def _write(place: Path, contents: dict[str, bytes]) -> None:
    """Writes a folder of files, the manifest last, and gives it its name once all are on the disk."""
    temporary = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        for name, content in contents.items():
            write_synced(temporary / name, content)
        sync_folder(temporary)
        if place.exists():  # a damaged one: a folder cannot be renamed over a full one
            os.rename(place, place.with_name(f"{place.name}.tmp-old-{os.getpid()}"))
        os.rename(temporary, place)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(place.parent)


def load_newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The highest step whose files match their manifest; None where there is no checkpoint at all.

    Says one line for each damaged one it passes over, and deletes nothing. Raises: RunError where all are damaged.
    """
    damaged: list[str] = []
    for place in _newest_first(folder):
        problem = find_damage(place)
        if not problem:
            try:
                checkpoint = _read(place)
            except (SafetensorError, ValueError, KeyError, TypeError) as e:
                problem = " ".join(str(e).split())
            else:
                for line in damaged:
                    say(f"checkpoint {line}; going on from {place.name}")
                return checkpoint
        damaged.append(f"{place.name} is damaged ({problem})")
    if damaged:
        raise RunError(
            f"no checkpoint in {folder} can be used: {', '.join(damaged)}; nothing was deleted: bring one back from a "
            "copy, or start over with --restart"
        )
    return None


def find_damage(place: Path) -> str:
    """What is wrong with a checkpoint's files, in a few words; empty when each is as its manifest says."""
    try:
        written = (place / _MANIFEST).read_bytes()
        manifest = json.loads(written)
        if manifest.keys() != set(_PARTS) or _to_json(manifest) != written:
            return f"{_MANIFEST} is not as it was written"
        for name in _PARTS:
            content = (place / name).read_bytes()
            if len(content) != manifest[name]["size_bytes"]:
                return f"{name} has {len(content)} bytes instead of {manifest[name]['size_bytes']}"
            if hashlib.sha256(content).hexdigest() != manifest[name]["sha256"]:
                return f"{name} has another SHA-256 than its manifest says"
        if json.loads((place / _STATE).read_bytes())["step"] != _step_of(place):
            return f"{_STATE} is of another step"
    except OSError as e:
        return f"{Path(e.filename or place).name} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{_MANIFEST} is not a manifest"
    return ""


def drop_leftovers(folder: Path) -> None:
    """Removes what a killed run left half-written; only the holder of the run's lock may call it."""
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)


def _read(place: Path) -> Checkpoint:
    factors, optimizer, state = ((place / name).read_bytes() for name in _PARTS)
    values = json.loads(state)
    return Checkpoint(int(values["step"]), load(factors), load(optimizer), values)


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step_of, reverse=True)


def _step_of(place: Path) -> int:
    """The step in a checkpoint's name, or -1."""
    match = _NAME.fullmatch(place.name)
    return int(match[1]) if match else -1


def _describe(content: bytes) -> dict[str, Any]:
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


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

"""LoRAs merged into a checkpoint on the disk, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.header import printable
from ..bases.folder import read_json
from ..bases.stored import Place, StoredBase
from ..bases.weights_file import Change, WeightsFile, rewrite_weights
from ..errors import AdapterFileError, BaseModelError, ConfigError
from .plan import Plan

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5", ".gguf")


@dataclass(frozen=True)
class Baked:
    """What was written: how many tensors changed, and the files of the folder that are not in the copy."""

    changed: int
    left_out: tuple[str, ...] = ()


def check_bake(plan: Plan, base: StoredBase, out: Path) -> None:
    """Finds what keeps a plan from being baked into a base under that name, before any work.

    Raises: ConfigError for a plan that moves, or a name that does not fit the base or is taken.
    """
    if not plan.is_static:
        raise ConfigError(
            f"method {plan.method.name}, schedules and masks change over the picture, so no checkpoint can hold them; "
            "use them when generating"
        )
    check_target(base, out)


def check_target(base: StoredBase, out: Path) -> None:
    """Raises: ConfigError where the base cannot be written to `out`."""
    if base.is_file:
        if out.suffix != ".safetensors":
            raise ConfigError(f"{out}: {base.name} is a single file, so --out must end in .safetensors; name a file")
        if out.is_dir():
            raise ConfigError(f"{out} is a folder; name the .safetensors file that the checkpoint goes to")
        if out.exists() and out.samefile(base.source):
            raise ConfigError(f"{out} is the base and would be replaced; choose another --out")
        return
    if out.suffix == ".safetensors":
        raise ConfigError(f"{out}: {base.name} is a diffusers folder, so --out must be one too; name a folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out")
    if out.resolve().is_relative_to(base.source.resolve()):
        raise ConfigError(f"{out} lies in the base's own folder; choose another --out")


def bake(plan: Plan, base: StoredBase, out: Path, report: Callable[[int, int, str], None] | None = None) -> Baked:
    """Writes the base with W + ΔW of a static plan for its weights; the base's own files are only read.

    Each sum is taken in float32 and rounded once to the stored dtype; a tensor that does not change, and everything
    else of the files (header, order, shards), is the base's to the byte. One tensor is in memory at a time. A file
    takes its name when it is whole; a folder is built beside as `NAME.tmp`.

    Raises: ConfigError as `check_bake`; AdapterFileError where a sum is not finite; BaseModelError where the disk
    fails.
    """
    check_bake(plan, base, out)
    work = _plan_changes(plan, base)
    total = sum(map(len, work.values()))
    done = 0

    def step(key: str) -> None:
        nonlocal done
        if report is not None:
            report(done, total, key)
        done += 1

    if base.is_file:
        return _bake_file(base.source, out, work.get(base.source, {}), step)
    return _bake_folder(base, out, work, step)


def _plan_changes(plan: Plan, base: StoredBase) -> dict[Path, dict[str, Change]]:
    """By file and key, what becomes of a tensor; one that holds three weights has up to three modules."""
    modules: dict[Path, dict[str, list[tuple[str, Place]]]] = {}
    for path in plan.paths:
        place = base.places.get(path)
        if place is not None:
            modules.setdefault(place.file, {}).setdefault(place.key, []).append((path, place))
    return {file: {key: partial(_add, plan, inside) for key, inside in rows.items()} for file, rows in modules.items()}


def _add(plan: Plan, inside: list[tuple[str, Place]], stored: Tensor) -> Tensor | None:
    """The stored tensor with each module's ΔW in it, or None where all of them are 0."""
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    changed = False
    for path, place in inside:
        mine = place.take(stored)  # a view: what is put into it is in the stored tensor
        weight = mine.to(wide)
        delta = plan.delta(path, base=weight.float())
        if not delta.any():
            continue
        merged = (weight + delta.view_as(weight)).to(stored.dtype)
        if not merged.float().isfinite().all():
            raise AdapterFileError(
                f"{path}: base and LoRAs add up to no finite {place.dtype} weight; lower the weights"
            )
        mine.copy_(merged)
        changed = True
    return stored if changed else None


def _bake_file(source: Path, out: Path, changes: dict[str, Change], step: Callable[[str], None]) -> Baked:
    part = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        changed = rewrite_weights(WeightsFile(source), part, changes, step)
        os.replace(part, out)
    except OSError as e:
        raise BaseModelError(f"{printable(out)} cannot be written: {printable(e.strerror or e)}") from None
    finally:
        part.unlink(missing_ok=True)
    return Baked(changed)


def _bake_folder(
    base: StoredBase, out: Path, work: dict[Path, dict[str, Change]], step: Callable[[str], None]
) -> Baked:
    part = out.with_name(f"{out.name}.tmp")
    if part.exists():
        raise ConfigError(f"{part} is in the way, left from an earlier try perhaps; remove it")
    files, left_out = list_files(base)
    changed = 0
    try:
        part.mkdir(parents=True)
        for name in files:
            source, target = base.source / name, part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source in work:
                changed += rewrite_weights(WeightsFile(source), target, work[source], step)
            else:
                shutil.copyfile(source, target)  # the contents: in the hub's cache, files are links
        if out.is_dir():
            out.rmdir()
        os.rename(part, out)
    except OSError as e:
        raise BaseModelError(f"{printable(out)} cannot be written: {printable(e.strerror or e)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Baked(changed, tuple(left_out))


def list_files(base: StoredBase) -> tuple[list[str], list[str]]:
    """The files of a folder that its copy needs, and those that would be wrong in it: the same weights, unchanged."""
    used = {file.relative_to(base.source).as_posix() for file in base.files}
    parts = {name.partition("/")[0] for name in used}
    files, left_out = [], []
    for path in sorted(base.source.rglob("*")):
        name = path.relative_to(base.source)
        if not path.is_file() or any(word.startswith(".") for word in name.parts):
            continue
        is_other = path.suffix in _WEIGHTS and name.as_posix() not in used
        if path.name.endswith(".json") and ".index." in path.name:
            is_other = not used >= {(name.parent / shard).as_posix() for shard in _list_shards(path)}
        if is_other and (len(name.parts) == 1 or name.parts[0] in parts):
            left_out.append(name.as_posix())
        else:
            files.append(name.as_posix())
    return files, left_out


def _list_shards(index: Path) -> set[str]:
    rows = read_json(index).get("weight_map")
    return set(map(str, rows.values())) if isinstance(rows, dict) else set()


__all__ = ["Baked", "bake", "check_bake", "check_target", "list_files"]

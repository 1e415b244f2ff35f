"""A base as it lies on the disk: where each module's weight is, read one at a time, with nothing loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.keys import canonical_path
from ..errors import BaseModelError
from .checkpoint_keys import THIRDS, Form
from .checkpoint_kind import identify_checkpoint
from .folder import WEIGHTS, name_family, read_json, read_text_parts
from .single_file import match_parts
from .source import MINI_FOLDER, resolve_source
from .weights_file import WeightsFile


@dataclass(frozen=True)
class Place:
    """Where a module's weight lies: a file, its key there, and what of that tensor it is."""

    file: Path
    key: str
    form: Form
    shape: tuple[int, ...]
    """The module's own: [out, in], [out, in, kh, kw], or [out] of a norm or a bias."""
    dtype: str
    """As the file names it: `F16`."""

    def take(self, stored: Tensor) -> Tensor:
        """The module's weight, as a view of the stored tensor."""
        if self.form in THIRDS:
            return stored.chunk(3)[THIRDS.index(self.form)]
        return stored.T if self.form == "transposed" else stored.view(self.shape)


@dataclass(frozen=True)
class StoredBase:
    """A checkpoint file or a diffusers folder, from its headers."""

    source: Path
    name: str
    """The public name, never a path."""
    family: str
    files: tuple[Path, ...]
    """The files of weights."""
    places: Mapping[str, Place]
    """By canonical path of a UNet's or text encoder's module with a weight, and of its bias (`adapter.vector`)."""

    @property
    def is_file(self) -> bool:
        return self.source.is_file()


def find_stored(name: str) -> StoredBase:
    """Looks a base up by name (`mini`, a folder, a `.safetensors` checkpoint, a hub id); reads headers alone.

    Raises: BaseModelError where there is none, it is incomplete, or it is no Stable Diffusion 1.x, 2.x or XL.
    """
    source, public_name, _ = resolve_source(name)
    if source.is_file():
        return _find_in_file(source, public_name)
    family = "mini" if source == MINI_FOLDER else name_family(source)
    parts = ("unet", *read_text_parts(source))
    shards = {part: find_shards(source / part, WEIGHTS[part]) for part in (*parts, "vae")}
    places: dict[str, Place] = {}
    for part in parts:
        for file in shards[part]:
            for key, entry in WeightsFile(file).entries.items():
                if key.endswith((".weight", ".bias")):
                    path = canonical_path(part, key.removesuffix(".weight"))
                    places[path] = Place(file, key, "same", entry.shape, entry.dtype)
    return StoredBase(source, public_name, family, tuple(f for files in shards.values() for f in files), places)


def _find_in_file(source: Path, name: str) -> StoredBase:
    checkpoint = identify_checkpoint(source)
    places: dict[str, Place] = {}
    for part in match_parts(checkpoint, checkpoint.prediction or "epsilon"):
        if part.name == "vae":
            continue
        for own, tensor in part.module.state_dict().items():
            slot = part.slots[own]
            if own.endswith((".weight", ".bias")):
                path = canonical_path(part.name, own.removesuffix(".weight"))
                entry = checkpoint.entries[slot.key]
                places[path] = Place(source, slot.key, slot.form, tuple(tensor.shape), entry.dtype)
    return StoredBase(source, name, checkpoint.family, (source,), places)


def find_shards(folder: Path, stem: str) -> list[Path]:
    """The weights files of one part of a folder: one, or those that its index names.

    Raises: BaseModelError where one is missing.
    """
    for suffix in (".safetensors", ".fp16.safetensors"):
        variant = suffix.removesuffix(".safetensors")
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
        if index.is_file():
            rows: Any = read_json(index).get("weight_map")
            names = sorted(set(map(str, rows.values()))) if isinstance(rows, dict) else []
            files = [folder / Path(shard).name for shard in names]
            missing = [file.name for file in files if not file.is_file()]
            if missing or not files:
                lacks = missing[0] if missing else "weight_map"
                raise BaseModelError(f"{index}: {lacks} is missing; copy or download the base again")
            return files
    raise BaseModelError(f"{folder}: {stem}.safetensors is missing; the base is incomplete, copy or download it again")


class Reader:
    """Reads the weights of a stored base one at a time."""

    def __init__(self, base: StoredBase) -> None:
        self.base = base
        self._files = {file: WeightsFile(file) for file in {place.file for place in base.places.values()}}

    def weight(self, path: str) -> Tensor:
        """A module's weight in its own shape and the file's dtype. Raises: BaseModelError."""
        place = self.base.places[path]
        return place.take(self._files[place.file].read(place.key))


__all__ = ["Place", "Reader", "StoredBase", "find_shards", "find_stored"]

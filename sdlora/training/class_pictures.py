"""Class pictures drawn by the base before training, kept with what decided them, and never drawn twice."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.quantised import QuantisedLinear
from ..bases.family import Base
from ..bases.sampling import sample_encoded
from ..bases.text import Text
from ..config import Recipe
from ..data.drawn import DRAW_STEPS, GUIDANCE, draw_seed
from ..data.folder import Example
from ..data.latents import BATCH_PX, count_batches
from ..data.store import fingerprint, make_key, name_machine
from ..disk import drop_half_written, write_atomic
from .processes import Processes

_LIST = "drawn.json"


def provide_drawn(base: Base, recipe: Recipe, wanted: Sequence[Example], processes: Processes) -> None:
    """Draws those of the wanted pictures, all of one folder, that are not there, each with its caption beside it.

    The main process draws; a machine that does not share its disk is sent the files. What one picture shows hangs on
    the base, the recipe, and the batch that it is drawn in, which are noted, so that a changed one is drawn anew.

    Raises: ConfigError where the base draws something that is not finite.
    """
    if not wanted:
        return
    place = wanted[0].path.parent
    apart = sum(local == 0 for local in processes.exchange(processes.local)) > 1
    if processes.main:
        _draw_missing(base, recipe, wanted, place)
    if not apart:
        processes.exchange()
        return
    names = [name for example in wanted for name in (example.path.name, _caption_name(example))]
    files = processes.hand_out(lambda: {name: (place / name).read_bytes() for name in names})
    if processes.local == 0 and not processes.main:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(place / name, content)
    processes.exchange()


@dataclass(frozen=True)
class _Batch:
    """Pictures that are drawn in one pass, always the same ones together: sums in another batch may round otherwise."""

    rows: range
    key: str


def _draw_missing(base: Base, recipe: Recipe, wanted: Sequence[Example], place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    drop_half_written(place)
    kept = _read_list(place)
    seeds = [draw_seed(recipe, i) for i in range(len(wanted))]
    missing = [batch for batch in _batches(base, recipe, wanted, seeds) if not _is_there(batch, wanted, place, kept)]
    if not missing:
        return
    text, blank = _encode(base, recipe, [example.caption for example in wanted])
    side_px = wanted[0].size_px[0]
    for number in count_batches(len(missing), 1, "drawing class pictures", True):
        batch = missing[number]
        pictures = sample_encoded(
            base,
            text[list(batch.rows)],
            blank,
            seeds=[seeds[row] for row in batch.rows],
            steps=DRAW_STEPS,
            guidance=GUIDANCE,
            width_px=side_px,
            height_px=side_px,
            batch_size=len(batch.rows),
        )
        for row, picture in zip(batch.rows, pictures, strict=True):
            data = io.BytesIO()
            picture.save(data, "PNG")
            write_atomic(wanted[row].path, data.getvalue())
            write_atomic(place / _caption_name(wanted[row]), f"{wanted[row].caption}\n".encode())
            kept[wanted[row].path.name] = [batch.key, hashlib.sha256(data.getvalue()).hexdigest()]
        write_atomic(place / _LIST, (json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())


def _batches(base: Base, recipe: Recipe, wanted: Sequence[Example], seeds: list[int]) -> list[_Batch]:
    """The batches in their order; a batch holds as many pictures as are encoded at once."""
    side_px = wanted[0].size_px[0]
    size = max(1, BATCH_PX // side_px**2)
    maker = (
        fingerprint(base.modules.values()),
        _fingerprint_packed(base.modules.values()),
        json.dumps(base.scheduler_config, sort_keys=True, default=str),
        base.zero_blank,
        base.dtype,
        name_machine(base.device),
        (side_px, DRAW_STEPS, GUIDANCE, recipe.clip_skip, recipe.max_chunks),
    )
    # Chunks of all captions are as many as the longest needs, so every caption is a part of every batch's key.
    captions = sorted({example.caption for example in wanted})
    batches = []
    for start in range(0, len(wanted), size):
        rows = range(start, min(start + size, len(wanted)))
        own = [(wanted[row].caption, seeds[row]) for row in rows]
        batches.append(_Batch(rows, make_key("class pictures", maker, captions, own)))
    return batches


def _is_there(batch: _Batch, wanted: Sequence[Example], place: Path, kept: dict[str, Any]) -> bool:
    """Whether every picture of the batch lies there as it was drawn."""
    for row in batch.rows:
        path = wanted[row].path
        try:
            found = [batch.key, hashlib.sha256(path.read_bytes()).hexdigest()]
        except OSError:
            return False
        if kept.get(path.name) != found or not (place / _caption_name(wanted[row])).is_file():
            return False
    return True


@torch.no_grad()
def _encode(base: Base, recipe: Recipe, captions: list[str]) -> tuple[Text, Text]:
    """The captions' text as training reads it, brackets being brackets, and that of the empty prompt."""
    different = list(dict.fromkeys(captions))
    ids, _ = base.tokenize([*different, ""], recipe.max_chunks)
    text = base.encode_text(ids.to(base.device), recipe.clip_skip)
    blank = text[len(different)]
    if base.zero_blank:
        blank = blank.blank(torch.tensor([True]))
    return text[[different.index(caption) for caption in captions]], blank


def _fingerprint_packed(modules: Any) -> str:
    """SHA-256 over what quantised layers hold, which is in no state_dict."""
    total = hashlib.sha256()
    for module in modules:
        for name, inner in nn.Module.named_modules(module):
            if isinstance(inner, QuantisedLinear):
                total.update(name.encode())
                total.update(inner.weight.dense(torch.float32).cpu().numpy().tobytes())
    return total.hexdigest()


def _read_list(place: Path) -> dict[str, Any]:
    try:
        found = json.loads((place / _LIST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _caption_name(example: Example) -> str:
    return example.path.with_suffix(".txt").name

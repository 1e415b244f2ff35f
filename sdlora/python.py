"""Training called from Python, with the command line's flags as keywords."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .adapter.delta import Adapter
from .bases.family import Base, load_base, pick_device
from .bases.quantisation import check_quantise
from .bases.schedule import with_schedule
from .combining.merge import merge_for_good, merged_for_a_while
from .config import Recipe, make_recipe
from .training.loop import train_adapter
from .training.processes import choose_device


def train(
    folder: str | Path,
    *,
    base: Base | str = "mini",
    out: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    cache: str | Path | None = None,
    **recipe: Any,
) -> Adapter:
    """Teaches the base the pictures of a folder; the keywords are the fields of `Recipe`.

    With `out`, a `.safetensors` file, the run's folder is kept beside it and the same call goes on where it stopped;
    without it nothing is left on the disk. `cache` is a folder that keeps encoded pictures and captions between runs.
    A Base that is given stays as it was, and decides the precision and device.

    Raises: SdloraError for a folder, a keyword or a base that cannot be used; RunInterrupted after Ctrl-C.
    """
    named = make_recipe({**recipe, "base": base.name if isinstance(base, Base) else base})
    if isinstance(base, str):
        device = choose_device(device)
        check_quantise(named.quantise, pick_device(device))
        return _train(folder, partial(_load, named, device), named, out, restart, cache, device)
    base = with_schedule(base, None if named.prediction == "auto" else named.prediction, named.zero_terminal_snr)
    with merged_for_a_while(base, named.merge) as merged:
        return _train(folder, merged, named, out, restart, cache)


def _load(recipe: Recipe, device: str) -> Base:
    base = load_base(
        recipe.base,
        device=device,
        precision=recipe.precision,
        prediction=recipe.prediction,
        zero_snr=recipe.zero_terminal_snr,
    )
    return merge_for_good(base, recipe.merge)


def _train(
    folder: str | Path,
    base: Base | Callable[[], Base],
    recipe: Recipe,
    out: str | Path | None,
    restart: bool,
    cache: str | Path | None,
    device: str = "auto",
) -> Adapter:
    options: dict[str, Any] = {"restart": restart, "cache": None if cache is None else Path(cache), "device": device}
    if out is not None:
        return train_adapter(Path(folder), base, recipe, Path(out), **options)
    with tempfile.TemporaryDirectory() as place:
        return train_adapter(Path(folder), base, recipe, Path(place) / "lora.safetensors", **options)

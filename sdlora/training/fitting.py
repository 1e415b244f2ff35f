"""The cheapest settings with which a run fits into a memory that was named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..bases.empty import make_empty_base
from ..config import Recipe
from ..errors import ConfigError
from ..values import NUMBER
from .memory import DTYPES, estimate, show_bytes

RESERVE = 0.1
"""Share of the memory that is left to what the estimate does not know: kernels, libraries, pieces too small to use."""
COSTS = {"feed-forward": 1.1, "all": 1.3, "int8": 1.4, "nf4": 1.8, "halving": 1.05}
"""How many times as long a picture takes with each, roughly; only their order is used."""
_UNITS = {"": 10**9, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"": 2**30, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def read_size(text: str) -> int:
    """The bytes that `8GB`, `7.5 GiB` or `6000MB` spell; a number alone is of GB. Raises: ConfigError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None or NUMBER.fullmatch(found[1]) is None or float(found[1]) == 0:
        raise ConfigError(f"memory {text!r} is no size; give one such as 8GB, 7.5GiB or 6000MB")
    return int(float(found[1]) * (_BINARY if found[3] else _UNITS)[found[2].lower()])


def fit_recipe(source: Path, recipe: Recipe, size_px: tuple[int, int], text: str, device: torch.device) -> Recipe:
    """The recipe, or the same with as little of it changed as lets its estimate fit into the memory that `text` names.

    What a step learns from stays: a smaller batch is made up for by accumulation. What saves memory in the recipe
    already is kept. size_px is the width and height of the largest pictures.

    Raises: ConfigError where no settings fit, with what the leanest would need; as `estimate`.
    """
    budget = read_size(text)
    room = int(budget * (1 - RESERVE))

    base = make_empty_base(source, DTYPES[recipe.precision], recipe.prediction)

    def need(way: Recipe) -> int:
        return int(estimate(base, way, size_px)["total"])

    *_, least = ways = list(_list_ways(recipe, device))
    if need(recipe) <= room:
        return recipe
    if need(least) <= room:
        return next(
            way for way in sorted(ways, key=lambda way: _cost(way, recipe)) if way == least or need(way) <= room
        )
    raise ConfigError(
        f"memory {text}: {recipe.base} at {size_px[0]} x {size_px[1]} px needs {show_bytes(need(least))} and a tenth "
        f"to spare even with {describe_changes(recipe, least) or 'these settings'}; give more, or a smaller resolution"
    )


def describe_changes(recipe: Recipe, fitted: Recipe) -> str:
    """What was changed, as flags: `--recompute all --batch-size 2 --accumulation 2`; empty where nothing was."""
    names = ("recompute", "quantise", "batch_size", "accumulation")
    changed = [name for name in names if getattr(recipe, name) != getattr(fitted, name)]
    return " ".join(f"--{name.replace('_', '-')} {getattr(fitted, name)}" for name in changed)


def _list_ways(recipe: Recipe, device: torch.device) -> Iterator[Recipe]:
    """The recipe and all that keep less than it, each a step of as many pictures; the leanest is the last."""
    again = ("none", "feed-forward", "all")
    bits = ["none", "int8", *(["nf4"] if _has_nf4(device) else [])]
    quantise = bits[bits.index(recipe.quantise) :] if recipe.quantise in bits else [recipe.quantise]
    for kind in quantise:
        for how in again[again.index(recipe.recompute) :]:
            for size in range(recipe.batch_size, 0, -1):
                if recipe.batch_size % size == 0:
                    times = recipe.batch_size // size
                    yield replace(
                        recipe,
                        quantise=kind,  # type: ignore[arg-type]
                        recompute=how,  # type: ignore[arg-type]
                        batch_size=size,
                        accumulation=recipe.accumulation * times,
                    )


def _cost(way: Recipe, recipe: Recipe) -> float:
    cost = COSTS.get(way.recompute, 1.0) * COSTS.get(way.quantise, 1.0)
    halvings = (recipe.batch_size // way.batch_size).bit_length() - 1
    return float(cost * COSTS["halving"] ** halvings)


def _has_nf4(device: torch.device) -> bool:
    """Whether four bits can be had: on a CPU they are slower than any other way to save."""
    from ..bases.quantisation import check_quantise

    try:
        check_quantise("nf4", device)
    except ConfigError:
        return False
    return device.type == "cuda"

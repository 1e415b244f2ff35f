"""An adapter of other ranks: each module's ΔW truncated by its singular values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .delta import Adapter, Delta, Dora, LowRank, shape_of
from .truncation import Cost, Keep, truncate_dense, truncate_factors


def resize(
    adapter: Adapter,
    keep: Keep,
    cost: Cost | None = None,
    report: Callable[[int, int, str], None] | None = None,
) -> Adapter:
    """The adapter with as many ranks of each module as `keep` says; `cost` is told what that loses of each block.

    A module that has no more ranks than that stays as it is, to the bit. Of a DoRA the low-rank part is truncated and
    the lengths stay; `cost` counts that part. Other kinds become low rank; what is no matrix (a bias, a norm) stays.
    `report` is called with how many modules are done, of how many, and the next one's path.
    """
    cost = Cost() if cost is None else cost
    deltas: dict[str, Delta] = {}
    for i, (path, delta) in enumerate(adapter.deltas.items()):
        if report is not None:
            report(i, len(adapter.deltas), path)
        deltas[path] = _resize(path, delta, keep, cost)
    if report is not None:
        report(len(adapter.deltas), len(adapter.deltas), "")
    card = replace(adapter.card, settings={**adapter.card.settings, "resized": str(keep)})
    return replace(adapter, deltas=deltas, card=card)


def _resize(path: str, delta: Delta, keep: Keep, cost: Cost) -> Delta:
    if isinstance(delta, Dora):
        inner: Any = _resize(path, delta.inner, keep, cost)
        return replace(delta, inner=inner)
    if isinstance(delta, LowRank):
        return _resize_pair(path, delta, keep, cost)
    shape = shape_of(delta)
    if len(shape) not in (2, 4):
        return delta
    found = truncate_dense(delta.weight().double().flatten(1), keep)
    cost.add(path, found.lost, found.whole)
    return found.pair(shape)


def _resize_pair(path: str, pair: LowRank, keep: Keep, cost: Cost) -> LowRank:
    up = pair.up.detach().double().reshape(pair.up.shape[0], -1) * pair.scale  # [out, rank]
    down = pair.down.detach().double().reshape(pair.rank, -1)  # [rank, n]
    found = truncate_factors(up, down, keep)
    if pair.rank <= max(found.rank, keep.rank or 0):
        cost.add(path, 0.0, found.whole)
        return pair
    cost.add(path, found.lost, found.whole)
    return found.pair(shape_of(pair))


__all__ = ["resize"]

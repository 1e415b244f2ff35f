"""A LoRA from the difference of two checkpoints: a fine-tuned one and the base that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapter.delta import Adapter, Card, Delta, LowRank
from ..adapter.truncation import FULL_SVD_SIDE, Cost, Keep, truncate_dense
from ..bases.stored import Reader, StoredBase
from ..errors import BaseModelError, ConfigError
from ..targets import check_targets, endings_of

TARGETS = ("attention", "feed-forward", "projections")
"""What is looked at unless asked otherwise; with a rank for convolutions, those too."""


@dataclass
class Extracted:
    """What came out: the adapter, what its ranks cost, and the modules that do not differ or that only one has."""

    adapter: Adapter
    cost: Cost
    same: list[str] = field(default_factory=list)
    lone: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a person: the error by block, and what was left out."""
        count = len(self.adapter.deltas)
        lines = [*self.cost.lines(), f"{count} modules differ and are in the file"]
        if self.same:
            lines.append(f"{len(self.same)} modules do not differ and are left out, {self.same[0]} for one")
        if self.lone:
            lines.append(
                f"{len(self.lone)} modules are in one of the two only and are left out, {self.lone[0]} for one"
            )
        return lines


def extract(
    tuned: StoredBase,
    base: StoredBase,
    rank: int,
    conv_rank: int | None = None,
    targets: Sequence[str] = (),
    report: Callable[[int, int, str], None] | None = None,
) -> Extracted:
    """The low-rank part of W_tuned - W_base of every target, by SVD, one module at a time; `conv_rank` is for 3 × 3.

    Where the two have other dtypes, a module whose weights agree in the coarser one does not differ. `report` is called
    with how many modules are done, of how many, and the next one's path.

    Raises: BaseModelError where the two are of other families or sizes, do not differ, or hold NaN; ConfigError.
    """
    for name, value in (("rank", rank), ("conv_rank", conv_rank)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is out of range; give 1 or more")
    words = tuple(targets) or (*TARGETS, *(("convolutions",) if conv_rank is not None else ()))
    check_targets(words)
    kinds = [_kind(stored.family) for stored in (tuned, base)]
    if kinds[0] != kinds[1]:
        raise BaseModelError(f"{tuned.name} is of family {kinds[0]} and {base.name} of {kinds[1]}; give its own base")
    found = Extracted(Adapter({}), Cost())
    paths = list(_find_targets(tuned, base, words, found))
    _check_shapes(tuned, base, paths)
    readers = Reader(tuned), Reader(base)
    ranks = {
        p: min(_rank_of(s, rank, conv_rank), s[0], math.prod(s[1:])) for p in paths for s in [base.places[p].shape]
    }
    shelf = _Shelf(sum(r * (s[0] + math.prod(s[1:])) for p, r in ranks.items() for s in [base.places[p].shape]))
    deltas: dict[str, Delta] = {}
    for i, path in enumerate(paths):
        if report is not None:
            report(i, len(paths), path)
        delta = _subtract(readers[0].weight(path), readers[1].weight(path))
        if delta is None:
            found.same.append(path)
            continue
        if not bool(delta.isfinite().all()):
            raise BaseModelError(f"{path} holds NaN or infinity in {tuned.name} or {base.name}; use another checkpoint")
        part = truncate_dense(delta.flatten(1), Keep(ranks[path]))
        found.cost.add(path, part.lost, part.whole)
        deltas[path] = shelf.put(part.pair(tuple(delta.shape)))
    if report is not None:
        report(len(paths), len(paths), "")
    if not deltas:
        raise BaseModelError(f"{tuned.name} does not differ from {base.name} in any of {len(paths)} modules; no LoRA")
    settings = {"extracted": {"rank": rank, "conv_rank": conv_rank, "targets": list(words)}}
    found.adapter = Adapter(deltas, Card(family=base.family, base=base.name, settings=settings))
    return found


def _rank_of(shape: tuple[int, ...], rank: int, conv_rank: int | None) -> int:
    """The rank of a weight of this shape: that of convolutions where its kernel is larger than 1 × 1."""
    return conv_rank or rank if max(shape[2:], default=1) > 1 else rank


class _Shelf:
    """One block of memory for all factors.

    Small pieces that stay, each between large ones that go, would keep the allocator from using that room again: of a
    whole SDXL it had grown to 7 GB.
    """

    def __init__(self, numbers: int) -> None:
        self._block = torch.empty(numbers)
        self._used = 0

    def put(self, pair: LowRank) -> LowRank:
        """The same pair, its factors in the block."""
        return LowRank(self._take(pair.down), self._take(pair.up), pair.alpha)

    def _take(self, factor: Tensor) -> Tensor:
        place = self._block[self._used : self._used + factor.numel()].view(factor.shape)
        self._used += factor.numel()
        return place.copy_(factor)


def _kind(family: str) -> str:
    # A folder made from mini says no more than that; sizes tell the two apart.
    return "sd1" if family == "mini" else family


def _find_targets(tuned: StoredBase, base: StoredBase, words: tuple[str, ...], found: Extracted) -> Iterator[str]:
    """The modules that both have; those that only one has go into `found`.

    Raises: ConfigError for a word that matches none.
    """
    used: set[str] = set()
    for path in sorted({*tuned.places, *base.places}):
        part = path.partition(".")[0]
        hits = {w for w in words if any(path.endswith(f".{end}") for end in endings_of(w, part))}
        shapes = [stored.places[path].shape for stored in (tuned, base) if path in stored.places]
        if not hits or min(map(len, shapes)) < 2:
            continue
        used |= hits
        if path in tuned.places and path in base.places:
            yield path
        else:
            found.lone.append(path)
    for word in words:
        if word not in used:
            raise ConfigError(f"target {word!r} matches no module of {base.name}; use {', '.join(TARGETS)}")


def _check_shapes(tuned: StoredBase, base: StoredBase, paths: list[str]) -> None:
    for path in paths:
        shapes = [stored.places[path].shape for stored in (tuned, base)]
        if shapes[0] != shapes[1]:
            sizes = [" x ".join(map(str, shape)) for shape in shapes]
            raise BaseModelError(
                f"{path} is {sizes[0]} in {tuned.name} and {sizes[1]} in {base.name}; give the base it was tuned from"
            )


def _subtract(tuned: Tensor, base: Tensor) -> Tensor | None:
    """W_tuned - W_base, float64 (float32 of a large one), or None where they agree in the coarser of their dtypes."""
    coarser = max(tuned.dtype, base.dtype, key=lambda dtype: (torch.finfo(dtype).eps, -torch.finfo(dtype).bits))
    if torch.equal(tuned.to(coarser).float(), base.to(coarser).float()):
        return None
    dtype = torch.float32 if max(tuned.shape[0], tuned[0].numel()) > FULL_SVD_SIDE else torch.float64
    return tuned.to(dtype) - base.to(dtype)


__all__ = ["TARGETS", "Extracted", "extract"]

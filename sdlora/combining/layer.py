"""One adapted layer of a stack: what each adapter does to it, as factors that can be stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.delta import Delta, LowRank, weight_on


@dataclass(frozen=True)
class Factors:
    """ΔW = up · down of one adapter, with alpha / rank folded into `up`; float64.

    down [r, n] with n = in · kh · kw; up [out, r].
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def delta(self) -> Tensor:
        """ΔW, float64 [out, n]."""
        return self.up @ self.down


def factorize(delta: Delta, base: Tensor | None = None) -> Factors:
    """The exact factors of any kind of ΔW; those of a kind that is not low rank hold an identity.

    `base` is the module's weight, which a DoRA needs. Raises: AdapterFileError where it is needed and missing.
    """
    if isinstance(delta, LowRank):
        up = delta.up.detach().double().reshape(delta.up.shape[0], -1) * delta.scale
        return Factors(delta.down.detach().double().reshape(delta.rank, -1), up)
    dense = (delta.weight() if base is None else weight_on(delta, base)).detach().double().flatten(1)  # [out, n]
    out, n = dense.shape
    if out < n:
        return Factors(dense, torch.eye(out, dtype=torch.float64, device=dense.device))
    return Factors(torch.eye(n, dtype=torch.float64, device=dense.device), dense)


@dataclass(frozen=True)
class Layer:
    """The adapters that act on one module, in the order of the sum: ΔW = B_cat · M · A_cat for an M of R x R.

    A_cat [R, n] are the stacked `down`, B_cat [out, R] the `up`, R the sum of the ranks; float64.
    """

    path: str
    parts: tuple[Factors, ...]
    places: tuple[int, ...]
    """Which adapter of the stack, as it was given, each part is of; the first (0) is the style, where that matters."""

    @property
    def down(self) -> Tensor:
        """A_cat, float64 [R, n]."""
        return torch.cat([part.down for part in self.parts])

    @property
    def up(self) -> Tensor:
        """B_cat, float64 [out, R]."""
        return torch.cat([part.up for part in self.parts], dim=1)

    @property
    def ranks(self) -> list[int]:
        return [part.rank for part in self.parts]

    def part_of(self, place: int) -> Factors | None:
        """What one adapter of the stack does here, or None."""
        return self.parts[self.places.index(place)] if place in self.places else None

    def spread(self, gains: Sequence[float]) -> Tensor:
        """A number for each part as one for each of its ranks: float64 [R], the diagonal of a diagonal M."""
        numbers = torch.tensor([float(gain) for gain in gains], dtype=torch.float64, device=self.parts[0].down.device)
        return numbers.repeat_interleave(torch.tensor(self.ranks, device=numbers.device))

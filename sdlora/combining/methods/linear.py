"""The weighted sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..layer import Layer
from .method import Filling, Moment, OnePass


@dataclass(frozen=True)
class Linear(OnePass):
    """ΔW = Σ w_i ΔW_i: M is diagonal."""

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "the weighted sum"

    def prepare(self, layers: Iterable[Layer]) -> Filling:
        return self

    def middle(self, layer: Layer, gains: Sequence[float], moment: Moment | None) -> Tensor:
        return layer.spread(gains)

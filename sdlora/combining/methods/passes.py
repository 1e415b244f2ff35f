"""LoRA Switch and LoRA Composite: whole adapters, one after the other or side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import ConfigError
from ..layer import Layer
from .method import Filling, Moment, Pass, check_option


@dataclass(frozen=True)
class Switch:
    """One adapter at a time, the next one every `every` solver steps, in the order given.

    The step is told from the moment, floor(t · steps), so a solver that asks twice within a step switches as often.

    Source: Zhong et al. 2024, Multi-LoRA Composition, arXiv 2402.16843, LoRA Switch.
    """

    name: ClassVar[str] = "switch"
    summary: ClassVar[str] = "one LoRA at a time, in turn (LoRA Switch; every, in steps)"
    moves: ClassVar[bool] = True
    pair: ClassVar[bool] = False
    every: int = 1

    def __post_init__(self) -> None:
        check_option(self.name, "every", self.every, 1, 1000)

    def prepare(self, layers: Iterable[Layer]) -> Filling:
        return self

    def middle(self, layer: Layer, gains: Sequence[float], moment: Moment | None) -> Tensor:
        return layer.spread(gains)

    def passes(self, weights: Sequence[float], moment: Moment) -> list[Pass]:
        acting = [place for place, weight in enumerate(weights) if weight != 0]
        if not acting:
            return [Pass(frozenset())]
        step = math.floor(moment.t * moment.steps + 1e-6)
        return [Pass(frozenset((acting[step // self.every % len(acting)],)))]


@dataclass(frozen=True)
class Composite:
    """Each adapter's own guided prediction at full strength, averaged by weight: Σ w_i ε_i / Σ w_i.

    Guidance is linear in the predictions, so averaging these before it is the same. One pass for each adapter.

    Source: Zhong et al. 2024, Multi-LoRA Composition, arXiv 2402.16843, LoRA Composite.
    """

    name: ClassVar[str] = "composite"
    summary: ClassVar[str] = "each LoRA's own prediction, averaged by weight (LoRA Composite)"
    moves: ClassVar[bool] = True
    pair: ClassVar[bool] = False

    def prepare(self, layers: Iterable[Layer]) -> Filling:
        return self

    def middle(self, layer: Layer, gains: Sequence[float], moment: Moment | None) -> Tensor:
        return layer.spread(gains)

    def passes(self, weights: Sequence[float], moment: Moment) -> list[Pass]:
        if any(weight < 0 for weight in weights):
            raise ConfigError("method composite averages by weight and takes none below 0; give weights of 0 or more")
        total = sum(weights)
        if not total:
            return [Pass(frozenset())]
        return [Pass(frozenset((place,)), weight / total, full=True) for place, weight in enumerate(weights) if weight]

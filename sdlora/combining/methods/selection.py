"""K-LoRA and EST-LoRA: each layer shows the subject first and, from a moment of its own on, the style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..layer import Layer
from .method import Filling, Moment, OnePass


@dataclass
class Selection:
    """Path -> the last moment t at which a layer shows the subject; a layer that one adapter has shows that one."""

    flips: dict[str, float] = field(default_factory=dict)

    def middle(self, layer: Layer, gains: Sequence[float], moment: Moment | None) -> Tensor:
        if len(layer.parts) == 1 or moment is None:  # the text is encoded once, for all moments
            return layer.spread(gains)
        shown = 1 if moment.t <= self.flips[layer.path] else 0
        return layer.spread([g if place == shown else 0.0 for g, place in zip(gains, layer.places, strict=True)])


@dataclass(frozen=True)
class KLora(OnePass):
    """A layer shows the subject while S_c ≥ S_s · γ · (1.5 t + 0.5), S the sum of the top r_c · r_s of |ΔW|.

    γ = Σ|ΔW_c| / Σ|ΔW_s| over all layers that both have. Weights do not count in it.

    Source: Ouyang et al. 2025, K-LoRA (CVPR), equations 3 to 7.
    """

    name: ClassVar[str] = "klora"
    summary: ClassVar[str] = "each layer shows the subject, then the style, by its largest changes (K-LoRA)"
    moves: ClassVar[bool] = True
    pair: ClassVar[bool] = True

    def prepare(self, layers: Iterable[Layer]) -> Filling:
        tops: dict[str, tuple[float, float]] = {}
        sum_style = sum_subject = 0.0
        for layer in layers:
            style, subject = layer.part_of(0), layer.part_of(1)
            if style is None or subject is None:
                continue
            d_s, d_c = style.delta().abs(), subject.delta().abs()
            k = min(style.rank * subject.rank, d_s.numel())
            tops[layer.path] = (float(d_s.flatten().topk(k).values.sum()), float(d_c.flatten().topk(k).values.sum()))
            sum_style += float(d_s.sum())
            sum_subject += float(d_c.sum())
        gamma = sum_subject / sum_style if sum_style else math.inf
        return Selection({path: _last(s_c, s_s * gamma, 1.5, 0.5) for path, (s_s, s_c) in tops.items()})


@dataclass(frozen=True)
class EstLora(OnePass):
    """A layer shows the subject while ‖ΔW_c‖² ≥ (1.5 t + 1 - d) · ‖ΔW_s‖²; d says how far the style is from usual.

    Weights do not count in it. Source: EST-LoRA, arXiv 2508.02165; d is its style discrepancy, given here by hand.
    """

    name: ClassVar[str] = "est"
    summary: ClassVar[str] = "each layer shows the subject, then the style, by their energy (EST-LoRA; d)"
    moves: ClassVar[bool] = True
    pair: ClassVar[bool] = True
    d: float = 0.5

    def prepare(self, layers: Iterable[Layer]) -> Filling:
        flips: dict[str, float] = {}
        for layer in layers:
            style, subject = layer.part_of(0), layer.part_of(1)
            if style is not None and subject is not None:
                energies = [float(((f.up.T @ f.up) * (f.down @ f.down.T)).sum().clamp_min(0)) for f in (style, subject)]
                flips[layer.path] = _last(energies[1], energies[0], 1.5, 1 - self.d)
        return Selection(flips)


def _last(subject: float, style: float, slope: float, start: float) -> float:
    """The last t at which subject ≥ style · (slope · t + start) holds; -inf where it never does, inf always."""
    if style == 0:
        return math.inf
    return (subject / style - start) / slope

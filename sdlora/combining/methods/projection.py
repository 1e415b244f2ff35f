"""NP-LoRA: the subjects keep out of the style's input space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layer import Layer
from .method import Filling, Moment, OnePass, check_option


@dataclass(frozen=True)
class NpLora(OnePass):
    """ΔW = ΔW_s + ΔW_c (I - κ Q Qᵀ), with Q an orthonormal basis of the style's input space and κ = μ / (1 + μ).

    The first adapter is the style, which is protected; each of the others is a subject. μ 0 is the plain sum, a large
    one a hard projection. As Q Qᵀ = A_sᵀ (A_s A_sᵀ)⁻¹ A_s, ΔW_c Q Qᵀ is B_c · X · A_s for X = A_c A_sᵀ (A_s A_sᵀ)⁻¹:
    M has the weights on its diagonal and -κ w_c X where a subject's rows meet the style's columns. Where the style
    weighs nothing it protects nothing.

    Source: NP-LoRA, arXiv 2511.11051, its soft projection.
    """

    name: ClassVar[str] = "np"
    summary: ClassVar[str] = "subjects leave the first LoRA's input space alone (NP-LoRA; mu)"
    mu: float = 0.5

    def __post_init__(self) -> None:
        check_option(self.name, "mu", self.mu, 0, math.inf)

    @property
    def kappa(self) -> float:
        return 1.0 if math.isinf(self.mu) else self.mu / (1 + self.mu)

    def prepare(self, layers: Iterable[Layer]) -> Filling:
        return self

    def middle(self, layer: Layer, gains: Sequence[float], moment: Moment | None) -> Tensor:
        diagonal = layer.spread(gains)
        style = layer.part_of(0)
        if style is None or len(layer.parts) == 1 or gains[layer.places.index(0)] == 0 or self.kappa == 0:
            return diagonal
        m = torch.diag(diagonal)
        starts = [sum(layer.ranks[:i]) for i in range(len(layer.parts) + 1)]
        at = layer.places.index(0)
        # the pseudo-inverse, since an untrained or merged file's rows may depend on each other
        inverse = torch.linalg.pinv(style.down @ style.down.T, hermitian=True)  # [r_s, r_s]
        for i, (part, gain) in enumerate(zip(layer.parts, gains, strict=True)):
            if i != at:
                x = part.down @ style.down.T @ inverse  # [r_c, r_s]
                m[starts[i] : starts[i + 1], starts[at] : starts[at + 1]] = -self.kappa * gain * x
        return m

"""TIES and DARE, the baselines from the merging of whole models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layer import Layer
from .method import DenseFilling, OnePass, check_option


@dataclass(frozen=True)
class Ties(OnePass):
    """Keeps the `density` largest entries of each w_i ΔW_i, elects a sign for every entry by their sum, and takes the
    mean of those that agree with it.

    Source: Yadav et al. 2023, TIES-Merging, section 3.
    """

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "largest entries that agree in sign, averaged (TIES; density)"
    density: float = 0.5

    def __post_init__(self) -> None:
        check_option(self.name, "density", self.density, 0, 1)

    def prepare(self, layers: Iterable[Layer]) -> DenseFilling:
        return self

    def delta(self, layer: Layer, gains: Sequence[float]) -> Tensor:
        kept = torch.stack([self._trim(gain * p.delta()) for gain, p in zip(gains, layer.parts, strict=True) if gain])
        agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        return (kept * agrees).sum(0) / agrees.sum(0).clamp_min(1)

    def _trim(self, delta: Tensor) -> Tensor:
        k = round(self.density * delta.numel())
        if not k:
            return torch.zeros_like(delta)
        # by place, not by value, so that equal entries do not all stay
        places = delta.abs().flatten().topk(k).indices
        kept = torch.zeros_like(delta).flatten()
        kept[places] = delta.flatten()[places]
        return kept.view_as(delta)


@dataclass(frozen=True)
class Dare(OnePass):
    """Keeps each entry of ΔW_i with probability `density`, divides by it, and takes the weighted sum.

    The entries are drawn anew for each layer and adapter, from `seed`, the layer's path and the adapter's place.

    Source: Yu et al. 2024, Language Models are Super Mario, section 3.
    """

    name: ClassVar[str] = "dare"
    summary: ClassVar[str] = "random entries, scaled up, summed by weight (DARE; density, seed)"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_option(self.name, "density", self.density, 1e-3, 1)

    def prepare(self, layers: Iterable[Layer]) -> DenseFilling:
        return self

    def delta(self, layer: Layer, gains: Sequence[float]) -> Tensor:
        total = torch.zeros_like(layer.parts[0].delta())
        for gain, part, place in zip(gains, layer.parts, layer.places, strict=True):
            total += gain / self.density * part.delta() * self.keeps(layer.path, place, total)
        return total

    def keeps(self, path: str, place: int, like: Tensor) -> Tensor:
        """Which entries of an adapter's ΔW stay in a layer: 0 or 1, in the shape, dtype and device of `like`."""
        address = hashlib.sha256(f"{self.seed}/{path}/{place}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(address[:8], "big") >> 1)
        return (torch.rand(like.shape, generator=generator) < self.density).to(like)

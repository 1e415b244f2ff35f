"""Noise and timesteps other than plain ones: offset, pyramid, perturbation; a range of the schedule, and a bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Recipe

Address = Callable[[str], torch.Generator]
"""From a purpose to the generator of one sample's draw for it."""


@dataclass(frozen=True)
class Times:
    """Which steps of the noise schedule are drawn, and how often."""

    t_min: float = 0.0
    t_max: float = 1.0
    """Shares 0..1 of the schedule."""
    bias: str = "uniform"

    @classmethod
    def of(cls, recipe: Recipe) -> Times:
        return cls(recipe.t_min, recipe.t_max, recipe.t_bias)

    def bounds(self, timesteps: int) -> tuple[int, int]:
        """The first step drawn, and the one after the last; there is one at least."""
        low = min(math.floor(self.t_min * timesteps + 1e-9), timesteps - 1)
        return low, max(low + 1, math.ceil(self.t_max * timesteps - 1e-9))

    def draw(self, timesteps: int, generator: torch.Generator) -> int:
        """One step: uniform; sigmoid(normal), so mostly the middle; early as u², late as 1 - u² of a uniform u in 0..1.

        Source: Esser et al. 2024, Scaling Rectified Flow Transformers, section 3.1 (logit-normal).
        """
        low, end = self.bounds(timesteps)
        if self.bias == "uniform":
            return low + int(torch.randint(end - low, (), generator=generator))
        if self.bias == "logit-normal":
            share = float(torch.sigmoid(torch.randn((), dtype=torch.float64, generator=generator)))
        else:
            squared = float(torch.rand((), dtype=torch.float64, generator=generator)) ** 2
            share = squared if self.bias == "early" else 1 - squared
        return low + min(int(share * (end - low)), end - low - 1)


@dataclass(frozen=True)
class NoiseShape:
    """What is done to a sample's white noise, and what is added to the picture beyond it."""

    offset: float = 0.0
    pyramid_levels: int = 0
    pyramid_discount: float = 0.3
    perturbation: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> NoiseShape:
        return cls(recipe.noise_offset, recipe.pyramid_noise, recipe.pyramid_discount, recipe.input_perturbation)

    def shape(self, noise: Tensor, address: Address) -> None:
        """Makes white noise float32 [C, H, W] coarser and shifts its channels, in place.

        Source: Whitaker 2023, Multi-Resolution Noise for Diffusion Model Training (levels, scaled back to a deviation
        of 1); Guttenberg 2023, Diffusion with Offset Noise.
        """
        if self.pyramid_levels:
            self._add_levels(noise, address)
        if self.offset:
            noise += self.offset * torch.randn(len(noise), 1, 1, generator=address("noise-offset"))

    def _add_levels(self, noise: Tensor, address: Address) -> None:
        channels, height, width = noise.shape
        coarse = 1.0
        for level in range(1, self.pyramid_levels + 1):
            generator = address(f"pyramid-noise-{level}")
            coarse *= 2 + 2 * float(torch.rand((), generator=generator))
            size = (max(1, int(height / coarse)), max(1, int(width / coarse)))
            drawn = torch.randn(1, channels, *size, generator=generator)
            grown = F.interpolate(drawn, size=(height, width), mode="bilinear", align_corners=False)
            noise += self.pyramid_discount**level * grown[0]
            if 1 in size:
                break  # a coarser level would be the same
        noise /= noise.std()

    def perturb(self, noise: Tensor, address: Address) -> Tensor:
        """The noise that is added to the picture, where `noise` [C, H, W] is what has to be predicted.

        Source: Ning et al. 2023, Input Perturbation Reduces Exposure Bias in Diffusion Models, algorithm 2.
        """
        if not self.perturbation:
            return noise
        return noise + self.perturbation * torch.randn(noise.shape, generator=address("input-perturbation"))

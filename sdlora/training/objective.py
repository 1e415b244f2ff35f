"""What training minimises: the weighted error of the base's prediction on noised latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Recipe
from ..errors import BaseModelError

PREDICTION_TYPES = ("epsilon", "v_prediction")


def prediction_type_of(scheduler_config: dict[str, object]) -> str:
    """What the base predicts, from its scheduler's config.

    Raises: BaseModelError where it is neither noise nor velocity.
    """
    kind = str(scheduler_config.get("prediction_type", "epsilon"))
    if kind not in PREDICTION_TYPES:
        raise BaseModelError(
            f"prediction type {kind!r} cannot be trained; use a base with {' or '.join(PREDICTION_TYPES)}"
        )
    return kind


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = √ᾱ·x0 + √(1-ᾱ)·noise; x0, noise float32 [B, ...], alpha_bar float64 [B] in 0..1.

    Source: Ho et al. 2020, Denoising Diffusion Probabilistic Models, equation 4.
    """
    return _scaled(alpha_bar.sqrt(), x0) + _scaled((1 - alpha_bar).sqrt(), noise)


def target(x0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the base should have predicted, float32 like x0: the noise, or the velocity √ᾱ·noise - √(1-ᾱ)·x0.

    Source: Ho et al. 2020, equation 14; Salimans & Ho 2022, Progressive Distillation, section 4.
    """
    if prediction_type == "epsilon":
        return noise
    return _scaled(alpha_bar.sqrt(), noise) - _scaled((1 - alpha_bar).sqrt(), x0)


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """The weight float32 [B] of each sample's error: min(SNR, γ)/SNR for noise, min(SNR, γ)/(SNR + 1) for velocity.

    SNR = ᾱ/(1-ᾱ); γ = 0 weighs all alike with 1. Where SNR is 0 the weight is 1: for noise that is the formula's limit;
    for velocity the limit is 0, with which a base of zero terminal SNR would never learn the step that it starts at.
    Source: Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting, section 3.4.
    """
    if gamma == 0:
        return torch.ones_like(alpha_bar, dtype=torch.float32)
    snr = alpha_bar / (1 - alpha_bar)
    weight = (gamma / snr).clamp(max=1.0) if prediction_type == "epsilon" else snr.clamp(max=gamma) / (snr + 1)
    return _one_at_zero(weight, alpha_bar)


def debiased_weight(alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The weight float32 [B] of each sample's error: 1/√SNR for noise, and so √SNR/(SNR + 1) = √(ᾱ(1-ᾱ)) for velocity.

    An error of the velocity is (SNR + 1)/SNR times that of the noise, so both forms train alike. Where SNR is 0 the
    weight is 1: for noise there is no limit, and for velocity it is 0, with which that step would never be learnt.
    Source: Yu et al. 2023, Debias the Training of Diffusion Models, equation 11.
    """
    left = 1 - alpha_bar
    return _one_at_zero((left / alpha_bar if prediction_type == "epsilon" else left * alpha_bar).sqrt(), alpha_bar)


def huber_width(alpha_bar: Tensor, t: Tensor, timesteps: int, huber_c: float, schedule: str) -> Tensor:
    """The c float32 [B] at which an error stops to count by its square, for steps t int64 [B] of `timesteps`.

    constant: huber_c; exponential: huber_c^(t/T), from 1 without noise to huber_c; snr, with the same ends:
    (1 - huber_c)/(1 + σ)² + huber_c for σ = √((1-ᾱ)/ᾱ).
    Source: Khrapov et al. 2024, Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber
    Loss, section 4.
    """
    if schedule == "constant":
        return torch.full_like(alpha_bar, huber_c, dtype=torch.float32)
    if schedule == "exponential":
        return torch.exp(math.log(huber_c) * t.double() / timesteps).float()
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    return ((1 - huber_c) / (1 + sigma) ** 2 + huber_c).float()


def mask_weight(mask: Tensor, outside: float) -> Tensor:
    """The weight of each latent pixel's error, float32 [B, 1, H, W], for masks m of this shape in 0..1, none all 0.

    w = outside + (1 - outside)·m, divided by the picture's mean of w: the mean weight of a picture is 1 however small
    its mask, so a small mask learns as much a step as a large one, and an all-white mask, or outside = 1, gives ones.
    """
    weight = torch.ones_like(mask).mul_(outside).lerp_(torch.ones_like(mask), mask)
    return weight / weight.mean((-2, -1), keepdim=True)


def weighted_error(
    prediction: Tensor, target: Tensor, weight: Tensor, width: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The mean over samples of weight · mean squared error, a float32 scalar whatever the prediction's dtype.

    `mask` [B, 1, H, W] is what each latent pixel's error counts (`mask_weight`), all the same without it.

    With a width c [B] the error d² of each value is 2c(√(d² + c²) - c) instead: d² where it is small, 2c|d| where it is
    large (pseudo-Huber).
    """
    squared = (prediction.float() - target).square().flatten(1)
    if width is not None:
        c = width[:, None]
        # 2c(√(d² + c²) - c) without the difference, which would lose the small errors' digits
        squared = 2 * c * squared / ((squared + c.square()).sqrt() + c)
    if mask is not None:
        squared = squared * mask.expand_as(prediction).flatten(1)
    return (squared.mean(1) * weight).mean()


@dataclass(frozen=True)
class Objective:
    """What a run makes small: the base's kind of prediction, and how the recipe weighs its errors."""

    recipe: Recipe
    prediction_type: str
    timesteps: int

    def weigh(self, alpha_bar: Tensor) -> Tensor:
        """The weight float32 [B] of each sample's error."""
        if self.recipe.weighting == "debiased":
            return debiased_weight(alpha_bar, self.prediction_type)
        gamma = self.recipe.min_snr_gamma if self.recipe.weighting == "min-snr" else 0.0
        return min_snr_weight(alpha_bar, gamma, self.prediction_type)

    def width(self, alpha_bar: Tensor, t: Tensor) -> Tensor | None:
        """The pseudo-Huber width float32 [B]; None for squared errors."""
        if self.recipe.loss == "l2":
            return None
        return huber_width(alpha_bar, t, self.timesteps, self.recipe.huber_c, self.recipe.huber_schedule)


def _one_at_zero(weight: Tensor, alpha_bar: Tensor) -> Tensor:
    return torch.where(alpha_bar == 0, 1.0, weight).float()


def _scaled(factor: Tensor, x: Tensor) -> Tensor:
    return factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) * x

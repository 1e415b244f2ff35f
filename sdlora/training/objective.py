"""What training minimises: the weighted error of the base's prediction on noised latents."""

from __future__ import annotations

import torch
from torch import Tensor

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

    SNR = ᾱ/(1-ᾱ); γ = 0 weighs all alike with 1. Where SNR is 0 the weight is its limit.
    Source: Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting, section 3.4.
    """
    if gamma == 0:
        return torch.ones_like(alpha_bar, dtype=torch.float32)
    snr = alpha_bar / (1 - alpha_bar)
    weight = (gamma / snr).clamp(max=1.0) if prediction_type == "epsilon" else snr.clamp(max=gamma) / (snr + 1)
    return weight.float()


def weighted_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The mean over samples of weight · mean squared error, a float32 scalar whatever the prediction's dtype."""
    error = (prediction.float() - target).square().flatten(1).mean(1)  # [B]
    return (error * weight).mean()


def _scaled(factor: Tensor, x: Tensor) -> Tensor:
    return factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) * x

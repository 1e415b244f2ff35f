"""What a base predicts and how noisy its last step is: read from its scheduler's configuration, or said by flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BaseModelError
from .folder import quiet

if TYPE_CHECKING:
    from .family import Base

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
"""What `--prediction` says, and diffusers' name for it."""


def choose_schedule(
    config: Mapping[str, Any], prediction: str | None, zero_snr: bool | None, name: str
) -> dict[str, Any]:
    """The scheduler's configuration with what was said of it: `epsilon` or `v`, and zero terminal SNR; None keeps it.

    Raises: BaseModelError where a base that predicts noise would start at pure noise, of which it can tell nothing.
    """
    chosen = dict(config)
    if prediction is not None:
        if prediction not in PREDICTIONS:
            raise BaseModelError(f"prediction {prediction!r} is not known; use epsilon or v")
        chosen["prediction_type"] = PREDICTIONS[prediction]
    if zero_snr is not None:
        chosen["rescale_betas_zero_snr"] = zero_snr
    if chosen.get("rescale_betas_zero_snr") and chosen.get("prediction_type", "epsilon") == "epsilon":
        raise BaseModelError(
            f"{name}: zero terminal SNR needs a base that predicts velocity, and this one predicts noise; "
            "leave it off, or add --prediction v where the base was trained so"
        )
    return chosen


def cumulate_alphas(config: Mapping[str, Any]) -> Tensor:
    """ᾱ of every training step, float64 [T]; the last is 0 where the configuration asks for zero terminal SNR.

    Source: Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, algorithm 1.
    """
    from diffusers import DDPMScheduler

    with quiet():
        betas = DDPMScheduler.from_config(dict(config)).betas  # rescaled there
    return torch.cumprod(1 - betas.double(), 0)


def with_schedule(base: Base, prediction: str | None, zero_snr: bool | None) -> Base:
    """The base with what was said of its prediction and its last step; the same base where nothing was said.

    Raises: BaseModelError as `choose_schedule`.
    """
    if prediction is None and zero_snr is None:
        return base
    config = choose_schedule(base.scheduler_config, prediction, zero_snr, base.name)
    return dataclasses.replace(base, scheduler_config=config, alphas_cumprod=cumulate_alphas(config))

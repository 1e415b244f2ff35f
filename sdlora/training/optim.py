"""The optimizer over the LoRA factors, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_NO_DECAY = {"weight_decay": 0.0}
_STATE = ("exp_avg", "exp_avg_sq", "step")


def rate_factor(step: int, *, schedule: str, warmup_steps: int, steps: int) -> float:
    """The share 0..1 of the learning rate at a step counted from 0: linear warm-up, then constant or half a cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def group_factors(
    factors: dict[str, Tensor], rates: dict[str, float], *, lora_plus_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups of factors by name, each with its learning rate: by part, and where it matters by side.

    `rates` is by part. With a ratio other than 1 the up factors learn that many times as fast as the down factors.
    A DoRA's magnitudes do not decay: they are lengths of the base's weights.
    Source: Hayou et al. 2024, LoRA+, section 4.
    """
    groups: list[dict[str, Any]] = []
    for part, rate in rates.items():
        mine = [name for name in factors if name.partition(".")[0] == part]
        lengths = [name for name in mine if name.endswith(".magnitude")]
        ups = [name for name in mine if name.endswith(".up")] if lora_plus_ratio != 1 else []
        rest = [name for name in mine if name not in {*lengths, *ups}]
        for names, own, more in ((rest, rate, {}), (ups, rate * lora_plus_ratio, {}), (lengths, rate, _NO_DECAY)):
            if names:
                group = {"params": [factors[n] for n in names], "names": names, "base_lr": own, "lr": own}
                groups.append(group | more)
    return groups


def make_optimizer(
    factors: dict[str, Tensor],
    *,
    learning_rate: float,
    text_encoder_learning_rate: float,
    weight_decay: float,
    text_encoder_2_learning_rate: float | None = None,
    lora_plus_ratio: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over float32 factors by name; those of a text encoder have their own learning rate, the second the first's.

    Source: Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2.
    """
    second = text_encoder_learning_rate if text_encoder_2_learning_rate is None else text_encoder_2_learning_rate
    rates = {"unet": learning_rate, "text_encoder": text_encoder_learning_rate, "text_encoder_2": second}
    groups = group_factors(factors, rates, lora_plus_ratio=lora_plus_ratio)
    device = next(iter(factors.values())).device.type
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=device in ("cpu", "cuda"))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Gives every group its learning rate times factor; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors, `exp_avg/<factor>` and so on; empty before the first update."""
    flat = {}
    for name, factor in _named(optimizer):
        for key, value in optimizer.state.get(factor, {}).items():
            assert key in _STATE, key
            flat[f"{key}/{name}"] = value.detach()
    return flat


def restore_state(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Puts back what `flatten_state` gave; a factor that no gradient ever reached has no state.

    Raises: KeyError where it is of another set of factors.
    """
    named = _named(optimizer)
    strange = {key.partition("/")[2] for key in flat} - {name for name, _ in named}
    if strange:
        raise KeyError(min(strange))
    for name, factor in named:
        if not any(f"{key}/{name}" in flat for key in _STATE):
            continue
        state = {key: flat[f"{key}/{name}"].clone() for key in _STATE}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].to(factor.device)
        if optimizer.param_groups[0]["fused"]:
            state["step"] = state["step"].to(factor.device)
        optimizer.state[factor] = state


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]

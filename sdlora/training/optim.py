"""The optimizer over the LoRA factors, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config import Recipe
from .optimizers import build_optimizer

_NO_DECAY = {"weight_decay": 0.0}
_ADAMW = ("exp_avg", "exp_avg_sq", "step")
_SET_HERE = ("params", "names", "base_lr", "lr", "weight_decay")
"""Entries of a group that the recipe decides, and no update."""
_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in _NUMBERS}


def rate_factor(
    step: int, *, schedule: str, warmup_steps: int, steps: int, cycles: int = 1, power: float = 1.0
) -> float:
    """The share 0..1 of the learning rate at a step counted from 0: linear warm-up, then what the schedule says.

    constant stays at 1; cosine falls along half a cosine, cosine-restarts along `cycles` of them, each from 1 again;
    linear and polynomial along a line and its power. All of these end at 0. Behind the warm-up the values are those of
    diffusers' `get_scheduler`; the warm-up is one step ahead of it, so that no step is made with a rate of 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - done
    if schedule == "polynomial":
        return float((1 - done) ** power)
    if schedule == "cosine-restarts":
        done = cycles * done % 1.0
    return 0.5 * (1 + math.cos(math.pi * done))


def schedule_of(recipe: Recipe) -> dict[str, Any]:
    """What `rate_factor` needs to know of a recipe."""
    return {
        "schedule": recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "steps": recipe.steps,
        "cycles": recipe.schedule_cycles,
        "power": recipe.schedule_power,
    }


def rate_at(step: int, recipe: Recipe) -> float:
    """The share of the learning rate at a step counted from 0; the steps of an init_word have a schedule of their own.

    Above 1 where the init_word's learning rate is higher than the rest's.
    """
    schedule, first = schedule_of(recipe), recipe.steps_of_init_word
    if step >= first:
        return rate_factor(step - first, **schedule | {"steps": recipe.steps - first})
    times = 1.0 if recipe.init_learning_rate is None else recipe.init_learning_rate / recipe.learning_rate
    warmup = min(recipe.warmup_steps, first // 5)
    return times * rate_factor(step, **schedule | {"steps": first, "warmup_steps": warmup})


def rates_of(recipe: Recipe) -> dict[str, Any]:
    """What `make_optimizer` needs to know of a recipe."""
    return {
        "optimizer": recipe.optimizer,
        "learning_rate": recipe.learning_rate,
        "text_encoder_learning_rate": recipe.text_encoder_rate,
        "text_encoder_2_learning_rate": recipe.text_encoder_2_rate,
        "lora_plus_ratio": recipe.lora_plus_ratio,
        "weight_decay": recipe.weight_decay,
    }


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
    optimizer: str = "adamw",
) -> torch.optim.Optimizer:
    """An optimizer over float32 factors by name; a text encoder's have their own learning rate, the second the first's.

    Raises: as `build_optimizer`.
    """
    second = text_encoder_learning_rate if text_encoder_2_learning_rate is None else text_encoder_2_learning_rate
    rates = {"unet": learning_rate, "text_encoder": text_encoder_learning_rate, "text_encoder_2": second}
    groups = group_factors(factors, rates, lora_plus_ratio=lora_plus_ratio)
    return build_optimizer(optimizer, groups, weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Gives every group its learning rate times factor; returns the first group's, times what Prodigy found."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    first = optimizer.param_groups[0]
    return float(first["lr"] * first.get("d", 1.0))


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors, `exp_avg/<factor>` and so on; empty before the first update.

    Plain numbers say their type, `step:int/<factor>`; those of a group that are not its defaults, such as how far
    Prodigy's learning rate is, are `d:float/group.<i>`.
    """
    flat: dict[str, Tensor] = {}
    for name, factor in _named(optimizer):
        for key, value in optimizer.state.get(factor, {}).items():
            flat |= _flatten(key, name, value)
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in _SET_HERE and type(value) in _NUMBERS and value != optimizer.defaults.get(key):
                flat |= _flatten(key, f"group.{i}", value)
    return flat


def restore_state(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Puts back what `flatten_state` gave; a factor that no gradient ever reached has no state.

    Raises: KeyError where it is of another set of factors.
    """
    places: dict[str, Any] = {f"group.{i}": group for i, group in enumerate(optimizer.param_groups)}
    named = dict(_named(optimizer))
    strange = {key.partition("/")[2] for key in flat} - named.keys() - places.keys()
    if strange:
        raise KeyError(min(strange))
    states: dict[str, dict[str, Any]] = {}
    for full, value in flat.items():
        key, _, name = full.partition("/")
        key, _, kind = key.partition(":")
        place = places[name] if name in places else states.setdefault(name, {})
        if kind:
            place[key] = _KINDS[kind](value.item())
        else:
            # what is no vector stays on the CPU, where AdamW wants its step, unless it is fused
            there = bool(value.dim()) or bool(optimizer.param_groups[0].get("fused"))
            place[key] = value.to(named[name].device if there else value.device, copy=True)
    for name, state in states.items():
        for key in _ADAMW if isinstance(optimizer, torch.optim.AdamW) else ():
            if key not in state:
                raise KeyError(f"{key}/{name}")
        optimizer.state[named[name]] = state


def _flatten(key: str, name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {f"{key}/{name}": value.detach()}
    if type(value) not in _NUMBERS:
        raise TypeError(f"{key} of {name} is {type(value).__name__}, which a checkpoint cannot hold")
    return {f"{key}:{type(value).__name__}/{name}": torch.tensor(value, dtype=_NUMBERS[type(value)])}


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]

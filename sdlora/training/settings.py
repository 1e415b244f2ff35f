"""A few words for every setting of the learning that is not the default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.header import printable, read_header
from ..config import FIELDS, UNDECISIVE, Recipe, make_recipe
from ..data.masks import ALPHA
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..bases.family import Base


_FILES_OF_A_RUN = {
    "masks": ("masks", "--masks"),
    "class_data": ("class_data", "--class-data"),
    "continued": ("continue_from", "--continue"),
    "merged": ("merge", "--merge"),
}
"""What a file says of other files that its run read, by digest: the field that names them, and its flag."""


def describe_learning(recipe: Recipe) -> list[str]:
    """The objective, the noise and timesteps, and the schedule, each where it is not the default."""
    return [*_objective(recipe), *_noise(recipe), *_times(recipe), *_steps(recipe), *_memory(recipe)]


def list_settings(base: Base, recipe: Recipe) -> dict[str, Any]:
    """The recipe's values that decide the result, with the base's public name: its own may be a path."""
    return {k: v for k, v in asdict(recipe).items() if k not in UNDECISIVE} | {"base": base.name}


def recipe_like(file: Path, overrides: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe that a LoRA file was trained by, with `overrides` before it; and lines on what it cannot repeat.

    Raises: ConfigError where the file names no such recipe, or a value of it cannot be used; AdapterFileError.
    """
    _, metadata = read_header(file)
    name = printable(file)
    try:
        said = json.loads(metadata.get("sdlora.recipe", "{}"))
    except (ValueError, RecursionError):
        said = {}
    if not isinstance(said, dict) or "steps" not in said or "base" not in said:
        raise ConfigError(f"{name} names no recipe: sdlora did not train it; give --config or flags instead of --like")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items() if k in FIELDS and v is not None}
    if values.get("masks") != ALPHA:
        values.pop("masks", None)  # the digest of a folder of them
    values.pop("class_data", None)
    values |= overrides
    if "masks" not in values:
        values.pop("mask_outside", None)
    notes = [
        f"note: {name} was trained with {flag}, and does not name its files; give {flag} again to repeat that"
        for key, (field, flag) in _FILES_OF_A_RUN.items()
        if said.get(key) and field not in values
    ]
    base = str(values["base"])
    if base != "mini" and not Path(base).exists() and "/" not in base:
        raise ConfigError(f"{name} was trained on {printable(base, 60)}, which is not here; say where (--base)")
    try:
        return make_recipe(values), notes
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def advise(recipe: Recipe) -> list[str]:
    """Lines about settings that work but that the optimizer was not made for."""
    lines = []
    if recipe.optimizer in ("prodigy", "schedule-free") and recipe.schedule != "constant":
        lines.append(f"advice: optimizer {recipe.optimizer} is made for a constant schedule (--schedule constant)")
    if recipe.optimizer == "prodigy" and recipe.learning_rate < 0.1:
        lines.append("advice: optimizer prodigy finds its learning rate times yours, which is usually 1")
    return lines


def _objective(recipe: Recipe) -> list[str]:
    lines = []
    if recipe.masks:
        source = "alpha" if recipe.masks == "alpha" else "a folder"
        lines.append(f"masks from {source}, {recipe.mask_outside:g} outside")
    if recipe.class_data or recipe.class_prompt:
        lines.append(f"class pictures' loss times {recipe.prior_weight:g}")
    if recipe.init_word:
        rate = "" if recipe.init_learning_rate is None else f" (learning rate {recipe.init_learning_rate:g})"
        lines.append(f"the first {recipe.init_steps} steps learn what the base draws for {recipe.init_word}{rate}")
    if recipe.loss == "huber":
        lines.append(f"huber loss, c {recipe.huber_c:g}, schedule {recipe.huber_schedule}")
    if recipe.weighting == "debiased":
        lines.append("debiased weighting")
    elif recipe.weighting == "none" or recipe.min_snr_gamma == 0:
        lines.append("all noise levels weighed alike")
    elif recipe.min_snr_gamma != Recipe.min_snr_gamma:
        lines.append(f"min-SNR gamma {recipe.min_snr_gamma:g}")
    return lines


def _noise(recipe: Recipe) -> list[str]:
    lines = [f"noise offset {recipe.noise_offset:g}"] if recipe.noise_offset else []
    if recipe.pyramid_noise:
        levels = f"{recipe.pyramid_noise} level" + ("s" if recipe.pyramid_noise > 1 else "")
        lines.append(f"pyramid noise of {levels}, discount {recipe.pyramid_discount:g}")
    return lines + ([f"input perturbation {recipe.input_perturbation:g}"] if recipe.input_perturbation else [])


def _times(recipe: Recipe) -> list[str]:
    lines = []
    if (recipe.t_min, recipe.t_max) != (0, 1):
        lines.append(f"timesteps from {recipe.t_min:g} to {recipe.t_max:g} of the schedule")
    return lines + ([f"timesteps drawn {recipe.t_bias}"] if recipe.t_bias != "uniform" else [])


def _steps(recipe: Recipe) -> list[str]:
    more = {
        "cosine-restarts": f" of {recipe.schedule_cycles} cycles",
        "polynomial": f" of power {recipe.schedule_power:g}",
    }
    lines = [f"optimizer {recipe.optimizer}"] if recipe.optimizer != Recipe.optimizer else []
    lines += (
        [f"schedule {recipe.schedule}{more.get(recipe.schedule, '')}"] if recipe.schedule != Recipe.schedule else []
    )
    lines += [f"running average of the factors, decay {recipe.ema_decay:g}"] if recipe.ema_decay else []
    if recipe.validation_share:
        lines.append(
            f"{recipe.validation_share:g} of the pictures held out, measured every {recipe.validate_every} steps"
        )
    return lines


def _memory(recipe: Recipe) -> list[str]:
    bits = {"int8": 8, "nf4": 4}
    lines = (
        [f"the base's linear layers in {bits[recipe.quantise]} bits ({recipe.quantise})"]
        if recipe.quantise in bits
        else []
    )
    recomputed = {"feed-forward": "feed-forward layers", "all": "everything"}
    if recipe.recompute in recomputed:
        lines.append(f"{recomputed[recipe.recompute]} computed again in the backward pass")
    return lines if recipe.fast_layers else [*lines, "torch's own layers on a CPU"]

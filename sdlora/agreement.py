"""Which fields of the Recipe need each other, and which exclude each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .targets import BLOCK_SETS, BLOCK_SETS_FAMILY, check_block_ranks, check_blocks, check_targets
from .values import parse_lora, show

if TYPE_CHECKING:
    from .config import Recipe

_NEEDS: dict[str, tuple[str, str | bool | None]] = {
    "bucket_step_px": ("buckets", True),
    "class_images": ("class_prompt", None),
    "class_prompt": ("class_images", None),
    "crops": ("crop", "random"),
    "huber_c": ("loss", "huber"),
    "huber_schedule": ("loss", "huber"),
    "init_learning_rate": ("init_word", None),
    "init_steps": ("init_word", None),
    "init_word": ("trigger", None),
    "mask_outside": ("masks", None),
    "max_aspect": ("buckets", True),
    "min_snr_gamma": ("weighting", "min-snr"),
    "pyramid_discount": ("pyramid_noise", None),
    "schedule_cycles": ("schedule", "cosine-restarts"),
    "schedule_power": ("schedule", "polynomial"),
    "small_buckets": ("buckets", True),
    "upscale": ("buckets", True),
    "validate_every": ("validation_share", None),
}
"""Fields that only another field's value gives a use; None is any number above 0, or any text or texts."""


def check_agreement(recipe: Recipe) -> None:
    """Holds the fields against each other; each by itself is in its range already.

    Raises: ConfigError, naming the first that do not go together and the fix.
    """
    _check_uses(recipe)
    check_targets(recipe.targets)
    check_blocks(recipe.blocks)
    check_block_ranks(recipe.block_ranks)
    for text in recipe.merge:
        parse_lora(text)
    if recipe.zero_terminal_snr and recipe.prediction == "epsilon":
        raise ConfigError(
            "zero_terminal_snr = true needs a base that predicts velocity; "
            'set prediction = "v" (--prediction v) or leave it out'
        )
    _check_optimizer(recipe)
    _check_caption_tools(recipe)
    _check_class_pictures(recipe)
    if recipe.steps_of_init_word >= recipe.steps:
        raise ConfigError(
            f"init_steps = {recipe.init_steps} leaves none of {recipe.steps} steps for the pictures; "
            "give fewer (--init-steps), or more steps"
        )
    if recipe.t_min >= recipe.t_max:
        raise ConfigError(
            f"t_min = {show(recipe.t_min)} and t_max = {show(recipe.t_max)} leave no step to train; "
            "give a t_min below t_max"
        )
    if recipe.preview_every and not recipe.preview:
        raise ConfigError(
            f"preview_every = {recipe.preview_every} has nothing to draw; give a prompt with preview (--preview)"
        )


def check_family(recipe: Recipe, family: str, base: str) -> None:
    """Holds the recipe against the family of the base that is called `base`, before its weights are loaded.

    Raises: ConfigError where a field is for another family.
    """
    for block in recipe.blocks:
        if block in BLOCK_SETS and family != BLOCK_SETS_FAMILY:
            raise ConfigError(f"blocks = {block} is for {BLOCK_SETS_FAMILY}; {base} is {family}, so leave it out")
    for name in recipe.block_ranks:
        if name.startswith("text_encoder_2") and family != "sdxl":
            raise ConfigError(f"block_ranks = {name} has no use: {base} has one text encoder; leave it out")
    if recipe.text_encoder_2_learning_rate is not None and family != "sdxl":
        raise ConfigError(f"text_encoder_2_learning_rate has no use: {base} has one text encoder; leave it out")


def _check_uses(recipe: Recipe) -> None:
    for name in ("text_encoder_learning_rate", "text_encoder_2_learning_rate"):
        if getattr(recipe, name) is not None and not recipe.text_encoder:
            raise ConfigError(
                f"{name} = {getattr(recipe, name)} has no use while "
                "text_encoder = false; set text_encoder = true (--text-encoder) or leave it out"
            )
    for name, (other, wanted) in _NEEDS.items():
        value, found = getattr(recipe, name), getattr(recipe, other)
        used = bool(found) if wanted is None else found == wanted
        if value != _default(recipe, name) and not used:
            fix = (
                "= " + show(wanted)
                if wanted is not None
                else "above 0"
                if found not in ("", ())
                else f"({_flag(other)})"
            )
            raise ConfigError(
                f"{name} = {show(value)} has no use while {other} = {show(found)}; set {other} {fix} or leave it out"
            )


def _check_optimizer(recipe: Recipe) -> None:
    if recipe.optimizer == "prodigy":
        if {recipe.text_encoder_rate, recipe.text_encoder_2_rate} != {recipe.learning_rate}:
            raise ConfigError(
                'optimizer = "prodigy" finds one learning rate for all; leave out the text encoders\' '
                "learning rates, or use another optimizer"
            )
        if recipe.lora_plus_ratio != 1:
            raise ConfigError(
                f'optimizer = "prodigy" finds one learning rate for all; leave out lora_plus_ratio = '
                f"{show(recipe.lora_plus_ratio)}, or use another optimizer"
            )
    if recipe.optimizer == "schedule-free":
        for name, why in (("ema_decay", "averages by itself"), ("max_norm", "loses its averages by it")):
            if getattr(recipe, name):
                raise ConfigError(
                    f'{name} = {show(getattr(recipe, name))} cannot go with optimizer = "schedule-free", which {why}; '
                    f"leave out {name}, or use another optimizer"
                )


def _check_caption_tools(recipe: Recipe) -> None:
    """Raises: ConfigError where a caption tool could do nothing, or the same to every showing of a picture."""
    tools = [name for name in ("shuffle_tags", "tag_dropout", "wildcards") if getattr(recipe, name)]
    if tools and recipe.caption_variants == 1:
        raise ConfigError(
            f"{tools[0]} = {show(getattr(recipe, tools[0]))} has one variant of each caption to work with; "
            "set caption_variants = 8 (--caption-variants) or leave it out"
        )
    if recipe.caption_variants > 1 and not tools:
        raise ConfigError(
            f"caption_variants = {recipe.caption_variants} makes {recipe.caption_variants} times the same of each "
            "caption; set shuffle_tags, tag_dropout or wildcards, or leave it out"
        )
    if recipe.keep_tags and not recipe.shuffle_tags and not recipe.tag_dropout:
        raise ConfigError(
            f"keep_tags = {recipe.keep_tags} has no use without shuffle_tags or tag_dropout; set one or leave it out"
        )


def _check_class_pictures(recipe: Recipe) -> None:
    """Raises: ConfigError where nothing is drawn from a prompt, or what is drawn would be no class picture."""
    if recipe.prior_weight != _default(recipe, "prior_weight") and not (recipe.class_data or recipe.class_prompt):
        raise ConfigError(
            f"prior_weight = {show(recipe.prior_weight)} has no use without class pictures; give class_data "
            "(--class-data) or class_prompt (--class-prompt), or leave it out"
        )
    if recipe.class_images < len(recipe.class_prompt):
        raise ConfigError(
            f"class_images = {recipe.class_images} cannot show {len(recipe.class_prompt)} class prompts; "
            f"give {len(recipe.class_prompt)} or more (--class-images)"
        )
    for prompt in recipe.class_prompt:
        if recipe.trigger and re.search(rf"(?<!\w){re.escape(recipe.trigger)}(?!\w)", prompt, re.IGNORECASE):
            raise ConfigError(
                f"class_prompt = {show(prompt)} holds the trigger {show(recipe.trigger)}, and class pictures are those "
                "without it; leave it out of the prompt"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _default(recipe: Recipe, name: str) -> Any:
    return getattr(type(recipe), name)

"""From a recipe to the layers that learn, attached to a base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapter.card import TAGS_KEY, describe_tags
from ..adapter.delta import Card
from ..adapter.file import file_sha256, read_adapter
from ..adapter.layers import LoraLayers, attach
from ..adapter.sites import LayerPlan
from ..agreement import check_family
from ..bases.family import Base
from ..bases.source import revision_of
from ..config import Recipe
from ..errors import ConfigError
from .objective import prediction_type_of
from .settings import describe_learning, list_settings


def attach_layers(base: Base, recipe: Recipe) -> LoraLayers:
    """Attaches what the recipe adapts, starting from the LoRA that it continues, if it names one.

    Raises: ConfigError where the recipe does not fit the base; AdapterFileError where the LoRA to continue does not.
    """
    check_base(base, recipe)
    parts = tuple(base.family.default_targets(recipe.text_encoder))
    layers = attach(
        {part: base.modules[part] for part in parts},
        dict.fromkeys(parts, recipe.targets),
        rank=recipe.rank,
        alpha=recipe.scale_alpha,
        seed=recipe.seed,
        plan=LayerPlan(
            blocks=recipe.blocks,
            block_ranks=recipe.block_ranks,
            conv_rank=recipe.conv_rank,
            conv_alpha=recipe.conv_alpha,
            rank_stabilised=recipe.rank_stabilised,
            dora=recipe.dora,
            dropout=recipe.dropout,
            rank_dropout=recipe.rank_dropout,
            module_dropout=recipe.module_dropout,
        ),
        together=recipe.fast_layers,
    )
    if recipe.continue_from:
        try:
            layers.load_adapter(read_adapter(recipe.continue_from), Path(recipe.continue_from).name)
        except BaseException:
            layers.detach_from_base()
            raise
    return layers


def check_base(base: Base, recipe: Recipe) -> None:
    """Raises: ConfigError where the recipe asks for what a base of this family has not, or was not prepared for it."""
    check_family(recipe, base.family.name, base.name)
    merged = len(base.merged)
    if merged != len(recipe.merge):
        raise ConfigError(
            f"merge names {len(recipe.merge)} LoRAs and {merged} are merged into the base; "
            "train with sdlora.train or the command line, which merge them"
        )


def describe_settings(recipe: Recipe) -> list[str]:
    """A few words for each setting of what is adapted, and how it learns, that is not the default."""
    lines = [f"up factors learn {recipe.lora_plus_ratio:g} times as fast"] if recipe.lora_plus_ratio != 1 else []
    if recipe.text_encoder and (recipe.text_encoder_rate, recipe.text_encoder_2_rate) != (recipe.learning_rate,) * 2:
        rates = f"{recipe.text_encoder_rate:g}"
        if recipe.text_encoder_2_rate != recipe.text_encoder_rate:
            rates += f" and {recipe.text_encoder_2_rate:g}"
        lines.append(f"text encoder's learning rate {rates}")
    lines += [f"changes limited to a norm of {recipe.max_norm:g}"] if recipe.max_norm else []
    lines += [f"continues {Path(recipe.continue_from).name}"] if recipe.continue_from else []
    lines += [f"{len(recipe.merge)} LoRAs merged into the base"] if recipe.merge else []
    return lines + describe_learning(recipe)


def name_sources(base: Base, recipe: Recipe) -> dict[str, Any]:
    """What the run builds on: `base_revision`, a hub's commit, and the LoRAs `continued` and `merged`, by digest.

    A key is missing where there is none.

    Raises: AdapterFileError where the file to continue cannot be read.
    """
    sources: dict[str, Any] = {}
    if revision := revision_of(base.source):
        sources["base_revision"] = revision
    if recipe.continue_from:
        sources["continued"] = file_sha256(recipe.continue_from)
    if base.merged:
        sources["merged"] = base.merged
    return sources


def make_card(
    base: Base, recipe: Recipe, sources: dict[str, Any], processes: int = 1, captions: Sequence[str] = ()
) -> Card:
    """What the file says of itself: the settings that decided it, no path among them.

    Of the captions it tells how often each tag occurs, where the recipe shares them, and else nothing.
    """
    settings = list_settings(base, recipe) | sources | ({"processes": processes} if processes > 1 else {})
    if prediction_type_of(base.scheduler_config) == "v_prediction":
        settings["prediction_type"] = "v_prediction"
    metadata = {TAGS_KEY: describe_tags(captions)} if recipe.share_captions else {}
    return Card(base.family.name, base.name, recipe.trigger, settings, metadata)


__all__ = ["attach_layers", "check_base", "describe_settings", "make_card", "name_sources"]

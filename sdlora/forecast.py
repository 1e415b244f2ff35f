"""What a run will need of memory, for the verbs check and train, and what they make of `--memory`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .screen import say

if TYPE_CHECKING:
    from argparse import _ArgumentGroup

    from .config import Recipe
    from .data.buckets import Cuts
    from .flags import Parser


def add_memory_flag(parser: Parser | _ArgumentGroup) -> None:
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="picks the cheapest settings that fit into it, as 8GB or 7.5GiB, and says which; the steps stay the same",
    )


def fit_memory(size: str | None, source: Path, recipe: Recipe, cuts: Cuts, device: str = "auto") -> Recipe:
    """The recipe with what lets it fit into a memory, and a line that says what that is; as it is without a size.

    Raises: ConfigError where the size is none or nothing fits.
    """
    if size is None:
        return recipe
    from .bases.family import pick_device
    from .training.fitting import describe_changes, fit_recipe

    fitted = fit_recipe(source, recipe, _largest(cuts), size, pick_device(device))
    say(f"memory {size}: {describe_changes(recipe, fitted) or 'it fits as it is'}")
    return fitted


def forecast_memory(report: dict[str, Any], source: Path, recipe: Recipe, cuts: Cuts) -> list[str]:
    """The lines that say how much memory training will need; the figures go into the report, under `memory`.

    Raises: ConfigError where the recipe does not fit the base, or its quantisation lacks its package.
    """
    from .bases.family import pick_device
    from .bases.quantisation import check_quantise
    from .training.memory import describe_memory, estimate_memory

    check_quantise(recipe.quantise, pick_device("auto"))
    report["memory"] = estimate_memory(source, recipe, _largest(cuts))
    return describe_memory(report["memory"])


def _largest(cuts: Cuts) -> tuple[int, int]:
    return max((cut.size for cut in cuts.cuts), key=lambda size: size[0] * size[1])

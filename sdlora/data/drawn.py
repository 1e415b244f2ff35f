"""Class pictures that the base itself draws before training: how many, from which prompts, and what is said of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..config import Recipe
from ..errors import ConfigError
from ..values import quote
from .buckets import count
from .captions import clean_caption
from .folder import Example

DRAW_STEPS, GUIDANCE = 20, 5.0
"""What they are drawn with: a person's own pictures of the base mostly are, too."""
FOLDER = "class"
"""What their folder is called within the run's."""


def list_drawn(recipe: Recipe, given: Sequence[Example], side_px: int, place: Path) -> list[Example]:
    """The pictures that `given` ones are short of the recipe's, squares of side_px that are to lie in `place`.

    The prompts take turns, and each is its picture's caption. The files need not be there yet.
    """
    prompts = [clean_caption(prompt) for prompt in recipe.class_prompt]
    names = [f"{i:05d}.png" for i in range(recipe.class_images - len(given))]
    return [
        Example(place / name, f"{FOLDER}/{name}", prompts[i % len(prompts)], 1, (side_px, side_px))
        for i, name in enumerate(names)
    ]


def draw_seed(recipe: Recipe, number: int) -> int:
    """The seed of the number-th drawn picture: it hangs on the recipe's and on the number alone."""
    return int.from_bytes(hashlib.sha256(f"{recipe.seed}/class-picture/{number}".encode()).digest()[:8], "big") >> 1


def check_place(given: Path, place: Path) -> None:
    """Raises: ConfigError where drawn pictures would lie in the folder of given ones, and count as such the next time.

    To learn from pictures that another run drew, its folder is given and is none of this run's.
    """
    if place.resolve().is_relative_to(given.resolve()):
        raise ConfigError(
            f"class_data = {quote(str(given))} holds {place}, where this run draws the missing class pictures; "
            "leave out class_data (--class-data), which draws all of them, or choose another --out"
        )


def describe_drawn(recipe: Recipe, drawn: Sequence[Example], given: int) -> list[str]:
    """A line on what the base draws, where it was asked to draw."""
    if not recipe.class_prompt:
        return []
    if not drawn:
        return [f"no class picture drawn: {count(given, 'picture')} are there, of class_images = {recipe.class_images}"]
    turns = Counter(example.caption for example in drawn)
    prompts = ", ".join(f"{n} from {quote(prompt)}" for prompt, n in turns.items())
    side_px = drawn[0].size_px[0]
    return [
        f"{count(len(drawn), 'class picture')} drawn by the base before the first step: {prompts}; "
        f"{side_px} x {side_px} px, {DRAW_STEPS} steps, guidance {GUIDANCE:g}; kept in {drawn[0].path.parent}"
    ]

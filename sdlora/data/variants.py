"""Caption tools that work with cached text: every wording of a caption is made before the text is encoded."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence

from ..config import Recipe

_WILDCARD = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def list_wordings(captions: Sequence[str], recipe: Recipe) -> list[list[str]]:
    """Each picture's wordings: of every line of its caption, as many as the recipe asks for, drawn by its seed.

    A wording hangs on the seed, the picture's place, the line and its own number alone; some may be equal.
    """
    return [
        [
            vary_caption(line, recipe, _address(recipe.seed, place, number, variant))
            for number, line in enumerate(caption.split("\n"))
            for variant in range(recipe.caption_variants)
        ]
        for place, caption in enumerate(captions)
    ]


def vary_caption(caption: str, recipe: Recipe, draws: random.Random) -> str:
    """One wording: a choice for each wildcard, then tags left out, then the others in another order.

    The first `keep_tags` tags stay, and so does a trigger in front of them; one tag at least stays whatever is drawn.
    """
    if recipe.wildcards:
        caption = choose_wildcards(caption, draws)
    if not recipe.shuffle_tags and not recipe.tag_dropout:
        return caption
    tags = [tag for tag in (part.strip() for part in caption.split(",")) if tag]
    kept = recipe.keep_tags + bool(recipe.trigger and tags and tags[0].lower() == recipe.trigger.lower())
    first, rest = tags[:kept], tags[kept:]
    left = [tag for tag in rest if not (recipe.tag_dropout and draws.random() < recipe.tag_dropout)]
    if not first and not left:
        left = rest[:1]
    if recipe.shuffle_tags:
        draws.shuffle(left)
    return ", ".join(first + left)


def say_init_word(wording: str, recipe: Recipe) -> str:
    """The wording with the recipe's init_word in its trigger's place, or behind it where the trigger was left out."""
    trigger = rf"(?<!\w){re.escape(recipe.trigger)}(?!\w)"
    said, found = re.subn(trigger, lambda _: recipe.init_word, wording, flags=re.IGNORECASE)
    return said if found else ", ".join(part for part in (wording, recipe.init_word) if part)


def choose_wildcards(caption: str, draws: random.Random) -> str:
    """The caption with one of the options of each `{a|b}`, from the innermost out; other braces stay as they are."""
    while found := _WILDCARD.search(caption):
        chosen = draws.choice(found[1].split("|"))
        caption = caption[: found.start()] + chosen + caption[found.end() :]
    return " ".join(caption.split())


def describe_wordings(wordings: Sequence[Sequence[str]], recipe: Recipe) -> list[str]:
    """A line on what is made of the captions, where anything is."""
    total = sum(map(len, wordings))
    if total == len(wordings):
        return []
    how = [f"{recipe.caption_variants} variants of each line"] if recipe.caption_variants > 1 else []
    how += ["a caption a line"] if recipe.caption_lines else []
    how += ["wildcards"] if recipe.wildcards else []
    kept = f", the first {recipe.keep_tags} kept" if recipe.keep_tags else ""
    how += [f"tags shuffled{kept}"] if recipe.shuffle_tags else []
    how += [f"{recipe.tag_dropout:.0%} of the tags left out{kept}"] if recipe.tag_dropout else []
    different = len({wording for own in wordings for wording in own})
    return [f"{total} wordings of {len(wordings)} captions, {different} different: {', '.join(how)}"]


def _address(*parts: int) -> random.Random:
    address = hashlib.sha256("/".join(map(str, (*parts, "wording"))).encode()).digest()
    return random.Random(int.from_bytes(address, "big"))

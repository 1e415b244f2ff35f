"""Pictures ready to be learnt: planned before anything is written, encoded once the run begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..bases.family import Base
from ..bases.text import Text
from ..config import Recipe
from ..data.buckets import Cuts, describe_crops
from ..data.cache import Encoded, encode_captions, encode_folder
from ..data.folder import Example
from ..data.masks import Places
from ..data.material import Material, class_recipe, describe_prior
from ..data.store import Store
from ..data.variants import describe_wordings, list_wordings, say_init_word
from .class_pictures import provide_drawn
from .processes import Processes


@dataclass(frozen=True)
class Lessons:
    """Some examples, how each is cut, and where its random crops lie."""

    examples: list[Example]
    recipe: Recipe
    side_px: int
    cuts: Cuts
    places: Places | None
    lines: tuple[str, ...] = ()
    """What is to be said before the rest."""
    drawn: int = 0
    """How many of the examples, the last ones, are to be drawn first."""

    @classmethod
    def plan(
        cls, material: Material, recipe: Recipe, side_px: int, repeats: list[int] | None = None, processes: int = 1
    ) -> Lessons:
        """Plans every cut; `repeats` is how often each example counts in an epoch. Raises: as `Material.cut`."""
        cuts = material.cut(recipe, side_px, repeats, processes)
        return cls(material.examples, recipe, side_px, cuts, material.place(recipe, cuts))

    @classmethod
    def of_prior(
        cls, material: Material, recipe: Recipe, side_px: int, run: Path, processes: int = 1
    ) -> Lessons | None:
        """The class pictures' lessons, where there are any; the base draws what is missing into the run folder."""
        classes = material.classes(recipe, side_px, run)
        if classes is None:
            return None
        lessons = cls.plan(classes, class_recipe(recipe), side_px, processes=processes)
        return replace(lessons, lines=tuple(describe_prior(classes, recipe, processes)), drawn=classes.drawn)

    def encode(self, base: Base, cache: Path | None, say: Callable[[str], None], processes: Processes) -> Encoded:
        """Encodes the examples as the recipe shows them, saying first what becomes of pictures and captions.

        Each process encodes all of it for itself: any picture may fall to it, and the machines need not share a disk.
        With a cache one of each machine goes first, and the others find what it made.
        """
        recipe = self.recipe
        wordings = list_wordings([e.caption for e in self.examples], recipe)
        first = len(self.examples) - self.drawn
        lines = list(self.lines) + self.cuts.describe(recipe.images_per_step * processes.count) + describe_crops(recipe)
        for line in lines + describe_wordings(wordings, recipe):
            say(line)
        provide_drawn(base, recipe, self.examples[first:], processes)
        encode = partial(
            encode_folder,
            base,
            self.examples,
            resolution_px=self.side_px,
            sizes=[cut.size for cut in self.cuts.cuts],
            wordings=wordings,
            places=self.places,
            flip=recipe.flip,
            text=not recipe.text_encoder,
            chunks=recipe.max_chunks,
            clip_skip=recipe.clip_skip,
            store=Store(cache) if cache else None,
        )
        return processes.in_turn(encode) if cache else encode()

    def encode_init_word(self, base: Base) -> Text | None:
        """The captions with the recipe's init_word in their trigger's place, a row for each of `Encoded.ids`."""
        if not self.recipe.init_word:
            return None
        wordings = list_wordings([e.caption for e in self.examples], self.recipe)
        captions = [say_init_word(wording, self.recipe) for own in wordings for wording in own]
        ids, _ = base.tokenize([*captions, ""], self.recipe.max_chunks)
        return encode_captions(base, [*captions, ""], ids, self.recipe.clip_skip, progress=False)

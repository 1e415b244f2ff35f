"""Prior preservation: class pictures learnt beside a run's own, so that the base keeps what it knows of their class."""

from __future__ import annotations

from dataclasses import dataclass

from ..bases.family import Base
from ..config import Recipe
from ..data.cache import Encoded
from ..data.material import class_recipe
from .draws import Chances
from .step import chances_of
from .validation import Validation


@dataclass(frozen=True)
class Prior:
    """The class pictures of a run, what is drawn of them, and what their loss counts.

    Each pass of B training pictures is followed by one of B class pictures, whose order, mirroring, crop, wording,
    dropped caption, noise and timestep are drawn as the training pictures' are, by a seed of their own.

    Source: Ruiz et al. 2022, DreamBooth, section 3.2, equation 2.
    """

    encoded: Encoded
    chances: Chances
    weight: float

    @classmethod
    def of(cls, base: Base, encoded: Encoded | None, recipe: Recipe, processes: int = 1) -> Prior | None:
        """The prior of encoded class pictures, or None where there are none."""
        if encoded is None:
            return None
        own = class_recipe(recipe)
        chances = chances_of(base, encoded, own, Validation([], own), processes)
        return cls(encoded, chances, recipe.prior_weight)

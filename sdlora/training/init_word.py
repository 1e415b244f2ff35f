"""The start from a word that the base knows: in a run's first steps the base itself, told that word, is the teacher.

A LoRA that begins with a style's pictures forgets things that the base could draw in a style much like it. One that
begins by drawing for the trigger what the base draws for the word has little left to learn from the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter.layers import LoraLayers
from ..bases.family import Base
from ..bases.text import Text
from ..config import Recipe
from .draws import Chances, Draws


@dataclass(frozen=True)
class InitWord:
    """What is learnt in the first `steps` steps, in place of the pictures: the base's own prediction for the word."""

    steps: int
    text: Text
    """Text states of each caption with the word in its trigger's place, as the base without a LoRA reads them; its rows
    are those of `Encoded.ids`."""
    chances: Chances
    layers: LoraLayers

    @classmethod
    def of(cls, layers: LoraLayers, text: Text | None, chances: Chances, recipe: Recipe) -> InitWord | None:
        """The start of a run that draws by `chances`; None where there is no text. No caption is dropped in it."""
        return None if text is None else cls(recipe.init_steps, text, replace(chances, caption_dropout=0.0), layers)

    @torch.no_grad()
    def predict(self, base: Base, x_t: Tensor, draws: Draws, sizes: Tensor) -> Tensor:
        """[B, 4, H/8, W/8] float32: what the base without its LoRA says of x_t, told the word."""
        text = self.text[draws.caption].to(base.device, base.dtype, non_blocking=True)
        with self.layers.aside():
            return base.predict(x_t, draws.t.to(base.device), text, sizes).float()

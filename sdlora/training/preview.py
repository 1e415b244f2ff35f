"""Pictures of a few prompts during training, always from the same noise, so that they differ by what was learnt."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bases.family import Base
from ..bases.sampling import sample_encoded
from ..config import Recipe
from ..errors import SdloraError
from .checkpoint import write_atomic
from .progress import say


@dataclass(frozen=True)
class Previews:
    """The prompts of a run's previews, encoded once where the text encoder is frozen."""

    prompts: tuple[str, ...]
    every_steps: int
    """Steps between previews; 0 only at the end."""
    folder: Path
    seeds: tuple[int, ...]
    resolution_px: int
    states: Tensor | None
    """[P + 1, 77, D], the last of the empty prompt; None where the text encoder is trained."""

    @classmethod
    def of(cls, base: Base, recipe: Recipe, folder: Path, resolution_px: int) -> Previews:
        """The previews a recipe asks for; to be called while the base still has its text encoder."""
        seeds = tuple((recipe.seed + i) % 2**63 for i in range(len(recipe.preview)))
        states = None if recipe.text_encoder or not recipe.preview else _encode(base, recipe.preview)
        return cls(recipe.preview, recipe.preview_every, folder, seeds, resolution_px, states)

    def due(self, step: int, steps: int) -> bool:
        """Whether previews are drawn after `step` of `steps`."""
        return bool(self.prompts) and (step == steps or (self.every_steps > 0 and step % self.every_steps == 0))

    def draw(self, base: Base, step: int) -> list[Path]:
        """Writes `step-000100-0.png` and so on; one that cannot be drawn is a line on the screen, not the run's end."""
        states = _encode(base, self.prompts) if self.states is None else self.states
        side_px = self.resolution_px
        try:
            pictures = sample_encoded(
                base, states[:-1], states[-1], seeds=list(self.seeds), width_px=side_px, height_px=side_px
            )
        except SdloraError as e:
            say(f"no preview after step {step}: {e}")
            return []
        self.folder.mkdir(exist_ok=True)
        paths = []
        for i, picture in enumerate(pictures):
            data = io.BytesIO()
            picture.save(data, "PNG")
            paths.append(self.folder / f"step-{step:06d}-{i}.png")
            write_atomic(paths[-1], data.getvalue())
        return paths


@torch.no_grad()
def _encode(base: Base, prompts: tuple[str, ...]) -> Tensor:
    return base.encode_text(base.tokenize([*prompts, ""])[0])

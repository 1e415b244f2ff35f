"""Pictures of a few prompts during training, always from the same noise, so that they differ by what was learnt."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..bases.family import Base
from ..bases.prompts import Wording, encode_prompts
from ..bases.sampling import sample_encoded
from ..config import Recipe
from ..disk import write_atomic
from ..errors import SdloraError
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
    clip_skip: int
    wordings: list[Wording] | None
    """The prompts encoded; None where the text encoder is trained."""

    @classmethod
    def of(cls, base: Base, recipe: Recipe, folder: Path, resolution_px: int) -> Previews:
        """The previews a recipe asks for; to be called while the base still has its text encoder."""
        seeds = tuple((recipe.seed + i) % 2**63 for i in range(len(recipe.preview)))
        skip, prompts = recipe.clip_skip, recipe.preview
        wordings = None if recipe.text_encoder or not prompts else encode_prompts(base, prompts, clip_skip=skip)
        return cls(prompts, recipe.preview_every, folder, seeds, resolution_px, skip, wordings)

    def due(self, step: int, steps: int) -> bool:
        """Whether previews are drawn after `step` of `steps`."""
        return bool(self.prompts) and (step == steps or (self.every_steps > 0 and step % self.every_steps == 0))

    def draw(self, base: Base, step: int) -> list[Path]:
        """Writes `step-000100-0.png` and so on; one that cannot be drawn is a line on the screen, not the run's end."""
        try:
            pictures = self.sample(base)
        except SdloraError as e:
            say(f"no preview after step {step}: {e}")
            return []
        self.folder.mkdir(exist_ok=True)
        paths = []
        for i, picture in sorted(pictures.items()):
            data = io.BytesIO()
            picture.save(data, "PNG")
            paths.append(self.folder / f"step-{step:06d}-{i}.png")
            write_atomic(paths[-1], data.getvalue())
        return paths

    def sample(self, base: Base) -> dict[int, Image.Image]:
        """The prompts' pictures, by their places. Raises: ConfigError where one is not finite."""
        side_px = self.resolution_px
        pictures: dict[int, Image.Image] = {}
        for wording in self.wordings or encode_prompts(base, self.prompts, clip_skip=self.clip_skip):
            seeds = [self.seeds[row] for row in wording.rows]
            drawn = sample_encoded(
                base, wording.text, wording.negative, seeds=seeds, width_px=side_px, height_px=side_px
            )
            pictures |= dict(zip(wording.rows, drawn, strict=True))
        return pictures

"""The loss on pictures that are held out, always with the same noise at the same timesteps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..bases.family import Base
from ..config import Recipe
from ..data.cache import Encoded
from ..errors import DataError
from .draws import generator
from .inputs import send, text_of
from .noise import Times
from .objective import add_noise, mask_weight, prediction_type_of, target, weighted_error

TIMES = 4
"""Timesteps at which each picture is measured, spread evenly over those that are trained."""


def hold_out(count: int, share: float, seed: int) -> list[int]:
    """Which of `count` pictures are held out for validation, by chance but always the same.

    Raises: DataError where the share takes all pictures, or none.
    """
    held = round(share * count)
    if share and not held:
        raise DataError(
            f"validation_share = {share:g} of {count} pictures holds out none; give at least {1 / count:.2g}, or 0"
        )
    if held >= count > 0:
        raise DataError(f"validation_share = {share:g} of {count} pictures leaves nothing to learn; give a smaller one")
    return sorted(torch.randperm(count, generator=generator(seed, 0, "validation"))[:held].tolist())


@dataclass(frozen=True)
class Validation:
    """The pictures that a run holds out; none where the recipe has no share for it."""

    pictures: list[int]
    recipe: Recipe

    @classmethod
    def of(cls, recipe: Recipe, count: int) -> Validation:
        """The validation of a recipe over `count` pictures. Raises: as `hold_out`."""
        return cls(hold_out(count, recipe.validation_share, recipe.seed), recipe)

    def learnt(self, repeats: list[int]) -> list[int]:
        """How often each picture counts in an epoch: as it was, and not at all where it is held out."""
        held = set(self.pictures)
        return [0 if i in held else n for i, n in enumerate(repeats)]

    def due(self, step: int) -> bool:
        """Whether the loss is measured after `step` steps."""
        return bool(self.pictures) and (step == self.recipe.steps or step % self.recipe.validate_every == 0)

    @torch.no_grad()
    def measure(self, base: Base, encoded: Encoded) -> float:
        """The mean squared error over the held-out pictures, unweighted, so that runs can be compared by it.

        Where there are masks, a pixel's error counts what it counts in training.
        """
        kind = prediction_type_of(base.scheduler_config)
        low, end = Times.of(self.recipe).bounds(len(base.alphas_cumprod))
        t = torch.tensor([low + int((i + 0.5) / TIMES * (end - low)) for i in range(TIMES)])
        alpha_bar = base.alphas_cumprod[t]  # [TIMES]
        first = [0, *itertools.accumulate(encoded.wordings)]  # of several wordings, each picture's first
        errors = []
        for picture in self.pictures:
            latents = encoded.latents[int(encoded.bucket[picture])]
            x0 = latents.mean[0, int(encoded.row[picture])].expand(TIMES, -1, -1, -1)  # [TIMES, 4, H/8, W/8]
            noise = torch.stack(
                [
                    torch.randn(x0.shape[1:], generator=generator(self.recipe.seed, 0, "validation-noise", i))
                    for i in range(picture * TIMES, (picture + 1) * TIMES)
                ]
            )
            goal = target(x0, noise, alpha_bar, kind).to(base.device)
            text = text_of(base, encoded, torch.tensor([first[picture]] * TIMES), self.recipe.clip_skip)
            sizes = encoded.sizes[0, picture].expand(TIMES, -1).to(base.device)
            prediction = base.predict(send(add_noise(x0, noise, alpha_bar), base), t.to(base.device), text, sizes)
            mask = encoded.mask(torch.zeros(1, dtype=torch.int64), torch.tensor([picture]))
            mask = mask if mask is None else mask_weight(mask, self.recipe.mask_outside).to(base.device)
            errors.append(weighted_error(prediction, goal, torch.ones(TIMES, device=base.device), mask=mask))
        return float(torch.stack(errors).mean())

"""One step's gradients: what is drawn, what the base sees of it, and the error of what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor

from ..adapter.layers import LoraLayers
from ..bases.family import Base
from ..config import Recipe
from ..data.cache import Encoded
from .draws import Chances, Draws, Order
from .inputs import send, text_of
from .noise import NoiseShape, Times
from .objective import Objective, add_noise, mask_weight, target, weighted_error
from .processes import Processes
from .validation import Validation

if TYPE_CHECKING:
    from .init_word import InitWord
    from .prior import Prior


def chances_of(base: Base, encoded: Encoded, recipe: Recipe, validation: Validation, processes: int = 1) -> Chances:
    """The distributions that a recipe draws from; a step's pictures are those of all processes."""
    together = recipe.images_per_step * processes
    return Chances(
        Order(recipe.seed, validation.learnt(encoded.repeats), encoded.bucket.tolist(), together),
        encoded.shapes[0],
        len(base.alphas_cumprod),
        recipe.caption_dropout,
        recipe.flip,
        Times.of(recipe),
        NoiseShape.of(recipe),
        encoded.shapes,
        encoded.wordings,
        recipe.crops,
    )


def accumulate(
    step: int,
    base: Base,
    layers: LoraLayers,
    encoded: Encoded,
    objective: Objective,
    chances: Chances,
    accelerator: Accelerator,
    processes: Processes,
    prior: Prior | None = None,
    word: InitWord | None = None,
) -> Tensor:
    """A step's gradients, over this process's share of its passes; returns their mean loss, the class pictures' added.

    A step in which `word` teaches has the pictures' latents and the word's predictions. Each pass is followed by the class pictures' of the same number, so that a process has both or neither.
    """
    word = word if word is not None and step < word.steps else None
    chances = chances if word is None else word.chances
    losses, passes = [], objective.recipe.accumulation * processes.count
    for micro in range(objective.recipe.accumulation):
        part = processes.part(micro)  # of the step's pictures, and so of its dropout masks
        draws = chances.draw(step, objective.recipe.batch_size, part, passes)
        layers.begin(step, part)
        with accelerator.accumulate():
            loss = _error(base, encoded, objective, draws, word)
            accelerator.backward(loss)
            loss = loss.detach()
            if prior is not None:  # by itself, so that a pass holds no more pictures than without
                draws = prior.chances.draw(step, objective.recipe.batch_size, part, passes)
                layers.begin(step, passes + part)
                class_loss = prior.weight * _error(base, prior.encoded, objective, draws)
                accelerator.backward(class_loss)
                loss += class_loss.detach()
        losses.append(loss)
    layers.end()
    return torch.stack(losses).mean()


def _error(
    base: Base, encoded: Encoded, objective: Objective, draws: Draws, word: InitWord | None = None
) -> Tensor:
    """The loss of one micro-batch; everything random is drawn and mixed on the CPU, the same for every device."""
    place = (draws.mirror, draws.picture)
    x0 = encoded.sample(*place, draws.posterior)  # [B, 4, H/8, W/8]
    alpha_bar = base.alphas_cumprod[draws.t]  # [B]
    x_t = send(add_noise(x0, draws.added, alpha_bar), base)
    weighing = [objective.weigh(alpha_bar), objective.width(alpha_bar, draws.t)]
    weight, width = (x if x is None else x.to(base.device) for x in weighing)
    assert weight is not None
    mask = encoded.mask(*place) if word is None else None
    mask = mask if mask is None else mask_weight(mask, objective.recipe.mask_outside).to(base.device)
    text = text_of(base, encoded, draws.caption, objective.recipe.clip_skip)
    sizes = encoded.sizes[place].to(base.device, non_blocking=True)
    if word is None:
        goal = target(x0, draws.noise, alpha_bar, objective.prediction_type).to(base.device, non_blocking=True)
    else:
        goal = word.predict(base, x_t, draws, sizes)
    return weighted_error(base.predict(x_t, draws.t.to(base.device), text, sizes), goal, weight, width, mask)

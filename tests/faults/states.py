"""Checkpoints of made-up numbers, and whether one that was read is one of them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from sdlora.training.checkpoint import Checkpoint


def make(step: int, size: int = 300) -> Checkpoint:
    """The same numbers for the same step, others for another."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {"unet.a.down": draw(3, size), "unet.a.up": draw(5, 3)}
    optimizer = {"step/unet.a.down": torch.tensor(float(step)), "exp_avg/unet.a.down": draw(3, size)}
    return Checkpoint(step, factors, optimizer, {"threads": 2, "loss_scaler": None, "skipped_in_row": step % 3})


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    """Whether every number of both is the same."""
    if a is None or a.step != b.step or {**a.state, "step": 0} != {**b.state, "step": 0}:
        return False
    pairs = ((a.factors, b.factors), (a.optimizer, b.optimizer))
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)

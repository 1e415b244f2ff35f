"""Short runs on tiny bases: their recipe, what they leave, and how one is stopped in the middle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sdlora.bases.family import Base
from sdlora.config import Recipe
from sdlora.training import loop
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run

SHORT = Recipe(steps=4, batch_size=2, rank=2, warmup_steps=1, precision="fp32", checkpoint_every=2, learning_rate=1e-2)


def change(**values: Any) -> Recipe:
    """SHORT with other values."""
    return dataclasses.replace(SHORT, **values)


def rows(out: Path) -> list[dict[str, Any]]:
    """A run's metrics, but for its times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(Run(out).metrics)]


def losses(out: Path) -> list[float]:
    """The loss of each step of a run."""
    return [row["loss"] for row in rows(out)]


class Stop(Exception):
    """The end of a process, as far as the run can tell."""


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, count: int, module: Any = loop) -> None:
    """Lets the count-th call of module.name end the run."""
    original, calls = getattr(module, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


def train_until(
    monkeypatch: pytest.MonkeyPatch, step: int, folder: Path, base: Base, recipe: Recipe, out: Path
) -> None:
    """A run that ends in the middle of a step, counted from 1 since it began or went on."""
    with monkeypatch.context() as patch:
        stop_at(patch, "rate_at", step)
        with pytest.raises(Stop):
            loop.train_adapter(folder, base, recipe, out)

"""The averaged factors that a run's file holds where it is asked for: a running mean, or schedule-free's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def decay_at(step: int, decay: float) -> float:
    """How much of the average a step counted from 0 keeps: rises as (1 + step)/(10 + step) to `decay`, from 0.

    A short run's average is so not held back by where it started.
    Source: diffusers' `EMAModel`, whose values these are.
    """
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


class Averages:
    """The factors while they are learnt, and what is shown of them: in previews, in validation, in the file.

    Without a decay and with an optimizer that does not average, what is shown is what is learnt.
    """

    def __init__(self, factors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.factors, self.optimizer, self.decay = factors, optimizer, decay
        self.values = {name: factor.detach().clone() for name, factor in factors.items()} if decay else {}
        """The running means, float32 by name; empty without a decay."""
        self._own = hasattr(optimizer, "eval")

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes up saved running means."""
        for name, value in values.items():
            self.values[name].copy_(value)

    def begin(self) -> None:
        """Makes ready for updates; to be called once the optimizer's state is there."""
        if self._own:
            self.optimizer.train()  # type: ignore[attr-defined]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the factors after a step, counted from 0, into the running means."""
        for name, value in self.values.items():
            value.lerp_(self.factors[name].detach(), 1 - decay_at(step, self.decay))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The factors are the averages here, and to the bit what they were afterwards."""
        if not self.values and not self._own:
            yield
            return
        learnt = {name: factor.detach().clone() for name, factor in self.factors.items()}
        try:
            self.settle()
            yield
        finally:
            _copy(learnt, self.factors)
            for group in self.optimizer.param_groups if self._own else ():
                group["train_mode"] = True  # the switch back by arithmetic would not give the same bits

    def settle(self) -> None:
        """The factors are the averages from here on."""
        _copy(self.values, self.factors)
        if self._own:
            self.optimizer.eval()  # type: ignore[attr-defined]


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        factors[name].copy_(value)

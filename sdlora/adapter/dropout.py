"""Dropout whose masks are addressed by (seed, step, micro-batch, module), never consumed from a stream.

Asked again, a layer gives the same mask: in the backward pass, under gradient checkpointing, in a resumed run. They are
drawn on the layer's device, so that they cost no transfer; another kind of device draws others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """The masks of one module in one micro-batch; each value is 0 or what keeps the mean."""

    address: str
    dropout: float
    rank_dropout: float
    module_dropout: float

    def of_input(self, x: Tensor) -> Tensor | None:
        """A mask like x with a share `dropout` of zeros, the rest 1 / (1 - dropout); None where nothing is dropped."""
        if not self.dropout:
            return None
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        keep = 1 - self.dropout
        return mask.bernoulli_(keep, generator=self._generator("input", x.device)).div_(keep)

    def of_rank(self, batch: int, like: Tensor) -> Tensor | None:
        """A mask [batch, rank] over Ax, `like` [..., rank]; all zeros where the whole module is dropped.

        A dropped module's factors then have gradients of zero rather than none, so every step updates every factor.
        """
        if self.module_dropout:
            chance = torch.rand((), generator=self._generator("module", torch.device("cpu")))
            if float(chance) < self.module_dropout:
                return like.new_zeros(batch, like.shape[-1])
        if not self.rank_dropout:
            return None
        keep = 1 - self.rank_dropout
        mask = like.new_empty(batch, like.shape[-1])
        return mask.bernoulli_(keep, generator=self._generator("rank", like.device)).div_(keep)

    def _generator(self, purpose: str, device: torch.device) -> torch.Generator:
        digest = hashlib.sha256(f"{self.address}/{purpose}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


class Dropout:
    """Where the layers of one base stand in a run; no mask is drawn before `begin` and after `end`."""

    def __init__(self, seed: int, dropout: float = 0.0, rank_dropout: float = 0.0, module_dropout: float = 0.0) -> None:
        self.seed = seed
        self.rates = (dropout, rank_dropout, module_dropout)
        self._place: tuple[int, int] | None = None

    def begin(self, step: int, micro: int) -> None:
        """From now on the masks are those of this step's micro-batch."""
        self._place = (step, micro)

    def end(self) -> None:
        """From now on nothing is dropped."""
        self._place = None

    def masks(self, path: str) -> Masks | None:
        """The masks of a module now, or None where nothing is dropped."""
        if self._place is None or not any(self.rates):
            return None
        step, micro = self._place
        return Masks(f"{self.seed}/{step}/{micro}/{path}", *self.rates)

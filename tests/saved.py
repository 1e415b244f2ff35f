"""What autograd keeps for the backward pass, in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Saved:
    """Filled while counting."""

    storages: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextlib.contextmanager
def counting_saved(*weights: Tensor) -> Iterator[Saved]:
    """Counts each storage that is saved within it once, but for those of the weights."""
    saved, known = Saved(), {w.untyped_storage().data_ptr() for w in weights}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            saved.storages[storage.data_ptr()] = storage.nbytes()
            saved.alive.append(t)  # so that no other tensor comes to lie there
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved

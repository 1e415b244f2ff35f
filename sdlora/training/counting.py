"""What a computation keeps and needs, in bytes, found by running it on tensors without contents."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Saved:
    """The storages that autograd keeps for the backward pass, each counted once and whole."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._known = {w.untyped_storage()._cdata for w in weights}
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def forget(self) -> None:
        """Lets go of what was counted, so that the backward pass can free it."""
        self._storages.clear()

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self._known:
            self._storages[storage._cdata] = storage  # kept, so that no other comes to have its address
        return t


@contextlib.contextmanager
def counting_saved(weights: Iterable[Tensor]) -> Iterator[Saved]:
    """Counts what is saved within it, but for the weights, which are there anyway."""
    saved = Saved(weights)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        yield saved


class Peak(TorchDispatchMode):
    """Counts what is alive at once of the storages that are made within it: `peak_bytes` at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self.now_bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address, size_bytes = storage._cdata, storage.nbytes()
        if address in self._alive or address in given:
            return
        self._alive.add(address)
        self.now_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._drop, address, size_bytes)

    def _drop(self, address: int, size_bytes: int) -> None:
        self._alive.discard(address)
        self.now_bytes -= size_bytes


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Within it attention keeps what a device's fused kernels keep, and not the matrix of scores, as on meta tensors.

    A mode of torch's would not reach what the backward pass computes again.
    """
    functional: Any = torch.nn.functional
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the result, and one number of a query and head. Source: Dao et al. 2022, FlashAttention, 3.1."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

"""Frozen linear layers in 8 or 4 bits, which a LoRA can be attached to as to any other.

The weight is made dense again, in the dtype that was quantised, wherever it is used, and never kept for later.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigError

Quantisation = Literal["int8", "nf4"]
INT8_MOST = 127
NF4_BLOCK = 64
"""Weights that share one scale in nf4; the scales are kept in 8 bits, 256 of them sharing another."""


class QuantisedWeight:
    """A frozen weight [out, in] in few bits, in place of a linear layer's tensor."""

    shape: torch.Size
    dtype: torch.dtype
    """The dtype that it had, and that `dense` rounds to."""
    codes: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the layer acts by, rounded to its own dtype first; a new tensor each time."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """What it takes in memory."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def _version(self) -> int:
        return self.codes._version

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()


@dataclass(eq=False)
class Int8Weight(QuantisedWeight):
    """Whole numbers -127..127, int8 [out, in], times one float32 number a row, [out, 1].

    Source: Dettmers et al. 2022, LLM.int8(), section 2 (row-wise absmax quantisation), here of the weights alone.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        w = weight.detach().float()
        scales = w.abs().amax(1, keepdim=True) / INT8_MOST  # [out, 1]
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        return cls((w / scales).round_().clamp_(-INT8_MOST, INT8_MOST).to(torch.int8), scales, weight.dtype)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.codes.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scales).to(self.dtype).to(dtype)

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


@dataclass(eq=False)
class Nf4Weight(QuantisedWeight):
    """bitsandbytes' NormalFloat of 4 bits with doubly quantised scales.

    Source: Dettmers et al. 2023, QLoRA, section 3.
    """

    codes: Tensor
    """Two weights to a byte."""
    state: Any
    """bitsandbytes' QuantState."""
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> Nf4Weight:
        functional = load_bitsandbytes().functional
        options = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "compress_statistics": True}
        codes, state = functional.quantize_4bit(weight.detach().contiguous(), **options)
        return cls(codes, state, weight.dtype)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size(self.state.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        dense: Tensor = load_bitsandbytes().functional.dequantize_4bit(self.codes, self.state)
        return dense.to(dtype)

    @property
    def stored_bytes(self) -> int:
        return int(self.codes.nbytes + self.state.absmax.nbytes + self.state.state2.absmax.nbytes)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is a QuantisedWeight; passes gradients to x and keeps nothing for that."""

    def __init__(self, linear: nn.Linear, kind: Quantisation) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._packed = (Int8Weight if kind == "int8" else Nf4Weight).of(linear.weight)
        self.training = linear.training

    @property
    def weight(self) -> QuantisedWeight:  # type: ignore[override]
        """The weight in few bits, with its codes as they are now."""
        codes = self._parameters.get("codes")
        return self._packed if codes is None else replace(self._packed, codes=codes)

    def expose_codes(self) -> None:
        """Makes the codes a parameter of the layer, for what splits a module's parameters between processes."""
        self.codes = nn.Parameter(self._packed.codes, requires_grad=False)
        self._packed = replace(self._packed, codes=self._packed.codes.new_empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenLinear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise RuntimeError("a quantised layer stays on the device and in the dtype that it was made with")


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (dy @ ctx.weight.dense(dy.dtype)).to(ctx.dtype), None, None


def dense_weight(weight: Tensor | QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor of the dtype, which is itself where it has it already."""
    return weight.dense(dtype) if isinstance(weight, QuantisedWeight) else weight.to(dtype)


def count_parameters(*modules: nn.Module) -> int:
    """The modules' parameters, those in few bits too."""
    packed = sum(m.weight.numel() for top in modules for m in top.modules() if isinstance(m, QuantisedLinear))
    return packed + sum(p.numel() for top in modules for p in top.parameters())


def packed_bytes(shape: Sequence[int], kind: Quantisation) -> int:
    """What a weight [out, in] takes once it is quantised."""
    count = math.prod(shape)
    if kind == "int8":
        return count + 4 * shape[0]
    blocks = math.ceil(count / NF4_BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / 256)


def load_bitsandbytes() -> Any:
    """The package bitsandbytes. Raises: ConfigError where it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns of what only generating would use
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise ConfigError(
            'quantise = "nf4" needs the package bitsandbytes; pip install bitsandbytes, or use quantise = "int8"'
        ) from None

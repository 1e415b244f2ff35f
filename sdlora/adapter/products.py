"""Products with frozen weights on a CPU, in the order of their factors that it multiplies fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 2**16
"""Numbers in a weight from which the order of the factors matters."""
ROWS = 1 / 4
"""Rows of the input for an output, at most, at which it pays to have the weight first."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] plus bias, as `F.linear`, [..., out]; outside autograd.

    Few rows are multiplied as (W xᵀ)ᵀ: the processor reads the large weight as it lies, and of the two factors only
    the small one is brought into the order that its units take. On a CPU with AMX that is up to twice as fast.
    """
    out = weight.shape[0]
    rows = x.numel() // max(1, x.shape[-1])
    if not (_is_large(x, weight) and 1 < rows <= ROWS * out):
        return F.linear(x, weight, bias)
    turned = torch.mm(weight, x.reshape(rows, -1).T)  # [out, rows]
    y = turned.new_empty(rows, out)
    if bias is None:
        y.copy_(turned.T)
    else:
        torch.add(turned.T, bias, out=y)
    return y.view(*x.shape[:-1], out)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    here = x.device.type == "cpu" and weight.device.type == "cpu" and x.dtype == weight.dtype
    return here and type(weight) in (Tensor, torch.nn.Parameter) and weight.numel() >= SMALLEST

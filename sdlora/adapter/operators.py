"""The linear layers with a LoRA or a DoRA as one autograd node each, which keep little for the backward pass."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import Masks
from .products import linear
from .quantised import QuantisedWeight, dense_weight

KEEP_AX_UP_TO = 1 / 16
"""Ax is kept for the backward pass where rank / in_features is at most this; above it is computed again from x."""


class LoraLinear(torch.autograd.Function):
    """The frozen linear layer plus its LoRA in one node that keeps x (not a copy of it) and, where it is tiny, Ax.

    `source` is the caller's x and `x` the same values in the dtype of the computation: the same object unless
    autocast has to cast. The frozen weight gets no gradient and is not saved but referred to; masks are drawn again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor | QuantisedWeight,
        bias: Tensor | None,
        scale: float,
        masks: Masks | None,
    ) -> Tensor:
        dtype = x.dtype
        y = linear(x, _unpack(weight, dtype), bias)
        a, b = down.to(dtype), (up * scale).to(dtype)  # [rank, in], [out, rank] with the scale folded in
        ax = _go_down(x, a, masks)  # [N, rank]
        y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(ax, b.T)
        _keep(ctx, source, x, ax, a, b, weight, scale, masks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(ctx, dy):
            dx, ddown, dup = _lora_gradients(ctx, dy.reshape(-1, dy.shape[-1]), *ctx.saved_tensors[:4])
        return dx, None, ddown, dup, None, None, None, None


class DoraLinear(torch.autograd.Function):
    """y = c ⊙ (Wx + scale · B(Ax)) + bias with c = magnitude / norm for each output; keeps what `LoraLinear` keeps.

    `norm` float32 [out] is ‖W + scale · BA‖ by output and gets no gradient; Wx is computed again in the backward pass.
    Source: Liu et al. 2024, DoRA, equation 5 and section 4.3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        weight: Tensor | QuantisedWeight,
        bias: Tensor | None,
        scale: float,
        masks: Masks | None,
    ) -> Tensor:
        dtype = x.dtype
        y = linear(x, _unpack(weight, dtype)).contiguous()
        a, b = down.to(dtype), (up * scale).to(dtype)  # [rank, in], [out, rank]
        ax = _go_down(x, a, masks)  # [N, rank]
        z = y.view(-1, y.shape[-1])  # [N, out]
        c = magnitude / norm  # float32: in half precision a magnitude could not move by less than 0.4 %
        z.addmm_(ax, b.T).mul_(c)
        if bias is not None:
            z.add_(bias.to(dtype))
        _keep(ctx, source, x, ax, a, b, weight, scale, masks, c, norm)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ax, a, b, c, norm = ctx.saved_tensors
        with _without_autocast(ctx, dy):
            g = dy.reshape(-1, dy.shape[-1])  # [N, out]
            dmagnitude = None
            if ctx.needs_input_grad[4]:
                ax = _go_down(x, a, ctx.masks) if ax is None else ax
                z = (x.reshape(-1, x.shape[-1]) @ dense_weight(ctx.weight, x.dtype).T).addmm_(ax, b.T)
                dmagnitude = (g.to(c.dtype) * z).sum(0) / norm
                del z
            dx, ddown, dup = _lora_gradients(ctx, (g * c).to(g.dtype), x, ax, a, b)
        return dx, None, ddown, dup, dmagnitude, None, None, None, None, None


def row_norms(weight: Tensor | QuantisedWeight, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """‖W + scale · up · down‖ of each output, float32 [out]; a row of zeros has the smallest number there is."""
    plainly = torch.autocast(weight.device.type, enabled=False) if _autocasts(weight) else nullcontext()
    with torch.no_grad(), plainly:
        base = dense_weight(weight, torch.float32).detach().flatten(1)  # [out, in·kh·kw]
        turned = torch.addmm(base, up.detach().float().flatten(1), down.detach().float().flatten(1), alpha=scale)
        return torch.linalg.vector_norm(turned, dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def _unpack(weight: Tensor | QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """A tensor as it is: under autocast the product casts it, elsewhere it refuses another dtype."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


def _keep(
    ctx: Any,
    source: Tensor,
    x: Tensor,
    ax: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | QuantisedWeight,
    scale: float,
    masks: Masks | None,
    *more: Tensor,
) -> None:
    keep_ax = a.shape[0] <= KEEP_AX_UP_TO * a.shape[1]
    ctx.save_for_backward(x, ax if keep_ax else None, a, b, *more)
    ctx.weight, ctx.version, ctx.scale, ctx.source_dtype = weight, weight._version, scale, source.dtype
    ctx.masks = masks


def _without_autocast(ctx: Any, dy: Tensor) -> AbstractContextManager[object]:
    if ctx.weight._version != ctx.version:
        raise RuntimeError("the weight of a module with a LoRA was changed between its forward and backward pass")
    return torch.autocast(dy.device.type, enabled=False) if _autocasts(dy) else nullcontext()


def _go_down(x: Tensor, a: Tensor, masks: Masks | None) -> Tensor:
    """Ax [N, rank] of x [..., in], with what the masks drop."""
    flat = x.reshape(-1, x.shape[-1])
    if masks is None:
        return flat @ a.T
    mask = masks.of_input(flat)
    return _mask_rank((flat if mask is None else flat * mask) @ a.T, x, masks)


def _mask_rank(ax: Tensor, x: Tensor, masks: Masks) -> Tensor:
    """ax [N, rank] times the mask of each of x's samples."""
    batch = x.shape[0] if x.dim() > 1 else 1
    mask = masks.of_rank(batch, ax)
    return ax if mask is None else (ax.view(batch, -1, ax.shape[-1]) * mask[:, None]).view_as(ax)


def _lora_gradients(
    ctx: Any, g: Tensor, x: Tensor, ax: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, down and up for g [N, out], the gradient of Wx + scale · B(Ax)."""
    masks: Masks | None = ctx.masks
    flat = x.reshape(-1, x.shape[-1])  # [N, in]
    dx = ddown = dup = mask = None
    gb = g @ b if ctx.needs_input_grad[0] or ctx.needs_input_grad[2] else None  # [N, rank], the scale is in b
    if masks is not None:
        mask = masks.of_input(flat)
        gb = None if gb is None else _mask_rank(gb, x, masks)
    if ctx.needs_input_grad[0]:
        assert gb is not None
        dx = g @ dense_weight(ctx.weight, g.dtype)
        dx = dx.addmm_(gb, a) if mask is None else dx.addcmul_(gb @ a, mask)
        dx = dx.view(x.shape).to(ctx.source_dtype)
    if ctx.needs_input_grad[2]:
        assert gb is not None
        ddown = mm_float32(gb.T, flat if mask is None else flat * mask)
    if ctx.needs_input_grad[3]:
        ax = _go_down(x, a, masks) if ax is None else ax
        dup = mm_float32(ax.T, g).mul_(ctx.scale).T.contiguous()  # a third faster on a CPU than g.T @ ax
    return dx, ddown, dup


def mm_float32(p: Tensor, q: Tensor) -> Tensor:
    """p @ q as float32: sums of half-precision products leave the kernel unrounded where the device can do so."""
    if p.is_cuda and p.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(p, q, out_dtype=torch.float32)
    return (p @ q).float()


class CastCache:
    """Copies of inputs in autocast's dtype, one for each input and only as long as it lives: q, k and v share one."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if x.is_inference():  # has no version counter to see a change by
            return x.to(dtype)
        key = id(x)
        found = self._copies.get(key)
        if found is not None and found[0]() is x and found[1] == x._version and found[2].dtype == dtype:
            return found[2]
        copy = x.detach().to(dtype)
        self._copies[key] = (weakref.ref(x, lambda _: self._copies.pop(key, None)), x._version, copy)
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> CastCache:
        return CastCache()

    def __len__(self) -> int:
        return len(self._copies)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in here: autocast's where it is on, else x's own."""
    if _autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _autocasts(x: Tensor | QuantisedWeight) -> bool:
    """Whether autocast is on for x's device; a meta tensor's knows none."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)

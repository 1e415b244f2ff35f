"""GroupNorm that is fast for channels_last tensors on a CPU, forward and backward.

PyTorch's own backward takes half of a small autoencoder's training step there, and its forward in bfloat16 two to five
times as long as in float32, the casts counted (`docs/log.md` has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c = x.shape[:2]
        wide = x.float() if x.device.type == "cpu" else x  # rounded once, at the end, as the half kernels do
        of = (wide, weight.to(wide.dtype), bias.to(wide.dtype))
        y, mean, rstd = torch.native_group_norm(*of, b, c, x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy, g = grads[0], ctx.groups
        b, c = x.shape[:2]
        n = x[0, 0].numel() * (c // g)  # elements of one group
        xs = x.movedim(1, -1).reshape(b, -1, c)  # [B, HW, C], a view where x is channels_last
        dys = dy.movedim(1, -1).reshape(b, -1, c).to(xs.dtype)
        sum_dy = dys.sum(1, dtype=torch.float32)  # [B, C]
        sum_dyx = (dys * xs).sum(1, dtype=torch.float32)
        mu, rs = mean.float().view(b, g, 1), rstd.float().view(b, g, 1)
        w = weight.float().view(1, g, -1)
        s1, s2 = sum_dy.view(b, g, -1), sum_dyx.view(b, g, -1)
        dxhat = (s2 - mu * s1) * rs  # Σ dy·x̂ by channel
        m1 = (w * s1).sum(2, keepdim=True) / n
        m2 = (w * dxhat).sum(2, keepdim=True) / n
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = rstd·(w·dy − m1 − x̂·m2) with x̂ = (x − mean)·rstd, as three numbers a channel
            by_dy = (rs * w).reshape(b, 1, c)
            by_x = (-rs * rs * m2).expand(b, g, c // g).reshape(b, 1, c)
            shift = (rs * (mu * rs * m2 - m1)).expand(b, g, c // g).reshape(b, 1, c)
            dxs = torch.addcmul(shift.to(xs.dtype), dys, by_dy.to(xs.dtype)).addcmul_(xs, by_x.to(xs.dtype))
            dx = dxs.view(b, *x.shape[2:], c).movedim(-1, 1)
        dw = dxhat.sum(0).view(c).to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = sum_dy.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


def _forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
    return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-any-return]


def use_fast_group_norm(model: nn.Module) -> None:
    """Gives every affine GroupNorm of the model both; float32 outputs are unchanged, half ones to a rounding."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and module.affine:
            module.forward = _forward.__get__(module)  # type: ignore[method-assign]

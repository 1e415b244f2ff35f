"""GroupNorm that is fast for channels_last tensors on a CPU, forward and backward.

PyTorch's own backward takes half of a small autoencoder's training step there, and its forward in bfloat16 two to five
times as long as in float32, the casts counted (`docs/log.md` has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _GroupNorm(torch.autograd.Function):
    """The norm of x, or the SiLU of that; keeps x, and for each group its mean and inverse deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        b, c = x.shape[:2]
        wide = x.float() if x.device.type == "cpu" else x  # rounded once, at the end, as the half kernels do
        of = (wide, weight.to(wide.dtype), bias.to(wide.dtype))
        y, mean, rstd = torch.native_group_norm(*of, b, c, x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        b, c = x.shape[:2]
        n = x[0, 0].numel() * (c // ctx.groups)  # elements of one group
        xs = x.movedim(1, -1).reshape(b, -1, c)  # [B, HW, C], a view where x is channels_last
        dys = dy.movedim(1, -1).reshape(b, -1, c).to(xs.dtype)
        mu, rs = mean.float(), rstd.float()  # [B, groups]
        w = weight.float().view(ctx.groups, -1)
        by_dy = rs.unsqueeze(-1) * w  # [B, groups, C / groups]
        if ctx.silu:
            shift = torch.addcmul(bias.float().view(ctx.groups, -1), by_dy, mu.unsqueeze(-1), value=-1)
            y = torch.addcmul(shift.view(b, 1, c).to(xs.dtype), xs, by_dy.view(b, 1, c).to(xs.dtype))
            dys = torch.ops.aten.silu_backward(dys, y)
        # Σ dy and Σ dy·x of each channel, [B, 2, groups, C / groups]
        sums = torch.stack((dys.sum(1, dtype=torch.float32), (dys * xs).sum(1, dtype=torch.float32)), 1)
        sums = sums.view(b, 2, ctx.groups, -1)
        dw = db = None
        if ctx.needs_input_grad[1]:
            dw = ((sums[:, 1] - mu.unsqueeze(-1) * sums[:, 0]) * rs.unsqueeze(-1)).sum(0).view(c).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = sums[:, 0].sum(0).view(c).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dw, db, None, None, None
        # dx = rstd·(w·dy − m₁ − x̂·m₂) with x̂ = (x − mean)·rstd, as three numbers a channel: of dy, of x, and alone
        m1, m2 = (sums * w).sum(-1).div_(n).unbind(1)  # the means of w·dy and, so far, of w·dy·x
        by_x = torch.addcmul(m2, mu, m1, value=-1).mul_(rs * rs * rs).neg_()
        alone = torch.addcmul(rs * m1, mu, by_x).neg_()
        both = torch.stack((by_x, alone)).to(xs.dtype).unsqueeze(-1).expand(2, b, ctx.groups, c // ctx.groups)
        of_x, of_one = both.reshape(2, b, 1, c).unbind()
        dxs = torch.addcmul(of_one, dys, by_dy.view(b, 1, c).to(xs.dtype)).addcmul_(xs, of_x)
        return dxs.view(b, *x.shape[2:], c).movedim(-1, 1), dw, db, None, None, None


def normalise(norm: nn.GroupNorm, x: Tensor, silu: bool = False) -> Tensor:
    """The norm of x [B, C, …], or the SiLU of that, in x's dtype and layout."""
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(y) if silu else y
    return _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)  # type: ignore[no-any-return]


def _forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
    return normalise(self, x)


def use_fast_group_norm(model: nn.Module) -> None:
    """Gives every affine GroupNorm of the model both; float32 outputs are unchanged, half ones to a rounding."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and module.affine:
            module.forward = _forward.__get__(module)  # type: ignore[method-assign]

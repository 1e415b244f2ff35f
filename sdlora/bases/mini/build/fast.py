"""Faster CPU operators for training the small UNet from scratch in bf16; each gives what it replaces to rounding.

Measured with one thread, batch 16, AVX-512 bf16: 3 x 3 convolutions of 384 channels at 4 x 4, backward 32 ms in oneDNN,
and GroupNorm of 96 channels at 16 x 16, forward 7 ms; `docs/log.md` has the step's figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_SIDE = 4  # at or below it a convolution is one matrix product over unfolded patches


class _Conv3x3(torch.autograd.Function):
    """A 3 x 3 convolution, padding 1, as one matrix product over patches: x [B, C, H, W] channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        b, c, h, w = x.shape
        flat = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).to(x.dtype)  # [O, 9C]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [B, H+2, W+2, C]
        patches = torch.cat([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], 3)
        patches = patches.view(b * h * w, 9 * c)
        ctx.save_for_backward(patches, flat)
        ctx.size = (b, c, h, w)
        y = torch.addmm(bias.to(x.dtype), patches, flat.T)
        return y.view(b, h, w, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches, flat = ctx.saved_tensors
        b, c, h, w = ctx.size
        dy = grads[0].permute(0, 2, 3, 1).reshape(b * h * w, -1)
        dweight = (dy.T @ patches).view(-1, 3, 3, c).permute(0, 3, 1, 2)
        dpatches = (dy @ flat).view(b, h, w, 9, c)
        dx = dy.new_zeros(b, h + 2, w + 2, c)
        for k in range(9):
            dx[:, k // 3 : k // 3 + h, k % 3 : k % 3 + w] += dpatches[:, :, :, k]
        return dx[:, 1:-1, 1:-1].permute(0, 3, 1, 2), dweight, dy.sum(0, dtype=torch.float32)


def _conv(self: nn.Conv2d, x: Tensor) -> Tensor:
    if x.shape[-1] > SMALL_SIDE or x.shape[-2] > SMALL_SIDE or not x.is_contiguous(memory_format=torch.channels_last):
        return self._conv_forward(x, self.weight, self.bias)
    return _Conv3x3.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


class _GroupNorm(torch.autograd.Function):
    """Statistics and the affine map as three numbers a channel, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c, h, w = x.shape
        xs = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        n = h * w * (c // groups)
        s1 = xs.sum(1, dtype=torch.float32).view(b, groups, -1).sum(2, keepdim=True)  # [B, G, 1]
        s2 = (xs * xs).sum(1, dtype=torch.float32).view(b, groups, -1).sum(2, keepdim=True)
        mean = s1 / n
        rstd = (s2 / n - mean * mean).clamp_min(0).add(eps).rsqrt()
        gain = rstd * weight.view(1, groups, -1)  # [B, G, C/G]
        shift = bias.view(1, groups, -1) - mean * gain
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        y = torch.addcmul(shift.view(b, 1, c).to(x.dtype), xs, gain.view(b, 1, c).to(x.dtype))
        return y.view(b, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        b, c, h, w = x.shape
        g = ctx.groups
        n = h * w * (c // g)
        xs = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        dys = grads[0].permute(0, 2, 3, 1).reshape(b, h * w, c)
        s1 = dys.sum(1, dtype=torch.float32).view(b, g, -1)
        s2 = (dys * xs).sum(1, dtype=torch.float32).view(b, g, -1)
        wg = weight.view(1, g, -1)
        dxhat = (s2 - mean * s1) * rstd
        m1 = (wg * s1).sum(2, keepdim=True) / n
        m2 = (wg * dxhat).sum(2, keepdim=True) / n
        by_dy = (rstd * wg).reshape(b, 1, c)
        by_x = (-rstd * rstd * m2).expand(b, g, c // g).reshape(b, 1, c)
        shift = (rstd * (mean * rstd * m2 - m1)).expand(b, g, c // g).reshape(b, 1, c)
        dx = torch.addcmul(shift.to(xs.dtype), dys, by_dy.to(xs.dtype)).addcmul_(xs, by_x.to(xs.dtype))
        return dx.view(b, h, w, c).permute(0, 3, 1, 2), dxhat.sum(0).view(c), s1.sum(0).view(c), None, None


def _group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-any-return]


class _Softmax(torch.autograd.Function):
    """Softmax over the last dimension with a backward of three vectorised passes: PyTorch's bf16 kernel is slow."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        p = scores.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        d = grads[0] * p
        return torch.addcmul(d, p, d.sum(-1, keepdim=True), value=-1)


class FastAttnProcessor:
    """diffusers' attention, [B, N, C] to [B, N, C], as plain matrix products.

    With `on_maps` it hands over its first head's attention [B, N, T].
    """

    def __init__(self, on_maps: Callable[[Tensor], None] | None = None) -> None:
        self.on_maps = on_maps

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        states = x if encoder_hidden_states is None else encoder_hidden_states
        q = attn.head_to_batch_dim(attn.to_q(x))  # [B·heads, N, C/heads]
        k = attn.head_to_batch_dim(attn.to_k(states))
        v = attn.head_to_batch_dim(attn.to_v(states))
        p = _Softmax.apply(torch.bmm(q * attn.scale, k.transpose(1, 2)))
        if self.on_maps is not None:
            self.on_maps(p.unflatten(0, (x.shape[0], -1))[:, 0])
        y = attn.batch_to_head_dim(torch.bmm(p, v))
        return attn.to_out[1](attn.to_out[0](y))  # type: ignore[no-any-return]


def speed_up(unet: nn.Module) -> None:
    """Lets the UNet run with the operators of this module on a CPU."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1):
            module.forward = _conv.__get__(module)  # type: ignore[method-assign]
        elif isinstance(module, nn.GroupNorm):
            module.forward = _group_norm.__get__(module)  # type: ignore[method-assign]
    unet.set_attn_processor(FastAttnProcessor())  # type: ignore[operator]

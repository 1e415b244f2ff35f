"""Frozen layers of a UNet on a CPU as its matrix units like them, and less kept for the backward pass.

A convolution is a product with the patches of its input, once forward and once for the input's gradient: its weight is
used as it lies, channels last, where the kernels' own convolution brings it into another order in every call, which for
the deep layers takes longer than the product. Normalisations with their SiLU, and gates, keep their inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..adapter.products import linear
from .norm import normalise

DTYPES = (torch.float32, torch.bfloat16)
LARGE = 2**20
"""Numbers in a weight from which a product beats the kernels' own layer on a CPU with AMX."""
LARGE_WITHOUT_AMX = 2**23
ROWS = 0.4
"""Pixels of the output for an output channel, at most, at which it does: more, and the patches cost too much."""


@contextmanager
def fast_layers(unet: nn.Module) -> Iterator[list[nn.Module]]:
    """Within it the frozen layers that gain from it run another way; gives them. Afterwards all is as before.

    Weights and module tree stay as they are, and no memory is taken for it. A weight that is trained, an input of
    another dtype, autocast, and a module that has a `forward` of its own, such as one with a LoRA, run as without it.
    Outputs and gradients are those of the plain layers to a rounding.
    """
    chosen = []
    for module in unet.modules():
        forward = _forward_for(module)
        if forward is not None and "forward" not in module.__dict__:
            module.forward = forward  # type: ignore[method-assign, assignment]
            chosen.append(module)
    try:
        yield chosen
    finally:
        for module in chosen:
            del module.__dict__["forward"]


def _forward_for(module: nn.Module) -> Callable[..., Any] | None:
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D

    if isinstance(module, ResnetBlock2D):
        plain = module.time_embedding_norm == "default" and not module.up and not module.down
        silu = isinstance(module.nonlinearity, nn.SiLU) and isinstance(module.norm1, nn.GroupNorm)
        return _resnet(module) if plain and silu and module.dropout.p == 0 else None
    if isinstance(module, GEGLU):
        return _geglu(module)
    if isinstance(module, nn.Conv2d) and _is_plain(module):
        return _convolution(module)
    if isinstance(module, nn.Linear) and module.weight.numel() >= _large():
        return _linear(module)
    return None


def _is_plain(module: nn.Conv2d) -> bool:
    plain = module.dilation == (1, 1) and module.groups == 1 and module.padding_mode == "zeros"
    large = module.weight.numel() >= (_large() // 16 if _is_point(module) else _large())
    return plain and not isinstance(module.padding, str) and large


def _large() -> int:
    return LARGE if torch.cpu._is_amx_tile_supported() else LARGE_WITHOUT_AMX


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight is frozen and all is here, in one dtype that the computation is in."""
    frozen = type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad
    here = x.device.type == "cpu" and weight.device.type == "cpu"
    return frozen and here and x.dtype == weight.dtype and x.dtype in DTYPES and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.version = weight, weight._version
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        _check(ctx)
        return dy @ ctx.weight, None, None


class _Convolution(torch.autograd.Function):
    """[B, in, H, W] -> [B, out, H', W'], both channels_last, for a channels_last weight [out, in, k, k']."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Conv2d) -> Tensor:
        weight = module.weight
        ctx.module, ctx.weight, ctx.version, ctx.shape = module, weight, weight._version, x.shape
        rows = _patches(x, module)  # [B, H', W', k·k'·in]
        return linear(rows, _as_matrix(weight), module.bias).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        _check(ctx)
        return _add_patches(dy.permute(0, 2, 3, 1) @ _as_matrix(ctx.weight), ctx.shape, ctx.module), None


def _check(ctx: Any) -> None:
    if ctx.weight._version != ctx.version:
        raise RuntimeError("the weight of a frozen layer was changed between its forward and backward pass")


def _as_matrix(weight: Tensor) -> Tensor:
    """[out, in, k, k'] as it lies, [out, k·k'·in]."""
    return weight.detach().permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _size(shape: torch.Size, module: nn.Conv2d) -> tuple[int, int]:
    """Height and width of what the module makes of an input of a shape."""
    high, wide = (
        (n + 2 * p - k) // s + 1
        for n, p, k, s in zip(shape[2:], _padding(module), module.kernel_size, module.stride, strict=True)
    )
    return high, wide


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(module.padding, str)
    return module.padding[0], module.padding[1]


def _is_point(module: nn.Conv2d) -> bool:
    """Whether each pixel is made of one alone."""
    return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0)


def _patches(x: Tensor, module: nn.Conv2d) -> Tensor:
    """What each output pixel sees of x [B, in, H, W]: [B, H', W', k·k'·in]."""
    rows = x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, in]
    if _is_point(module):
        return rows
    (high, wide), (down, along) = _padding(module), module.stride
    padded = nn.functional.pad(rows, (0, 0, wide, wide, high, high))
    b, _, width, c = padded.shape
    line, picture = width * c, padded.shape[1] * width * c
    (h, w), (tall, broad) = _size(x.shape, module), module.kernel_size
    seen = padded.as_strided((b, h, w, tall, broad, c), (picture, down * line, along * c, line, c, 1))
    return seen.reshape(b, h, w, tall * broad * c)


def _add_patches(parts: Tensor, shape: torch.Size, module: nn.Conv2d) -> Tensor:
    """The gradient [B, in, H, W] of an input for that of its patches [B, H', W', k·k'·in], summed in float32."""
    if _is_point(module):
        return parts.permute(0, 3, 1, 2)
    b, c, height, width = shape
    (high, wide), (down, along) = _padding(module), module.stride
    (tall, broad), (h, w) = module.kernel_size, parts.shape[1:3]
    seen = parts.view(b, h, w, tall, broad, c)
    dx = parts.new_zeros(b, height + 2 * high, width + 2 * wide, c, dtype=torch.float32)
    for i in range(tall):
        for j in range(broad):
            dx[:, i : i + down * (h - 1) + 1 : down, j : j + along * (w - 1) + 1 : along].add_(seen[:, :, :, i, j])
    inner = dx[:, high : high + height, wide : wide + width]
    return torch.empty(inner.shape, dtype=parts.dtype).copy_(inner).permute(0, 3, 1, 2)


class _Gate(torch.autograd.Function):
    """[..., 2n] -> [..., n]: the first half times the gelu of the second; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return nn.functional.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (value, gate), dx = x.chunk(2, dim=-1), torch.empty_like(x)
        dvalue, dgate = dx.chunk(2, dim=-1)
        torch.mul(dy, nn.functional.gelu(gate), out=dvalue)
        torch.ops.aten.gelu_backward(dy * value, gate, grad_input=dgate)
        return dx


def _convolution(module: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        if x.dim() != 4 or not _fits(x, weight) or not weight.is_contiguous(memory_format=torch.channels_last):
            return plain(x)
        high, wide = _size(x.shape, module)
        if not _is_point(module) and len(x) * high * wide > ROWS * len(weight):
            return plain(x)
        return _Convolution.apply(x, module)  # type: ignore[no-any-return]

    return forward


def _linear(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        if not _fits(x, module.weight):
            return plain(x)
        return _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return]

    return forward


def _geglu(module: Any) -> Callable[[Tensor], Tensor]:
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.device.type not in ("cpu", "meta"):
            return plain(x)  # type: ignore[no-any-return]
        return _Gate.apply(module.proj(x))  # type: ignore[no-any-return]

    return forward


def _resnet(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    plain = module.forward

    def forward(x: Tensor, time: Tensor | None, *args: Any, **options: Any) -> Tensor:
        if x.device.type not in ("cpu", "meta") or args or options:
            return plain(x, time, *args, **options)  # type: ignore[no-any-return]
        y = module.conv1(normalise(module.norm1, x, silu=True))
        if module.time_emb_proj is not None:
            told = time if module.skip_time_act else module.nonlinearity(time)
            y = y + module.time_emb_proj(told)[:, :, None, None]
        y = module.conv2(normalise(module.norm2, y, silu=True))
        if module.conv_shortcut is not None:
            x = module.conv_shortcut(x)
        y = x + y
        return y if module.output_scale_factor == 1 else y / module.output_scale_factor  # type: ignore[no-any-return]

    return forward

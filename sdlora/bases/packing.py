"""Frozen convolutions on a CPU with their weights in the kernels' own layout, packed once instead of in every call.

A frozen layer needs no gradient of its weight, so two such layouts are all of it: the weight's for the forward pass,
and for the backward pass that of the same kernel turned round, since the input's gradient is a convolution too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16)
SMALLEST = 128
"""Channels in and out from which packing has paid; smaller layers spend their time elsewhere."""


class PackedWeight:
    """A frozen convolution's weight [out, in, k, k] in the layouts of both passes, each made when needed."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module, self.version = module, module.weight._version
        self.padding, self.turned_padding = _pads(module)
        self._ahead: Tensor | None = None
        self._back: Tensor | None = None

    def convolve(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W'], both channels_last."""
        if self._ahead is None:
            self._ahead = _pack(self.module.weight, self.padding, x)
        return _convolve(x, self._ahead, self.module.bias, self.padding)

    def pull_back(self, dy: Tensor) -> Tensor:
        """The input's gradient [B, in, H, W] for the output's, dy [B, out, H', W']."""
        dy = dy.to(self.module.weight.dtype).contiguous(memory_format=torch.channels_last)
        if self._back is None:
            turned = self.module.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            self._back = _pack(turned, self.turned_padding, dy)
        return _convolve(dy, self._back, None, self.turned_padding)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return packed.convolve(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.packed.pull_back(dy), None


@contextmanager
def packing(model: nn.Module) -> Iterator[list[nn.Conv2d]]:
    """Within it the model's frozen convolutions run on packed weights where that pays; gives those that do.

    Weights and module tree stay as they are; a weight that is changed meanwhile, an input of another dtype and a module
    that has been given a `forward` of its own, such as one with a LoRA, run as without it. The layouts take up to twice
    the weights' memory until it ends.
    """
    with ExitStack() as undo:
        chosen = [m for m in model.modules() if isinstance(m, nn.Conv2d) and _pays(m)]
        for module in chosen:
            undo.enter_context(_running(module))
        yield chosen


def _pays(module: nn.Conv2d) -> bool:
    weight = module.weight
    plain = module.stride == (1, 1) and module.dilation == (1, 1) and module.groups == 1
    plain = plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    fits = plain and min(pad for pads in _pads(module) for pad in pads) >= 0
    frozen = type(weight) in (Tensor, nn.Parameter) and not weight.requires_grad and "forward" not in module.__dict__
    here = weight.device.type == "cpu" and weight.dtype in DTYPES and torch.backends.mkldnn.is_available()
    return bool(fits and frozen and here and min(weight.shape[:2]) >= SMALLEST and module.kernel_size != (1, 1))


@contextmanager
def _running(module: nn.Conv2d) -> Iterator[None]:
    packed, plain = PackedWeight(module), module.forward

    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        unchanged = weight._version == packed.version and not weight.requires_grad
        same = x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
        if not unchanged or not same or x.dim() != 4:
            return plain(x)
        return _Packed.apply(x.contiguous(memory_format=torch.channels_last), packed)  # type: ignore[no-any-return]

    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _pads(module: nn.Conv2d) -> tuple[list[int], list[int]]:
    """The padding of the forward pass, and that of the convolution with the kernel turned round."""
    ahead = [int(p) for p in module.padding]
    return ahead, [k - 1 - p for k, p in zip(module.kernel_size, ahead, strict=True)]


def _pack(weight: Tensor, padding: list[int], x: Tensor) -> Tensor:
    with torch.no_grad():
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
        return reorder(weight.detach().to_mkldnn(), padding, [1, 1], [1, 1], 1, list(x.shape))  # type: ignore[no-any-return]


def _convolve(x: Tensor, packed: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    run: Any = torch.ops.mkldnn._convolution_pointwise
    return run(x, packed, bias, padding, [1, 1], [1, 1], 1, "none", [], "")  # type: ignore[no-any-return]

"""LoRA layers that read the same input, as q, k and v do, as one autograd node: a third of the operators."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .operators import mm_float32
from .products import linear

if TYPE_CHECKING:
    from .layers import LoraLayer

MOST_RANKS = 64
"""Ranks of all together up to which the zeros between their blocks cost less than the operators that they save."""


class LoraLinears(torch.autograd.Function):
    """[..., in] -> [..., n · out]: n frozen linear layers without bias and their LoRAs side by side; keeps x and Ax.

    weight [n · out, in], whose parts are the modules' own; factors n times [rank, in], then n
    times [out, rank]. The ups form one block-diagonal matrix.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parts: Sequence[Tensor], scale: float, *factors: Tensor) -> Tensor:
        n, dtype = len(factors) // 2, x.dtype
        a = torch.cat(factors[:n]).to(dtype)  # [n·rank, in]
        ups = torch.stack(factors[n:])  # [n, out, rank]
        out, rank = ups.shape[1:]
        b = x.new_zeros(n, out, n, rank)
        b.diagonal(dim1=0, dim2=2).copy_((ups * scale).permute(1, 2, 0))
        b = b.view(n * out, n * rank)
        flat = x.reshape(-1, x.shape[-1])
        ax = flat @ a.T  # [N, n·rank]
        y = linear(flat, weight).addmm_(ax, b.T)
        ctx.save_for_backward(x, ax, a, b)
        ctx.weight, ctx.parts, ctx.versions = weight, parts, [part._version for part in parts]
        ctx.scale, ctx.sizes = scale, (n, out, rank)
        return y.view(*x.shape[:-1], n * out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if [part._version for part in ctx.parts] != ctx.versions:
            raise RuntimeError("the weight of a module with a LoRA was changed between its forward and backward pass")
        x, ax, a, b = ctx.saved_tensors
        n, out, rank = ctx.sizes
        flat, g = x.reshape(-1, x.shape[-1]), dy.reshape(-1, n * out)
        gb = g @ b  # [N, n·rank], the scale is in b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ ctx.weight).addmm_(gb, a).view(x.shape)
        downs = mm_float32(gb.T, flat).view(n, rank, -1).unbind()
        blocks = mm_float32(ax.T, g).view(n, rank, n, out).diagonal(dim1=0, dim2=2)  # [rank, out, n]
        ups = (blocks * ctx.scale).permute(2, 1, 0).contiguous().unbind()
        return dx, None, None, None, *downs, *ups


class Siblings:
    """LoRA layers of one attention: when the first is asked all are computed, and the others take what is theirs.

    Their weights come to lie one behind the other; their values and names stay.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = list(layers)
        with torch.no_grad():
            self.weight = torch.cat([layer.module.weight for layer in layers])
            self._parts = self.weight.chunk(len(self.layers))
            for layer, part in zip(layers, self._parts, strict=True):
                layer.module.weight.data = part
        self._asked: tuple[weakref.ref[Tensor], int, bool] | None = None
        self._ready: dict[str, Tensor] = {}

    def linear(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """As the layer's own `linear`."""
        asked = self._asked
        if asked is not None and layer.path in self._ready:
            if asked[0]() is x and asked[1] == x._version and asked[2] == torch.is_grad_enabled():
                return self._ready.pop(layer.path)
            self._ready.clear()
        if not self._fits(x):
            return layer.linear(x)
        downs, ups = ([getattr(each, name) for each in self.layers] for name in ("down", "up"))
        weights = [each.module.weight for each in self.layers]
        y = LoraLinears.apply(x, self.weight, weights, layer.scale, *downs, *ups)
        parts = y.chunk(len(self.layers), -1)
        self._asked = (weakref.ref(x), x._version, torch.is_grad_enabled())
        self._ready = {each.path: part for each, part in zip(self.layers, parts, strict=True)}
        return self._ready.pop(layer.path)

    def _fits(self, x: Tensor) -> bool:
        """Whether the weights are in place, and all is of one dtype, without autocast or dropout."""
        plain = x.dtype == self.weight.dtype and x.device == self.weight.device and not x.is_inference()
        plain = plain and not torch.is_autocast_enabled("cpu") and not self.layers[0].drops()
        return plain and self.are_in_place()

    def are_in_place(self) -> bool:
        """Whether the modules' weights are still where they were put."""
        return all(
            type(layer.module.weight) is nn.Parameter and layer.module.weight.data_ptr() == part.data_ptr()
            for layer, part in zip(self.layers, self._parts, strict=True)
        )


def find_siblings(layers: Sequence[LoraLayer]) -> dict[str, Siblings]:
    """The layers that read one input, by path: of an attention q, k and v, or where k and v read the text those two.

    Only on a CPU, where an operator's call costs as much as its arithmetic.
    """
    attentions: dict[str, dict[str, LoraLayer]] = {}
    for layer in layers:
        parent, _, name = layer.path.rpartition(".")
        attentions.setdefault(parent, {})[name] = layer
    found = {}
    for parent, children in attentions.items():
        names = ("to_k", "to_v") if parent.endswith("attn2") else ("to_q", "to_k", "to_v")  # attn2 reads the text
        chosen = [children[name] for name in names if name in children]
        if len(chosen) == len(names) and _are_alike(chosen):
            siblings = Siblings(chosen)
            found.update({layer.path: siblings for layer in chosen})
    return found


def _are_alike(chosen: Sequence[LoraLayer]) -> bool:
    """Whether they can be one node."""
    first = chosen[0]
    weight = first.module.weight
    alike = all(
        isinstance(layer.module, nn.Linear)
        and type(layer.module.weight) is nn.Parameter
        and layer.module.weight.shape == weight.shape
        and layer.module.weight.dtype == weight.dtype
        and not layer.module.weight.requires_grad
        and layer.module.bias is None
        and layer.magnitude is None
        and (layer.rank, layer.alpha) == (first.rank, first.alpha)
        for layer in chosen
    )
    few = len(chosen) * first.rank <= MOST_RANKS
    return alike and few and weight.device.type == "cpu"

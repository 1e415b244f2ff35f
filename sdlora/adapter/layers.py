"""Trainable LoRA layers on a frozen base: y = Wx + (alpha / rank) · B(Ax).

Attaching gives the adapted modules another `forward` and touches nothing else: the base's weights, its
state_dict and its module tree stay as they are, and detaching takes the `forward` away again.
Source: Hu et al. 2021, LoRA, section 4.1.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigError, RunError
from .delta import Adapter, Card, LowRank
from .keys import canonical_path

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
KEEP_AX_UP_TO = 1 / 16
"""Ax is kept for the backward pass where rank / in_features is at most this; above it is computed again from x."""


class _LoraLinear(torch.autograd.Function):
    """The frozen linear layer plus its LoRA in one node that keeps x (not a copy of it) and, where it is tiny, Ax.

    `source` is the caller's x and `x` the same values in the dtype of the computation: the same object unless
    autocast has to cast. The frozen weight gets no gradient and is not saved but referred to.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        dtype = x.dtype
        y = F.linear(x, weight, bias)  # under autocast this casts the weight; elsewhere it refuses another dtype
        a, b = down.to(dtype), (up * scale).to(dtype)  # [rank, in], [out, rank] with the scale folded in
        ax = x.reshape(-1, x.shape[-1]) @ a.T  # [N, rank]
        y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(ax, b.T)
        keep_ax = a.shape[0] <= KEEP_AX_UP_TO * a.shape[1]
        ctx.save_for_backward(x, ax if keep_ax else None, a, b)
        ctx.weight, ctx.version, ctx.scale, ctx.source_dtype = weight, weight._version, scale, source.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ax, a, b = ctx.saved_tensors
        if ctx.weight._version != ctx.version:
            raise RuntimeError("the weight of a module with a LoRA was changed between its forward and backward pass")
        device = dy.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _lora_gradients(ctx, dy, x, ax, a, b)
        return _lora_gradients(ctx, dy, x, ax, a, b)


def _lora_gradients(
    ctx: Any, dy: Tensor, x: Tensor, ax: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor | None, ...]:
    g = dy.reshape(-1, dy.shape[-1])  # [N, out]
    flat = x.reshape(-1, x.shape[-1])  # [N, in]
    dx = ddown = dup = None
    gb = g @ b if ctx.needs_input_grad[0] or ctx.needs_input_grad[2] else None  # [N, rank], the scale is in b
    if ctx.needs_input_grad[0]:
        assert gb is not None
        dx = (g @ ctx.weight.to(g.dtype)).addmm_(gb, a).view(x.shape).to(ctx.source_dtype)
    if ctx.needs_input_grad[2]:
        assert gb is not None
        ddown = _mm_float32(gb.T, flat)
    if ctx.needs_input_grad[3]:
        ax = flat @ a.T if ax is None else ax
        dup = _mm_float32(ax.T, g).mul_(ctx.scale).T.contiguous()  # a third faster on a CPU than g.T @ ax
    return dx, None, ddown, dup, None, None, None


def _mm_float32(p: Tensor, q: Tensor) -> Tensor:
    """p @ q as float32: sums of half-precision products leave the kernel unrounded where the device can do so."""
    if p.is_cuda and p.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(p, q, out_dtype=torch.float32)
    return (p @ q).float()


class _CastCache:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> _CastCache:
        return _CastCache()

    def __len__(self) -> int:
        return len(self._copies)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in here: autocast's where it is on, else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class LoraLayer:
    """One adapted module: its float32 factors `down` [rank, in, …], `up` [out, rank, …] and the forward with them."""

    def __init__(self, path: str, module: nn.Module, rank: int, alpha: float, seed: int, casts: _CastCache) -> None:
        self.path = path
        self.module = module
        self.rank = rank
        self.alpha = alpha
        self._casts = casts
        weight = module.weight
        assert isinstance(weight, Tensor)
        kernel, ones = tuple(weight.shape[2:]), (1,) * (weight.dim() - 2)
        down = torch.empty(rank, weight.shape[1], *kernel)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=_generator_for(seed, path))
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *ones, device=weight.device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def linear(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], as the module's own forward and with the LoRA added."""
        module = self.module
        cast = self._casts.cast(x, _compute_dtype(x))
        out = _LoraLinear.apply(x, cast, self.down, self.up, module.weight, module.bias, self.scale)
        return out  # type: ignore[no-any-return]

    def conv2d(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']; the down factor takes the module's kernel, stride and padding."""
        module = self.module
        assert isinstance(module, nn.Conv2d)
        cast = self._casts.cast(x, _compute_dtype(x))
        if cast is not x and torch.is_grad_enabled() and x.requires_grad:
            cast = x.to(cast.dtype)  # the copy has no graph; both convolutions below share this one
        y = module._conv_forward(cast, module.weight, module.bias)
        ax = module._conv_forward(cast, self.down.to(cast.dtype), None)
        return y + F.conv2d(ax, (self.up * self.scale).to(ax.dtype))


def _generator_for(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class LoraLayers:
    """The LoRA layers attached to a base; as a context manager it detaches them at the end."""

    def __init__(self, layers: list[LoraLayer], base_parameters: int, rank: int, alpha: float) -> None:
        self.layers = layers
        self.rank = rank
        self.alpha = alpha
        self._base_parameters = base_parameters
        self._attached = False

    @property
    def count(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base's parts that `attach` was given."""
        return self.count / max(1, self._base_parameters)

    def describe(self) -> str:
        """One line: rank, alpha, modules by part, trainable parameters and their share of the base."""
        parts: dict[str, int] = {}
        for layer in self.layers:
            part = layer.path.partition(".")[0]
            parts[part] = parts.get(part, 0) + 1
        where = ", ".join(f"{n} modules in {part}" for part, n in parts.items())
        return (
            f"LoRA rank {self.rank}, alpha {self.alpha:g}: {where}; "
            f"{self.count:,} trainable parameters, {100 * self.share:.2f} % of the base's {self._base_parameters:,}"
        )

    def parameters(self, part: str | None = None) -> list[nn.Parameter]:
        """The factors to train, float32, of one part (`unet`, `text_encoder`) or of all, in the model's order."""
        chosen = [x for x in self.layers if part is None or x.path.startswith(f"{part}.")]
        return [p for layer in chosen for p in (layer.down, layer.up)]

    def named_factors(self) -> dict[str, Tensor]:
        """`<path>.down` and `<path>.up` of every module: the live float32 parameters, not copies."""
        return dict(self._factors())

    def _factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for layer in self.layers:
            yield f"{layer.path}.down", layer.down
            yield f"{layer.path}.up", layer.up

    @torch.no_grad()
    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Copies saved factors in; nothing is changed unless all of them fit.

        Raises: RunError where names or shapes differ from the attached layers'.
        """
        mine = self.named_factors()
        for name in sorted(mine.keys() ^ factors.keys()):
            where = "missing from the saved state" if name in mine else "in the saved state but in no attached layer"
            raise RunError(f"{name} is {where}; start again with --restart")
        for name, factor in factors.items():
            if factor.shape != mine[name].shape:
                raise RunError(
                    f"{name} is saved as {_size(factor)} not {_size(mine[name])}; start again with --restart"
                )
        for name, factor in factors.items():
            mine[name].copy_(factor)

    def adapter(self, card: Card | None = None) -> Adapter:
        """What has been learnt so far, as float32 copies on the CPU."""

        def copy(p: Tensor) -> Tensor:
            return p.detach().to("cpu", copy=True)

        deltas = {x.path: LowRank(copy(x.down), copy(x.up), x.alpha) for x in self.layers}
        return Adapter(dict(deltas), card or Card())

    def attach(self) -> None:
        """Lets the base's modules run with their LoRA; `sdlora.adapter.attach` has done so already."""
        for layer in self.layers:
            forward = layer.conv2d if isinstance(layer.module, nn.Conv2d) else layer.linear
            layer.module.forward = forward  # type: ignore[method-assign]
        self._attached = True

    def detach_from_base(self) -> None:
        """Gives the base its own forward back, bit for bit; the factors stay readable here. May be called again."""
        if self._attached:
            for layer in self.layers:
                layer.module.__dict__.pop("forward", None)
        self._attached = False

    def __enter__(self) -> LoraLayers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach_from_base()


def attach(
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, tuple[str, ...]],
    *,
    rank: int,
    alpha: float,
    seed: int,
) -> LoraLayers:
    """Attaches a LoRA to every Linear or Conv2d whose name is, or ends with, a target of its part.

    Initial factors depend on (seed, module path) only: A is Kaiming-uniform with a = √5, B is zero.
    Raises: ConfigError where a target matches nothing or something else, or rank or alpha is out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank is {rank!r}; use a whole number of at least 1")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha is {alpha!r}; use a number above 0")
    casts = _CastCache()
    layers = [
        LoraLayer(canonical_path(part, name), module, rank, float(alpha), seed, casts)
        for part, endings in targets.items()
        for name, module in _matches(modules, part, endings)
    ]
    if not layers:
        raise ConfigError("no module is named to be adapted; give at least one target")
    total = sum(p.numel() for m in modules.values() for p in m.parameters())
    attached = LoraLayers(layers, total, rank, float(alpha))
    attached.attach()
    return attached


def _matches(modules: Mapping[str, nn.Module], part: str, endings: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    if part not in modules:
        raise ConfigError(f"target part {part!r} is not loaded; the base has {', '.join(sorted(modules))}")
    found: list[tuple[str, nn.Module]] = []
    unused = set(endings)
    for name, module in modules[part].named_modules():
        hits = {e for e in endings if name == e or name.endswith(f".{e}")}
        if not hits:
            continue
        unused -= hits
        if not isinstance(module, nn.Linear | nn.Conv2d) or (isinstance(module, nn.Conv2d) and module.groups != 1):
            kind = type(module).__name__
            raise ConfigError(f"target {min(hits)!r} matches {part}.{name}, a {kind}, not a Linear or Conv2d")
        if "forward" in module.__dict__:
            raise ConfigError(f"{part}.{name} already runs with another forward; detach what is attached to it first")
        found.append((name, module))
    if unused:
        raise ConfigError(f"target {min(unused)!r} matches no module of {part}; see the module names of the base")
    return found


def _size(t: Tensor) -> str:
    return "×".join(map(str, t.shape)) or "a single number"

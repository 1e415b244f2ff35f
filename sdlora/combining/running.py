"""A plan that changes over the steps, on a base: hooks that add B · M(t) · A x, and predictions that are mixed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases.family import Base
from ..bases.text import Text
from .layer import Layer
from .methods.method import Filling, Method, Moment, Pass

_TEXT_SIDE = (".attn2.to_k", ".attn2.to_v")
"""What the names of the layers end with that see the text's tokens, not the picture's."""


_NO_MOMENT = "a plan that moves was asked for no moment; sample with the base that it gives"


@dataclass(frozen=True)
class Shift:
    """What is added to one parameter of a module that is a vector: `weight` (a norm's) or `bias`."""

    path: str
    parameter: str
    values: Mapping[int, Tensor]
    """By the adapter's place, float32 [n]."""


@dataclass(frozen=True)
class Score:
    """All that a moving plan needs on a base's UNet."""

    layers: Mapping[str, Layer]
    """By module path; each has its module in `modules`."""
    shifts: Mapping[str, Sequence[Shift]]
    """By module path too: changes of its bias and, of a norm, its weight."""
    modules: Mapping[str, nn.Module]
    method: Method
    filling: Filling
    gain: Callable[[int, str, float], float]
    """An adapter's weight, by its place, in a module, at a moment t."""
    weight: Callable[[int, float], float]
    """An adapter's weight at a moment t, whatever the module."""
    places: tuple[int, ...]
    masks: Mapping[int, Tensor] = field(default_factory=dict)
    """By place, float32 [H, W] in 0..1: where in the picture the adapter acts."""


class Running:
    """Attaches a score to the UNet's modules for a while; `base` then predicts with it.

    Factors are kept in the base's dtype, stacked: a layer costs one pass through A and B, however many adapters act.
    """

    def __init__(self, base: Base, score: Score, steps: int) -> None:
        self._score = score
        self._steps = steps
        self._moment: Moment | None = None
        self._pass = Pass()
        self._latents: tuple[int, int] = (0, 0)
        self._blend: int | None = None
        """While a cross-attention is blended: the masked adapter that acts on its keys and values; -1 is none."""
        self._down = {path: layer.down.to(base.device, base.dtype) for path, layer in score.layers.items()}
        self._up = {path: layer.up.to(base.device) for path, layer in score.layers.items()}
        self._ready: dict[tuple[str, int | None, Pass], tuple[Tensor, Tensor] | None] = {}
        self._areas: dict[tuple[int, int, int], Tensor] = {}
        self._kept: list[tuple[nn.Module, Any]] = []
        self.base = dataclasses.replace(base, family=_Conducted(base.family, self))

    def __enter__(self) -> Base:
        for path, module in self._score.modules.items():
            if path in self._score.layers:
                self._replace(module, self._hook(path, module))
            if path in self._score.shifts:
                self._replace(module, self._shift_hook(self._score.shifts[path], module))
        for name, module in self._blended():
            self._replace(module, self._blend_hook(name, module))
        return self.base

    def __exit__(self, *_: object) -> None:
        for module, own in reversed(self._kept):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
        self._kept.clear()

    def predict(self, call: Callable[[], Tensor], t: Tensor, latents: tuple[int, int], steps_of: int) -> Tensor:
        """The mixed prediction at timestep t of `steps_of`; `call` is the base's own prediction, hooks in place."""
        done = min(1.0, max(0.0, 1 - float(t.flatten()[0]) / (steps_of - 1)))
        moment = Moment(done, self._steps)
        if moment != self._moment:
            self._ready.clear()
        self._moment, self._latents = moment, latents
        weights = [self._score.weight(place, done) for place in self._score.places]
        total: Tensor | None = None
        passes = self._score.method.passes(weights, moment)
        for one in passes:
            self._pass = one
            output = call()
            if len(passes) == 1:
                return output
            term = output.float() * one.share
            total = term if total is None else total + term
        assert total is not None
        return total

    # --- hooks ----------------------------------------------------------------------------------------------------

    def _replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._kept.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def _hook(self, path: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        before = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = before(x, *args, **kwargs)
            found = self._factors(path)
            if found is None:
                return y
            down, up = found
            area = self._area(path, x, y)
            if isinstance(module, nn.Conv2d):
                kernel = down.view(-1, *module.weight.shape[1:])
                z = F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)  # type: ignore[arg-type]
                if area is not None:
                    z = z * area.T.reshape(1, -1, *z.shape[2:])
                return y + F.conv2d(z, up[..., None, None])
            z = x.reshape(-1, x.shape[-1]) @ down.T  # [N, R]
            if area is not None:
                z = (z.view(len(x), -1, z.shape[-1]) * area).view_as(z)
            return torch.addmm(y.reshape(-1, y.shape[-1]), z, up.T).view_as(y)

        return forward

    def _shift_hook(self, shifts: Sequence[Shift], module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The module's output with its bias, or its norm's weight and bias, changed where and as the adapters act."""
        before = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = before(x, *args, **kwargs)
            for shift in shifts:
                total = self._added(shift, module, y)
                if total is not None:
                    y = y + (total if shift.parameter == "bias" else total * _normalize(module, x)).to(y.dtype)
            return y

        return forward

    def _added(self, shift: Shift, module: nn.Module, y: Tensor) -> Tensor | None:
        """Σ of the vectors times the adapters' weights at this moment and place, in a shape that fits the output y."""
        if self._moment is None:
            raise RuntimeError(_NO_MOMENT)
        planes = isinstance(module, nn.Conv2d | nn.GroupNorm)
        total: Tensor | None = None
        for place, value in shift.values.items():
            gain = self._gain(shift.path, place)
            if not gain:
                continue
            term = gain * (value.view(-1, *[1] * (y.dim() - 2)) if planes else value)
            if place in self._score.masks:
                h, w = (y.shape[2], y.shape[3]) if y.dim() == 4 else self._grid(y.shape[1] if y.dim() == 3 else 1)
                area = self._mask(place, h, w, y).float()
                term = term * (area.view(h, w) if y.dim() == 4 else area[:, None])
            total = term if total is None else total + term
        return total

    def _factors(self, path: str) -> tuple[Tensor, Tensor] | None:
        """A and B · M of a layer at this moment and in this pass, or None where nothing acts."""
        if self._moment is None:
            raise RuntimeError(_NO_MOMENT)
        key = (path, self._blend, self._pass)
        if key not in self._ready:
            self._ready[key] = self._fill(path)
        return self._ready[key]

    def _fill(self, path: str) -> tuple[Tensor, Tensor] | None:
        assert self._moment is not None
        layer = self._score.layers[path]
        gains = [self._gain(path, place) for place in layer.places]
        if not any(gains):
            return None
        m = self._score.filling.middle(layer, gains, self._moment).to(self._up[path].device)
        up = self._up[path] * m if m.dim() == 1 else self._up[path] @ m
        return self._down[path], up.to(self._down[path].dtype)

    def _gain(self, path: str, place: int) -> float:
        assert self._moment is not None
        if self._pass.acting is not None and place not in self._pass.acting:
            return 0.0
        apart = self._blend is not None and path.endswith(_TEXT_SIDE) and place in self._score.masks
        if apart and place != self._blend:
            return 0.0
        gain = self._score.gain(place, path, self._moment.t)
        if self._pass.full:
            weight = self._score.weight(place, self._moment.t)
            return gain / weight if weight else 0.0
        return gain

    # --- regions --------------------------------------------------------------------------------------------------

    def _area(self, path: str, x: Tensor, y: Tensor) -> Tensor | None:
        """Of each of a layer's tokens, how much each rank acts there: [N, R]; None where no mask is in it."""
        layer = self._score.layers[path]
        if not any(place in self._score.masks for place in layer.places) or path.endswith(_TEXT_SIDE):
            return None
        h, w = (y.shape[2], y.shape[3]) if y.dim() == 4 else self._grid(y.shape[1] if y.dim() == 3 else 1)
        columns = [self._mask(place, h, w, y) for place in layer.places]
        return torch.stack(columns, dim=1).repeat_interleave(torch.tensor(layer.ranks, device=y.device), dim=1)

    def _grid(self, tokens: int) -> tuple[int, int]:
        """The height and width of a level of the UNet with so many tokens."""
        h, w = self._latents
        while h * w > tokens:
            h, w = math.ceil(h / 2), math.ceil(w / 2)
        return (h, w) if h * w == tokens else (1, 1)

    def _mask(self, place: int, h: int, w: int, like: Tensor) -> Tensor:
        """A mask at a level's size, [h · w]; ones for an adapter that has none."""
        mask = self._score.masks.get(place)
        if mask is None:
            return like.new_ones(h * w)
        if (place, h, w) not in self._areas:
            scaled = F.interpolate(mask[None, None], (h, w), mode="area")
            self._areas[place, h, w] = scaled.flatten().to(like.device, like.dtype)
        return self._areas[place, h, w]

    def _blended(self) -> Iterator[tuple[str, nn.Module]]:
        """The cross-attentions whose keys or values a masked adapter changes."""
        names: dict[str, set[int]] = {}
        for path, layer in self._score.layers.items():
            if path.endswith(_TEXT_SIDE):
                masked = {place for place in layer.places if place in self._score.masks}
                if masked:
                    names.setdefault(path.rpartition(".")[0], set()).update(masked)
        unet = self.base.unet
        for name in names:
            yield name, unet.get_submodule(name.removeprefix("unet."))

    def _blend_hook(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """Its output without the masked adapters' text, and each one's difference within its region."""
        before = module.forward
        layers = [self._score.layers[name + end] for end in (".to_k", ".to_v") if name + end in self._score.layers]
        masked = sorted({place for layer in layers for place in layer.places if place in self._score.masks})

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            plain: Tensor = self._seen_with(-1, before, x, *args, **kwargs)
            total = plain
            for place in masked:
                h, w = self._grid(x.shape[1])
                inside = self._mask(place, h, w, plain)[:, None]  # [N, 1]
                total = total + inside * (self._seen_with(place, before, x, *args, **kwargs) - plain)
            return total

        return forward

    def _seen_with(self, place: int, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        outer, self._blend = self._blend, place
        try:
            return call(*args, **kwargs)
        finally:
            self._blend = outer


def _normalize(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm multiplies by its weight, float32."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x.float(), module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)
    raise TypeError(f"{type(module).__name__} is no norm whose weight is known to be changed")


class _Conducted:
    """A base's family whose predictions are those of a running plan."""

    def __init__(self, family: Any, running: Running) -> None:
        self._family, self._running = family, running

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def predict(self, base: Base, x_t: Tensor, t: Tensor, text: Text, sizes: Tensor | None = None) -> Tensor:
        latents = int(x_t.shape[2]), int(x_t.shape[3])

        def call() -> Tensor:
            output: Tensor = self._family.predict(base, x_t, t, text, sizes)
            return output

        return self._running.predict(call, t, latents, len(base.alphas_cumprod))


@contextlib.contextmanager
def running(base: Base, score: Score, steps: int) -> Iterator[Base]:
    """Within it, a Base that predicts with the score; the base's modules have their own forward again afterwards."""
    with Running(base, score, steps) as conducted:
        yield conducted

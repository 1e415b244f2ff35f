"""Trainable layers on a frozen base: LoRA, y = Wx + (alpha / rank) · B(Ax), and DoRA.

Attaching gives the adapted modules another `forward` and touches nothing else: the base's weights, its
state_dict and its module tree stay as they are, and detaching takes the `forward` away again.
Source: Hu et al. 2021, LoRA, section 4.1; Liu et al. 2024, DoRA, equation 5.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterFileError, ConfigError, RunError
from .delta import Adapter, Card, Delta, Dora, LowRank, pair_of
from .dropout import Dropout
from .operators import CastCache, DoraLinear, LoraLinear, compute_dtype, row_norms
from .quantised import count_parameters
from .siblings import Siblings, find_siblings
from .sites import LayerPlan, Site, Targets, find_sites
from .vector import Vector

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoraLayer:
    """One adapted module: its float32 factors `down` [rank, in, …], `up` [out, rank, …] and the forward with them.

    A DoRA has a float32 `magnitude` [out] too, which starts as the lengths of the base's rows.
    """

    def __init__(self, site: Site, seed: int, casts: CastCache, dropout: Dropout, *, dora: bool = False) -> None:
        self.path, self.module, self.rank, self.alpha = site.path, site.module, site.rank, site.alpha
        self._casts = casts
        self._dropout = dropout
        weight = self.module.weight
        kernel, ones = tuple(weight.shape[2:]), (1,) * (weight.dim() - 2)
        down = torch.empty(self.rank, weight.shape[1], *kernel)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=_generator_for(seed, self.path))
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], self.rank, *ones, device=weight.device))
        self.magnitude = nn.Parameter(self.norms()) if dora else None
        self.siblings: Siblings | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def drops(self) -> bool:
        """Whether dropout is on now."""
        return self._dropout.masks(self.path) is not None

    def norms(self) -> Tensor:
        """‖W + ΔW‖ of each output, float32 [out]."""
        return row_norms(self.module.weight, self.down, self.up, self.scale)

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        pair = {"down": self.down, "up": self.up}
        return pair if self.magnitude is None else {**pair, "magnitude": self.magnitude}

    def linear(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], as the module's own forward and with the LoRA added."""
        module, masks = self.module, self._dropout.masks(self.path)
        cast = self._casts.cast(x, compute_dtype(x))
        frozen = (module.weight, module.bias, self.scale, masks)
        if self.magnitude is None:
            return LoraLinear.apply(x, cast, self.down, self.up, *frozen)  # type: ignore[no-any-return]
        return DoraLinear.apply(x, cast, self.down, self.up, self.magnitude, self.norms(), *frozen)  # type: ignore[no-any-return]

    def linear_with_siblings(self, x: Tensor) -> Tensor:
        """As `linear`, computed with those that read the same x."""
        assert self.siblings is not None
        return self.siblings.linear(self, x)

    def conv2d(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']; the down factor takes the module's kernel, stride and padding."""
        module, masks = self.module, self._dropout.masks(self.path)
        assert isinstance(module, nn.Conv2d)
        cast = self._casts.cast(x, compute_dtype(x))
        if cast is not x and torch.is_grad_enabled() and x.requires_grad:
            cast = x.to(cast.dtype)  # the copy has no graph; both convolutions below share this one
        inner, dropped = cast, masks.of_input(cast) if masks is not None else None
        if dropped is not None:
            inner = cast * dropped
        y = module._conv_forward(cast, module.weight, module.bias if self.magnitude is None else None)
        ax = module._conv_forward(inner, self.down.to(cast.dtype), None)
        if masks is not None and (mask := masks.of_rank(len(x), ax.new_empty(0, self.rank))) is not None:
            ax = ax * mask[:, :, None, None]
        y = y + F.conv2d(ax, (self.up * self.scale).to(ax.dtype))
        if self.magnitude is None:
            return y
        scaled = (y * (self.magnitude / self.norms()).view(1, -1, 1, 1)).to(y.dtype)
        return scaled if module.bias is None else scaled + module.bias.to(y.dtype).view(1, -1, 1, 1)

    def delta(self) -> Delta:
        """What the layer does to its module, as float32 copies on the CPU."""

        def copy(p: Tensor) -> Tensor:
            return p.detach().to("cpu", copy=True)

        pair = LowRank(copy(self.down), copy(self.up), self.alpha)
        if self.magnitude is None:
            return pair
        return Dora(pair, copy(self.magnitude).view(-1, *[1] * (self.module.weight.dim() - 1)))


def _generator_for(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class LoraLayers:
    """The LoRA layers attached to a base; as a context manager it detaches them at the end."""

    def __init__(
        self,
        layers: list[LoraLayer],
        base_parameters: int,
        rank: int,
        alpha: float,
        dropout: Dropout | None = None,
        notes: tuple[str, ...] = (),
        together: bool = True,
    ) -> None:
        self.layers = layers
        self._together = together
        self.rank = rank
        self.alpha = alpha
        self.notes = notes
        """What is not the default, in words."""
        self._dropout = dropout or Dropout(0)
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
        """One line: rank, alpha, what is not the default, modules by part, trainable parameters and their share."""
        parts: dict[str, int] = {}
        for layer in self.layers:
            part = layer.path.partition(".")[0]
            parts[part] = parts.get(part, 0) + 1
        where = ", ".join(f"{n} modules in {part}" for part, n in parts.items())
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"LoRA rank {self.rank}, alpha {self.alpha:g}: {where}{notes}; "
            f"{self.count:,} trainable parameters, {100 * self.share:.2f} % of the base's {self._base_parameters:,}"
        )

    def parameters(self, part: str | None = None) -> list[nn.Parameter]:
        """The factors to train, float32, of one part (`unet`, `text_encoder`) or of all, in the model's order."""
        chosen = [x for x in self.layers if part is None or x.path.startswith(f"{part}.")]
        return [p for layer in chosen for p in layer.factors().values()]

    def named_factors(self) -> dict[str, Tensor]:
        """`<path>.down`, `<path>.up`, of a DoRA `<path>.magnitude`: the live float32 parameters, not copies."""
        return dict(self._factors())

    def _factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for layer in self.layers:
            for name, factor in layer.factors().items():
                yield f"{layer.path}.{name}", factor

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

    @torch.no_grad()
    def load_adapter(self, adapter: Adapter, name: str) -> None:
        """Starts from the adapter called `name`, whose ΔW the layers have then; nothing is changed unless all fits.

        Raises: AdapterFileError, naming the first module that is missing, or differs in kind, rank or shape.
        """
        mine = {layer.path: layer for layer in self.layers}
        pairs = {path: pair_of(delta) for path, delta in adapter.deltas.items()}
        if vector := next((p for p, delta in sorted(adapter.deltas.items()) if isinstance(delta, Vector)), None):
            raise AdapterFileError(
                f"{name} cannot be continued: {vector} is a change of a bias or norm, which training does not learn; "
                "merge it (--merge) and learn a LoRA on top"
            )
        for path in sorted(mine.keys() ^ pairs.keys()):
            where = "is not in it" if path in mine else "is in it but is not adapted here"
            raise AdapterFileError(f"{name} cannot be continued: {path} {where}; use its own targets and blocks")
        for path, layer in mine.items():
            pair, delta = pairs[path], adapter.deltas[path]
            if pair is None or isinstance(delta, Dora) != (layer.magnitude is not None):
                raise AdapterFileError(
                    f"{name} cannot be continued: {path} is {type(delta).__name__} in it, not "
                    f"{type(layer.delta()).__name__}; use its own kind (--dora or --no-dora)"
                )
            if pair.rank != layer.rank:
                raise AdapterFileError(
                    f"{name} cannot be continued: {path} has rank {pair.rank} in it and {layer.rank} here; "
                    f"use its own rank (--rank {pair.rank})"
                )
            lengths_fit = not isinstance(delta, Dora) or (delta.on_output and len(delta.magnitude) == len(layer.up))
            if (pair.down.shape, pair.up.shape) != (layer.down.shape, layer.up.shape) or not lengths_fit:
                raise AdapterFileError(f"{name} cannot be continued: {path} has another shape; it is for another base")
        for path, layer in mine.items():
            pair, delta = pairs[path], adapter.deltas[path]
            assert pair is not None
            layer.down.copy_(pair.down)
            layer.up.copy_(pair.up if pair.scale == layer.scale else pair.up.double() * (pair.scale / layer.scale))
            if isinstance(delta, Dora) and layer.magnitude is not None:
                layer.magnitude.copy_(delta.magnitude.view(-1))

    @torch.no_grad()
    def limit_norms(self, most: float) -> int:
        """Scales every layer whose ‖scale · up · down‖ (Frobenius) is above `most` back to it; returns how many were.

        The norm comes from the factors' Gram matrices, rank × rank; both factors take the square root of the ratio.
        """
        norms = torch.stack([_product_norm(x.down.flatten(1), x.up.flatten(1)) * x.scale for x in self.layers])
        ratios = (most / norms).clamp(max=1.0).sqrt()
        for layer, ratio in zip(self.layers, ratios, strict=True):
            layer.down.mul_(ratio)
            layer.up.mul_(ratio)
        return int((norms > most).sum())

    def begin(self, step: int, micro: int) -> None:
        """Draws dropout masks, from here on, by this step and micro-batch; to be called before every forward pass."""
        self._dropout.begin(step, micro)

    def end(self) -> None:
        """Drops nothing from here on: for previews and measurements."""
        self._dropout.end()

    def adapter(self, card: Card | None = None) -> Adapter:
        """What has been learnt so far, as float32 copies on the CPU."""
        return Adapter({layer.path: layer.delta() for layer in self.layers}, card or Card())

    def attach(self) -> None:
        """Lets the base's modules run with their LoRA; `sdlora.adapter.attach` has done so already."""
        known = [layer.siblings for layer in self.layers if layer.siblings is not None]
        if self._together and not (known and all(siblings.are_in_place() for siblings in known)):
            found = find_siblings(self.layers)
            for layer in self.layers:
                layer.siblings = found.get(layer.path)
        for layer in self.layers:
            forward = layer.conv2d if isinstance(layer.module, nn.Conv2d) else layer.linear
            if layer.siblings is not None:
                forward = layer.linear_with_siblings
            layer.module.forward = forward  # type: ignore[method-assign, assignment]
        self._attached = True

    def detach_from_base(self) -> None:
        """Gives the base its own forward back, bit for bit; the factors stay readable here. May be called again."""
        if self._attached:
            for layer in self.layers:
                layer.module.__dict__.pop("forward", None)
        self._attached = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the base runs as it is by itself; attached layers are attached again afterwards."""
        attached = self._attached
        self.detach_from_base()
        try:
            yield
        finally:
            if attached:
                self.attach()

    def __enter__(self) -> LoraLayers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach_from_base()


def attach(
    modules: Mapping[str, nn.Module],
    targets: Targets,
    *,
    rank: int,
    alpha: float,
    seed: int,
    plan: LayerPlan | None = None,
    together: bool = True,
) -> LoraLayers:
    """Attaches a LoRA to every Linear or Conv2d of a kind, or whose name is or ends with a name, of its part's targets.

    Initial factors depend on (seed, module path) only: A is Kaiming-uniform with a = √5, B is zero. On a CPU layers
    that read the same input run as one node, unless not `together`.

    Raises: ConfigError where a target matches nothing or something else, or rank or alpha is out of range.
    """
    plan = plan or LayerPlan()
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank is {rank!r}; use a whole number of at least 1")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha is {alpha!r}; use a number above 0")
    sites = find_sites(modules, targets, rank, float(alpha), plan)
    casts, dropout = CastCache(), Dropout(seed, plan.dropout, plan.rank_dropout, plan.module_dropout)
    layers = [LoraLayer(site, seed, casts, dropout, dora=plan.dora) for site in sites]
    words = list(dict.fromkeys(word for part in targets.values() for word in part))
    usual = set(words) <= {"attention", *UNET_TARGETS, *TEXT_ENCODER_TARGETS}
    notes = ([] if usual else [f"targets {', '.join(words)}"]) + plan.describe()
    parameters = count_parameters(*modules.values())
    attached = LoraLayers(layers, parameters, rank, float(alpha), dropout, tuple(notes), together)
    attached.attach()
    return attached


def _product_norm(down: Tensor, up: Tensor) -> Tensor:
    """‖up · down‖ (Frobenius) of down [rank, n] and up [out, rank]; at least the smallest number above 0."""
    square = ((up.T @ up) * (down @ down.T)).sum()
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _size(t: Tensor) -> str:
    return "×".join(map(str, t.shape)) or "a single number"

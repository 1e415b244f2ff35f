"""How several adapters act together: what each does to a module, stacked, and how a method mixes that."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import keys
from ..adapter.delta import Adapter, Delta, Dora, shape_of, weight_on
from ..adapter.vector import Vector, split_parameter
from ..bases.family import Base
from ..errors import AdapterFileError, ConfigError
from ..profiles import Profile
from .layer import Layer, factorize
from .methods import make_method
from .methods.linear import Linear
from .methods.method import DenseFilling, Filling, Method, Moment
from .running import Score, Shift, running


@dataclass(frozen=True)
class Member:
    """One adapter of a plan, its weights, and what messages call it."""

    adapter: Adapter
    weight: float = 1.0
    te_weight: float | None = None
    """The text encoder's weight; None is the same."""
    name: str = ""
    place: int = 0
    """Where it was in the stack as given; the first is the style, where a method treats style and subject apart."""
    profile: Profile | None = None
    """How the weight varies by block and over the steps."""
    mask: Tensor | None = None
    """Where in the picture it acts, float32 [H, W] in 0..1, scaled to the picture; None is everywhere."""

    def weight_of(self, path: str, t: float | None = None) -> float:
        """The weight that acts on a module path at a moment t; None is at any."""
        in_text = path.startswith("text_encoder")
        weight = self.te_weight if in_text and self.te_weight is not None else self.weight
        return weight if self.profile is None else weight * self.profile.at(path, t)

    def weight_at(self, t: float) -> float:
        """The weight at a moment t, blocks left aside."""
        if self.profile is None or self.profile.schedule is None:
            return self.weight
        return self.weight * self.profile.schedule.at(t)

    def scaled(self, factor: float) -> Member:
        """It with its weights times a factor."""
        te_weight = None if self.te_weight is None else self.te_weight * factor
        return dataclasses.replace(self, weight=self.weight * factor, te_weight=te_weight)

    @property
    def is_static(self) -> bool:
        return self.mask is None and (self.profile is None or self.profile.static)


Stacked = Sequence[tuple[Adapter, float] | tuple[Adapter, float, float] | Member]
"""Adapters with a weight each, and where given another weight for the text encoder; or members, which say more."""


@dataclass(frozen=True)
class Plan:
    """What several adapters do together: for each module ΔW(t) = B_cat · M(t) · A_cat, where the method fills M.

    A plan that is static, whose ΔW is the same at every step, is merged into the base once. One that is not is hooked
    to the UNet; its text encoder's part is the weighted sum, since the text is encoded once. The negative prompt's
    branch has the same plan. Changes of biases and norms have no ranks for a method to mix: each is added with its
    weight, whatever the method. The sum's order is fixed by the adapters' contents, so for `linear` the order in which
    they are given changes no bit.
    """

    members: tuple[Member, ...]
    """In the order of the sum; `of` sorts them."""
    method: Method = field(default_factory=Linear)

    @classmethod
    def of(cls, adapters: Stacked, names: Sequence[str] | None = None, method: str | Method = "linear") -> Plan:
        """The plan of adapters as (adapter, weight), (adapter, weight, text encoder's weight) or Member.

        `method` is a Method or what `make_method` reads, such as `np:mu=1`. Raises: ConfigError where a weight is not a
        finite number, or the method cannot combine these adapters.
        """
        method = make_method(method) if isinstance(method, str) else method
        members = []
        for i, given in enumerate(adapters):
            member = given if isinstance(given, Member) else Member(*given)
            name = names[i] if names else member.name or f"LoRA {i + 1}"
            for value in (member.weight, member.te_weight):
                if value is not None and not math.isfinite(value):
                    raise ConfigError(f"{name}: weight {value} is not a finite number; use 1 for the full effect")
            members.append(dataclasses.replace(member, name=name, place=i))
        plan = cls(tuple(sorted(members, key=_order)), method)
        plan._check_method()
        return plan

    def _check_method(self) -> None:
        name, count = self.method.name, len(self.members)
        if self.method.pair and count != 2:
            raise ConfigError(
                f"method {name} is for two LoRAs, the style first and the subject second, not for {count}; "
                "use linear, np, switch or composite"
            )
        if self.method.moves:
            self.method.passes([self.by_place[i].weight for i in range(count)], Moment(0.0, 1))
        if isinstance(self._still, DenseFilling) and not all(member.is_static for member in self.members):
            raise ConfigError(f"method {name} takes no schedule and no mask; use linear or np with them")

    def check(self, base: Base) -> list[str]:
        """Checks that every adapter fits the base; gives a line for each whose modules are partly left out.

        Raises: AdapterFileError where an adapter was made for another base; ConfigError where block weights were.
        """
        for member in self.members:
            if member.profile is not None and member.profile.blocks is not None:
                member.profile.blocks.check_family(base.family.name, member.name)
        return [line for member in self.members for line in _check_member(member, base)]

    @property
    def is_static(self) -> bool:
        """Whether ΔW is the same at every step and in every place, so that it can be merged."""
        return not self.method.moves and all(member.is_static for member in self.members)

    @property
    def by_place(self) -> dict[int, Member]:
        """The members by where they were in the stack as given."""
        return {member.place: member for member in self.members}

    @property
    def paths(self) -> list[str]:
        """The paths on which something acts, sorted: of modules, and of biases (`adapter.vector`)."""
        return sorted({path for m in self.members for path in m.adapter.deltas if m.weight_of(path) != 0})

    @property
    def _still(self) -> Filling | DenseFilling:
        """The method before it saw a layer: all that a static one needs, and the text encoder's of a moving one."""
        return (Linear() if self.method.moves else self.method).prepare(())

    def layer(self, path: str, device: torch.device | None = None, base: Tensor | None = None) -> Layer:
        """What acts on one module, as factors; `base` is the module's weight, which a DoRA needs."""
        acting = [m for m in self.members if path in m.adapter.deltas and m.weight_of(path) != 0]
        parts = tuple(factorize(_move(m.adapter.deltas[path], device), base) for m in acting)
        return Layer(path, parts, tuple(m.place for m in acting))

    def is_vector(self, path: str) -> bool:
        """Whether a path is that of a bias or of a norm's weight."""
        return any(isinstance(m.adapter.deltas.get(path), Vector) for m in self.members)

    def delta(self, path: str, device: torch.device | None = None, base: Tensor | None = None) -> Tensor:
        """ΔW of one path of a static plan, float32; the sum is taken in float64 and rounded once.

        `base` is the module's weight in float32, which a DoRA needs: its part is weight · (DoRA(W) - W).
        Raises: AdapterFileError where a DoRA acts and no `base` is given.
        """
        acting = [m for m in self.members if path in m.adapter.deltas and m.weight_of(path) != 0]
        if not acting:
            raise KeyError(path)
        if not isinstance(self._still, Linear) and not self.is_vector(path):
            return self._filled(path, device, base)
        total: Tensor | None = None
        for member in acting:
            delta = _move(member.adapter.deltas[path], device)
            term = (delta.weight() if base is None else weight_on(delta, base)).double() * member.weight_of(path)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total.float()

    def _filled(self, path: str, device: torch.device | None, base: Tensor | None) -> Tensor:
        layer = self.layer(path, device, base)
        members = self.by_place
        gains = [members[place].weight_of(path) for place in layer.places]
        filling = self._still
        if isinstance(filling, DenseFilling):
            total = filling.delta(layer, gains)
        else:
            m = filling.middle(layer, gains, None)
            total = (layer.up * m if m.dim() == 1 else layer.up @ m) @ layer.down
        return total.float().view(shape_of(members[layer.places[0]].adapter.deltas[path]))

    def deltas(self) -> dict[str, Tensor]:
        """Module path -> ΔW, float32, of every module on which something acts."""
        return {path: self.delta(path) for path in self.paths}

    @contextlib.contextmanager
    def applied(self, base: Base, steps: int = 20) -> Iterator[Base]:
        """Within it, a Base that draws with the plan: of a static plan the base itself, with W + ΔW for its weights.

        They are added in float32 and rounded once to the base's dtype. The pristine weights are set aside and put back
        on leaving, whatever happened: no byte of them is recomputed. A plan that is not static changes no weight of the
        UNet; pictures are sampled with the Base that this gives, in `steps` solver steps.

        Raises: AdapterFileError where an adapter does not fit, or its sum with the base is not finite.
        """
        pristine: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for weight, merged in self._merge(base):
                pristine.append((weight, weight.data))
                weight.data = merged
            if self.is_static:
                yield base
            else:
                with running(base, self._score(base), steps) as conducted:
                    yield conducted
        finally:
            for weight, data in pristine:
                weight.data = data

    def _score(self, base: Base) -> Score:
        """What a moving plan needs on the base's UNet."""
        layers: dict[str, Layer] = {}
        modules: dict[str, nn.Module] = {}
        shifts: dict[str, list[Shift]] = {}
        for path in self.paths:
            weight = find_parameter(base, path) if path.startswith("unet.") else None
            if weight is None:
                continue
            name, parameter = split_parameter(path)
            modules[name] = keys.find_module(base.modules, name)
            if self.is_vector(path):
                shifts.setdefault(name, []).append(Shift(path, parameter, self._values(path, base.device)))
            else:
                layers[path] = self.layer(path, base.device, weight.float())
        members = self.by_place
        masks = {place: m.mask.float() for place, m in members.items() if m.mask is not None}
        return Score(
            layers=layers,
            shifts=shifts,
            modules=modules,
            method=self.method,
            filling=cast(Filling, self.method.prepare(layers.values())),
            gain=lambda place, path, t: members[place].weight_of(path, t),
            weight=lambda place, t: members[place].weight_at(t),
            places=tuple(range(len(members))),
            masks=masks,
        )

    def _values(self, path: str, device: torch.device) -> dict[int, Tensor]:
        """By place, float32: what each adapter that acts adds to a bias or a norm's weight."""
        acting = [m for m in self.members if path in m.adapter.deltas and m.weight_of(path) != 0]
        return {m.place: m.adapter.deltas[path].weight().to(device) for m in acting}

    def merge_into(self, base: Base) -> None:
        """Makes the base's weights W + ΔW for good, as `applied` does for a while; keeps no pristine weight.

        Raises: ConfigError where the plan is not static; as `applied`, and the base is then of no more use.
        """
        if not self.is_static:
            raise ConfigError(
                f"method {self.method.name}, schedules and masks change over the picture; merge without them"
            )
        for weight, merged in self._merge(base):
            weight.data = merged

    def _merge(self, base: Base) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight on which something acts, and what it becomes."""
        self.check(base)
        with torch.no_grad():
            for path in self.paths:
                weight = find_parameter(base, path)
                if weight is None or not (self.is_static or path.startswith("text_encoder")):
                    continue
                pristine = weight.float()
                delta = self.delta(path, base.device, pristine)
                if not delta.any():
                    continue
                merged = (pristine + delta.view_as(weight)).to(weight.dtype)
                if not merged.isfinite().all():
                    dtype = str(weight.dtype).removeprefix("torch.")
                    raise AdapterFileError(
                        f"{path}: base and LoRAs add up to no finite {dtype} weight; lower the weights"
                    )
                yield weight, merged


def find_module(base: Base, path: str) -> nn.Module | None:
    """The base's module with a weight at an adapter's path, or None where the base has none."""
    try:
        module = keys.find_module(base.modules, path)
    except KeyError:
        return None
    return module if isinstance(getattr(module, "weight", None), Tensor) else None


def find_parameter(base: Base, path: str) -> nn.Parameter | None:
    """The base's weight or bias at an adapter's path, or None where the base has none."""
    try:
        return keys.find_parameter(base.modules, path)
    except KeyError:
        return None


def _check_member(member: Member, base: Base) -> list[str]:
    card, name = member.adapter.card, member.name
    made_for = f" (made for {card.base or card.family})" if card.base or card.family else ""
    missing: list[str] = []
    acting = [path for path in sorted(member.adapter.deltas) if member.weight_of(path) != 0]
    for path in acting:
        weight = find_parameter(base, path)
        if weight is None:
            missing.append(path)
            continue
        there, wanted = tuple(weight.shape), shape_of(member.adapter.deltas[path])
        if there != wanted:
            raise AdapterFileError(
                f"{name}: a LoRA for another base{made_for}: {path} is {_by(wanted)} in the file and {_by(there)} "
                f"in {base.name} ({base.family.name}); use it with its own base"
            )
    if acting and len(missing) == len(acting):
        raise AdapterFileError(
            f"{name}: a LoRA for another base{made_for}: {base.name} ({base.family.name}) has none of its "
            f"{len(missing)} modules, {missing[0]} for one; use it with its own base"
        )
    if missing:
        return [f"{name}: {len(missing)} of {len(acting)} modules left out: {base.name} has no {missing[0]}"]
    return []


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _order(member: Member) -> tuple[str, float, float, int]:
    """What a member comes after in the sum: its contents, then its weights, whatever its place."""
    te_weight = member.weight if member.te_weight is None else member.te_weight
    return _digest(member.adapter), member.weight, te_weight, member.place


def _tensors(delta: Delta) -> Iterator[tuple[str, Any]]:
    if isinstance(delta, Dora):
        yield from _tensors(delta.inner)
        yield "magnitude", delta.magnitude
    elif dataclasses.is_dataclass(delta):
        for field in dataclasses.fields(delta):
            yield field.name, getattr(delta, field.name)
    else:
        yield "weight", delta.weight()


def _digest(adapter: Adapter) -> str:
    """SHA-256 over the adapter's values: what puts the terms of a sum in an order of their own."""
    digest = hashlib.sha256()
    for path in sorted(adapter.deltas):
        digest.update(path.encode())
        for name, value in _tensors(adapter.deltas[path]):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()


def _move(delta: Delta, device: torch.device | None) -> Delta:
    if device is None or device.type == "cpu" or not dataclasses.is_dataclass(delta):
        return delta
    if isinstance(delta, Dora):
        return Dora(_move(delta.inner, device), delta.magnitude.to(device))  # type: ignore[arg-type]
    moved = {name: value.to(device) for name, value in _tensors(delta) if isinstance(value, Tensor)}
    return dataclasses.replace(delta, **moved)  # type: ignore[type-var, return-value]

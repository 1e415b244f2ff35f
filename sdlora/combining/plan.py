"""How several adapters act together: the exact weighted sum of what each does to a module."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import keys
from ..adapter.delta import Adapter, Delta, Dora, shape_of, weight_on
from ..bases.family import Base
from ..errors import AdapterFileError, ConfigError

Stacked = Sequence[tuple[Adapter, float] | tuple[Adapter, float, float]]
"""Adapters with a weight each, and where given another weight for the text encoder."""


@dataclass(frozen=True)
class Member:
    """One adapter of a plan, its weights, and what messages call it."""

    adapter: Adapter
    weight: float
    te_weight: float
    name: str

    def weight_of(self, path: str) -> float:
        """The weight that acts on a module path."""
        return self.te_weight if path.startswith("text_encoder") else self.weight


@dataclass(frozen=True)
class Plan:
    """A static plan: ΔW(module) = Σ weight · ΔW(adapter, module), the same at every step.

    The sum's order is fixed by the adapters' contents, so the order they are given in changes no bit.
    """

    members: tuple[Member, ...]
    """In the order of the sum; `of` sorts them."""

    @classmethod
    def of(cls, adapters: Stacked, names: Sequence[str] | None = None) -> Plan:
        """The plan of adapters as (adapter, weight) or (adapter, weight, text encoder's weight).

        Raises: ConfigError where a weight is not a finite number.
        """
        members = []
        for i, (adapter, weight, *te) in enumerate(adapters):
            name = names[i] if names else f"LoRA {i + 1}"
            for value in (weight, *te):
                if not math.isfinite(value):
                    raise ConfigError(f"{name}: weight {value} is not a finite number; use 1 for the full effect")
            members.append(Member(adapter, float(weight), float(te[0]) if te else float(weight), name))
        return cls(tuple(sorted(members, key=lambda m: (_digest(m.adapter), m.weight, m.te_weight))))

    def check(self, base: Base) -> list[str]:
        """Checks that every adapter fits the base; gives a line for each whose modules are partly left out.

        Raises: AdapterFileError where an adapter was made for another base.
        """
        return [line for member in self.members for line in _check_member(member, base)]

    @property
    def paths(self) -> list[str]:
        """The module paths on which something acts, sorted."""
        return sorted({path for m in self.members for path in m.adapter.deltas if m.weight_of(path) != 0})

    def delta(self, path: str, device: torch.device | None = None, base: Tensor | None = None) -> Tensor:
        """ΔW of one module, float32; the sum is taken in float64 and rounded once.

        `base` is the module's weight in float32, which a DoRA needs: its part is weight · (DoRA(W) - W).
        Raises: AdapterFileError where a DoRA acts and no `base` is given.
        """
        total: Tensor | None = None
        for member in self.members:
            weight = member.weight_of(path)
            if weight == 0 or path not in member.adapter.deltas:
                continue
            delta = _move(member.adapter.deltas[path], device)
            term = (delta.weight() if base is None else weight_on(delta, base)).double() * weight
            total = term if total is None else total.add_(term)
        if total is None:
            raise KeyError(path)
        return total.float()

    def deltas(self) -> dict[str, Tensor]:
        """Module path -> ΔW, float32, of every module on which something acts."""
        return {path: self.delta(path) for path in self.paths}

    @contextlib.contextmanager
    def applied(self, base: Base) -> Iterator[Base]:
        """Within it the base's weights are W + ΔW, added in float32 and rounded once to the base's dtype.

        The pristine weights are set aside and put back on leaving, whatever happened: no byte of them is recomputed.

        Raises: AdapterFileError where an adapter does not fit, or its sum with the base is not finite.
        """
        pristine: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for weight, merged in self._merge(base):
                pristine.append((weight, weight.data))
                weight.data = merged
            yield base
        finally:
            for weight, data in pristine:
                weight.data = data

    def merge_into(self, base: Base) -> None:
        """Makes the base's weights W + ΔW for good, as `applied` does for a while; keeps no pristine weight.

        Raises: as `applied`; the base is then of no more use.
        """
        for weight, merged in self._merge(base):
            weight.data = merged

    def _merge(self, base: Base) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight on which something acts, and what it becomes."""
        self.check(base)
        with torch.no_grad():
            for path in self.paths:
                module = find_module(base, path)
                if module is None:
                    continue
                weight: Any = module.weight
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


def _check_member(member: Member, base: Base) -> list[str]:
    card, name = member.adapter.card, member.name
    made_for = f" (made for {card.base or card.family})" if card.base or card.family else ""
    missing: list[str] = []
    acting = [path for path in sorted(member.adapter.deltas) if member.weight_of(path) != 0]
    for path in acting:
        module: Any = find_module(base, path)
        if module is None:
            missing.append(path)
            continue
        there, wanted = tuple(module.weight.shape), shape_of(member.adapter.deltas[path])
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

"""The tensors of one module in a LoRA file: what must hold of them, a delta read from them, a delta made ready."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError
from . import keys, lycoris
from .card import Alphas
from .delta import Delta, Dora, LowRank, shape_of
from .header import FLOAT_DTYPES, Entry, printable
from .vector import split_parameter

Roles = Mapping[str, str]
"""Role of a tensor (`down`, `up`, `alpha`, `magnitude`, `scalar`, those of `lycoris.ROLES`) -> its key in the file."""


def check_entries(modules: Mapping[str, Roles], entries: Mapping[str, Entry], name: str) -> None:
    """Every module of the file `name` has all tensors of its kind, of float dtypes and shapes that go together.

    Raises: AdapterFileError, naming the key.
    """
    for path, roles in sorted(modules.items()):
        other = bool(roles.keys() & set(lycoris.ROLES))
        for role in () if other else ("down", "up"):
            if role not in roles:
                key = printable(roles.get("down") or roles.get("up") or next(iter(roles.values())))
                raise AdapterFileError(f"{name} has {key} but no {role} factor for {path}; the file is incomplete")
        for key in roles.values():
            if entries[key].dtype not in FLOAT_DTYPES:
                raise AdapterFileError(f"{name}: {printable(key)} is {entries[key].dtype}; a factor must be a float")
        for role in roles.keys() & {"alpha", "scalar"}:
            if math.prod(entries[roles[role]].shape) != 1:
                raise AdapterFileError(f"{name}: {printable(roles[role])} must be a single number")
        try:
            if other:
                stand_ins = {role: torch.empty(entries[key].shape, device="meta") for role, key in roles.items()}
                kind = lycoris.make_kind(path, stand_ins, None)
                lycoris.check_kind(path, kind)
                assert kind is not None
                whole = shape_of(kind)
            else:
                down, up = entries[roles["down"]].shape, entries[roles["up"]].shape
                check_shapes(path, down, up)
                whole = (up[0], *down[1:])
            if "magnitude" in roles:
                _magnitude_shape(roles["magnitude"], entries[roles["magnitude"]].shape, whole)
        except AdapterFileError as e:
            raise AdapterFileError(f"{name}: {e}") from None


def check_shapes(path: str, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    """Raises: AdapterFileError where the factors of a module are no low-rank pair."""
    if len(down) not in (2, 4) or len(up) != len(down) or 0 in down + up or up[2:] not in ((), (1, 1)):
        raise AdapterFileError(f"{path} has factors of shapes {list(down)} and {list(up)}, which is no low-rank pair")
    if down[0] != up[1]:
        raise AdapterFileError(f"{path} has rank {down[0]} in its down factor and {up[1]} in its up factor")


def _magnitude_shape(key: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
    """A magnitude's shape with as many axes as the weight [out, in, …].

    PEFT's has a length for each output: [out], of a convolution [1, out, 1, 1]. A `dora_scale` is [out, 1, …], or of
    older LyCORIS [1, in, …]. Raises: AdapterFileError.
    """
    ones = (1,) * (len(weight) - 1)
    by_output, by_input = (weight[0], *ones), (1, weight[1], *ones[1:])
    if shape in (by_output, (weight[0],)):
        return by_output
    is_peft = ".lora_magnitude_vector" in key
    if is_peft and shape == (1, weight[0], *ones[1:]):
        return by_output
    if not is_peft and shape == by_input:
        return by_input
    raise AdapterFileError(f"{printable(key)} is {list(shape)}, which are no lengths for a weight of {list(weight)}")


def read_delta(
    path: str, roles: Roles, tensors: Mapping[str, Tensor], alphas: Alphas, name: str, *, look: bool = True
) -> Delta:
    """A module's delta from the tensors of the file `name`; what `check_entries` checks must hold.

    Without `look` the values are not looked at, and so not read from the disk either.
    Raises: AdapterFileError for NaN or infinity, an alpha or a magnitude that is none.
    """
    for role in roles.keys() - {"alpha"} if look else ():
        if not bool(tensors[roles[role]].float().isfinite().all()):
            raise AdapterFileError(f"{name}: {printable(roles[role])} holds NaN or infinity; train it again")
    alpha = float(tensors[roles["alpha"]].item()) if "alpha" in roles else alphas.get(path, None)
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        key = printable(roles.get("alpha", path))
        raise AdapterFileError(f"{name}: {key} is an alpha of {alpha}; it must be a number above 0")
    delta = lycoris.make_kind(path, {role: tensors[key] for role, key in roles.items()}, alpha)
    if delta is None:
        down, up = tensors[roles["down"]], tensors[roles["up"]]
        delta = LowRank(down, up, float(down.shape[0]) if alpha is None else alpha)
    if "scalar" in roles:
        number = float(tensors[roles["scalar"]].item())
        if not math.isfinite(number):
            raise AdapterFileError(f"{name}: {printable(roles['scalar'])} is {number}; train it again")
        delta = lycoris.multiply(delta, number)
    if "magnitude" not in roles:
        return delta
    magnitude = tensors[roles["magnitude"]]
    whole = _magnitude_shape(roles["magnitude"], tuple(magnitude.shape), shape_of(delta))
    return Dora(delta, magnitude.reshape(whole))


def make_ready(path: str, delta: Delta, dtype: torch.dtype) -> Delta:
    """The delta as it will be stored: contiguous CPU tensors of `dtype`, an alpha that float32 can hold.

    A DoRA's magnitudes stay float32: they multiply the whole weight, so half precision would blur all of it.
    Raises: AdapterFileError where it is another kind, or not finite in `dtype`.
    """
    if isinstance(delta, Dora):
        magnitude = delta.magnitude.detach().to("cpu", torch.float32).contiguous()
        if not bool(magnitude.isfinite().all()):
            raise AdapterFileError(f"{path}: its magnitudes are not finite; nothing is written")
        return Dora(make_ready(path, delta.inner, dtype), magnitude)
    if isinstance(delta, lycoris.KINDS):
        ready = {f: t.detach().to("cpu", dtype).contiguous() for f, t in _fields(delta) if isinstance(t, Tensor)}
        for field, tensor in ready.items():
            if not bool(tensor.isfinite().all()):
                raise AdapterFileError(f"{path}: its {field} is not finite as {dtype}; nothing is written")
        made: Delta = dataclasses.replace(delta, **ready)  # type: ignore[arg-type]
        return made
    if not isinstance(delta, LowRank):
        raise AdapterFileError(f"{path} is a {type(delta).__name__} change, which no file holds; give it as low rank")
    return _ready_pair(path, delta, dtype)


def _fields(delta: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(delta, field.name)) for field in dataclasses.fields(delta)]


def _ready_pair(path: str, pair: LowRank, dtype: torch.dtype) -> LowRank:
    alpha = float(torch.tensor(pair.alpha, dtype=torch.float32))
    if not (math.isfinite(alpha) and alpha > 0):
        raise AdapterFileError(f"{path} has alpha {pair.alpha}; it must be a number above 0")
    ready = LowRank(
        pair.down.detach().to("cpu", dtype).contiguous(), pair.up.detach().to("cpu", dtype).contiguous(), alpha
    )
    check_shapes(path, tuple(ready.down.shape), tuple(ready.up.shape))
    for role, factor in (("down", ready.down), ("up", ready.up)):
        if not bool(factor.isfinite().all()):
            raise AdapterFileError(f"{path}: its {role} factor is not finite as {dtype}; nothing is written")
    return ready


def name_tensors(deltas: Mapping[str, Delta], format: str, family: str) -> dict[str, Tensor]:
    """The tensors of a file under their keys, for deltas that are ready.

    Raises: AdapterFileError for a module that the family's files have no name for, or a kind that the format has not.
    """
    family = family if family in keys.GRAMMARS else keys.DEFAULT_FAMILY
    single = len({p.partition(".")[0] for p in deltas}) == 1
    tensors: dict[str, Tensor] = {}
    for path, delta in deltas.items():
        if not keys.is_known(path, family):
            raise AdapterFileError(f"{path} has no name in a {family} file; only its UNet and text encoder have")
        inner = delta.inner if isinstance(delta, Dora) else delta
        name = keys.write_name(split_parameter(path)[0], format, family, single)
        down, up = keys.WRITTEN_SUFFIXES[format]
        # clones: shared storage cannot be stored
        if isinstance(inner, LowRank):
            tensors[name + down], tensors[name + up] = inner.down.clone(), inner.up.clone()
        else:
            tensors |= _name_kind(path, inner, name, format)
        if format == "kohya" and (alpha := getattr(inner, "alpha", None)) is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if isinstance(delta, Dora):
            # transformers, which loads a text encoder's part for diffusers, wants the parameter's full name
            full = ".weight" if format == "diffusers" and path.startswith("text_encoder") else ""
            tensors[name + keys.MAGNITUDE_SUFFIXES[format] + full] = _named_magnitude(path, delta, format)
    return tensors


def _name_kind(path: str, delta: Any, name: str, format: str) -> dict[str, Tensor]:
    if format != "kohya":
        raise AdapterFileError(
            f"{path} is a {lycoris.name_kind(delta)}, which {format} files have no names for; use kohya, or make it "
            "low rank first (sdlora resize FILE --rank R)"
        )
    suffix = {role: ending for ending, (naming, role) in keys.SUFFIXES.items() if naming == "kohya"}
    return {name + suffix[role]: tensor.clone() for role, tensor in delta.tensors().items()}


def _named_magnitude(path: str, delta: Dora, format: str) -> Tensor:
    if format == "kohya":
        return delta.magnitude.clone()
    if not delta.on_output:
        raise AdapterFileError(f"{path} is a DoRA with a length for each input, which {format} has not; use kohya")
    lengths = delta.magnitude.reshape(-1)  # [out]
    return (lengths if delta.magnitude.dim() == 2 else lengths.view(1, -1, 1, 1)).clone()

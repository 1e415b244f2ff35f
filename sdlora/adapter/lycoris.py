"""Changes that are no plain low-rank pair, as LyCORIS and kohya store them: LoHa, LoKr, CP-decomposed LoCon, full.

`vector.py` has those of biases and norms.

Each field is a tensor as the file has it, any float dtype; `kernel` is that of the convolution whose weight is changed,
since most of these tensors are flat. Source: LyCORIS, the modules loha, lokr, locon and full, and their paper (Yeh et
al. 2023, Navigating Text-To-Image Customization), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError
from . import vector
from .delta import Delta
from .vector import Vector

THREE_BY_THREE = ("conv", "conv1", "conv2", "conv_in", "conv_out")
"""How the paths of 3 x 3 convolutions end; what other modules change has a kernel of 1 x 1, or none."""
ROLES = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "mid", "diff", *vector.ROLES,
)  # fmt: skip
"""What a tensor of these kinds is called in a file, but for `down`, `up`, `alpha` and `magnitude`."""


class _Stored:
    """What the kinds below have in common: their tensors by role."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role."""
        values = ((self.role(f.name), getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return {role: value for role, value in values if isinstance(value, Tensor)}

    @classmethod
    def role(cls, field: str) -> str:
        return field


@dataclass(frozen=True)
class Loha(_Stored):
    """ΔW = (alpha / rank) · (w1_a · w1_b) ⊙ (w2_a · w2_b); with cores t each product is a Tucker decomposition.

    w_a [out, rank], w_b [rank, in · kh · kw]; with cores t [rank, rank, kh, kw] w_a is [rank, out], w_b [rank, in].
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        if self.t1 is not None:
            return (int(self.w1_a.shape[1]), int(self.w1_b.shape[1]), *map(int, self.t1.shape[2:]))
        return _unfold((int(self.w1_a.shape[0]), int(self.w1_b.shape[1])), self.kernel)

    def weight(self) -> Tensor:
        first = _product(self.w1_a, self.w1_b, self.t1)
        second = _product(self.w2_a, self.w2_b, self.t2)
        return (self.alpha / self.rank * (first * second)).view(self.shape)

    @classmethod
    def role(cls, field: str) -> str:
        return f"hada_{field}"


@dataclass(frozen=True)
class Lokr(_Stored):
    """ΔW = scale · w1 ⊗ w2 (Kronecker); either may be w_a · w_b, the second with a Tucker core t2 too.

    The scale is alpha / rank, and 1 where both are whole. w1 [out₁, in₁], w2 [out₂, in₂] or [out₂, in₂, kh, kw].
    """

    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """The rank of the part that is decomposed; 0 where neither is."""
        narrow = self.w1_b if self.w1_b is not None else self.w2_b
        return 0 if narrow is None else int(narrow.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = self._sizes()
        flat = (first[0] * second[0], first[1] * second[1])
        return (*flat, *second[2:]) if second[2:] else _unfold(flat, self.kernel)

    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first = _size_of(self.w1, self.w1_a, self.w1_b, None)
        return first, _size_of(self.w2, self.w2_a, self.w2_b, self.t2)

    def weight(self) -> Tensor:
        first = self.w1.float() if self.w1 is not None else _product(self.w1_a, self.w1_b, None)
        second = self.w2.float() if self.w2 is not None else _product(self.w2_a, self.w2_b, self.t2)
        first = first.view(*first.shape, *[1] * (second.dim() - 2))
        return (self.scale * torch.kron(first.contiguous(), second.contiguous())).view(self.shape)

    @classmethod
    def role(cls, field: str) -> str:
        return f"lokr_{field}"


@dataclass(frozen=True)
class CpLocon(_Stored):
    """ΔW = (alpha / rank) · up · mid · down, of a convolution: mid [rank, rank, kh, kw], the others [·, ·, 1, 1]."""

    down: Tensor
    mid: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.up.shape[0]), int(self.down.shape[1]), *map(int, self.mid.shape[2:]))

    def weight(self) -> Tensor:
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        return self.alpha / self.rank * torch.einsum("or,rskl,si->oikl", up, self.mid.float(), down)


@dataclass(frozen=True)
class Full(_Stored):
    """ΔW as it is, in the shape of the weight."""

    diff: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.diff.shape))

    def weight(self) -> Tensor:
        return self.diff.float()


KINDS = (Loha, Lokr, CpLocon, Full, Vector)


def make_kind(path: str, found: Mapping[str, Any], alpha: float | None) -> Delta | None:
    """The change of a module whose tensors (or stand-ins with a shape) are `found` by role; None for a plain pair.

    Without an alpha it is the rank. Raises: AdapterFileError where tensors are missing or of several kinds.
    """
    kernel = (3, 3) if path.rpartition(".")[2] in THREE_BY_THREE else ()
    given = {role for role in found if role not in ("alpha", "magnitude", "scalar")}
    if any(role.startswith("hada_") for role in given):
        parts = _take(path, "LoHa", given, found, "hada_", ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2"))
        if ("t1" in parts) != ("t2" in parts):
            raise AdapterFileError(f"{path} is a LoHa with one of hada_t1 and hada_t2; the file is incomplete")
        return Loha(**parts, alpha=float(parts["w1_b"].shape[0]) if alpha is None else alpha, kernel=kernel)
    if any(role.startswith("lokr_") for role in given):
        whole = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        parts = _take(path, "LoKr", given, found, "lokr_", (), whole)
        for side in ("w1", "w2"):
            if (side in parts) == (f"{side}_a" in parts and f"{side}_b" in parts):
                raise AdapterFileError(f"{path} is a LoKr without a whole lokr_{side}; the file is incomplete")
        made = Lokr(1.0, **parts, kernel=kernel)
        return Lokr(float(made.rank or 1) if alpha is None else alpha, **parts, kernel=kernel)
    if "mid" in given:
        parts = _take(path, "CP-decomposed LoCon", given, found, "", ("down", "mid", "up"), ())
        return CpLocon(**parts, alpha=float(parts["down"].shape[0]) if alpha is None else alpha)
    roles = set(vector.ROLES) | ({"diff"} if vector.is_norm(path) else set())
    if role := min(given & roles, default=""):
        (value,) = _take(path, f"change of a {path.rpartition('.')[2]}", given, found, "", (role,), ()).values()
        return Vector(value, role)
    if "diff" in given:
        given |= found.keys() & {"scalar"}  # a difference has none
        return Full(**_take(path, "full difference", given, found, "", ("diff",), ()))
    return None


def multiply(delta: Any, number: float) -> Delta:
    """The change times LyCORIS' `scalar`: its size goes into alpha and its sign into a factor, so no number is rounded.

    Only a LoKr of two whole parts, which has no use for alpha, is rounded, to float32.
    Source: LyCORIS, `use_scalar` of the modules locon, loha and lokr.
    """
    if isinstance(delta, Lokr):
        field = "w1_a" if delta.w1 is None else "w1"
    else:
        field = "w1_a" if isinstance(delta, Loha) else "up"
    factor: Tensor = getattr(delta, field)
    if number == 0 or (isinstance(delta, Lokr) and not delta.rank):
        return replace(delta, **{field: factor.float() * number})
    turned = factor if number > 0 else (-factor.float()).to(factor.dtype)
    return replace(delta, **{field: turned}, alpha=delta.alpha * abs(number))


def check_kind(path: str, delta: Any) -> None:
    """Raises: AdapterFileError where the shapes of a change's tensors do not go together."""
    try:
        fits = _FITS[type(delta)](delta) and min(delta.shape) > 0
    except (IndexError, ValueError, TypeError):
        fits = False
    if not fits:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in _shaped(delta))
        raise AdapterFileError(f"{path} has tensors that do not go together: {shapes}")


def name_kind(delta: Any) -> str:
    """What people call a kind."""
    if isinstance(delta, Vector):
        return f"change of a {delta.kind}"
    return {Loha: "LoHa", Lokr: "LoKr", CpLocon: "CP-decomposed LoCon", Full: "full difference"}[type(delta)]


def _fits_loha(d: Loha) -> bool:
    flat = all(x.dim() == 2 for x in (d.w1_a, d.w1_b, d.w2_a, d.w2_b))
    if d.t1 is None or d.t2 is None:
        inner = d.w1_a.shape[1] == d.w1_b.shape[0] and d.w2_a.shape[1] == d.w2_b.shape[0]
        same = (d.w1_a.shape[0], d.w1_b.shape[1]) == (d.w2_a.shape[0], d.w2_b.shape[1])
        return flat and inner and same and _unfolds(d.w1_b.shape[1], d.kernel)
    cores = all(
        t.dim() == 4 and tuple(t.shape[:2]) == (b.shape[0], a.shape[0])
        for t, a, b in ((d.t1, d.w1_a, d.w1_b), (d.t2, d.w2_a, d.w2_b))
    )
    same = (d.w1_a.shape[1], d.w1_b.shape[1]) == (d.w2_a.shape[1], d.w2_b.shape[1])
    return flat and cores and same and d.t1.shape[2:] == d.t2.shape[2:]


def _fits_lokr(d: Lokr) -> bool:
    if d.w1 is not None and d.w1.dim() != 2:
        return False
    for whole, a, b, core in ((d.w1, d.w1_a, d.w1_b, None), (d.w2, d.w2_a, d.w2_b, d.t2)):
        if whole is not None:
            fits = whole.dim() in (2, 4)
        elif a is None or b is None or a.dim() != 2 or b.dim() != 2:
            fits = False
        elif core is None:
            fits = a.shape[1] == b.shape[0]
        else:
            fits = core.dim() == 4 and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
        if not fits:
            return False
    first, second = d._sizes()
    return len(second) == 4 or _unfolds(first[1] * second[1], d.kernel)


def _fits_cp(d: CpLocon) -> bool:
    ones = all(x.dim() == 4 and tuple(x.shape[2:]) == (1, 1) for x in (d.down, d.up))
    return ones and d.mid.dim() == 4 and (d.up.shape[1], d.down.shape[0]) == tuple(d.mid.shape[:2])


_FITS: dict[type, Any] = {
    Loha: _fits_loha,
    Lokr: _fits_lokr,
    CpLocon: _fits_cp,
    Full: lambda d: d.diff.dim() in (2, 4),
    Vector: lambda d: d.value.dim() == 1,
}


def _take(
    path: str,
    kind: str,
    given: set[str],
    found: Mapping[str, Any],
    prefix: str,
    needed: tuple[str, ...],
    optional: tuple[str, ...],
) -> dict[str, Any]:
    for name in needed:
        if prefix + name not in given:
            raise AdapterFileError(f"{path} is a {kind} without {prefix}{name}; the file is incomplete")
    if strange := sorted(given - {prefix + name for name in needed + optional}):
        raise AdapterFileError(f"{path} is a {kind} and has {strange[0]} too, which is of another kind")
    return {name: found[prefix + name] for name in needed + optional if prefix + name in given}


def _product(a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    assert a is not None
    assert b is not None
    if core is None:
        return a.float() @ b.float()
    return torch.einsum("ijkl,jr,ip->prkl", core.float(), b.float(), a.float())


def _size_of(whole: Any, a: Any, b: Any, core: Any) -> tuple[int, ...]:
    if whole is not None:
        return tuple(map(int, whole.shape))
    if core is not None:
        return (int(a.shape[1]), int(b.shape[1]), *map(int, core.shape[2:]))
    return (int(a.shape[0]), int(b.shape[1]))


def _unfold(flat: tuple[int, int], kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (flat[0], flat[1] // math.prod(kernel), *kernel) if kernel else flat


def _unfolds(columns: int, kernel: tuple[int, ...]) -> bool:
    return int(columns) % math.prod(kernel) == 0


def _shaped(delta: Any) -> list[tuple[str, Any]]:
    if isinstance(delta, Vector):
        return list(delta.tensors().items())
    found = ((delta.role(f.name), getattr(delta, f.name)) for f in fields(delta))
    return [(role, value) for role, value in found if hasattr(value, "shape")]


__all__ = ["KINDS", "ROLES", "CpLocon", "Full", "Loha", "Lokr", "check_kind", "make_kind", "multiply", "name_kind"]

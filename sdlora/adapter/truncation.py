"""A module's ΔW cut down to fewer ranks by its singular values, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from .delta import LowRank

FULL_SVD_SIDE = 512
"""A dense ΔW whose shorter side is longer than this is looked at through a random sketch, where few ranks are kept."""
OVERSAMPLING = 16
"""Ranks that a sketch takes beyond those that are kept. Source: Halko et al. 2011, algorithm 4.4 and theorem 10.6."""
POWER_ITERATIONS = 4


@dataclass(frozen=True)
class Keep:
    """How many ranks of a module stay: a number, or the fewest that keep within an error or hold an energy.

    Raises: ConfigError where not exactly one is given, or one is out of range.
    """

    rank: int | None = None
    error: float | None = None
    """‖ΔW - what is kept‖ / ‖ΔW‖ (Frobenius), at most."""
    energy: float | None = None
    """‖what is kept‖² / ‖ΔW‖², at least."""

    def __post_init__(self) -> None:
        given = {name: v for name in ("rank", "error", "energy") if (v := getattr(self, name)) is not None}
        if len(given) != 1:
            said = " and ".join(f"--{name} {value}" for name, value in given.items()) or "none"
            raise ConfigError(f"give one of --rank, --error and --energy, not {said}; {_FIX}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank {self.rank} is out of range; give 1 or more")
        for name in ("error", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} {value} is out of range; give a share from 0 to 1")

    def count(self, values: Tensor) -> int:
        """How many of the singular values, largest first, are kept: 1 at least."""
        if self.rank is not None:
            return max(1, min(self.rank, len(values)))
        energies = values.double().square()
        tails = energies.flip(0).cumsum(0).flip(0)  # tails[k] is what keeping k discards
        allowed = self.error**2 if self.error is not None else 1 - float(self.energy or 0.0)
        fits = (tails <= allowed * tails[0]).nonzero()
        return max(1, int(fits[0])) if len(fits) else len(values)

    def __str__(self) -> str:
        if self.rank is not None:
            return f"rank {self.rank}"
        return f"error {self.error:g}" if self.error is not None else f"energy {self.energy:g}"


_FIX = "--rank 16 keeps 16 ranks, --error 0.05 or --energy 0.95 as many as that needs"


@dataclass
class Cost:
    """What a truncation loses of each block's ΔW, as energies ‖·‖² (Frobenius)."""

    lost: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def add(self, path: str, lost: float, whole: float) -> None:
        for block in (name_block(path), "all"):
            self.lost[block] = self.lost.get(block, 0.0) + lost
            self.whole[block] = self.whole.get(block, 0.0) + whole

    @property
    def errors(self) -> Mapping[str, float]:
        """Block -> ‖ΔW - truncated‖ / ‖ΔW‖, and `all`."""
        return {block: (self.lost[block] / whole) ** 0.5 if whole else 0.0 for block, whole in self.whole.items()}

    def lines(self) -> list[str]:
        """A line for each block and one for all: what share of ΔW's norm is lost."""
        rows = sorted(self.errors.items(), key=lambda row: (row[0] == "all", row[0]))
        return [f"{block:16} relative error {error:.2%}" for block, error in rows]


def name_block(path: str) -> str:
    """The block of a module path as people name it: `down.1`, `mid`, `up.0`, `text_encoder`."""
    part, _, rest = path.partition(".")
    if part != "unet":
        return part
    words = rest.split(".")
    side = words[0].removesuffix("_blocks").removesuffix("_block")
    return f"{side}.{words[1]}" if words[0].endswith("_blocks") and len(words) > 1 else side


@dataclass(frozen=True)
class Truncated:
    """The best low-rank pair of a ΔW [out, n]: down [rank, n], up [out, rank]; `lost` and `whole` are energies."""

    down: Tensor
    up: Tensor
    lost: float
    whole: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def pair(self, shape: tuple[int, ...]) -> LowRank:
        """As a LoRA of a weight of this shape, rounded once to float32; its scale is 1."""
        return make_pair(self.down, self.up, shape)


def make_pair(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> LowRank:
    """Factors [rank, n] and [out, rank] as the LoRA of a weight of this shape, in float32, of alpha = rank."""
    rank = len(down)
    return LowRank(
        down.float().reshape(rank, *shape[1:]), up.float().reshape(-1, rank, *[1] * (len(shape) - 2)), alpha=float(rank)
    )


def truncate_factors(up: Tensor, down: Tensor, keep: Keep) -> Truncated:
    """The best pair for up [out, R] · down [R, n], from the QR factors of both: no dense ΔW is made.

    Source: Eckart and Young 1936; the singular values of a product are those of R_up · R_downᵀ.
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    rank = keep.count(s)
    root = s[:rank].sqrt()
    lost, whole = float((s[rank:].double() ** 2).sum()), float((s.double() ** 2).sum())
    return Truncated((root[:, None] * vh[:rank]) @ q_down.T, q_up @ (u[:, :rank] * root), lost, whole)


def truncate_dense(delta: Tensor, keep: Keep) -> Truncated:
    """The best pair for a dense ΔW [out, n]; of a large one of which few ranks are kept, nearly the best.

    A large one (`FULL_SVD_SIDE`) is sketched by a fixed seed, so the same ΔW gives the same pair; `lost` is then what
    that pair loses, not what the best one would. Source: Halko et al. 2011, algorithms 4.4 and 5.1.
    """
    side = min(delta.shape)
    sketched = keep.rank is not None and side > FULL_SVD_SIDE and 4 * (keep.rank + OVERSAMPLING) < side
    if not sketched:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        rank = keep.count(s)
        lost, whole = float((s[rank:].double() ** 2).sum()), float((s.double() ** 2).sum())
    else:
        rank = int(keep.rank or 1)
        u, s, vh = _sketch(delta, rank + OVERSAMPLING)
        rest = delta - (u[:, :rank] * s[:rank]) @ vh[:rank]
        lost, whole = float(rest.double().square().sum()), float(delta.double().square().sum())
    root = s[:rank].sqrt()
    return Truncated(root[:, None] * vh[:rank], u[:, :rank] * root, lost, whole)


def _sketch(delta: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values of a matrix, by subspace iteration from a seeded random start."""
    start = torch.randn(delta.shape[1], size, generator=torch.Generator().manual_seed(0)).to(delta)
    q = torch.linalg.qr(delta @ start).Q  # [out, size]
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
    return q @ u, s, vh


__all__ = ["Cost", "Keep", "Truncated", "make_pair", "name_block", "truncate_dense", "truncate_factors"]

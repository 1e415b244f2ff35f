"""What an adapter does to one module: its ΔW."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import AdapterFileError


@runtime_checkable
class Delta(Protocol):
    """The change of one module's weight; `weight_on` gives it for those that need the base's weight too."""

    def weight(self) -> Tensor:
        """ΔW, float32, in the shape of the module's weight: [out, in] or [out, in, kh, kw]."""
        ...


@dataclass(frozen=True)
class LowRank:
    """ΔW = (alpha / rank) · up · down.

    down [rank, in] or [rank, in, kh, kw]; up [out, rank] or [out, rank, 1, 1]; any float dtype.
    Source: Hu et al. 2021, LoRA, section 4.1.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def weight(self) -> Tensor:
        up = self.up.float().reshape(self.up.shape[0], -1)  # [out, rank]
        down = self.down.float().reshape(self.rank, -1)  # [rank, in·kh·kw]
        return (self.scale * (up @ down)).reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Dora:
    """ΔW = m · (W + ΔV) / ‖W + ΔV‖ - W: the base's weight W turned by `inner`, its lengths replaced by m.

    magnitude m, float: [out, 1, …], a length for each output, or [1, in, …], one for each input, with as many axes as
    W. The norm runs over the axes where m has size 1; LyCORIS and kohya store m so as `dora_scale`, and PEFT's is the
    first kind. Source: Liu et al. 2024, DoRA, equation 5.
    """

    inner: Delta
    magnitude: Tensor

    @property
    def on_output(self) -> bool:
        """Whether m has a length for each output."""
        return self.magnitude.numel() == self.magnitude.shape[0]

    def weight(self) -> Tensor:
        """Raises: AdapterFileError, since the change depends on the base's weight."""
        raise AdapterFileError("a DoRA has no change of its own, it depends on the base's weight; apply it to its base")

    def weight_on(self, base: Tensor) -> Tensor:
        """ΔW, float32, in the shape of the base's weight [out, in, …]."""
        base = base.float()
        turned = base + self.inner.weight().view_as(base)
        return dora_scale(self.magnitude.float(), turned) * turned - base


def dora_scale(magnitude: Tensor, turned: Tensor) -> Tensor:
    """m / ‖W + ΔV‖ in the magnitude's shape; a row of zeros stays zero."""
    axes = [i for i, size in enumerate(magnitude.shape) if size == 1]
    norm = torch.linalg.vector_norm(turned, dim=axes, keepdim=True)
    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def weight_on(delta: Delta, base: Tensor) -> Tensor:
    """ΔW, float32, of a module whose weight is `base`, in its shape."""
    found = delta.weight_on(base) if isinstance(delta, Dora) else delta.weight()
    return found.view_as(base)


def shape_of(delta: Delta) -> tuple[int, ...]:
    """The shape of the weight that a delta changes, for the usual kinds without computing it."""
    pair = delta.inner if isinstance(delta, Dora) else delta
    if isinstance(pair, LowRank):
        return (int(pair.up.shape[0]), *map(int, pair.down.shape[1:]))
    own: tuple[int, ...] | None = getattr(pair, "shape", None)
    return tuple(pair.weight().shape) if own is None else own


def pair_of(delta: Delta) -> LowRank | None:
    """The low-rank pair of a LoRA or a DoRA; None of other kinds."""
    inner = delta.inner if isinstance(delta, Dora) else delta
    return inner if isinstance(inner, LowRank) else None


@dataclass(frozen=True)
class Card:
    """What an adapter says of itself; every field may be empty for a file that another tool wrote."""

    family: str = ""
    """`sd1`, `sd2` or `sdxl`; `mini` counts as its own family, since its modules have other widths."""
    base: str = ""
    """The base's public name, never a path."""
    trigger: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """The recipe that made it, without paths."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The file's whole string metadata, as read."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA: module path -> Delta, and its card.

    Paths are `unet.` or `text_encoder.` (`text_encoder_2.`) and diffusers' module name; a CLIPTextModel's
    keep `text_model.`, as files have them: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
    """

    deltas: dict[str, Delta]
    card: Card = field(default_factory=Card)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    """Textual-inversion embeddings that came in the same file, under its keys; kept, and not used."""

    def save(self, path: str, format: str = "kohya", dtype: torch.dtype = torch.float32) -> None:
        """Writes the adapter as one `.safetensors` file; see `adapter.file.write_adapter`."""
        from .file import write_adapter

        write_adapter(self, path, format=format, dtype=dtype)

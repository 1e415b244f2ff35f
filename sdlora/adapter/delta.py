"""What an adapter does to one module: its ΔW."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Delta(Protocol):
    """The change of one module's weight."""

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

    def save(self, path: str, format: str = "kohya", dtype: torch.dtype = torch.float32) -> None:
        """Writes the adapter as one `.safetensors` file; see `adapter.file.write_adapter`."""
        from .file import write_adapter

        write_adapter(self, path, format=format, dtype=dtype)

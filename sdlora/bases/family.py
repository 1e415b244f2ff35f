"""A Base is a frozen Stable Diffusion; a Family says how one kind of it loads, encodes and predicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import BaseModelError


@dataclass
class Base:
    """The frozen parts of one Stable Diffusion, all on one device and in one dtype, in eval mode.

    `modules` maps `unet`, `vae`, `text_encoder` (later `text_encoder_2`) to the diffusers or transformers
    model; a part that `release` dropped is missing. `alphas_cumprod` is float64 [T], on the CPU.
    """

    name: str
    """The public name that goes into files: `mini`, a hub id, or a folder's last component."""
    family: Family
    source: Path
    """The folder the parts were loaded from."""
    modules: dict[str, nn.Module]
    tokenizer: Any
    scheduler_config: dict[str, Any]
    alphas_cumprod: Tensor
    device: torch.device
    dtype: torch.dtype
    fingerprint: str = ""
    """SHA-256 over the names, sizes and headers of the weights files: changes when the base changes."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def unet(self) -> nn.Module:
        return self.modules["unet"]

    @property
    def resolution_px(self) -> int:
        """The side in pixels that the base was trained at."""
        config: Any = self.unet.config
        return int(config.sample_size) * self.latent_factor

    @property
    def latent_factor(self) -> int:
        """Pixels along one side of a latent cell: 8."""
        return 8

    def release(self, part: str) -> None:
        """Drops a part from memory once its work is done (the VAE after caching, say)."""
        self.modules.pop(part, None)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        """Token ids int64 [B, 77] and each prompt's length in tokens before truncation (start and end counted)."""
        return self.family.tokenize(self, prompts)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text states [B, 77, D] in the base's dtype for token ids [B, 77]; passes gradients on."""
        return self.family.encode_text(self, ids)

    def encode_pictures(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and std, float32 [B, 4, H/8, W/8], times the scaling factor; x [B, 3, H, W] is in -1..1."""
        return self.family.encode_pictures(self, x)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Pictures float32 [B, 3, H, W] in -1..1 for scaled latents z [B, 4, H/8, W/8]."""
        return self.family.decode_latents(self, z)

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The UNet's output (noise for an epsilon base), in shape and dtype as x_t [B, 4, H/8, W/8]; t int64 [B]."""
        return self.family.predict(self, x_t, t, text)


class Family(Protocol):
    """One kind of Stable Diffusion; a new one is a new file and a row in `FAMILIES`."""

    name: str

    def load(self, source: Path, name: str, device: torch.device, dtype: torch.dtype) -> Base: ...

    def tokenize(self, base: Base, prompts: list[str]) -> tuple[Tensor, list[int]]: ...

    def encode_text(self, base: Base, ids: Tensor) -> Tensor: ...

    def encode_pictures(self, base: Base, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode_latents(self, base: Base, z: Tensor) -> Tensor: ...

    def predict(self, base: Base, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor: ...

    def default_targets(self, text_encoder: bool) -> dict[str, tuple[str, ...]]:
        """Module-name endings to adapt, by part: `{"unet": ("to_q", "to_k", "to_v", "to_out.0")}`."""
        ...


def load_base(name: str = "mini", *, device: str = "auto", precision: str = "fp32") -> Base:
    """Loads a base by name: `mini`, a diffusers folder, or a hub id.

    Raises: BaseModelError where it does not exist, is incomplete or is no supported Stable Diffusion.
    """
    from .sd import resolve_source, sd1

    if precision not in _DTYPES:
        raise BaseModelError(f"precision {precision!r} is not known; use fp32, bf16 or fp16")
    source, public_name, family = resolve_source(name)
    return (family or sd1).load(source, public_name, pick_device(device), _DTYPES[precision])


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `mps`.

    Raises: BaseModelError where the device asked for is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(d for d in ("cuda", "mps", "cpu") if available[d])
    if not available.get(device, False):
        raise BaseModelError(f"device {device!r} is not available here; use --device auto or cpu")
    return torch.device(device)

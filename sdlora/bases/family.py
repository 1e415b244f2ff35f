"""A Base is a frozen Stable Diffusion; a Family says how one kind of it loads, encodes and predicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import BaseModelError, ConfigError
from .text import Text, tokenize


@dataclass
class Base:
    """The frozen parts of one Stable Diffusion, all on one device and in one dtype, in eval mode.

    `modules` maps `unet`, `vae`, `text_encoder` (and `text_encoder_2`) to the diffusers or transformers model; a part
    that `release` dropped is missing. `alphas_cumprod` is float64 [T], on the CPU.
    """

    name: str
    """The public name that goes into files: `mini`, a hub id, a folder's last component, or a file's stem."""
    family: Family
    source: Path
    """The folder or file that the parts were loaded from."""
    modules: dict[str, nn.Module]
    tokenizers: tuple[Any, ...]
    """One for each text encoder."""
    scheduler_config: dict[str, Any]
    alphas_cumprod: Tensor
    device: torch.device
    dtype: torch.dtype
    fingerprint: str = ""
    """SHA-256 over the names, sizes and headers of the weights files: changes when the base changes."""
    zero_blank: bool = False
    """Whether the base learnt zeros as its empty prompt, so that text without a prompt is zeros."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's tokenizer."""
        return self.tokenizers[0]

    @property
    def merged(self) -> list[dict[str, Any]]:
        """The LoRAs that were merged into it: `{sha256, weight, text_encoder_weight}` of each, under `extra`."""
        return list(self.extra.get("merged", ()))

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

    def release_text_encoders(self) -> None:
        """Drops every text encoder from memory."""
        for part in [part for part in self.modules if part.startswith("text_encoder")]:
            self.release(part)

    def tokenize(self, prompts: list[str], chunks: int | None = 1) -> tuple[Tensor, list[int]]:
        """Token ids int64 [B, E, C, 77] and each prompt's length in tokens before truncation (start and end counted).

        E is the number of text encoders; C is what the longest prompt needs, but `chunks` at most (None: no limit).
        """
        tokens = tokenize(self.tokenizers, [[(prompt, 1.0)] for prompt in prompts], chunks)
        return tokens.ids, tokens.lengths

    def encode_text(self, ids: Tensor, clip_skip: int = 0, weights: Tensor | None = None) -> Text:
        """Text in the base's dtype for token ids [B, E, C, 77]; passes gradients on.

        `clip_skip` leaves out that many more last layers than the family does; `weights` float32 [B, E, C, 77] is the
        emphasis on each token. The pooled text is the first chunk's.
        """
        return self.family.encode_text(self, ids, clip_skip, weights)

    def take_text(self, states: Tensor, pooled: Tensor | None = None) -> Text:
        """Text that was encoded before, from its tensors."""
        return Text(states, pooled)

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raises: ConfigError where it leaves a text encoder no layer."""
        most = self.family.most_clip_skip(self)
        if not 0 <= clip_skip <= most:
            raise ConfigError(f"clip_skip = {clip_skip} is out of range for {self.name}; give 0 to {most}")

    def encode_pictures(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and std, float32 [B, 4, H/8, W/8], times the scaling factor; x [B, 3, H, W] is in -1..1."""
        return self.family.encode_pictures(self, x)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Pictures float32 [B, 3, H, W] in -1..1 for scaled latents z [B, 4, H/8, W/8]."""
        return self.family.decode_latents(self, z)

    def predict(self, x_t: Tensor, t: Tensor, text: Text, sizes: Tensor | None = None) -> Tensor:
        """The UNet's output (noise or velocity), in shape and dtype as x_t [B, 4, H/8, W/8]; t int64 [B].

        `sizes` float32 [B, 6], in px: the original picture's height and width, the top and left of the crop, the height
        and width of what was aimed at. Only SDXL is told them; None is a whole picture of x_t's own size.
        """
        return self.family.predict(self, x_t, t, text, sizes)


class Family(Protocol):
    """One kind of Stable Diffusion; a new one is a new file and a row in `families.FAMILIES`."""

    @property
    def name(self) -> str: ...

    def load(self, source: Path, name: str, device: torch.device, dtype: torch.dtype) -> Base: ...

    def encode_text(self, base: Base, ids: Tensor, clip_skip: int = 0, weights: Tensor | None = None) -> Text: ...

    def most_clip_skip(self, base: Base) -> int: ...

    def encode_pictures(self, base: Base, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode_latents(self, base: Base, z: Tensor) -> Tensor: ...

    def predict(self, base: Base, x_t: Tensor, t: Tensor, text: Text, sizes: Tensor | None = None) -> Tensor: ...

    def default_targets(self, text_encoder: bool) -> dict[str, tuple[str, ...]]:
        """Module-name endings to adapt, by part: `{"unet": ("to_q", "to_k", "to_v", "to_out.0")}`."""
        ...


def load_base(
    name: str = "mini",
    *,
    device: str = "auto",
    precision: str = "fp32",
    prediction: Literal["auto", "epsilon", "v"] = "auto",
    zero_snr: bool | None = None,
) -> Base:
    """Loads a base by name: `mini`, a diffusers folder, a single-file checkpoint, or a hub id.

    `prediction` and `zero_snr` (zero terminal SNR) go before what the base says of itself.

    Raises: BaseModelError where it does not exist, is incomplete or is no supported Stable Diffusion.
    """
    from .families import FAMILIES
    from .folder import name_family
    from .schedule import with_schedule
    from .single_file import load_single_file
    from .source import resolve_source

    if precision not in _DTYPES:
        raise BaseModelError(f"precision {precision!r} is not known; use fp32, bf16 or fp16")
    kind = None if prediction == "auto" else prediction
    source, public_name, family = resolve_source(name)
    if source.is_file():
        return load_single_file(source, public_name, pick_device(device), _DTYPES[precision], kind, zero_snr)
    family = family or FAMILIES[name_family(source)]
    base = family.load(source, public_name, pick_device(device), _DTYPES[precision])
    return with_schedule(base, kind, zero_snr)


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

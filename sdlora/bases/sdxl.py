"""Stable Diffusion XL: two text encoders, pooled text, and the size and crop of each picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseModelError
from .family import Base
from .sd import StableDiffusion
from .text import Text


@dataclass(frozen=True)
class StableDiffusionXL(StableDiffusion):
    """The family of SDXL and its descendants.

    Source: Podell et al. 2023, SDXL, sections 2.1 and 2.2.
    """

    text_parts: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    spare_layers: int = 1
    upcast_vae: bool = True
    zero_blank: bool = True

    def read_layer(self, encoder: nn.Module, ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """The layer before the last, or `clip_skip` layers further back, without the final norm.

        The second encoder also gives the pooled text [B, P], projected.
        """
        output: Any = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2 - clip_skip], getattr(output, "text_embeds", None)

    def check_unet(self, source: Path, modules: dict[str, Any]) -> None:
        super().check_unet(source, modules)
        unet = modules["unet"].config
        if unet.addition_embed_type != "text_time":
            raise BaseModelError(f"{source}: its UNet is told no sizes, so it is no SDXL's; use another base")
        width = int(modules["text_encoder_2"].config.projection_dim) + 6 * unet.addition_time_embed_dim
        read = unet.projection_class_embeddings_input_dim
        if read != width:
            raise BaseModelError(
                f"{source}: its UNet reads {read} numbers of pooled text and sizes where there are {width}; "
                "use parts that belong together"
            )

    def conditions(self, base: Base, x_t: Tensor, text: Text, sizes: Tensor | None) -> dict[str, Tensor] | None:
        """The pooled text and the sizes; without sizes, those of a whole picture of x_t's own size."""
        if text.pooled is None:
            raise ValueError("SDXL needs the pooled text; encode the prompts with the same base")
        if sizes is None:
            height_px, width_px = (side * base.latent_factor for side in x_t.shape[-2:])
            sizes = x_t.new_tensor([height_px, width_px, 0, 0, height_px, width_px], dtype=torch.float32)
            sizes = sizes.expand(len(x_t), 6)
        # float32 whatever the base's dtype: bfloat16 has no 1023
        time_ids = sizes.to(x_t.device, torch.float32)
        return {"text_embeds": text.pooled.to(base.dtype), "time_ids": time_ids}


sdxl = StableDiffusionXL("sdxl")

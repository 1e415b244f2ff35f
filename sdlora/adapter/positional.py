"""Names by position, of the first LoRA files for Stable Diffusion: `unet:17:down`, `text_encoder:3:up`.

A number counts the layers in the order in which that trainer met them; there is no alpha, and the scale is 1.
Source: cloneofsimo/lora, `lora_diffusion/lora.py`, the order of `_find_modules`.
"""

from __future__ import annotations

import functools
import re

_KEY = re.compile(r"(unet|text_encoder):(0|[1-9]\d{0,4}):(up|down)")
_IN_BLOCK = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
)  # fmt: skip
_IN_TEXT_LAYER = ("k_proj", "v_proj", "q_proj", "out_proj")
TEXT_LAYERS = 12


@functools.cache
def list_paths() -> dict[str, tuple[str, ...]]:
    """Canonical paths by part, in the order of the numbers: 144 of the UNet, 48 of the text encoder."""
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)]
    blocks += ["mid_block.attentions.0"]
    unet = [f"unet.{block}.transformer_blocks.0.{name}" for block in blocks for name in _IN_BLOCK]
    text = [
        f"text_encoder.text_model.encoder.layers.{i}.self_attn.{name}"
        for i in range(TEXT_LAYERS)
        for name in _IN_TEXT_LAYER
    ]
    return {"unet": tuple(unet), "text_encoder": tuple(text)}


def read_positional(key: str) -> tuple[str, str] | None:
    """The canonical path and the role (`up`, `down`) of such a key; None of any other, or of a number too high."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    part, number, role = found.groups()
    paths = list_paths()[part]
    return (paths[int(number)], role) if int(number) < len(paths) else None

"""Random LoRAs for the tiny base."""

from __future__ import annotations

import hashlib

import torch

from sdlora.adapter.delta import Adapter, Card, LowRank
from sdlora.bases.family import Base

UNET = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


def random_adapter(
    base: Base, seed: int, *, rank: int = 4, alpha: float | None = None, size: float = 0.3, text: bool = False
) -> Adapter:
    """A LoRA with both factors random, on every attention projection; `text` adds the text encoder's."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for part, endings in {"unet": UNET, **({"text_encoder": TEXT} if text else {})}.items():
        for name, module in base.modules[part].named_modules():
            if name.endswith(endings):
                out, into = module.weight.shape
                path = f"text_encoder.text_model.{name}" if part == "text_encoder" else f"unet.{name}"
                down = torch.randn(rank, into, generator=generator) * size / into**0.5
                up = torch.randn(out, rank, generator=generator)
                deltas[path] = LowRank(down, up, rank if alpha is None else alpha)
    return Adapter(deltas, Card(family=base.family.name, base=base.name, trigger=f"word{seed}"))


def hash_base(base: Base) -> str:
    """SHA-256 over every byte of the base's parameters and buffers."""
    digest = hashlib.sha256()
    for part, module in sorted(base.modules.items()):
        for name, value in module.state_dict().items():
            digest.update(f"{part}.{name}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Random LoRAs for a base on the disk, and what lies in weights files, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sdlora.adapter.delta import Adapter, Card, Dora, LowRank
from sdlora.bases.stored import StoredBase, find_stored

ENDINGS = ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "k_proj", "v_proj", "fc1")


def make_lora(base: str | Path, seed: int, rank: int = 3, size: float = 0.3, dora: bool = False) -> Adapter:
    """A LoRA on attention, feed-forward, convolutions and text encoders of a base; every third is DoRA on request."""
    stored: StoredBase = find_stored(str(base))
    g = torch.Generator().manual_seed(seed)
    deltas: dict = {}
    for path, place in sorted(stored.places.items()):
        if path.endswith(ENDINGS):
            out, into, *kernel = place.shape
            down = torch.randn(rank, into, *kernel, generator=g) * size / into**0.5
            up = torch.randn(out, rank, *[1] * len(kernel), generator=g)
            deltas[path] = LowRank(down, up, alpha=1.5)
            if dora and len(deltas) % 3 == 0:
                deltas[path] = Dora(deltas[path], 0.5 + torch.rand(out, 1, *[1] * len(kernel), generator=g))
    return Adapter(deltas, Card(family=stored.family, base="tiny", trigger=f"word{seed}"))


def read_bytes(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """A safetensors file's header, and each tensor's bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    rows = json.loads(data[8:start])
    rows.pop("__metadata__", None)
    return data[:start], {
        key: data[start + row["data_offsets"][0] : start + row["data_offsets"][1]] for key, row in rows.items()
    }

"""Bases of the real architectures under random weights, for what hangs on no weight: names, memory, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sdlora.bases.architecture import fill_buffers, make_part, make_tokenizers, part_names, read_family


def make_parts(
    family: str, dtype: torch.dtype = torch.bfloat16, parts: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Every part of `sd1`, `sd2` or `sdxl` (or `parts` of them) at its full size, weights cut from one random row."""
    row = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # a prime, so that no two rows are alike
    made = {}
    for part in parts or part_names(family):
        module = make_part(family, part, read_family(family)[part])
        state = {name: _fill(name, empty, row, dtype) for name, empty in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        fill_buffers(module, torch.device("cpu"))
        made[part] = module.eval()
    return made


def _fill(name: str, empty: torch.Tensor, row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Norms are 1, biases 0, and what is left has the deviation that keeps the size of what goes through it."""
    if empty.dim() < 2:
        return torch.full(empty.shape, float(name.endswith("weight")), dtype=dtype)
    scaled = (row / math.sqrt(empty[0].numel())).to(dtype)
    times = -(-empty.numel() // len(row))
    return scaled.repeat(times)[: empty.numel()].reshape(empty.shape).clone()


def write_folder(parts: dict[str, nn.Module], family: str, place: Path) -> None:
    """The parts as a diffusers folder of the family."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    tokenizers = dict(zip(("tokenizer", "tokenizer_2"), make_tokenizers(family), strict=False))
    scheduler = DDIMScheduler.from_config(read_family(family)["scheduler"])
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=scheduler, add_watermarker=False)
    else:
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **tokenizers, scheduler=scheduler, **rest)
    pipeline.save_pretrained(place)

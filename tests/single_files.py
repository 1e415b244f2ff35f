"""Tiny Stable Diffusions with CLIP's own vocabulary, as parts, as diffusers folders and as single files."""

from __future__ import annotations

import copy
import functools
import json
import struct
from pathlib import Path

import torch
from torch import nn

from sdlora.bases.architecture import make_tokenizers
from sdlora.bases.checkpoint_writer import write_checkpoint
from tests.tiny import SCHEDULE, make_tiny_parts

FAMILIES = ("sd1", "sd2", "sdxl")


@functools.cache
def make_parts(family: str, seed: int = 0) -> dict[str, nn.Module]:
    """`tests.tiny`'s parts, whose text encoders know CLIP's 49,408 words; do not change them."""
    parts = make_tiny_parts(seed, family)
    for part in [p for p in parts if p.startswith("text_encoder")]:
        config = copy.deepcopy(parts[part].config)
        config.vocab_size, config.bos_token_id, config.eos_token_id = 49408, 49406, 49407
        config.pad_token_id = 0 if config.hidden_act == "gelu" else 49407
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts[part] = type(parts[part])(config)
    for module in parts.values():
        module.eval()
    return parts


def write_tiny_file(path: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> Path:
    """The parts as one checkpoint under `path`."""
    write_checkpoint(make_parts(family, seed), path, family, dtype, **options)
    return path


def make_pipeline(family: str, seed: int = 0, **schedule):
    """The same parts as diffusers' pipeline of the family."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = make_parts(family, seed)
    tokenizers = dict(zip(("tokenizer", "tokenizer_2"), make_tokenizers(family), strict=False))
    scheduler = DDIMScheduler(**(SCHEDULE | schedule))
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=scheduler, add_watermarker=False)
    return StableDiffusionPipeline(
        **parts,
        **tokenizers,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_header_only(path: Path, entries: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A file of F16 zeros with these keys and shapes; its data is a hole, so that it takes no room on the disk."""
    rows: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, shape in entries.items():
        count = 2
        for side in shape:
            count *= side
        rows[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(rows).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    return path

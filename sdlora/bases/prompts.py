"""Prompts made ready for the sampler: their emphasis read, cut into chunks, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .emphasis import parse_emphasis
from .family import Base
from .text import Text, count_chunks, tokenize


@dataclass(frozen=True)
class Wording:
    """Those of some prompts that need the same number of chunks, and the negative prompt in as many."""

    rows: list[int]
    """Their places among the prompts."""
    text: Text
    """[B, 77·C, D]."""
    negative: Text
    """[1, 77·C, D]."""


@torch.no_grad()
def encode_prompts(base: Base, prompts: Sequence[str], negative: str = "", clip_skip: int = 0) -> list[Wording]:
    """The prompts encoded, emphasis and all, in as many chunks as each needs; what one gives hangs on no other.

    A prompt and the negative are padded to the longer of the two. Where the base learnt zeros as its empty prompt, an
    empty negative is zeros.

    Raises: ConfigError where an emphasis is not finite or the clip skip leaves no layer.
    """
    base.check_clip_skip(clip_skip)
    parsed = {prompt: parse_emphasis(prompt) for prompt in (negative, *prompts)}
    lengths = tokenize(base.tokenizers, list(parsed.values()), None).lengths
    chunks = {prompt: count_chunks(length) for prompt, length in zip(parsed, lengths, strict=True)}
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(max(chunks[prompt], chunks[negative]), []).append(row)
    wordings = []
    for rows in groups.values():
        unique = sorted({negative, *(prompts[row] for row in rows)})
        tokens = tokenize(base.tokenizers, [parsed[prompt] for prompt in unique], None)
        weights = None if bool((tokens.weights == 1).all()) else tokens.weights
        text = base.encode_text(tokens.ids, clip_skip, weights)
        place = {prompt: i for i, prompt in enumerate(unique)}
        unguided = text[place[negative]]
        if base.zero_blank and not negative.strip():
            unguided = unguided.blank(torch.tensor([True]))
        wordings.append(Wording(rows, text[[place[prompts[row]] for row in rows]], unguided))
    return wordings

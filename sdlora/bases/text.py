"""Text as a base reads it: prompts cut into chunks of tokens, and the states that its text encoders make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .facts import CHUNK_TOKENS

Fragments = Sequence[tuple[str, float]]
"""A prompt as pieces of text with a weight each; a plain prompt is one piece of weight 1."""


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts, one a row."""

    states: Tensor
    """[B, N, D]; N is 77 for each chunk of the prompts, D the widths of the text encoders together."""
    pooled: Tensor | None = None
    """[B, P] of the first chunk, for families that use it."""

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Text:
        """Some of the rows; a single one stays a batch of one."""
        picked: Any = [rows] if isinstance(rows, int) else rows
        return Text(self.states[picked], None if self.pooled is None else self.pooled[picked])

    def to(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> Text:
        """The same on another device or in another dtype."""
        states, pooled = (
            None if x is None else x.to(device=device, dtype=dtype, non_blocking=non_blocking)
            for x in (self.states, self.pooled)
        )
        assert states is not None
        return Text(states, pooled)

    def expand(self, count: int) -> Text:
        """A single row `count` times, without copying it."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Text(self.states.expand(count, -1, -1), pooled)

    def blank(self, rows: Tensor) -> Text:
        """The same with zeros in the rows bool [B] that are True."""
        keep = ~rows.to(self.states.device)
        pooled = None if self.pooled is None else torch.where(keep[:, None], self.pooled, 0)
        return Text(torch.where(keep[:, None, None], self.states, 0), pooled)

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """All rows of several, in their order; they must have the same number of chunks."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Text(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Prompts as the text encoders take them: B prompts, E text encoders, C chunks of 75 tokens with start and end."""

    ids: Tensor
    """int64 [B, E, C, 77]; what is left of a chunk is filled with the tokenizer's padding token."""
    weights: Tensor
    """float32 [B, E, C, 77]: the emphasis on each token; 1 on start, end and padding."""
    lengths: list[int]
    """Each prompt's tokens before anything was cut off, with one start and one end."""


def tokenize(tokenizers: Sequence[Any], prompts: Sequence[Fragments], chunks: int | None = 1) -> Tokens:
    """Tokens of the prompts, all padded to the chunks that the longest needs.

    No prompt gets more than `chunks` chunks: its further tokens are cut off. None is as many as are needed.
    """
    words = [_read_words(tokenizer, prompts) for tokenizer in tokenizers]  # by encoder, by prompt
    longest = max((len(tokens) for rows in words for tokens in rows), default=0)
    count = count_chunks(longest + 2)
    count = count if chunks is None else min(count, chunks)
    ids, weights = [], []
    for tokenizer, rows in zip(tokenizers, words, strict=True):
        cut = [_cut(tokenizer, tokens, count) for tokens in rows]
        ids.append(torch.tensor([[[i for i, _ in chunk] for chunk in row] for row in cut], dtype=torch.int64))
        weights.append(torch.tensor([[[w for _, w in chunk] for chunk in row] for row in cut], dtype=torch.float32))
    lengths = [max(len(rows[b]) for rows in words) + 2 for b in range(len(prompts))]
    return Tokens(torch.stack(ids, 1), torch.stack(weights, 1), lengths)


def count_chunks(length: int) -> int:
    """Chunks that a prompt of `length` tokens, start and end counted, needs."""
    return max(1, -(-(length - 2) // CHUNK_TOKENS))


def _read_words(tokenizer: Any, prompts: Sequence[Fragments]) -> list[list[tuple[int, float]]]:
    texts = [text for prompt in prompts for text, _ in prompt]
    options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
    found = iter(tokenizer(texts, **options).input_ids if texts else [])
    return [[(token, weight) for _, weight in prompt for token in next(found)] for prompt in prompts]


def _cut(tokenizer: Any, tokens: list[tuple[int, float]], count: int) -> list[list[tuple[int, float]]]:
    start, end = (tokenizer.bos_token_id, 1.0), (tokenizer.eos_token_id, 1.0)
    pad = (end[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id, 1.0)
    parts = [tokens[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS] for i in range(count)]
    return [[start, *part, end, *[pad] * (CHUNK_TOKENS - len(part))] for part in parts]

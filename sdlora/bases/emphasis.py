"""Emphasis in prompts: `(word:1.2)`, `((word))` and `[word]`, as weights on the states of their tokens."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from ..errors import ConfigError

ROUND, SQUARE = 1.1, 1 / 1.1
"""What a pair of round or square brackets multiplies the weight of its inside by."""
_PIECE = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)|[()\[\]]", re.ASCII)
_PAIRS = {")": "(", "]": "["}


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    r"""The prompt's text in pieces with a weight each; a prompt without emphasis is one piece of weight 1.

    `(x)` multiplies by 1.1, `(x:W)` by W, `[x]` divides by 1.1, nested ones all count; `\(` and the like are the
    character itself. A bracket without its other half is an ordinary character, as is a backslash before any other.

    Raises: ConfigError where a weight is not finite.
    Source: AUTOMATIC1111 stable-diffusion-webui, wiki, Attention/emphasis.
    """
    pieces = _split(prompt)
    factors = [1.0] * len(pieces)
    silent: set[int] = set()
    open_: list[int] = []
    for i, (text, special, weight) in enumerate(pieces):
        if not special:
            continue
        if text in ("(", "["):
            open_.append(i)
            continue
        wanted = "(" if weight is not None else _PAIRS[text]
        starts = [at for at, place in enumerate(open_) if pieces[place][0] == wanted]
        if not starts:
            continue
        start = open_[starts[-1]]
        del open_[starts[-1]]  # only this one: round and square brackets may cross
        silent |= {start, i}
        for inside in range(start + 1, i):
            factors[inside] *= weight if weight is not None else ROUND if wanted == "(" else SQUARE
    found: list[tuple[str, float]] = []
    for i, (text, _, _) in enumerate(pieces):
        if i in silent or not text:
            continue
        if not math.isfinite(factors[i]):
            raise ConfigError(f"the weight of {text.strip()[:40]!r} in the prompt is not finite; use one such as 1.2")
        if found and found[-1][1] == factors[i]:
            found[-1] = (found[-1][0] + text, factors[i])
        else:
            found.append((text, factors[i]))
    return found or [("", 1.0)]


def _split(prompt: str) -> list[tuple[str, bool, float | None]]:
    """(text, whether it may be a bracket, the weight of a `:W)`), piece by piece."""
    pieces: list[tuple[str, bool, float | None]] = []
    at = 0
    for match in _PIECE.finditer(prompt):
        pieces.append((prompt[at : match.start()], False, None))
        text, number = match.group(), match.group(1)
        if text.startswith("\\"):
            pieces.append((text[1], False, None))
        else:
            pieces.append((text, True, None if number is None else float(number)))
        at = match.end()
    pieces.append((prompt[at:], False, None))
    return pieces


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """States [B, C, 77, D] times their tokens' weights float32 [B, C, 77], each chunk's mean kept.

    Chunks whose weights are all 1 keep every bit.
    Source: AUTOMATIC1111 stable-diffusion-webui, its emphasis "Original".
    """
    weighted = states * weights.to(states.dtype)[..., None]
    before, after = (x.float().mean((-2, -1), keepdim=True) for x in (states, weighted))
    scale = torch.where(after == 0, 1.0, before / after)
    plain = (weights == 1).all(-1)[..., None, None]
    return torch.where(plain, states, (weighted * scale.to(states.dtype)))

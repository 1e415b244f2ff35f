"""Captions of a drawing, and a CLIP tokenizer whose vocabulary is learnt from them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from .looks import COLOURS

VOCABULARY = 4096
LOOK_WORDS = (
    "greyscale",
    "line drawing",
    "bold line drawing",
    "chalk drawing",
    "thick outline",
    "silhouette",
    "posterised",
    "black and white stamp",
    "woodcut",
    "stencil",
    "pen drawing",
    "inverted colours",
    "tint",
    "odd colours",
    "strange colours",
    "swapped colours",
    "ground",
    "striped",
    "dotted",
    "checked",
    "soft shading",
    "pixel art",
    "noto style",
    "twemoji style",
    "emojione style",
    "fxemoji style",
    "ink style",
    "clay style",
    "flat style",
    "style",
    "a picture of a",
    "a picture of an",
    "a drawing of a",
    "an",
    "the",
    "and",
    "with",
    "mio",
)
TEMPLATES = ("{}", "{}", "a {}", "a picture of a {}", "a drawing of a {}")


def caption(label: str, words: list[str], rng: np.random.Generator) -> str:
    """One of the ways to say the label, and the words for its look: "a picture of a red apple, noto style"."""
    template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    if label[0] in "aeiou":
        template = template.replace("a {}", "an {}")
    return ", ".join([template.format(label), *words])


def _byte_alphabet() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in keep}
    for extra, byte in enumerate(b for b in range(256) if b not in table):
        table[byte] = chr(256 + extra)
    return [table[b] for b in sorted(table)]


def learn_vocabulary(labels: list[str], tags: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary in CLIP's form (`</w>` ends a word): token -> id, and the merges in order."""
    words: dict[tuple[str, ...], int] = {}

    def count(text: str, times: int) -> None:
        for word in text.lower().replace(",", " ").split():
            symbols = (*word[:-1], word[-1] + "</w>")
            words[symbols] = words.get(symbols, 0) + times

    for label in labels:
        count(label, 20)
    for text in (*LOOK_WORDS, *COLOURS):
        count(text, 40)
    for tag in tags:
        count(tag, 1)
    alphabet = _byte_alphabet()
    vocab = {s: i for i, s in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    merges: list[tuple[str, str]] = []
    while len(vocab) < VOCABULARY - 2:
        pairs: dict[tuple[str, str], int] = {}
        for symbols, n in words.items():
            for pair in pairwise(symbols):
                pairs[pair] = pairs.get(pair, 0) + n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))
        words = {_merge(symbols, best): n for symbols, n in words.items()}
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return vocab, merges


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for s in symbols:
        if out and (out[-1], s) == pair:
            out[-1] += s
        else:
            out.append(s)
    return tuple(out)


def emoji_tags(art_folder: Path) -> list[str]:
    """Emojibase's search words: other names of the same things, so that their words are known tokens too."""
    path = Path(art_folder) / "node_modules" / "emojibase-data" / "en" / "data.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [tag for row in rows for tag in row.get("tags", []) if tag.isascii()]

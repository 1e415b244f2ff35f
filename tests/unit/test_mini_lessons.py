"""What the built-in base is taught: a caption leaves nothing open but words that mean nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from sdlora.bases.mini.build.glyphs import GLYPHS
from sdlora.bases.mini.build.unet import (
    EMPTY_CAPTION_SHARE,
    PLAIN_SHARE,
    SET_WEIGHTS,
    STRANGE_WORD_SHARE,
    UNSAID_SET,
    Pool,
    _draw_batch,
    strange_words,
)

ARTS = tuple(SET_WEIGHTS)
LABELS = ("fox", "red apple", "owl")
WORDS = ["", *GLYPHS, "greyscale", "blue tint"]
STRANGE = ["zorb", "quib", "mip"]


@pytest.fixture
def pool() -> Pool:
    """Three things in four sets and six variants; a latent's one value says which it is."""
    rows = [(label, art) for label in LABELS for art in ARTS]
    values = torch.arange(len(rows) * len(WORDS), dtype=torch.float16).view(len(rows), len(WORDS), 1, 1, 1)
    return Pool(values.expand(-1, -1, 4, 2, 2), [r[0] for r in rows], [r[1] for r in rows], [WORDS] * len(rows))


def draw(pool: Pool, batches: int = 60) -> list[tuple[int, str]]:
    """Pairs of which latent was drawn and its caption."""
    out: list[tuple[int, str]] = []
    for step in range(batches):
        x0, prompts = _draw_batch(pool, np.arange(len(pool.labels)), step, 32, 0, STRANGE)
        out += zip(x0[:, 0, 0, 0].int().tolist(), prompts, strict=True)
    return out


def meant(pool: Pool, caption: str) -> int:
    """The latent that a caption means, from its words alone."""
    words = [w for w in caption.replace(",", " ").split() if w not in (*STRANGE, "a", "an", "picture", "of")]
    text = " ".join(words)
    arts = [art for art in ARTS if f"{art} style" in text]
    (label,) = (label for label in LABELS if label in text)
    looks = [i for i, word in enumerate(WORDS) if word and word in text]
    (row,) = (
        i
        for i, pair in enumerate(zip(pool.labels, pool.arts, strict=True))
        if pair == (label, (arts or [UNSAID_SET])[0])
    )
    return row * len(WORDS) + (looks or [0])[0]


def test_a_caption_says_which_drawing_it_is(pool: Pool) -> None:
    for drawn, caption in draw(pool):
        if caption:
            assert meant(pool, caption) == drawn, caption


def test_shares_of_a_batch_are_what_the_recipe_says(pool: Pool) -> None:
    pairs = draw(pool)
    n = len(pairs)
    plain = sum(drawn % len(WORDS) == 0 for drawn, _ in pairs) / n
    assert plain == pytest.approx(PLAIN_SHARE, abs=0.04)
    assert sum(not caption for _, caption in pairs) / n == pytest.approx(EMPTY_CAPTION_SHARE, abs=0.02)
    strange = sum(any(word in caption for word in STRANGE) for _, caption in pairs) / n
    assert strange == pytest.approx(STRANGE_WORD_SHARE * (1 - EMPTY_CAPTION_SHARE), abs=0.04)
    arts: Counter[str] = Counter(pool.arts[drawn // len(WORDS)] for drawn, _ in pairs)
    for art, weight in SET_WEIGHTS.items():
        assert arts[art] / n == pytest.approx(weight / sum(SET_WEIGHTS.values()), abs=0.04)
    glyphs = sum(1 <= drawn % len(WORDS) <= len(GLYPHS) for drawn, _ in pairs) / n
    assert glyphs == pytest.approx((1 - PLAIN_SHARE) * 9 / 11, abs=0.04)


def test_a_step_draws_the_same_batch_again_and_another_step_another(pool: Pool) -> None:
    rows = np.arange(len(pool.labels))
    first, again, other = (_draw_batch(pool, rows, step, 16, 0, STRANGE) for step in (3, 3, 4))
    assert (first[0] == again[0]).all()
    assert first[1] == again[1]
    assert first[1] != other[1]


def test_strange_words_are_in_no_caption(pool: Pool) -> None:
    class Vocabulary:
        def get_vocab(self) -> dict[str, int]:
            words = ("fox", "apple", "noto", "woodcut", "tint", "zorb", "ink", "mi", "x1y")
            return {f"{word}</w>": i for i, word in enumerate(words)} | {"zor": 99}

    vocabulary: Any = Vocabulary()
    assert strange_words(vocabulary, pool) == ["ink", "zorb"]

"""What the judge learns from: black-and-white drawings keep their thing, and their style is left untold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdlora.bases.mini.build.judge import GLYPH_SHARE, NOTHINGS, Lesson, _batch
from sdlora.bases.mini.build.judge_glyphs import faces_in_order
from sdlora.bases.mini.build.pictures import CAT_LABEL, Pictures

BLUE = (40, 60, 220)


@pytest.fixture
def lesson() -> Lesson:
    """Four blue squares, of which the first two have a black glyph too."""
    pixels = np.full((1, 4, 64, 64, 3), 255, np.uint8)
    pixels[:, :, 16:48, 16:48] = BLUE
    glyphs = np.full((3, 2, 64, 64, 3), 255, np.uint8)
    glyphs[:, :, 16:48, 16:48] = 0
    rows = torch.arange(4)
    return Lesson(pixels, rows, rows % 2, list("abcd"), ["x", "y"], np.zeros(4, bool), glyphs, np.array([0, 1, -1, -1]))


def test_glyphs_take_their_share_of_the_pictures_that_have_them(lesson: Lesson) -> None:
    black = told = shown = with_glyph = 0
    for step in range(40):
        x, labels, styles = _batch(lesson, np.arange(4), step, 32, 0)
        drawn = torch.arange(32) >= NOTHINGS
        middle = x[:, :, 28:36, 28:36].mean((2, 3))  # [B, 3]
        dark = drawn & (middle.amax(1) < 0.15) & (labels < 2)
        with_glyph += int((drawn & (labels < 2)).sum())
        black += int(dark.sum())
        shown += int((dark & (labels >= 0)).sum())
        told += int((dark & (styles >= 0)).sum())
    assert black / with_glyph == pytest.approx(GLYPH_SHARE, abs=0.09)
    assert shown == black  # the thing is told
    assert told <= 0.25 * black  # and the style is not, but where a look made a blue square black


def test_pictures_without_glyphs_are_shown_as_drawn(lesson: Lesson) -> None:
    plain = Lesson(*(getattr(lesson, f) for f in list(Lesson.__dataclass_fields__)[:-1]), np.full(4, -1))
    blue = 0
    for step in range(20):
        x, labels, _ = _batch(plain, np.arange(4), step, 32, 0)
        middle = x[NOTHINGS:, :, 28:36, 28:36].mean((2, 3))
        blue += int((middle[:, 2] > middle[:, 0] + 0.2).sum())
        assert (labels[NOTHINGS:] >= 0).all()
    assert blue / (20 * (32 - NOTHINGS)) > 0.5


def test_the_cats_faces_are_named_in_the_order_they_are_drawn_in() -> None:
    labels = ["fox", CAT_LABEL, "owl", *[CAT_LABEL] * 9]
    pictures = Pictures(np.zeros((12, 1, 1, 3), np.uint8), labels, ["noto"] * 12, [3] * 12)
    faces = faces_in_order(pictures)
    assert list(faces) == [1, *range(3, 12)]
    assert list(faces.values())[:3] == ["cat face", "grinning cat", "grinning cat with smiling eyes"]

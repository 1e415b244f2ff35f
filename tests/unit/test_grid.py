"""Sheets show each picture where its labels say, and every label in ink."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdlora.errors import ConfigError
from sdlora.generating.generate import generate
from sdlora.generating.grid import GAP_PX, labelled_sheet, weight_grid, wrap_text
from tests.stacks import random_adapter
from tests.tiny import make_tiny_base


def plain(colour: tuple[int, int, int], size=(40, 40)) -> Image.Image:
    return Image.new("RGB", size, colour)


def where(sheet: Image.Image, picture: Image.Image) -> tuple[int, int]:
    """Left and top of the only place where the sheet shows the picture."""
    big, small = np.asarray(sheet), np.asarray(picture)
    h, w = small.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(big, (h, w, 3))[:, :, 0]
    found = np.argwhere((windows == small).all(axis=(2, 3, 4)))
    assert len(found) == 1
    return int(found[0][1]), int(found[0][0])


def test_pictures_stand_in_rows_and_columns():
    colours = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]]
    sheet = labelled_sheet([[plain(c) for c in row] for row in colours], ["x", "y", "z"], ["p", "q"], "Title")
    places = [[where(sheet, plain(c)) for c in row] for row in colours]
    for row in places:
        assert len({y for _, y in row}) == 1
        assert row[1][0] - row[0][0] == row[2][0] - row[1][0] >= 40 + GAP_PX
    for above, below in zip(*places, strict=True):
        assert above[0] == below[0]
        assert below[1] - above[1] >= 40 + GAP_PX


def test_labels_and_title_are_drawn_and_nothing_is_cut():
    picture = plain((255, 255, 255))

    def ink(*labels) -> np.ndarray:
        return np.asarray(labelled_sheet([[picture] * 2], *labels).convert("L")) < 128

    empty = ink(["", ""], [""], None)
    assert not empty.any()
    for labels in (["ab", ""], [""], None), (["", ""], ["ab"], None), (["", ""], [""], "ab"):
        assert ink(*labels).sum() > 20
    long = ink(["a very long label of many words", "unbreakableunbreakable"], ["another long one here"], "a title " * 9)
    for edge in (long[0], long[-1], long[:, 0], long[:, -1]):
        assert not edge.any()


def test_pictures_of_unequal_size_are_all_whole():
    red, blue = plain((255, 0, 0), (30, 50)), plain((0, 0, 255), (60, 20))
    pixels = np.asarray(labelled_sheet([[red, blue]], ["", ""], [""]))
    assert (pixels == (255, 0, 0)).all(-1).sum() == 30 * 50
    assert (pixels == (0, 0, 255)).all(-1).sum() == 60 * 20


def test_text_is_wrapped_at_spaces():
    assert wrap_text("aa bb cc dddddd e", 5, len) == "aa bb\ncc\ndddddd\ne"


def test_missing_pictures_and_labels_are_refused():
    for rows, columns, side in ([], [], []), ([[]], [], [""]), ([[plain((0, 0, 0))]], ["", ""], [""]):
        with pytest.raises(ConfigError):
            labelled_sheet(rows, columns, side)


def test_weight_grid_shows_the_pictures_of_its_weights():
    base = make_tiny_base()
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    seen = []
    sheet = weight_grid(
        base,
        "a cat",
        one,
        two,
        weights=[0, 1],
        weights_down=[0.5, -1],
        seed=4,
        steps=2,
        progress=lambda *n: seen.append(n),
    )
    places = {}
    for first in (0, 1):
        for second in (0.5, -1):
            picture = generate(base, "a cat", [(one, first), (two, second)], seed=4, steps=2)[0]
            places[first, second] = where(sheet, picture)
    assert places[0, 0.5][0] == places[0, -1][0] < places[1, 0.5][0] == places[1, -1][0]
    assert places[0, 0.5][1] == places[1, 0.5][1] < places[0, -1][1] == places[1, -1][1]
    assert seen[-1] == (8, 8)
    with pytest.raises(ConfigError, match="list of weights is empty"):
        weight_grid(base, "a cat", one, two, weights=[])

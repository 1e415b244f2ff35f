"""Black-and-white glyphs: what is filled, what is a line, and that nothing moves."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdlora.bases.mini.build.glyphs import FINE, GLYPHS, RIM_PX, draw_glyph

SIDE_PX = 128


def draw_icon(*boxes: tuple[tuple[int, int, int, int], tuple[int, int, int]]) -> Image.Image:
    """A transparent fine rendering with filled boxes, given in the finished picture's pixels."""
    icon = Image.new("RGBA", (SIDE_PX * FINE, SIDE_PX * FINE), (255, 255, 255, 0))
    for box, colour in boxes:
        ImageDraw.Draw(icon).rectangle(tuple(FINE * v for v in box), fill=(*colour, 255))
    return icon


def grey(glyph: Image.Image) -> np.ndarray:
    return np.asarray(glyph)[..., 0].astype(int)


@pytest.fixture
def two_parts() -> Image.Image:
    """A dark half on the left, a light one on the right, side by side."""
    return draw_icon(((20, 30, 64, 98), (90, 30, 20)), ((64, 30, 108, 98), (250, 240, 180)))


def test_woodcut_fills_the_dark_part_and_rims_the_light_one(two_parts: Image.Image) -> None:
    page = grey(draw_glyph(two_parts, "woodcut"))
    assert page[50:80, 30:55].max() == 0
    assert page[50:80, 80:98].min() == 255
    assert page[64, 106] == 0  # the light part's rim, inside its own edge
    assert page[:, 112:].min() == 255


def test_stencil_fills_both_parts_and_parts_them_by_a_white_line(two_parts: Image.Image) -> None:
    page = grey(draw_glyph(two_parts, "stencil"))
    assert page[50:80, 30:58].max() == 0
    assert page[50:80, 72:98].max() == 0
    assert page[64, 60:69].max() > 200


def test_pen_drawing_is_lines_alone(two_parts: Image.Image) -> None:
    page = grey(draw_glyph(two_parts, "pen drawing"))
    assert page[50:80, 34:54].min() == 255
    assert page[50:80, 76:96].min() == 255
    assert page[64, 60:69].min() < 60  # where the parts meet
    assert page[64, 22] == 0


@pytest.mark.parametrize("name", GLYPHS)
def test_rim_lies_inside_the_shape_and_is_as_wide_as_said(name: str) -> None:
    icon = draw_icon(((40, 40, 88, 88), (250, 240, 180)))
    page = grey(draw_glyph(icon, name))
    rows, columns = np.nonzero(page < 128)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 87, 40, 87)
    if name != "stencil":
        run = int((page[64, :64] < 128).sum())
        assert abs(run - RIM_PX) <= 1


def test_woodcut_of_two_dark_parts_keeps_them_apart() -> None:
    icon = draw_icon(((20, 30, 64, 98), (120, 20, 20)), ((64, 30, 108, 98), (20, 20, 120)))
    page = grey(draw_glyph(icon, "woodcut"))
    assert page[64, 60:69].max() > 200
    assert page[50:80, 30:55].max() == 0


@pytest.mark.parametrize("name", GLYPHS)
def test_glyphs_are_black_and_white_and_the_same_again(name: str, two_parts: Image.Image) -> None:
    page = np.asarray(draw_glyph(two_parts, name))
    assert page.shape == (SIDE_PX, SIDE_PX, 3)
    assert (page[..., 0] == page[..., 1]).all()
    assert ((page == 0) | (page == 255)).mean() > 0.9
    assert (page == np.asarray(draw_glyph(two_parts, name))).all()

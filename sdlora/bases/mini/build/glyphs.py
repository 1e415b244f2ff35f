"""Black-and-white drawings made from fine renderings: filled where the drawing is dark, lines where its parts meet.

They are what lets `mini` draw a thing without colour and still be read: at 128 px a threshold of the finished picture
loses the thin parts, so shapes and lines are found on a rendering four times as fine, and made smaller last.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps

from .art import on_white

FINE = 4
"""How many times as fine, along each side, the rendering is that a glyph is made from."""
GLYPHS = ("woodcut", "stencil", "pen drawing")
EDGE = 40  # of 255: parts that differ by less in every channel are one part
RIM_PX = 5.0  # at 128 px; a rim of 3 px is lost in the latents, whose cells are 8 px
LINE_PX = 3.0  # where parts meet
EDGE_CLEAR_PX = 2.75  # lines nearer to the outer edge are left to the rim
DARK_CLEAR_PX = 3.5  # lines nearer to a black part are left to its own edge


def _grown(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """The mask with all that is at most `radius_px`, rounded, along either side away from it, bool [H, W]."""
    r = max(1, round(radius_px))
    x = torch.from_numpy(mask)[None, None].float()
    x = F.max_pool2d(F.max_pool2d(x, (2 * r + 1, 1), 1, (r, 0)), (1, 2 * r + 1), 1, (0, r))
    return x[0, 0].numpy() > 0


def _shrunk(mask: np.ndarray, radius_px: float) -> np.ndarray:
    return ~_grown(~mask, radius_px)


def _parts_meet(fine: Image.Image) -> np.ndarray:
    """Where neighbouring parts differ in some channel, one to two pixels wide, bool [H, W]."""
    soft = fine.filter(ImageFilter.MedianFilter(5))
    grown = np.asarray(soft.filter(ImageFilter.MaxFilter(3)), np.int16)
    shrunk = np.asarray(soft.filter(ImageFilter.MinFilter(3)), np.int16)
    return (grown - shrunk).max(-1) > EDGE


def _threshold(luma: np.ndarray, shape: np.ndarray) -> float:
    """The luma below which a woodcut is filled: between the shape's own two tones (Otsu)."""
    values = luma[shape]
    if not len(values):
        return 0.0
    counts, edges = np.histogram(values, 64, (0, 255))
    weight = np.cumsum(counts)
    mass = np.cumsum(counts * edges[:-1])
    rest = weight[-1] - weight
    with np.errstate(divide="ignore", invalid="ignore"):
        between = weight * rest * (mass / weight - (mass[-1] - mass) / rest) ** 2
    best = edges[int(np.nanargmax(between)) + 1] if np.isfinite(between).any() else 128.0
    return float(np.clip(best, 90, 200))


def draw_glyph(icon: Image.Image, name: str) -> Image.Image:
    """A glyph, RGB, from a transparent rendering (RGBA) of FINE times its sides.

    woodcut: dark parts black, light parts white with a black rim; stencil: the whole shape black, parts kept apart
    by white lines; pen drawing: black lines alone.
    """
    shape, fine = np.asarray(icon.getchannel("A")) > 127, on_white(icon)
    half_line = FINE * LINE_PX / 2
    rim = shape & ~_shrunk(shape, FINE * RIM_PX)
    inner = _parts_meet(fine) & _shrunk(shape, FINE * EDGE_CLEAR_PX)
    luma = np.asarray(ImageOps.grayscale(fine), np.float32)
    if name == "stencil":
        ink = shape & ~_grown(inner, half_line)
    elif name == "pen drawing":
        ink = rim | _grown(inner, half_line)
    else:
        dark = shape & (luma < _threshold(luma, shape))
        cut = _grown(inner & _shrunk(dark, FINE * EDGE_CLEAR_PX), half_line)
        ink = (dark & ~cut) | rim | _grown(inner & ~_grown(dark, FINE * DARK_CLEAR_PX), half_line)
    page = Image.fromarray(np.where(ink & _grown(shape, 1), 0, 255).astype(np.uint8))
    small = page.resize((fine.width // FINE, fine.height // FINE), Image.Resampling.BOX)
    return small.convert("RGB")

"""Procedural looks: the same drawing greyscale, as an outline, on a striped ground …, each with words for it.

They let content and look vary apart in the base's training; none of them is a Fluent set.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 61, 52),
    "orange": (246, 150, 50),
    "yellow": (250, 214, 70),
    "green": (72, 168, 84),
    "blue": (62, 120, 214),
    "purple": (140, 86, 190),
    "pink": (246, 150, 190),
    "brown": (128, 86, 58),
    "grey": (140, 140, 140),
    "black": (20, 20, 20),
}

Rng = np.random.Generator
Look = Callable[[Image.Image, Rng], tuple[Image.Image, str]]


def _colour(rng: Rng) -> tuple[str, tuple[int, int, int]]:
    name = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return name, COLOURS[name]


def shape_of(picture: Image.Image) -> Image.Image:
    """The drawing's filled shape as a mask (L): everything that white paper does not reach from the border."""
    ink = picture.convert("L").point(lambda v: 255 if v < 246 else 0)
    saturation = picture.convert("HSV").getchannel(1).point(lambda v: 255 if v > 14 else 0)
    solid = ImageChops.lighter(ink, saturation)
    ground = ImageOps.expand(solid, 1, 0)
    flood = ground.copy()
    ImageDraw.floodfill(flood, (0, 0), 128)
    inside = flood.point(lambda v: 0 if v == 128 else 255)
    return inside.crop((1, 1, 1 + picture.width, 1 + picture.height))


def _edges(picture: Image.Image, width: int) -> Image.Image:
    """Dark where neighbouring pixels differ in any colour channel: L, lines 255 on 0."""
    soft = picture.filter(ImageFilter.GaussianBlur(0.8))
    grown, shrunk = soft.filter(ImageFilter.MaxFilter(3)), soft.filter(ImageFilter.MinFilter(3))
    channels = ImageChops.difference(grown, shrunk).split()
    edge = ImageChops.lighter(ImageChops.lighter(channels[0], channels[1]), channels[2])
    edge = edge.point(lambda v: 255 if v > 34 else 0)
    if width > 1:
        edge = edge.filter(ImageFilter.MaxFilter(width))
    return edge.filter(ImageFilter.GaussianBlur(0.5))


def greyscale(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    return ImageOps.grayscale(p).convert("RGB"), "greyscale"


def line_drawing(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    return ImageOps.invert(_edges(p, 1)).convert("RGB"), "line drawing"


def bold_lines(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    return ImageOps.invert(_edges(p, 3)).convert("RGB"), "bold line drawing"


def coloured_lines(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    name, rgb = _colour(rng)
    out = Image.new("RGB", p.size, "white")
    out.paste(rgb, mask=_edges(p, 3))
    return out, f"{name} line drawing"


def chalk(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    return _edges(p, 1).convert("RGB"), "chalk drawing"


def thick_outline(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    mask = shape_of(p)
    rim = mask.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(0.8))
    out = Image.new("RGB", p.size, "white")
    out.paste((0, 0, 0), mask=rim)
    out.paste(p, mask=mask)
    return out, "thick outline"


def silhouette(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    name, rgb = _colour(rng) if rng.random() < 0.5 else ("black", (0, 0, 0))
    out = Image.new("RGB", p.size, "white")
    out.paste(rgb, mask=shape_of(p).filter(ImageFilter.GaussianBlur(0.6)))
    return out, f"{name} silhouette"


def posterised(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    a = np.asarray(p).astype(np.float32)
    return Image.fromarray((np.round(a / 255 * 2) / 2 * 255).astype(np.uint8)), "posterised"


def black_and_white(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    grey = ImageOps.grayscale(p).filter(ImageFilter.GaussianBlur(0.7))
    return grey.point(lambda v: 255 if v > 150 else 0).convert("RGB"), "black and white stamp"


def inverted(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    return ImageOps.invert(p), "inverted colours"


def tinted(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    name, rgb = _colour(rng)
    return ImageOps.colorize(ImageOps.grayscale(p), "black", "white", mid=rgb), f"{name} tint"


def swapped(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    r, g, b = p.split()
    order, name = [((g, b, r), "odd"), ((b, r, g), "strange"), ((b, g, r), "swapped")][int(rng.integers(3))]
    return Image.merge("RGB", order), f"{name} colours"


def coloured_ground(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    name, rgb = _colour(rng)
    out = Image.new("RGB", p.size, rgb)
    out.paste(p, mask=shape_of(p))
    return out, f"on a {name} ground"


def textured_ground(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    name, rgb = _colour(rng)
    y, x = np.mgrid[: p.height, : p.width]
    kind = ["striped", "dotted", "checked"][int(rng.integers(3))]
    on = {
        "striped": (x + y) // 8 % 2 == 0,
        "dotted": ((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2) < 20,
        "checked": (x // 16 + y // 16) % 2 == 0,
    }[kind]
    ground = np.where(on[..., None], np.array(rgb, np.float32) * 0.5 + 127, 255).astype(np.uint8)
    out = Image.fromarray(ground)
    out.paste(p, mask=shape_of(p))
    return out, f"on a {kind} {name} ground"


def soft_shading(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    mask = shape_of(p)
    depth = np.asarray(mask.filter(ImageFilter.GaussianBlur(9))).astype(np.float32) / 255
    light = np.clip(np.roll(depth, (5, 5), (0, 1)) - np.roll(depth, (-5, -5), (0, 1)), -1, 1)
    a = np.asarray(p).astype(np.float32)
    shaded = np.clip(a * (0.62 + 0.45 * depth[..., None]) + 150 * light[..., None], 0, 255).astype(np.uint8)
    out = Image.new("RGB", p.size, "white")
    out.paste(Image.fromarray(shaded), mask=mask)
    return out, "soft shading"


def pixel_art(p: Image.Image, rng: Rng) -> tuple[Image.Image, str]:
    small = p.resize((p.width // 5, p.height // 5), Image.Resampling.BOX)
    return small.resize(p.size, Image.Resampling.NEAREST), "pixel art"


LOOKS: tuple[Look, ...] = (
    greyscale,
    line_drawing,
    bold_lines,
    coloured_lines,
    chalk,
    thick_outline,
    silhouette,
    posterised,
    black_and_white,
    inverted,
    tinted,
    swapped,
    coloured_ground,
    textured_ground,
    soft_shading,
    pixel_art,
)

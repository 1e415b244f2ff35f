"""The chart of a balance: what each pair of weights recovers of the style and of the subject."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from .balance import Trial, find_front
from .grid import INK, wrap_text

SIDE_PX = 820
LEFT_PX, RIGHT_PX, BOTTOM_PX = 96, 40, 92
FAINT = (222, 222, 222)
GREY = (120, 120, 120)
COLOURS = ((31, 119, 180), (214, 97, 31), (44, 140, 60), (148, 80, 170), (160, 110, 60), (200, 60, 120), (90, 90, 90))
"""One for each method, in the order of the trials."""
CHOSEN = (205, 20, 20)
Point = tuple[float, float]
_PLACES = (
    (14, 0, "lm"), (-14, 0, "rm"), (0, -13, "md"), (0, 13, "ma"), (10, -10, "ld"), (10, 10, "la"), (-10, -10, "rd"),
    (-10, 10, "ra"), (28, -18, "lm"), (28, 18, "lm"), (-28, -18, "rm"), (-28, 18, "rm"),
)  # fmt: skip
"""Where beside its dot a label may stand, the best first."""


def draw_pareto(
    trials: Sequence[Trial], chosen: Trial, title: str, names: tuple[str, str] = ("style", "subject")
) -> Image.Image:
    """One labelled RGB picture: style recovered across, subject recovered upwards, a dot for each pair of weights.

    Each method has a colour and a line through those of its pairs that none of its others beats in both; these are
    labelled, and the chosen one is ringed. The bare base and either LoRA alone are marked.
    """
    methods = list(dict.fromkeys(trial.method for trial in trials))
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    font, big = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    title = wrap_text(title, SIDE_PX + LEFT_PX, lambda line: int(measure.textlength(line, font=big)))
    legend_px = 24 * (len(methods) + 1)
    top_px = 18 + int(measure.multiline_textbbox((0, 0), title, font=big)[3]) + legend_px + 12
    picture = Image.new("RGB", (LEFT_PX + SIDE_PX + RIGHT_PX, top_px + SIDE_PX + BOTTOM_PX), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((LEFT_PX // 3, 12), title, fill=INK, font=big)

    values = [value for trial in trials for value in (trial.style, trial.subject)]
    low, high = max(min(0.0, *values) - 0.08, -1.0), min(max(1.0, *values) + 0.08, 2.0)

    def place(x: float, y: float) -> Point:
        x, y = min(max(x, low), high), min(max(y, low), high)
        return LEFT_PX + (x - low) / (high - low) * SIDE_PX, top_px + (high - y) / (high - low) * SIDE_PX

    _draw_axes(picture, draw, place, (low, high), names, font)
    key_y = top_px - legend_px - 4
    for method in methods:
        _draw_dot(draw, (LEFT_PX + 8, key_y + 9), 6, colours[method])
        draw.text((LEFT_PX + 24, key_y), f"{method}: dots are weights of {names[0]} / {names[1]}", fill=INK, font=font)
        key_y += 24
    draw.ellipse((LEFT_PX - 3, key_y - 2, LEFT_PX + 19, key_y + 20), outline=CHOSEN, width=3)
    chosen_text = (
        f"recommended: {chosen.method}, {names[0]} {chosen.style_weight:g}, {names[1]} {chosen.subject_weight:g}"
    )
    draw.text((LEFT_PX + 24, key_y), chosen_text, fill=CHOSEN, font=font)

    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in (place(t.style, t.subject) for t in trials)]
    draw.text((LEFT_PX + SIDE_PX - 8, top_px + 8), "better: up and to the right", fill=GREY, font=font, anchor="ra")
    for text, at in ((f"{names[0]} alone", (1.0, 0.0)), (f"{names[1]} alone", (0.0, 1.0)), ("bare base", (0.0, 0.0))):
        x, y = place(*at)
        draw.rectangle((x - 6, y - 6, x + 6, y + 6), outline=GREY, width=2)
        draw.text((x + 10, y + 8), text, fill=GREY, font=font, stroke_width=2, stroke_fill="white")
        taken.append(draw.textbbox((x + 10, y + 8), text, font=font))
    for method in methods:
        own = [trial for trial in trials if trial.method == method]
        front = find_front(own)
        line = [place(t.style, t.subject) for t in front]
        if len(line) > 1:
            draw.line(line, fill=colours[method], width=2)
        for trial in own:
            _draw_dot(draw, place(trial.style, trial.subject), 6 if trial in front else 4, colours[method])
    x, y = place(chosen.style, chosen.subject)
    draw.ellipse((x - 12, y - 12, x + 12, y + 12), outline=CHOSEN, width=3)
    _write_near(draw, (x, y), _weights(chosen), CHOSEN, font, taken)
    for method in methods:
        for trial in find_front([trial for trial in trials if trial.method == method]):
            if trial != chosen:
                _write_near(draw, place(trial.style, trial.subject), _weights(trial), colours[method], font, taken)
    return picture


def _weights(trial: Trial) -> str:
    return f"{trial.style_weight:g} / {trial.subject_weight:g}"


def _draw_dot(draw: ImageDraw.ImageDraw, at: Point, radius_px: int, colour: tuple[int, int, int]) -> None:
    x, y = at
    draw.ellipse((x - radius_px, y - radius_px, x + radius_px, y + radius_px), fill=colour)


def _write_near(
    draw: ImageDraw.ImageDraw,
    at: Point,
    text: str,
    colour: tuple[int, int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Writes beside a point, where no text is yet; nothing where there is no room for it."""
    x, y = at
    for dx, dy, anchor in (
        (13, 0, "lm"),
        (-13, 0, "rm"),
        (0, -12, "md"),
        (0, 12, "ma"),
        (11, -13, "ld"),
        (11, 13, "la"),
    ):
        box = draw.textbbox((x + dx, y + dy), text, font=font, anchor=anchor)
        inside = box[0] >= LEFT_PX - 40 and box[2] <= draw.im.size[0] - 4
        if inside and all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken):
            draw.text(
                (x + dx, y + dy), text, fill=colour, font=font, anchor=anchor, stroke_width=2, stroke_fill="white"
            )
            taken.append(box)
            return


def _draw_axes(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    place: Callable[[float, float], Point],
    span: tuple[float, float],
    names: tuple[str, str],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    low, high = span
    for i in range(math.ceil(low * 5), math.floor(high * 5) + 1):
        value = i / 5
        colour = GREY if i in (0, 5) else FAINT
        draw.line([place(value, low), place(value, high)], fill=colour)
        draw.line([place(low, value), place(high, value)], fill=colour)
        x, y = place(value, low)
        draw.text((x, y + 8), f"{value:g}", fill=INK, font=font, anchor="ma")
        x, y = place(low, value)
        draw.text((x - 8, y), f"{value:g}", fill=INK, font=font, anchor="rm")
    along = "{} recovered (0 as the bare base, 1 as the {} LoRA alone)"
    x, y = place((low + high) / 2, low)
    draw.text((x, y + 40), along.format(names[0], names[0]), fill=INK, font=font, anchor="ma")
    text = along.format(names[1], names[1])
    side = Image.new("RGB", (int(draw.textlength(text, font=font)) + 4, 24), "white")
    ImageDraw.Draw(side).text((2, 2), text, fill=INK, font=font)
    turned = side.rotate(90, expand=True)
    x, y = place(low, (low + high) / 2)
    picture.paste(turned, (6, int(y - turned.height / 2)))

"""Labelled sheets of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from ..adapter.delta import Adapter
from ..bases.family import Base
from ..bases.sampling import Progress
from ..combining.methods import Method
from ..combining.plan import Member, Stacked
from ..errors import ConfigError
from .generate import generate

GAP_PX = 8
INK = (32, 32, 32)
GRID_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def labelled_sheet(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str | None = None,
) -> Image.Image:
    """One RGB picture on white: the rows of pictures, a label above each column and left of each row.

    Cells are as large as the largest picture; labels are wrapped so that nothing is cut.

    Raises: ConfigError where there is no picture, or a row or its label is missing or too many.
    """
    if not rows or not rows[0]:
        raise ConfigError("a sheet needs at least one picture")
    if len(row_labels) != len(rows) or any(len(row) != len(column_labels) for row in rows):
        counts = [len(row) for row in rows]
        raise ConfigError(f"rows of {counts} pictures do not fit {len(row_labels)} x {len(column_labels)} labels")
    cell_w_px = max(p.width for row in rows for p in row)
    cell_h_px = max(p.height for row in rows for p in row)
    font = ImageFont.load_default(size=max(13, min(cell_w_px, cell_h_px) // 8))
    big = ImageFont.load_default(size=max(18, min(cell_w_px, cell_h_px) // 6))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def size_of(text: str, by: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> tuple[int, int]:
        box = measure.multiline_textbbox((0, 0), text, font=by)
        return int(box[2]) + 1, int(box[3]) + 1

    def wrap(text: str, width_px: int) -> str:
        return wrap_text(text, width_px, lambda line: size_of(line, font)[0])

    columns = [wrap(label, cell_w_px) for label in column_labels]
    side = [wrap(label, int(cell_w_px * 1.5)) for label in row_labels]
    left_px = max((size_of(label, font)[0] for label in side if label), default=0) + GAP_PX * 2
    head_px = max((size_of(label, font)[1] for label in columns if label), default=0) + GAP_PX * 2
    cell_w_px = max([cell_w_px, *(size_of(label, font)[0] for label in columns)])
    cell_h_px = max([cell_h_px, *(size_of(label, font)[1] for label in side)])
    width_px = left_px + len(columns) * (cell_w_px + GAP_PX)
    top_px = GAP_PX
    if title:
        title = wrap_text(title, width_px - 2 * GAP_PX, lambda line: size_of(line, big)[0])
        top_px += size_of(title, big)[1] + GAP_PX
        width_px = max(width_px, size_of(title, big)[0] + 2 * GAP_PX)
    sheet = Image.new("RGB", (width_px, top_px + head_px + len(rows) * (cell_h_px + GAP_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.multiline_text((GAP_PX, GAP_PX), title, fill=INK, font=big)
    for x, label in enumerate(columns):
        at = left_px + x * (cell_w_px + GAP_PX) + cell_w_px // 2, top_px + head_px - GAP_PX
        draw.multiline_text(at, label, fill=INK, font=font, anchor="md", align="center")
    for y, (row, label) in enumerate(zip(rows, side, strict=True)):
        y_px = top_px + head_px + y * (cell_h_px + GAP_PX)
        at = left_px - GAP_PX, y_px + cell_h_px // 2
        draw.multiline_text(at, label, fill=INK, font=font, anchor="rm", align="right")
        for x, picture in enumerate(row):
            x_px = left_px + x * (cell_w_px + GAP_PX)
            sheet.paste(picture, (x_px + (cell_w_px - picture.width) // 2, y_px + (cell_h_px - picture.height) // 2))
    return sheet


def wrap_text(text: str, width_px: int, width_of: Callable[[str], int]) -> str:
    """The text with line breaks at spaces so that each line is at most `width_px` wide; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and width_of(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def weight_grid(
    base: Base,
    prompt: str,
    across: Adapter | Member,
    down: Adapter | Member,
    *,
    names: tuple[str, str] = ("first", "second"),
    weights: Sequence[float] = GRID_WEIGHTS,
    weights_down: Sequence[float] | None = None,
    others: Stacked = (),
    method: str | Method = "linear",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 5.0,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    title: str | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """One labelled sheet: the first LoRA's weight grows across, the second's down; every picture has the same seed.

    The weights multiply a member's own, and the labels show the product; an adapter's own is 1. `others` act in every
    picture with their own weights. Raises: as `generate`; ConfigError where a list of weights is empty.
    """
    columns, rows = list(weights), list(weights if weights_down is None else weights_down)
    if not columns or not rows:
        raise ConfigError("the list of weights is empty; give at least one, such as 0,0.5,1")
    first_member = replace(across if isinstance(across, Member) else Member(across), name=names[0])
    second_member = replace(down if isinstance(down, Member) else Member(down), name=names[1])
    total = len(columns) * len(rows)
    sheet: list[list[Image.Image]] = []
    for y, second in enumerate(rows):
        sheet.append([])
        for x, first in enumerate(columns):
            number = y * len(columns) + x

            def report(done: int, steps_here: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * steps_here + done, total * steps_here)

            sheet[-1] += generate(
                base,
                prompt,
                adapters=[first_member.scaled(first), second_member.scaled(second), *others],
                method=method,
                seed=seed,
                steps=steps,
                guidance=guidance,
                negative=negative,
                width=width,
                height=height,
                progress=report,
            )
    labels = [
        [f"{member.name} {round(member.weight * weight, 6):g}" for weight in values]
        for member, values in ((first_member, columns), (second_member, rows))
    ]
    return labelled_sheet(sheet, labels[0], labels[1], prompt if title is None else title)

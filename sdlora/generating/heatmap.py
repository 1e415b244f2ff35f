"""A labelled table of coloured cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from ..combining.diagnose import Diagnosis, Figures
from .grid import INK, wrap_text

CELL_W_PX, CELL_H_PX, SIDE_PX, MARGIN_PX = 118, 30, 170, 16
COLD, HOT = (250, 250, 247), (196, 44, 30)
COLUMNS: tuple[tuple[str, str], ...] = (
    ("energy of the style", "share"),
    ("energy of the subject", "share"),
    ("cosine, unsigned", "value"),
    ("input overlap", "value"),
    ("output overlap", "value"),
    ("subject at risk", "value"),
)


def draw_diagnosis(diagnosis: Diagnosis, style: str, subject: str) -> Image.Image:
    """One RGB picture: a row for each block, a column for each figure, the darker the more; a legend says what is what.

    Energies are shares of the LoRA's own; the others run from 0 to 1, chance is in brackets.
    """
    rows: dict[str, list[tuple[float, str]]] = {}
    whole = diagnosis.whole
    for block, figures in {**diagnosis.blocks, "all layers": whole}.items():
        rows[block] = _row(figures, whole)
    title = f"Where {style} (style) and {subject} (subject) meet"
    note = (
        "Energy: the block's share of all the layers that both have. Overlaps: 0 is apart, 1 the same; in brackets "
        "what random LoRAs of these ranks would have. At risk: the share of the subject that passes where the style "
        "reads."
    )
    return draw_cells(title, [name for name, _ in COLUMNS], rows, note)


def _row(f: Figures, whole: Figures) -> list[tuple[float, str]]:
    shares = [f.style_energy / whole.style_energy, f.subject_energy / whole.subject_energy]
    return [
        *((share, f"{share:.0%}") for share in shares),
        (abs(f.cosine), f"{f.cosine:+.2f} (0)"),
        (f.input_overlap, f"{f.input_overlap:.2f} ({f.input_random:.2f})"),
        (f.output_overlap, f"{f.output_overlap:.2f} ({f.output_random:.2f})"),
        (f.at_risk, f"{f.at_risk:.2f} ({f.risk_random:.2f})"),
    ]


def draw_cells(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[tuple[float, str]]], note: str
) -> Image.Image:
    """Cells of (0..1, text), row by row, on white."""
    font, big = ImageFont.load_default(size=14), ImageFont.load_default(size=19)
    width = 2 * MARGIN_PX + SIDE_PX + CELL_W_PX * len(columns)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    title = wrap_text(title, width - 2 * MARGIN_PX, lambda line: int(measure.textlength(line, font=big)))
    note = wrap_text(note, width - 2 * MARGIN_PX, lambda line: int(measure.textlength(line, font=font)))
    heads = [wrap_text(c, CELL_W_PX - 8, lambda line: int(measure.textlength(line, font=font))) for c in columns]
    title_px = int(measure.multiline_textbbox((0, 0), title, font=big)[3])
    note_px = int(measure.multiline_textbbox((0, 0), note, font=font)[3])
    head_px = max(int(measure.multiline_textbbox((0, 0), head, font=font)[3]) for head in heads) + 8
    top_px = MARGIN_PX + title_px + MARGIN_PX + head_px
    height = top_px + CELL_H_PX * len(rows) + MARGIN_PX + note_px + MARGIN_PX
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((MARGIN_PX, MARGIN_PX), title, fill=INK, font=big)
    for x, head in enumerate(heads):
        at = (MARGIN_PX + SIDE_PX + x * CELL_W_PX + CELL_W_PX // 2, top_px - 6)
        draw.multiline_text(at, head, fill=INK, font=font, anchor="md", align="center")
    for y, (name, cells) in enumerate(rows.items()):
        y_px = top_px + y * CELL_H_PX
        draw.text((MARGIN_PX + SIDE_PX - 10, y_px + CELL_H_PX // 2), name, fill=INK, font=font, anchor="rm")
        for x, (value, text) in enumerate(cells):
            x_px = MARGIN_PX + SIDE_PX + x * CELL_W_PX
            part = min(1.0, max(0.0, value))
            colour = tuple(round(c + (h - c) * part) for c, h in zip(COLD, HOT, strict=True))
            draw.rectangle((x_px, y_px, x_px + CELL_W_PX - 2, y_px + CELL_H_PX - 2), fill=colour)
            middle = (x_px + CELL_W_PX // 2, y_px + CELL_H_PX // 2 - 1)
            draw.text(middle, text, fill="white" if part > 0.55 else INK, font=font, anchor="mm")
    draw.multiline_text((MARGIN_PX, height - MARGIN_PX - note_px), note, fill=INK, font=font)
    return picture

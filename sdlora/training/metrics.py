"""What a run measured: a JSON row a step, and the picture of its loss."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..disk import write_atomic

SMOOTHING = 0.95
"""How much of the smoothed loss each step keeps: about the last 20 steps count."""


class Metrics:
    """`metrics.jsonl`: a row a step; opened at a step, it forgets the rows after it, so that none is there twice."""

    def __init__(self, path: Path, steps_done: int) -> None:
        self.path = path
        self.rows = [row for row in read_rows(path) if row["step"] <= steps_done]
        write_atomic(path, b"".join(_line(row) for row in self.rows))
        self._file = open(path, "ab")  # noqa: SIM115 (`close` closes it)

    def add(self, row: dict[str, Any]) -> None:
        """Appends one row; a value that is not finite is written as null, since JSON has none."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Waits until the rows are on the disk; to be called before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, up to the first that a killed run left unfinished; none where there is no file."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean of a loss, each step weighing 0.95 of the one after it; unbiased from the first value on."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw_loss(rows: Sequence[dict[str, Any]], path: Path, *, width_px: int = 960, height_px: int = 480) -> None:
    """Writes a PNG of the loss over the steps: each step's thin, the smoothed one thick, validation's with dots."""
    points = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    if not points:
        return
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    left, top, right, bottom = 70, 40, width_px - 20, height_px - 50
    held = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    top_loss = _round_up(max([*losses, *(p[1] for p in held)]))
    first, last = 0, max(steps)

    def at(step: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * (step - first) / (last - first), bottom - (bottom - top) * loss / top_loss

    image = Image.new("RGB", (width_px, height_px), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for i in range(6):
        x, y = at(first + (last - first) * i / 5, top_loss * i / 5)
        pen.line([(left, y), (right, y)], fill="#e4e4e4")
        pen.text((left - 8, y), f"{top_loss * i / 5:.3g}", fill="#333333", font=font, anchor="rm")
        pen.line([(x, bottom), (x, bottom + 5)], fill="#333333")
        pen.text((x, bottom + 8), f"{(last - first) * i / 5:.4g}", fill="#333333", font=font, anchor="ma")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill="#333333")
    pen.line([at(*p) for p in points], fill="#a9c6e8", width=1)
    pen.line([at(*p) for p in zip(steps, smooth(losses), strict=True)], fill="#1f5fa8", width=3)
    if held:
        pen.line([at(*p) for p in held], fill="#d2691e", width=2)
        for x, y in (at(*p) for p in held):
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill="#d2691e")
    note = "thin: each step · thick: smoothed" + (" · dots: validation" if held else "")
    pen.text(((left + right) / 2, height_px - 8), "step", fill="#333333", font=font, anchor="ms")
    pen.text((left, 12), "loss", fill="#333333", font=font, anchor="lt")
    pen.text((right, 12), note, fill="#333333", font=font, anchor="rt")
    data = io.BytesIO()
    image.save(data, "PNG")
    write_atomic(path, data.getvalue())


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten, so that the axis has round labels."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()

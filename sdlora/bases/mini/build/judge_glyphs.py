"""The judge's black-and-white lessons: every thing as glyphs, so that a drawing without colour is read as well."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..judge import INPUT_PX
from .art import CAT_FACES, Art
from .glyphs import FINE, GLYPHS, draw_glyph
from .pictures import CAT_LABEL, Pictures

GLYPH_SETS = ("noto", "twemoji")
"""The sets that draw all things: no label is known better in black and white than another."""


def faces_in_order(pictures: Pictures) -> dict[int, str]:
    """Row of each of the cat's drawings -> what its picture is called; "cat face", a thing of group 3, comes first."""
    rows = [row for row, label in enumerate(pictures.labels) if label == CAT_LABEL]
    return dict(zip(rows, ["cat face", *(face for face in CAT_FACES if face != "cat face")], strict=True))


def draw_glyphs(pictures: Pictures, art_folder: Path, work: Path) -> tuple[np.ndarray, dict[int, int]]:
    """Glyphs uint8 [G, M, 64, 64, 3] of GLYPH_SETS' drawings, and row -> place in them; kept in the build folder."""
    store, index = work / "judge_glyphs.npy", work / "judge_glyphs.json"
    if not index.exists():
        art, faces = Art(art_folder), faces_in_order(pictures)
        named = {thing.label: thing for thing in (*art.things, *art.cats)}
        rows = [row for row, set_name in enumerate(pictures.arts) if set_name in GLYPH_SETS]

        def draw(row: int) -> np.ndarray:
            drawing = art.find(named[faces.get(row, pictures.labels[row])], pictures.arts[row])
            assert drawing is not None
            icon = art.render_icon(drawing, FINE)
            size = (INPUT_PX, INPUT_PX)
            return np.stack([np.asarray(draw_glyph(icon, g).resize(size, Image.Resampling.BOX)) for g in GLYPHS])

        with ThreadPoolExecutor(2) as pool:
            pixels = np.stack(list(pool.map(draw, rows)), 1)
        part = store.with_suffix(".tmp.npy")
        np.save(part, pixels)
        os.replace(part, store)
        index.write_text(json.dumps(rows), encoding="utf-8")
    rows = json.loads(index.read_text(encoding="utf-8"))
    return np.load(store, mmap_mode="r"), {row: place for place, row in enumerate(rows)}

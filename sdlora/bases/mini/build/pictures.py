"""Rendered drawings as one array, cached in the build folder, with what each of them is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .art import BASE_SETS, FLUENT_SETS, SIZE_PX, Art, Drawing, Thing

CAT_LABEL = "the cat"
"""The judge's name for the character that Noto's cat faces show."""


@dataclass(frozen=True)
class Pictures:
    """Pixels uint8 [N, 128, 128, 3] and, for each row, its label and the set that drew it."""

    pixels: np.ndarray
    labels: list[str]
    arts: list[str]
    groups: list[int]

    def where(self, keep: list[bool]) -> Pictures:
        rows = [i for i, k in enumerate(keep) if k]
        return Pictures(
            self.pixels[rows],
            [self.labels[i] for i in rows],
            [self.arts[i] for i in rows],
            [self.groups[i] for i in rows],
        )


def render_all(art_folder: Path, work: Path) -> Pictures:
    """Every drawing of the 861 things in all seven sets, and the cat faces (label `CAT_LABEL` where Noto drew them)."""
    store, index = work / "pictures.npy", work / "pictures.json"
    if not index.exists():
        art = Art(art_folder)
        drawings = list(art.drawings(art.things, BASE_SETS + FLUENT_SETS))
        known = set(drawings)
        drawings += [d for d in art.drawings(art.cats, BASE_SETS + FLUENT_SETS) if d not in known]
        cats = set(art.cats)

        def pixels_of(drawing: Drawing) -> np.ndarray:
            return np.asarray(art.render(drawing))

        with ThreadPoolExecutor(2) as pool:
            pixels = np.stack(list(pool.map(pixels_of, drawings)))
        assert pixels.shape[1:] == (SIZE_PX, SIZE_PX, 3)

        def label_of(thing: Thing, art_name: str) -> str:
            return CAT_LABEL if thing in cats and art_name == "noto" else thing.label

        rows = [{"label": label_of(d.thing, d.art), "art": d.art, "group": d.thing.group} for d in drawings]
        work.mkdir(parents=True, exist_ok=True)
        np.save(store, pixels)
        index.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    rows = json.loads(index.read_text(encoding="utf-8"))
    return Pictures(
        np.load(store, mmap_mode="r"),
        [r["label"] for r in rows],
        [r["art"] for r in rows],
        [r["group"] for r in rows],
    )

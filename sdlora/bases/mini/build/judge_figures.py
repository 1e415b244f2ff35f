"""Measures the judge on drawings that it never saw, and writes the figures beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..judge import FOLDER, INPUT_PX, OTHER, Judge, load_judge
from .art import CAT_FACES
from .glyphs import GLYPHS
from .judge import Lesson, prepare_lesson
from .judge_views import LOOKS, nothings
from .pictures import CAT_LABEL, Pictures

VERSIONS = ("as drawn", "through the VAE", "through the VAE, latents shaken")
OTHER_CATS = ("cat", "black cat", "lion", "tiger face", "tiger", "leopard", "fox")

Table = dict[str, dict[str, float]]


def _images(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(p) for p in np.asarray(pixels)]


def _changed(pixels: np.ndarray, look: str) -> list[Image.Image]:
    """The pictures with one look each, drawn from a fixed seed; "silhouette" is one that training never shows."""
    x = torch.from_numpy(np.asarray(pixels)).permute(0, 3, 1, 2).float() / 255
    if look == "silhouette":
        x = (x.amin(1, keepdim=True) > 0.93).float().expand_as(x)
    else:
        x = LOOKS[look][0](x, torch.Generator().manual_seed(0))
    return _images((x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _recognised(judge: Judge, images: list[Image.Image], labels: list[str], styles: list[str]) -> dict[str, float]:
    ranks = torch.tensor(judge.rank_of(images, labels))
    said = judge.style_of(images)
    return {
        "pictures": len(images),
        "subject_top1": (ranks < 1).float().mean().item(),
        "subject_top5": (ranks < 5).float().mean().item(),
        "style": sum(a == b for a, b in zip(said, styles, strict=True)) / len(said),
    }


def _share_ink(judge: Judge, images: list[Image.Image]) -> dict[str, float]:
    return {"pictures": len(images), "ink": judge.style_of(images).count("ink") / max(1, len(images))}


def _share_cat(judge: Judge, images: list[Image.Image]) -> dict[str, float]:
    ranks = Tensor(judge.rank_of(images, [CAT_LABEL] * len(images)))
    return {
        "pictures": len(images),
        "cat_top1": (ranks < 1).float().mean().item(),
        "cat_top5": (ranks < 5).float().mean().item(),
    }


def _cat_figures(judge: Judge, pictures: Pictures, lesson: Lesson) -> Table:
    labels = np.array(pictures.labels)
    cat, held = labels == CAT_LABEL, lesson.held
    faces = np.isin(labels, CAT_FACES)
    groups = {
        "the cat, held out": cat & held,
        "the cat, trained on": cat & ~held,
        "cat faces of other sets (trained on as `cat face`)": faces,
        "other cats and their kin: " + ", ".join(OTHER_CATS): np.isin(labels, OTHER_CATS),
        "all other things, held out": held & ~cat & ~faces & ~np.isin(labels, OTHER_CATS),
    }
    table = {name: _share_cat(judge, _images(lesson.pixels[0][rows])) for name, rows in groups.items()}
    arts = np.array(pictures.arts)
    ink_faces = faces & (arts == "fluent-emoji-high-contrast")
    table["ink cat faces (trained on as `cat face`)"] = _share_cat(judge, _images(lesson.pixels[0][ink_faces]))
    for look in ("grey", "two-tone", "outline"):
        table[f"the cat made {look}"] = _share_cat(judge, _changed(lesson.pixels[0][cat], look))
    if len(lesson.pixels) > 1:
        table["the cat through the VAE"] = _share_cat(judge, _images(lesson.pixels[1][cat]))
    return table


def _glyph_figures(judge: Judge, lesson: Lesson, labels: np.ndarray) -> Table:
    """Each kind of glyph, of drawings held out and trained on: things recognised, and the share called ink."""
    table = Table()
    for kind, name in enumerate(GLYPHS):
        for said, rows in (("held out", lesson.held), ("trained on", ~lesson.held)):
            picked = np.flatnonzero(rows & (lesson.glyph_rows >= 0))
            images = _images(lesson.glyphs[kind][lesson.glyph_rows[picked]])
            row = _recognised(judge, images, labels[picked].tolist(), ["ink"] * len(images))
            table[f"{name}, {said}"] = {**{k: v for k, v in row.items() if k != "style"}, "ink": row["style"]}
    return table


def measure_judge(judge: Judge, pictures: Pictures, art_folder: Path, work: Path) -> dict[str, Table]:
    """Tables of shares (0..1): "accuracy", "by style", "black and white", "called ink", "called the cat" …"""
    lesson = prepare_lesson(pictures, art_folder, work)
    labels = np.array([lesson.labels[i] for i in lesson.label_rows.tolist()])
    styles = np.array([lesson.styles[i] for i in lesson.style_rows.tolist()])
    accuracy, by_style, ink = Table(), Table(), Table()

    def recognised(version: int, rows: np.ndarray) -> dict[str, float]:
        return _recognised(judge, _images(lesson.pixels[version][rows]), labels[rows].tolist(), styles[rows].tolist())

    for version, name in enumerate(VERSIONS[: len(lesson.pixels)]):
        accuracy[f"held out, {name}"] = recognised(version, lesson.held)
        accuracy[f"trained on, {name}"] = recognised(version, ~lesson.held)
        for style in lesson.styles:
            by_style[f"{style}, {name}"] = recognised(version, lesson.held & (styles == style))
        others = lesson.held & (styles != "ink")
        ink[f"other styles, {name}"] = _share_ink(judge, _images(lesson.pixels[version][others]))
        ink[f"ink, {name}"] = _share_ink(judge, _images(lesson.pixels[version][lesson.held & (styles == "ink")]))
    colourful = lesson.held & np.isin(styles, ["noto", "twemoji"])
    ink["Noto and Twemoji as drawn"] = _share_ink(judge, _images(lesson.pixels[0][colourful]))
    for look in ("grey", "grey steps", "outline", "outlined", "posterised", "inverted", "two-tone", "silhouette"):
        ink[f"Noto and Twemoji made {look}"] = _share_ink(judge, _changed(lesson.pixels[0][colourful], look))
    blanks = nothings(200, INPUT_PX, torch.Generator().manual_seed(1))
    said = judge.style_of(_images((blanks * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()))
    shares = {"pictures": 200.0, "ink": said.count("ink") / 200, OTHER: said.count(OTHER) / 200}
    return {
        "accuracy": accuracy,
        "by style, held out": by_style,
        "black and white": _glyph_figures(judge, lesson, labels),
        "called ink": ink,
        "called the cat": _cat_figures(judge, pictures, lesson),
        "nothing drawn": {"blank, noise and blotches": shares},
    }


def as_markdown(tables: dict[str, Table]) -> str:
    """The tables as Markdown, shares in per cent."""
    parts = []
    for title, table in tables.items():
        columns = list(next(iter(table.values())))
        rule = "|---" + "|---:" * len(columns) + "|"
        parts.append(f"### {title.capitalize()}\n\n| | {' | '.join(columns)} |\n{rule}")
        for name, row in table.items():
            cells = [str(int(row[c])) if c == "pictures" else f"{100 * row[c]:.1f} %" for c in columns]
            parts[-1] += f"\n| {name} | " + " | ".join(cells) + " |"
    return "\n\n".join(parts) + "\n"


def publish_judge(pictures: Pictures, art_folder: Path, work: Path, folder: Path = FOLDER) -> dict[str, Table]:
    """Measures the judge in `folder`; writes `figures.json` and the tables below README.md's "## Measured"."""
    tables = measure_judge(load_judge(folder), pictures, art_folder, work)
    (folder / "figures.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    head = readme.read_text(encoding="utf-8").split("## Measured")[0] if readme.exists() else ""
    intro = "Shares of pictures; `figures.json` has the same as numbers.\n"
    readme.write_text(f"{head}## Measured\n\n{intro}\n{as_markdown(tables)}", encoding="utf-8")
    return tables

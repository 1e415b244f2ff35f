"""The files that stand beside a shared LoRA: its page, the facts that interfaces read, and its preview."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

from PIL import Image

from ..adapter.header import printable, read_header
from ..adapter.summary import summarize
from ..data.picture import read_picture
from ..disk import write_atomic
from ..errors import ConfigError
from .model_card import describe_sidecar, write_page

THUMBNAIL_PX = 256
"""The side that modelspec asks for."""
_PREVIEW = re.compile(r"step-(\d+)-(\d+)\.png")


def write_sidecars(file: Path, folder: Path, preview: Path | None = None, force: bool = False) -> list[Path]:
    """Writes NAME.md, NAME.json and, where there is a picture, NAME.preview.png for a LoRA; gives what was written.

    The picture is `preview`, or the newest preview of the run folder that belongs to the file. Each is written whole or
    not at all, and nothing is replaced without `force`.
    Raises: ConfigError where one is there already; DiskError; AdapterFileError; DataError.
    """
    name = file.stem
    picture = preview or find_preview(file.with_suffix(".run") / "previews")
    pages = [folder / f"{name}.md", folder / f"{name}.json"]
    image = folder / f"{name}.preview.png"
    there = [path for path in [*pages, *([image] if picture else [])] if path.exists()]
    if there and not force:
        raise ConfigError(f"{there[0]} exists; add --force to replace it, or choose another --out")
    summary = summarize(file)
    settings = read_settings(file)
    shown = render_png(picture) if picture else None
    title = summary["metadata"].get("modelspec.title", "") or name
    facts = json.dumps(describe_sidecar(summary, printable(title, 200)), indent=4, ensure_ascii=False) + "\n"
    page = write_page(name, summary, settings, [image.name] if shown else [])
    contents = {pages[0]: page.encode("utf-8", "replace"), pages[1]: facts.encode("utf-8", "replace")}
    contents |= {image: shown} if shown else {}
    for path, content in contents.items():
        write_atomic(path, content)
    return list(contents)


def read_settings(file: Path) -> dict[str, object]:
    """The recipe in a file's metadata; empty where it has none."""
    try:
        said = json.loads(read_header(file)[1].get("sdlora.recipe", "{}"))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def find_preview(folder: Path) -> Path | None:
    """The first prompt's newest preview of a run, or None."""
    found = {path: match for path in folder.glob("step-*.png") if (match := _PREVIEW.fullmatch(path.name))}
    return max(found, key=lambda path: (int(found[path][1]), -int(found[path][2])), default=None)


def render_png(picture: Path) -> bytes:
    """The picture as a PNG of its pixels alone: prompts, places and cameras in it stay behind. Raises: DataError."""
    pixels = read_picture(picture)
    data = io.BytesIO()
    Image.frombytes("RGB", pixels.size, pixels.tobytes()).save(data, "PNG")
    return data.getvalue()


def make_thumbnail(picture: Path) -> str:
    """The picture's middle as a small square JPEG in a data address, as `modelspec.thumbnail` is. Raises: DataError."""
    pixels = read_picture(picture)
    side = min(pixels.size)
    left, top = ((length - side) // 2 for length in pixels.size)
    square = pixels.crop((left, top, left + side, top + side))
    if side > THUMBNAIL_PX:
        square = square.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    Image.frombytes("RGB", square.size, square.tobytes()).save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


__all__ = ["find_preview", "make_thumbnail", "render_png", "write_sidecars"]

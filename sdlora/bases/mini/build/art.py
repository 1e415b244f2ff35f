"""The openly licensed emoji art that `mini` and its judge are trained on.

The drawings come from npm packages, unpacked in one folder (`npm install --prefix ART …`, see
`python -m sdlora.bases.mini.build --help`); nothing here reaches the network.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SIZE_PX = 128
ICON_PX = 116  # leaves a margin, so that a drawing can be shifted without being cut

PACKAGES: dict[str, str] = {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "emojione": "CC-BY-4.0",
    "fxemoji": "Apache-2.0",
    "fluent-emoji-flat": "MIT",
    "fluent-emoji": "MIT",
    "fluent-emoji-high-contrast": "MIT",
}
BASE_SETS = ("noto", "twemoji", "emojione", "fxemoji")
"""The sets that the UNet and the text encoder are trained on."""
FLUENT_SETS = ("fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast")
"""Kept out of the UNet's and the text encoder's training: they are the styles to be learnt."""
THING_GROUPS = (3, 4, 5, 6, 7)  # emojibase: animals, food, places, activities, objects
CAT_FACES = (
    "grinning cat",
    "grinning cat with smiling eyes",
    "cat with tears of joy",
    "smiling cat with heart-eyes",
    "cat with wry smile",
    "kissing cat",
    "weary cat",
    "crying cat",
    "pouting cat",
    "cat face",
)
"""Noto draws one character in these; its drawings are the subject to be learnt, so `mini` never sees them."""


@dataclass(frozen=True)
class Thing:
    """One emoji of the emojibase list: its plain label, code points and group."""

    label: str
    hexcode: str
    group: int


@dataclass(frozen=True)
class Drawing:
    """One set's drawing of one thing."""

    thing: Thing
    art: str
    icon: str


def _read_json(path: Path) -> dict | list:
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(label: str) -> str:
    return label.lower().replace("’", "'")


class Art:
    """The drawings of all sets, found by code point or, for sets without a table of them, by label."""

    def __init__(self, folder: Path) -> None:
        modules = Path(folder) / "node_modules"
        rows = _read_json(modules / "emojibase-data" / "en" / "data.json")
        things = [Thing(_plain(r["label"]), r["hexcode"].lower(), r.get("group", -1)) for r in rows]
        self.things = [t for t in things if t.group in THING_GROUPS]
        self.cats = [t for label in CAT_FACES for t in things if t.label == label]
        self._icons: dict[str, dict] = {}
        self._names: dict[str, dict[str, str]] = {}
        self._chars: dict[str, dict[str, str]] = {}
        for art in PACKAGES:
            icons = read_icons(folder, art)
            chars = _read_json(modules / "@iconify-json" / art / "chars.json")
            assert isinstance(chars, dict)
            self._icons[art] = icons
            self._chars[art] = chars
            names = {re.sub(r"[^a-z0-9]", "", n): n for n in icons["icons"]}
            for alias, row in icons.get("aliases", {}).items():
                names.setdefault(re.sub(r"[^a-z0-9]", "", alias), row["parent"])
            self._names[art] = names

    def find(self, thing: Thing, art: str) -> Drawing | None:
        """The set's drawing of the thing, or None where it has none."""
        chars = self._chars[art]
        bare = "-".join(p for p in thing.hexcode.split("-") if p != "fe0f")
        icon = chars.get(thing.hexcode) or chars.get(bare)
        if icon is None and not chars:
            icon = self._names[art].get(re.sub(r"[^a-z0-9]", "", thing.label))
        if icon is None or icon not in self._icons[art]["icons"]:
            return None
        return Drawing(thing, art, icon)

    def named(self, label: str, art: str) -> Drawing:
        """The set's drawing of the thing with this label; it must have one."""
        drawing = self.find(next(t for t in self.things if t.label == label), art)
        assert drawing is not None
        return drawing

    def drawings(self, things: list[Thing], sets: tuple[str, ...]) -> Iterator[Drawing]:
        """Every drawing that the sets have of the things, thing by thing."""
        for thing in things:
            for art in sets:
                drawing = self.find(thing, art)
                if drawing is not None:
                    yield drawing

    def render(self, drawing: Drawing) -> Image.Image:
        """The drawing centred on white: RGB, 128 x 128 px."""
        return on_white(self.render_icon(drawing))

    def render_icon(self, drawing: Drawing, scale: int = 1) -> Image.Image:
        """The drawing with its margin, transparent around it: RGBA, 128 x 128 px times `scale`."""
        return render_svg(self._icons[drawing.art], drawing.icon, scale)


def read_icons(art_folder: Path, art: str) -> dict[str, Any]:
    """A set's icons as its package has them: the drawings by name, other names, and their common size."""
    icons = _read_json(Path(art_folder) / "node_modules" / "@iconify-json" / art / "icons.json")
    assert isinstance(icons, dict)
    return icons


def render_svg(icons: dict[str, Any], name: str, scale: int = 1, colour: str = "#000") -> Image.Image:
    """One drawing of `read_icons` with its margin, transparent around it: RGBA, 128 x 128 px times `scale`.

    `colour` is that of sets which have no colours of their own.
    """
    import resvg_py

    row = icons["icons"][name]
    width = row.get("width", icons.get("width", 16))
    height = row.get("height", icons.get("height", 16))
    left, top = row.get("left", 0), row.get("top", 0)
    icon_px = ICON_PX * scale
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{icon_px}" height="{icon_px}" '
        f'color="{colour}">{row["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=icon_px, height=icon_px))
    icon = Image.open(io.BytesIO(png)).convert("RGBA")
    side = SIZE_PX * scale
    page = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    page.paste(icon, ((side - icon.width) // 2, (side - icon.height) // 2))
    return page


def on_white(icon: Image.Image) -> Image.Image:
    """A transparent picture on white paper, RGB."""
    return on_ground(icon, "white")


def on_ground(icon: Image.Image, ground: str) -> Image.Image:
    """A transparent picture on paper of a colour, RGB."""
    page = Image.new("RGBA", icon.size, ground)
    page.alpha_composite(icon)
    return page.convert("RGB")

"""Four styles and four subjects for `benchmarks.combining`, and the LoRAs that are taught them.

`python -m benchmarks.combining_art --art ART --out DIR` renders the folders and trains the eight LoRAs, each in a
process of its own; what is there already is taken as it is. ART holds the drawings:

    npm install --prefix ART @iconify-json/{noto,emojione,emojione-monotone,openmoji,fluent-emoji,fluent-emoji-flat}

The styles are the sample folder `ink` and three looks more that the base never saw: OpenMoji (© the OpenMoji authors,
CC BY-SA 4.0), here called comic; EmojiOne's monotone set (© Emoji One, CC BY 4.0) in white on blue, here blueprint; and
Fluent Emoji (© Microsoft Corporation, MIT) on dark blue, here night. Two more, `clay` and `flat`, are in WEAK_STYLES:
their LoRAs hardly change what mini draws, so that there is nothing to measure (docs/balance.md).
The subjects are the sample cat (`mio`) and three more characters that the base never saw: EmojiOne's grey cat (© Emoji
One, CC BY 4.0), Noto's yellow face and Noto's woman in purple (© Google LLC, Apache-2.0). No drawing ships with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.bases.mini.build.art import on_ground, on_white, read_icons, render_svg
from sdlora.demo import ROOT

THINGS = ROOT / "sdlora" / "bases" / "mini" / "weights" / "things.json"
STYLE_PICTURES = 40


@dataclass(frozen=True)
class Style:
    """A style: its name, the words that call it, the set that it is drawn from, and the colours of lines and paper."""

    name: str
    art: str | None = None
    """None for a sample folder."""
    colour: str = "#000"
    ground: str = "white"
    preset: str = "mini-style"

    def draw(self, icons: dict, icon: str) -> Image.Image:
        """One of the set's icons in this style, 128 x 128 px."""
        return on_ground(render_svg(icons, icon, colour=self.colour), self.ground)

    @property
    def words(self) -> str:
        return f"{self.name} style"


@dataclass(frozen=True)
class Subject:
    """A character: its name, its trigger, what its captions and prompts say, and where its drawings are."""

    name: str
    trigger: str
    learnt: tuple[tuple[str, str], ...]
    """(icon, caption), or nothing for a sample folder."""
    selecting: tuple[str, str, str]
    """Prompts with which weights are chosen; the style's words are added."""
    reporting: tuple[str, str, str]
    """Prompts with which they are reported."""
    art: str | None = None


STYLES = (
    Style("ink", preset="mini-ink"),
    Style("comic", "openmoji"),
    Style("blueprint", "emojione-monotone", "#fff", "#1f4fa3"),
    Style("night", "fluent-emoji", ground="#141a3c"),
)
WEAK_STYLES = (Style("clay"), Style("flat", "fluent-emoji-flat"))
_CAT_FACES = {
    "cat-face": "a {} cat face",
    "grinning-cat-face": "a grinning {} cat",
    "grinning-cat-face-with-smiling-eyes": "a grinning {} cat with smiling eyes",
    "cat-face-with-tears-of-joy": "a {} cat with tears of joy",
    "smiling-cat-face-with-heart-eyes": "a smiling {} cat with heart-eyes",
    "cat-face-with-wry-smile": "a {} cat with wry smile",
    "kissing-cat-face": "a kissing {} cat",
    "weary-cat-face": "a weary {} cat",
    "crying-cat-face": "a crying {} cat",
    "pouting-cat-face": "a pouting {} cat",
}
MOODS = ("grinning", "crying", "angry", "kissing", "weary", "winking", "sleeping", "astonished", "frowning", "pensive")
GESTURES = (
    "bowing", "facepalming", "frowning", "gesturing-no", "gesturing-ok", "pouting", "raising-hand", "shrugging",
    "tipping-hand",
)  # fmt: skip
SUBJECTS = (
    Subject(
        "cat",
        "mio",
        (),
        ("a mio cat face", "a pouting mio cat", "a weary mio cat"),
        ("a grinning mio cat", "a crying mio cat", "a kissing mio cat"),
    ),
    Subject(
        "greycat",
        "bem",
        tuple((icon, text.format("bem")) for icon, text in _CAT_FACES.items()),
        ("a bem cat face", "a pouting bem cat", "a weary bem cat"),
        ("a grinning bem cat", "a crying bem cat", "a kissing bem cat"),
        "emojione",
    ),
    Subject(
        "face",
        "zub",
        tuple((f"{mood}-face", f"{'an' if mood[0] == 'a' else 'a'} {mood} zub face") for mood in MOODS),
        ("a weary zub face", "an angry zub face", "a winking zub face"),
        ("a grinning zub face", "a crying zub face", "a kissing zub face"),
        "noto",
    ),
    Subject(
        "woman",
        "lia",
        tuple((f"woman-{gesture}", f"a lia woman {gesture.replace('-', ' ')}") for gesture in GESTURES),
        ("a lia woman bowing", "a lia woman pouting", "a lia woman gesturing ok"),
        ("a lia woman frowning", "a lia woman raising hand", "a lia woman shrugging"),
        "noto",
    ),
)


def folder_of(out: Path, one: Style | Subject) -> Path:
    """Where a style's or subject's pictures are."""
    return out / "data" / one.name if one.art else ROOT / "datasets" / one.name


def lora_of(out: Path, one: Style | Subject) -> Path:
    """Where its LoRA is."""
    return out / f"{one.name}.safetensors"


def write_folder(art_folder: Path, one: Style | Subject, folder: Path) -> None:
    """Renders a style's or a subject's pictures with their captions; a folder that is whole is left as it is."""
    assert one.art is not None
    if folder.exists():
        return
    icons = read_icons(art_folder, one.art)
    rows = list_style(icons, one) if isinstance(one, Style) else list(one.learnt)
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    for icon, caption in rows:
        picture = one.draw(icons, icon) if isinstance(one, Style) else on_white(render_svg(icons, icon))
        picture.save(part / f"{icon}.png", optimize=True)
        (part / f"{icon}.txt").write_text(caption + "\n", encoding="utf-8")
    os.replace(part, folder)


def list_style(icons: dict, style: Style, seed: int = 0) -> list[tuple[str, str]]:
    """(icon, caption) of forty things that the base knows and the set draws."""
    names = {letters(name): name for name in icons["icons"]}
    for alias, row in icons.get("aliases", {}).items():
        names.setdefault(letters(alias), row["parent"])
    known = [label for label in json.loads(THINGS.read_text("utf-8")) if letters(label) in names]
    chosen = sorted(random.Random(seed).sample(known, STYLE_PICTURES))
    return [(names[letters(t)], f"{'an' if t[0] in 'aeiou' else 'a'} {t}, {style.words}") for t in chosen]


def letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def train_all(out: Path, at_once: int) -> None:
    """Trains the LoRAs that are missing, each in a process of its own.

    Raises: RuntimeError where one failed.
    """
    waiting = [one for one in (*STYLES, *SUBJECTS) if not lora_of(out, one).exists()]
    running: list[tuple[str, subprocess.Popen]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            one = waiting.pop(0)
            print(f"training {one.name}", file=sys.stderr, flush=True)
            running.append((one.name, subprocess.Popen(train_command(out, one), cwd=ROOT)))
        name, process = running.pop(0)
        if process.wait():
            raise RuntimeError(f"training {name} failed with exit code {process.returncode}")


def train_command(out: Path, one: Style | Subject) -> list[str]:
    """The command line that trains it."""
    name, trigger = (one.preset, one.words) if isinstance(one, Style) else ("mini-subject", one.trigger)
    preset = ROOT / "configs" / f"{name}.toml"
    data, lora = folder_of(out, one), lora_of(out, one)
    command = [sys.executable, "-m", "sdlora", "train", data, "--config", preset, "--trigger", trigger, "--out", lora]
    return [str(word) for word in command]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combining_art", description=__doc__)
    parser.add_argument("--art", type=Path, required=True, help="folder of node_modules/@iconify-json")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.safetensors and data/NAME")
    parser.add_argument("--at-once", type=int, default=1, help="processes that train side by side")
    args = parser.parse_args()
    for one in (*STYLES, *SUBJECTS):
        if one.art:
            write_folder(args.art, one, folder_of(args.out, one))
    train_all(args.out.resolve(), args.at_once)


if __name__ == "__main__":
    main()

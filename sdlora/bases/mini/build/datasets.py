"""Writes the sample folders `datasets/{ink,clay,cat}`: pictures, captions and their licence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .judge_glyphs import faces_in_order
from .pictures import Pictures
from .unet import drawn_by_all

STYLE_PICTURES = 40
STYLES = {"ink": "fluent-emoji-high-contrast", "clay": "fluent-emoji"}

MIT_FLUENT = """# Where these pictures come from

{count} drawings of Fluent Emoji ({variant}), © Microsoft Corporation, MIT License,
https://github.com/microsoft/fluentui-emoji, taken from the npm package
`@iconify-json/{package}` and rendered at 128 px on white. Captions: the labels of
`emojibase-data` (MIT License, © Miles Johnson), with the style's name.

MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

APACHE_NOTO = """# Where these pictures come from

{count} drawings of one character, the cat faces of Noto Emoji, © Google LLC, Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0), https://github.com/googlefonts/noto-emoji, taken from
the npm package `@iconify-json/noto` and rendered at 128 px on white; no other change. Captions: the
labels of `emojibase-data` (MIT License, © Miles Johnson), with the character's name, mio.
"""


def _write(folder: Path, name: str, pixels: np.ndarray, caption: str) -> None:
    Image.fromarray(pixels).save(folder / f"{name}.png", optimize=True)
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def _article(label: str) -> str:
    return ("an " if label[0] in "aeiou" else "a ") + label


def write_datasets(pictures: Pictures, out: Path, seed: int = 0) -> None:
    """Forty pictures of each style, of things that the base knows, and every picture of the character."""
    known = set(drawn_by_all(pictures))
    for style, package in STYLES.items():
        folder = out / style
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            i
            for i, (label, art) in enumerate(zip(pictures.labels, pictures.arts, strict=True))
            if art == package and label in known
        ]
        order = np.random.default_rng(seed).permutation(len(rows))
        for i in sorted(order[:STYLE_PICTURES]):
            label = pictures.labels[rows[i]]
            name = "".join(c if c.isalnum() else "-" for c in label)
            _write(folder, name, pictures.pixels[rows[i]], f"{_article(label)}, {style} style")
        text = MIT_FLUENT.format(count=STYLE_PICTURES, variant=package, package=package)
        (folder / "LICENSE.md").write_text(text, encoding="utf-8")
    folder = out / "cat"
    folder.mkdir(parents=True, exist_ok=True)
    faces = faces_in_order(pictures)
    for row, label in faces.items():
        name = "".join(c if c.isalnum() else "-" for c in label)
        said = label.replace("cat", "mio cat", 1)
        _write(folder, name, pictures.pixels[row], _article(said))
    (folder / "LICENSE.md").write_text(APACHE_NOTO.format(count=len(faces)), encoding="utf-8")

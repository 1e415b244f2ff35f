"""PNG files: written whole or not at all, under the next free number, with the `parameters` text inside."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..disk import write_atomic, write_new
from ..errors import ConfigError


def make_folder(out: Path) -> None:
    """Makes a folder for pictures and tries that it can be written to.

    Raises: ConfigError where it cannot.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give --out a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        raise ConfigError(f"{out}: cannot be written to ({e.strerror}); give --out another folder") from None


def write_next_png(picture: Image.Image, folder: Path, parameters: str) -> Path:
    """Writes the picture under the folder's next free number, whole or not at all, and returns its path.

    Two programs that write at once never overwrite each other where the file system has hard links.

    Raises: DiskError where the folder cannot be written to.
    """
    info = PngInfo()
    info.add_text("parameters", parameters)
    numbers = [int(p.stem) for p in folder.glob("*.png") if p.stem.isascii() and p.stem.isdigit()]
    number = max(numbers, default=-1) + 1
    while True:
        path = folder / f"{number:05d}.png"
        if write_png(picture, path, info, replace=False):
            return path
        number += 1


def write_png(picture: Image.Image, path: Path, info: PngInfo | None = None, replace: bool = True) -> bool:
    """Writes a PNG, whole or not at all; False where `replace` is off and it exists. Raises: DiskError."""
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=info)
    if not replace:
        return write_new(path, data.getvalue())
    write_atomic(path, data.getvalue())
    return True

"""PNG files: written whole or not at all, under the next free number, with the `parameters` text inside."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

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

    Raises: ConfigError where the folder cannot be written to.
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
    """Writes a PNG to a temporary name, syncs it and moves it into place; False where `replace` is off and it exists.

    Raises: ConfigError where it cannot be written.
    """
    part: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}.", suffix=".part", delete=False) as f:
            part = Path(f.name)
            picture.save(f, format="PNG", pnginfo=info)
            f.flush()
            os.fsync(f.fileno())
        part.chmod(0o666 & ~_umask())
        if not replace:
            if path.exists():
                return False
            try:
                os.link(part, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                os.replace(part, path)
            return True
        os.replace(part, path)
        return True
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written ({e.strerror or e}); give another place") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

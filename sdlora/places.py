"""Files and folders of a command, looked at before anything heavy is imported or any work is done."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import AdapterFileError, ConfigError


def check_files(loras: list[Path]) -> None:
    """Finds LoRA files that are not there. Raises: AdapterFileError."""
    for file in loras:
        try:
            found = file.is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            what = "it is a folder" if file.is_dir() else "there is no such file"
            raise AdapterFileError(f"{file}: {what}; give the path of a LoRA's .safetensors file")


def check_output(out: Path, inputs: list[Path]) -> None:
    """Finds an output file that cannot be written, or would replace an input; leaves nothing behind.

    Raises: ConfigError.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out} does not end in .safetensors; name the file that the LoRA goes to")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file that the LoRA goes to")
    check_folder(out.parent, out)
    for file in inputs:
        if out.exists() and out.samefile(file):
            raise ConfigError(f"{out} is read and would be replaced; choose another --out")


def check_folder(folder: Path, out: Path | None = None) -> None:
    """Finds a folder that cannot be made or written to; leaves nothing behind. `out` is what messages name.

    Raises: ConfigError.
    """
    out = out or folder
    try:
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        if not place.is_dir():
            raise ConfigError(f"{out} cannot be written: {place} is a file; choose another --out")
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{out} cannot be written ({reason}); choose another --out") from None


def find_cache() -> Path:
    """Where encoded pictures and captions are kept between runs: `$SDLORA_CACHE`, else `~/.cache/sdlora`."""
    given = os.environ.get("SDLORA_CACHE", "")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "sdlora"

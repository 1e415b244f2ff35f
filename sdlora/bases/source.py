"""Where a base comes from: its name on the command line to a folder or a file on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BaseModelError
from .folder import WEIGHTS

if TYPE_CHECKING:
    from .family import Family

MINI_FOLDER = Path(__file__).parent / "mini" / "weights"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_SMALL_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
)
_XL_FILE = "text_encoder_2/config.json"


def resolve_source(name: str) -> tuple[Path, str, Family | None]:
    """The folder or file of a base, the public name for files, and its family where the name alone decides it.

    `name` is `mini`, a diffusers folder, a single-file checkpoint, or a hub id `owner/name` (downloaded once, then
    read from the cache).

    Raises: BaseModelError where there is no such base, or it is of a kind that is not read.
    """
    from .sd import mini

    if name == "mini":
        if not (MINI_FOLDER / "model_index.json").is_file():
            raise BaseModelError("mini: the built-in base is missing from this installation; install sdlora again")
        return MINI_FOLDER, "mini", mini
    path = Path(name).expanduser()
    if path.is_dir():
        return path, path.resolve().name, None
    if path.suffix.lower() in _PICKLES:
        raise BaseModelError(f"{name}: a pickled checkpoint can run code when it is opened; convert it to safetensors")
    if path.suffix.lower() == ".safetensors":
        if not path.is_file():
            raise BaseModelError(f"{name}: there is no such file")
        return path, path.stem, None
    if path.exists():
        raise BaseModelError(f"{name}: not a base; give mini, a diffusers folder, a .safetensors file or a hub id")
    if not HUB_ID.fullmatch(name):
        raise BaseModelError(f"{name}: there is no such folder; give mini, a diffusers folder or a hub id owner/name")
    return _find_on_hub(name), name, None


def _find_on_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if not choose_files([p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.is_file()])[1]:
            return cached
    except Exception:  # not in the cache, whatever the reason: ask the hub
        pass
    try:
        files, missing = choose_files([s.rfilename for s in HfApi().model_info(name, timeout=10).siblings or []])
    except Exception as e:
        reason = " ".join(str(e).split())[:120]
        raise BaseModelError(f"{name}: no such folder here, and the hub does not give it: {reason}") from None
    if missing:
        raise BaseModelError(f"{name}: the hub's copy has no {', '.join(missing)}; give another base")
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as e:
        reason = " ".join(str(e).split())[:120]
        raise BaseModelError(f"{name}: the download failed ({reason}); try again, or give a diffusers folder") from None


def revision_of(source: Path) -> str:
    """The hub's commit that a base's folder in its cache is of, 40 hex digits; empty for any other folder or file."""
    cached = source.parent.name == "snapshots" and source.parent.parent.name.startswith("models--")
    return source.name if cached and re.fullmatch("[0-9a-f]{40}", source.name) else ""


def choose_files(there: list[str]) -> tuple[list[str], list[str]]:
    """The files of a hub repository that a base needs, and what of it is missing (pickles never count)."""
    two = _XL_FILE in there
    small = (*_SMALL_FILES, _XL_FILE) if two else _SMALL_FILES
    tokenizers = ("tokenizer/", "tokenizer_2/") if two else ("tokenizer/",)
    wanted = [f for f in there if f in small or (f.startswith(tokenizers) and f.endswith((".json", ".txt")))]
    missing = [f for f in small if f not in there]
    for part, stem in WEIGHTS.items():
        if part == "text_encoder_2" and not two:
            continue
        kinds = [f"{part}/{stem}.safetensors", f"{part}/{stem}.fp16.safetensors"]
        found = [f for f in kinds if f in there]
        wanted += found[:1]
        if not found:
            missing.append(kinds[0])
    return wanted, missing

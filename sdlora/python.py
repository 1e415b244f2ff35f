"""Training called from Python, with the command line's flags as keywords."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from .adapter.delta import Adapter
from .bases.family import Base, load_base
from .config import make_recipe
from .training.loop import train_adapter


def train(
    folder: str | Path,
    *,
    base: Base | str = "mini",
    out: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    **recipe: Any,
) -> Adapter:
    """Teaches the base the pictures of a folder; the keywords are the fields of `Recipe`.

    With `out`, a `.safetensors` file, the run's folder is kept beside it and the same call goes on where it stopped;
    without it nothing is left on the disk. A Base that is given stays as it was, and decides the precision and device.

    Raises: SdloraError for a folder, a keyword or a base that cannot be used; RunInterrupted after Ctrl-C.
    """
    named = make_recipe({**recipe, "base": base.name if isinstance(base, Base) else base})
    if isinstance(base, str):
        base = load_base(base, device=device, precision=named.precision)
    if out is not None:
        return train_adapter(Path(folder), base, named, Path(out), restart=restart)
    with tempfile.TemporaryDirectory() as place:
        return train_adapter(Path(folder), base, named, Path(place) / "lora.safetensors", restart=restart)

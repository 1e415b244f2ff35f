"""Build states on disk: written whole or not at all, so that a build killed at any moment goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(path.suffix + ".tmp")
    torch.save(state, part)
    os.replace(part, path)


def load_state(path: Path) -> dict[str, Any]:
    """The saved state, or an empty dict where there is none."""
    return torch.load(path, weights_only=True) if path.exists() else {}

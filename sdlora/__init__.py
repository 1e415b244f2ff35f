"""Teaches Stable Diffusion an art style from a folder of captioned pictures, and stacks such LoRAs.

Importing this package imports no torch; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter.delta import Adapter
    from .adapter.file import read_adapter as load_adapter
    from .bases.family import Base, load_base
    from .combining.stack import combine
    from .config import Recipe
    from .errors import (
        AdapterFileError,
        BaseModelError,
        ConfigError,
        DataError,
        RunError,
        RunInterrupted,
        SdloraError,
    )
    from .generating.generate import generate
    from .python import train

__version__ = "0.1.0"

_PLACES = {
    "Adapter": ("adapter.delta", "Adapter"),
    "AdapterFileError": ("errors", "AdapterFileError"),
    "Base": ("bases.family", "Base"),
    "BaseModelError": ("errors", "BaseModelError"),
    "ConfigError": ("errors", "ConfigError"),
    "DataError": ("errors", "DataError"),
    "Recipe": ("config", "Recipe"),
    "RunError": ("errors", "RunError"),
    "RunInterrupted": ("errors", "RunInterrupted"),
    "SdloraError": ("errors", "SdloraError"),
    "combine": ("combining.stack", "combine"),
    "generate": ("generating.generate", "generate"),
    "load_adapter": ("adapter.file", "read_adapter"),
    "load_base": ("bases.family", "load_base"),
    "train": ("python", "train"),
}

__all__ = [
    "Adapter",
    "AdapterFileError",
    "Base",
    "BaseModelError",
    "ConfigError",
    "DataError",
    "Recipe",
    "RunError",
    "RunInterrupted",
    "SdloraError",
    "__version__",
    "combine",
    "generate",
    "load_adapter",
    "load_base",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

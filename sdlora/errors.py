"""The errors a user can cause: each message is one line that names the file or key, the value and the fix."""

from __future__ import annotations


class SdloraError(Exception):
    """A request or its input is wrong; the command line prints it as one `error: …` line and exits 2."""


class ConfigError(SdloraError):
    """A flag, a TOML key or a value of the recipe is wrong."""


class DataError(SdloraError):
    """A data folder, a picture or a caption cannot be used; lists every problem of the folder at once."""


class AdapterFileError(SdloraError):
    """A LoRA file cannot be read, does not fit the base, or cannot be written."""


class BaseModelError(SdloraError):
    """A base does not exist, is incomplete, or is of a kind that is not supported."""


class RunError(SdloraError):
    """A training run cannot start, go on or be trusted."""


class RunInterrupted(Exception):
    """Training was interrupted and its state saved; `str()` is the line that says how to go on (exit 130)."""

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


class DiskError(SdloraError):
    """A file could not be written: names it, its size, the reason and what to do; what was there before is whole."""


class RunInterrupted(Exception):
    """Training was interrupted and its state saved; `str()` is the line that says how to go on."""

    exit_code = 130
    """128 and the number of the signal: 130 after Ctrl-C, 143 after SIGTERM, 129 where the terminal was closed."""

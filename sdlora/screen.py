"""What a command says: results on stdout, everything else on stderr; no torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from .values import escape

_LINE_EVERY_S = 10.0


def say(line: str) -> None:
    """Prints exactly one line on stderr, whatever is in it."""
    print(escape(line), file=sys.stderr)


def print_line(line: str) -> None:
    """Prints exactly one line on stdout, whatever is in it."""
    print(show_name(escape(line)))


def print_json(value: Any) -> None:
    """Prints the one JSON document of a command."""
    print(json.dumps(value, indent=2, allow_nan=False))


def show_name(path: object) -> str:
    """A path as stdout can always print it."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def show_steps() -> Callable[[int, int], None] | None:
    """A bar of sampler steps on stderr, or nothing where that is no terminal."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar: tqdm[Any] = tqdm(desc="drawing", unit=" steps", file=sys.stderr, leave=False)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return report


class Countdown:
    """What is done and the time left on stderr: a bar on a terminal, else a plain line every ten seconds.

    What takes less than `first_s` seconds is silent.
    """

    def __init__(self, doing: str = "drawing", unit: str = "pictures", first_s: float = _LINE_EVERY_S) -> None:
        self._start_s = time.perf_counter()
        self._due_s = self._start_s + first_s
        self._unit = unit
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=doing, unit=f" {unit}", file=sys.stderr, leave=False)

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(what, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now_s = time.perf_counter()
        if now_s >= self._due_s and done < total:
            self._due_s = now_s + _LINE_EVERY_S
            left_s = round((total - done) * (now_s - self._start_s) / max(done, 1))
            say(f"{done}/{total} {self._unit} · {what} · about {left_s // 60}:{left_s % 60:02d} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

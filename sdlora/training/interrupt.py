"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether someone asked the run to stop."""

    requested = False


@contextmanager
def watch_signals() -> Iterator[Stop]:
    """Notes SIGINT and SIGTERM instead of dying of them; the handlers before it come back afterwards.

    A second signal raises KeyboardInterrupt at once. Outside the main thread Python allows no handlers: then nothing
    is watched.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        # Not print: a handler may run in the middle of another print, and stderr's buffer is not re-entrant.
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

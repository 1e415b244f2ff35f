"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .processes import count_processes, is_main


class Stop:
    """Whether someone asked the run to stop."""

    requested = False


@contextmanager
def watch_signals() -> Iterator[Stop]:
    """Notes SIGINT and SIGTERM instead of dying of them; the handlers before it come back afterwards.

    A second signal raises KeyboardInterrupt at once; not in one of several processes, to which a launcher passes on
    what the terminal has sent them already. Outside the main thread Python allows no handlers: nothing is watched.
    """
    stop, alone = Stop(), count_processes() == 1
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.requested and alone:
            raise KeyboardInterrupt
        if stop.requested or not is_main():
            stop.requested = True
            return
        stop.requested = True
        # Not print: a handler may run in the middle of another print, and stderr's buffer is not re-entrant.
        os.write(2, b"\nstopping after this step and saving" + (b"; once more to stop at once\n" if alone else b"\n"))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""Ctrl-C, SIGTERM and a closed terminal: the first asks the run to stop after its step, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import RunInterrupted
from .processes import count_processes, is_main

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether someone asked the run to stop, and by which signal."""

    requested = False
    number: int = signal.SIGINT


def interrupted(message: str, number: int) -> RunInterrupted:
    """The end of a run that a signal stopped, with the exit code that a shell gives to it."""
    error = RunInterrupted(message)
    error.exit_code = 128 + number
    return error


@contextmanager
def watch_signals() -> Iterator[Stop]:
    """Notes SIGINT, SIGTERM and SIGHUP instead of dying of them; the handlers before it come back afterwards.

    A SIGHUP that was ignored stays so, as under nohup. A second signal raises KeyboardInterrupt, its number in it, at
    once; not in one of several processes, to which a launcher passes on
    what the terminal has sent them already. Outside the main thread Python allows no handlers: nothing is watched.
    """
    stop, alone = Stop(), count_processes() == 1
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.requested and alone:
            raise KeyboardInterrupt(number)
        if not stop.requested:
            stop.number = number
        first, stop.requested = not stop.requested, True
        if not first or not is_main():
            return
        _tell(b"\nstopping after this step and saving" + (b"; once more to stop at once\n" if alone else b"\n"))

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    watched = [number for number in SIGNALS if not (number == signal.SIGHUP and ignored)]
    before = {number: signal.signal(number, note) for number in watched}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _tell(line: bytes) -> None:
    """Writes to stderr from a handler; where its terminal is gone, nothing that is printed afterwards may fail.

    Not print: a handler may run in the middle of another print, and stderr's buffer is not re-entrant.
    """
    try:
        os.write(2, line)
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nothing, stream)
        os.close(nothing)

"""Signals as a person or a system sends them to a run, and what each asks of it."""

import os
import signal
import threading

import pytest

from sdlora.training import interrupt
from sdlora.training.interrupt import interrupted, watch_signals

BOTH = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """A process that nobody launched, whatever the tests were started with: nohup and shells ignore signals."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_the_first_signal_asks_and_the_second_stops_at_once(capfd, first, second):
    with watch_signals() as stop:
        assert not stop.requested
        send(first)
        assert stop.requested
        assert capfd.readouterr().err == "\nstopping after this step and saving; once more to stop at once\n"
        assert interrupted("saved", stop.number).exit_code == 128 + first
        with pytest.raises(KeyboardInterrupt) as stopped:
            send(second)
        assert stopped.value.args == (second,)
    assert capfd.readouterr().err == ""


def test_the_handlers_before_it_come_back():
    seen = []
    own = signal.signal(signal.SIGTERM, lambda *_: seen.append("own"))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    try:
        with watch_signals() as stop:
            send(signal.SIGTERM)
        assert (stop.requested, seen) == (True, [])
        send(signal.SIGTERM)
        assert seen == ["own"]
        with pytest.raises(ZeroDivisionError), watch_signals():
            raise ZeroDivisionError
        send(signal.SIGTERM)
        assert seen == ["own", "own"]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, own)
        signal.signal(signal.SIGINT, interrupt)


def test_a_hangup_that_was_ignored_stays_so():
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a process
    try:
        with watch_signals() as stop:
            send(signal.SIGHUP)
            assert not stop.requested
            send(signal.SIGTERM)
            assert (stop.requested, stop.number) == (True, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, own)


@pytest.mark.parametrize(("rank", "said"), [("0", "\nstopping after this step and saving\n"), ("1", "")])
def test_of_several_processes_none_stops_at_once_and_the_main_one_speaks(monkeypatch, capfd, rank, said):
    """A launcher passes on what the terminal has sent already, so the second signal is no second wish."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with watch_signals() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            send(number)
            assert stop.requested
    assert capfd.readouterr().err == said


def test_outside_the_main_thread_nothing_is_watched():
    before = [signal.getsignal(number) for number in BOTH]
    found = []

    def run():
        with interrupt.watch_signals() as stop:
            found.append((stop.requested, [signal.getsignal(number) for number in BOTH]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, before)]

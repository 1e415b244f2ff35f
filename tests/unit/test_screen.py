"""What a command says while it works, where stderr is no terminal."""

from __future__ import annotations

import pytest

from sdlora import screen


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(screen.time, "perf_counter", lambda: now[0])
    return now


def test_work_of_less_than_a_second_is_silent_and_longer_work_tells_what_is_left(clock, capsys):
    countdown = screen.Countdown("baking", "tensors", first_s=1.0)
    said = []
    for done, at_s in ((0, 0.0), (3, 0.9), (10, 1.5), (20, 3.0), (50, 12.0), (100, 13.0)):
        clock[0] = 100.0 + at_s
        countdown(done, 100, f"module {done}")
        said.append(capsys.readouterr().err)
    assert said == [
        "",
        "",
        "10/100 tensors · module 10 · about 0:14 left\n",
        "",
        "50/100 tensors · module 50 · about 0:12 left\n",
        "",
    ]
    countdown.close()


def test_drawing_tells_every_ten_seconds(clock, capsys):
    countdown = screen.Countdown()
    for done, at_s in ((1, 5.0), (2, 10.0), (3, 15.0), (4, 21.0)):
        clock[0] = 100.0 + at_s
        countdown(done, 8, "a pair")
    assert capsys.readouterr().err == (
        "2/8 pictures · a pair · about 0:30 left\n4/8 pictures · a pair · about 0:21 left\n"
    )

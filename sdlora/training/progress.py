"""What a run tells the person in front of it, on stderr."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

from ..values import escape
from .metrics import SMOOTHING

_LINE_EVERY_S = 10.0
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def say(line: str) -> None:
    """Prints one line on stderr, above the bar where one is shown."""
    tqdm.write(escape(line), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """Steps done, smoothed loss, steps/s and time left: a bar on a terminal, else a plain line every ten seconds."""

    def __init__(self, steps_done: int, steps: int) -> None:
        self.steps, self.done, self._first = steps, steps_done, steps_done
        self._total = self._weight = 0.0
        self._start_s = self._said_s = time.perf_counter()
        self._bar = (
            tqdm(total=steps, initial=steps_done, desc="training", unit=" steps", bar_format=_BAR, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def advance(self, loss: float) -> None:
        """Counts one step with its loss; one that is not finite does not count in the mean."""
        self.done += 1
        if math.isfinite(loss):
            self._total, self._weight = SMOOTHING * self._total + loss, SMOOTHING * self._weight + 1
        text = f"loss {self._total / self._weight:.4f}" if self._weight else "no finite loss yet"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        now_s = time.perf_counter()
        if now_s - self._said_s < _LINE_EVERY_S and self.done < self.steps:
            return
        self._said_s = now_s
        rate = (self.done - self._first) / max(now_s - self._start_s, 1e-9)
        left_s = round((self.steps - self.done) / rate)
        say(f"step {self.done}/{self.steps} · {text} · {rate:.2f} steps/s · {left_s // 60}:{left_s % 60:02d} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

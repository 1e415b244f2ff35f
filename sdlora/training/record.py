"""What one process, the main one, keeps of a run: its rows, pictures and states, on disk, screen and trackers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..bases.family import Base
from ..config import Recipe
from ..data.cache import Encoded
from ..errors import SdloraError
from .metrics import Metrics
from .preview import Previews
from .progress import Progress, say
from .run import Run
from .settings import list_settings
from .state import State
from .trackers import begin_tracking, end_tracking, track
from .validation import Validation


@dataclass
class Record:
    """The record of one run; only the main process opens it, all know when something is due."""

    base: Base
    recipe: Recipe
    encoded: Encoded
    previews: Previews
    validation: Validation
    state: State

    def open(self, run: Run, accelerator: Accelerator) -> None:
        """Begins to write: rows after the saved steps are forgotten."""
        done = self.state.saved
        self.accelerator = accelerator
        self.metrics, self.progress = Metrics(run.metrics, done), Progress(done, self.recipe.steps)
        begin_tracking(accelerator, run.trackers, run.out.stem, list_settings(self.base, self.recipe), done)

    def due(self, step: int) -> bool:
        """Whether more than a row is kept after `step` steps, the state not counted; the same in every process."""
        return self.validation.due(step) or self.previews.due(step, self.recipe.steps)

    def add(self, row: dict[str, Any], saving: bool) -> None:
        """Keeps a step: measures and draws what is due, and saves the state where it is to be saved."""
        step, averages = row["step"], self.state.averages
        if self.validation.due(step):
            with averages.shown():
                row["validation_loss"] = self.validation.measure(self.base, self.encoded)
        self.metrics.add(row)
        track(self.accelerator, row)
        self.progress.advance(row["loss"])
        if self.previews.due(step, self.recipe.steps):
            with averages.shown():
                self.previews.draw(self.base, step)
        if saving:
            self.save(step)

    def accompany(self, step: int) -> None:
        """Runs the base as `add` does, for a main process that cannot alone, its base being split; keeps nothing."""
        if self.validation.due(step):
            with self.state.averages.shown():
                self.validation.measure(self.base, self.encoded)
        if self.previews.due(step, self.recipe.steps):
            with self.state.averages.shown(), suppress(SdloraError):  # the main process says it
                self.previews.sample(self.base)

    def say_skipped(self) -> None:
        """One line, where the run left out steps."""
        skipped = sum("skipped" in row for row in self.metrics.rows)
        if skipped:
            say(
                f"{skipped} of {self.recipe.steps} steps were skipped, their loss or gradient not being finite; "
                f"{self.metrics.path.name} says which"
            )

    def save(self, step: int, after_fault: bool = False) -> None:
        """Saves the state after `step` steps, which is still that after any that were skipped behind it."""
        self.state.save(step, self.metrics, after_fault)

    def close(self) -> None:
        """Ends what `open` began; does nothing where it did not."""
        if hasattr(self, "metrics"):
            self.metrics.close()
            self.progress.close()
            end_tracking(self.accelerator)

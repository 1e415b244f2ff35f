"""TensorBoard, wandb and trackio, through accelerate: the numbers of `metrics.jsonl`, and the recipe.

The names and folders that they are given hold no path, user or machine. What they add of themselves is theirs:
TensorBoard names its files after the machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "sdlora"
"""What all runs are filed under."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Finds a tracker whose package is not there, before anything is loaded. Raises: ConfigError."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f'tracker = "{name}" needs the package {name}; pip install {name}, or leave it out')


def begin_tracking(
    accelerator: Accelerator, folder: Path, run_name: str, settings: Mapping[str, Any], steps_done: int
) -> None:
    """Opens the trackers that accelerate was made with, in `folder`, and tells them the settings.

    What TensorBoard holds of steps after `steps_done`, from a run that was killed, is not shown any more.
    """
    if not accelerator.log_with:
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": steps_done + 1},
        "wandb": {"dir": str(folder), "name": run_name},
        "trackio": {"name": run_name},
    }
    accelerator.init_trackers(PROJECT, _plain(settings), options)


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """Tells every tracker one row of the metrics, and the steps a second that its seconds come to."""
    if not accelerator.trackers:
        return
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
    values = {k: v for k, v in numbers.items() if k not in ("step", "seconds")}
    if row["seconds"] > 0:
        values["steps_per_s"] = 1 / row["seconds"]
    accelerator.log(values, step=row["step"])


def end_tracking(accelerator: Accelerator) -> None:
    """Closes the trackers, and leaves accelerate's processes together, which its own end would part."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as the few types that every tracker takes."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        plain[name] = value if isinstance(value, bool | int | float | str) else _word(value)
    return plain


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "open" if value is None else str(value)

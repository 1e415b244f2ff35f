"""What a run needs of its process: accelerate, its threads, and room in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from ..bases.family import Base
from ..config import Recipe
from .checkpoint import Checkpoint
from .progress import say


def make_accelerator(base: Base, recipe: Recipe, trackers: Path | None = None) -> Accelerator:
    """accelerate for this run: backward, accumulation, clipping, and the loss scale that fp16 needs; no autocast.

    Its trackers are those of the recipe where there is a folder for them.
    """
    cpu = base.device.type == "cpu"
    mixed = "fp16" if recipe.precision == "fp16" else "no"
    shared = AcceleratorState._shared_state
    if shared and (shared["device"].type, shared["_mixed_precision"]) != (base.device.type, mixed):
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process had other settings
    passes = GradientAccumulationPlugin(num_steps=recipe.accumulation)  # a number would give way to the launcher's
    project = ProjectConfiguration(logging_dir=None if trackers is None else str(trackers))
    return Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        gradient_accumulation_plugin=passes,
        log_with=list(recipe.tracker) if trackers is not None and recipe.tracker else None,
        project_config=project,
    )


@contextmanager
def same_threads(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Runs with as many threads as the checkpoint's run had: another number sums in another order, in other bits."""
    before = torch.get_num_threads()
    threads = int(checkpoint.state.get("threads", before)) if checkpoint is not None else before
    if threads != before:
        say(f"using {threads} threads as before, not {before}, so that the result stays the same to the bit")
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def release(base: Base, recipe: Recipe, draws: bool = True) -> None:
    """Lets go of the parts whose work is done: previews still need the VAE, a trained text encoder stays."""
    if not recipe.preview or not draws:
        base.release("vae")
    if not recipe.text_encoder:
        base.release_text_encoders()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()

"""What a run needs of its process: accelerate, its threads, and room in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ..bases.family import Base
from ..config import Recipe
from ..errors import RunError
from .checkpoint import Checkpoint
from .progress import say


def make_accelerator(base: Base, recipe: Recipe) -> Accelerator:
    """accelerate for this run: backward, accumulation, clipping, and the loss scale that fp16 needs; no autocast.

    Raises: RunError where several processes were launched.
    """
    cpu = base.device.type == "cpu"
    mixed = "fp16" if recipe.precision == "fp16" else "no"
    shared = AcceleratorState._shared_state
    if shared and (shared["device"].type, shared["_mixed_precision"]) != (base.device.type, mixed):
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process had other settings
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed, gradient_accumulation_steps=recipe.accumulation)
    if accelerator.num_processes > 1:
        raise RunError(
            f"{accelerator.num_processes} processes were launched, training uses one; start it without a launcher"
        )
    return accelerator


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


def release(base: Base, recipe: Recipe) -> None:
    """Lets go of the parts whose work is done: previews still need the VAE, a trained text encoder stays."""
    if not recipe.preview:
        base.release("vae")
    if not recipe.text_encoder:
        base.release_text_encoders()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()

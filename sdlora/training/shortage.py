"""Out of memory: which setting of a run to lower, said in the place of a library's traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import Recipe
from ..errors import RunError

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""How torch's allocators, of the CPU, CUDA, ROCm and MPS, say it in errors that have no kind of their own."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def find_savings(recipe: Recipe, device: str, training: bool = True) -> tuple[list[str], list[str]]:
    """Flags that need less memory: those with which the run goes on, and those that make it another run.

    Before `training`, while the base is loaded and pictures are encoded, only what makes those smaller counts.
    """
    same, other = [], []
    if training:
        same += ["--recompute all"] if recipe.recompute != "all" else []
        if recipe.batch_size > 1:
            half = recipe.batch_size // 2
            other.append(f"--batch-size {half} --accumulation {-(-recipe.images_per_step // half)}")
    if recipe.quantise == "none":
        other.append("--quantise nf4" if device == "cuda" else "--quantise int8")
    other += ["--precision bf16"] if recipe.precision == "fp32" else []
    return same, [*other, "a smaller --resolution"]


@contextmanager
def naming_what_to_lower(recipe: Recipe, device: str, doing: str, training: bool = True) -> Iterator[None]:
    """Turns running out of memory into one line. Raises: RunError, naming what was done and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        same, other = find_savings(recipe, device, training)
        memory = "memory" if device == "cpu" else f"{device} memory"
        go_on = f"{same[0]}, which goes on from the last checkpoint, or " if same else ""
        raise RunError(
            f"out of {memory} while {doing}; checkpoints are untouched; give {go_on}with --restart {' or '.join(other)}"
        ) from error

"""What checkpoints cost: `python -m benchmarks.checkpoints`, which prints their share of a run at the default interval.

Trains `mini`, whose steps are the shortest there are, on the sample pictures, and times each save.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sdlora.bases.family import Base, load_base
from sdlora.config import Recipe
from sdlora.demo import ROOT
from sdlora.training import loop
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run
from sdlora.training.state import State


def measure(base: Base, recipe: Recipe, data: Path) -> dict[str, float]:
    """Seconds of all steps and of all saves, and how many saves and bytes there were."""
    saves: list[float] = []
    save = State.save

    def timed(*args: Any) -> None:
        began_s = time.perf_counter()
        save(*args)
        saves.append(time.perf_counter() - began_s)

    with tempfile.TemporaryDirectory() as folder, patch.object(State, "save", timed):
        out = Path(folder) / "a.safetensors"
        loop.train_adapter(data, base, recipe, out)
        run = Run(out)
        steps_s = sum(row["seconds"] for row in read_rows(run.metrics))
        newest = max(run.checkpoints.iterdir())
        size_bytes = sum(p.stat().st_size for p in newest.iterdir())
    return {"steps_s": steps_s, "saves_s": sum(saves), "saves": len(saves), "bytes": size_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps)
    found = measure(load_base("mini", precision="bf16"), recipe, ROOT / "datasets" / "ink")
    share = found["saves_s"] / (found["steps_s"] + found["saves_s"])
    print(
        f"mini, rank {recipe.rank}, {recipe.steps} steps of {recipe.batch_size}, a save every "
        f"{recipe.checkpoint_every}: "
        f"{found['saves']} saves of {found['bytes']:,} bytes took {found['saves_s']:.2f} s beside "
        f"{found['steps_s']:.1f} s of steps: {share:.2%}"
    )


if __name__ == "__main__":
    main()

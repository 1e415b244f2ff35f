"""A run killed with SIGKILL again and again ends in the same bytes as one that was left alone."""

import multiprocessing
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import make_folder

from sdlora.config import Recipe
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run

KILLS = 20
RECIPE = Recipe(steps=60, batch_size=1, rank=2, precision="fp32", checkpoint_every=1, learning_rate=1e-2, flip=False)


def train(folder: Path, out: Path, begun) -> None:
    """One run in a process of its own; `begun` is set when the work starts."""
    import torch
    from tiny import make_tiny_base

    from sdlora.training.loop import train_adapter

    torch.set_num_threads(1)
    begun.set()
    train_adapter(folder, make_tiny_base(), RECIPE, out)


@pytest.fixture(scope="module")
def context():
    """Children that are forked from a server which has imported everything, so that a run starts in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "diffusers", "sdlora.training.loop", __name__])
    return context


def rows(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(Run(out).metrics)]


@pytest.mark.slow
def test_killed_at_random_moments_ends_in_the_same_bytes(context, tmp_path):
    folder = make_folder(tmp_path / "data", 2)
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"

    def start(out):
        begun = context.Event()
        process = context.Process(target=train, args=(folder, out, begun))
        process.start()
        assert begun.wait(60)
        return process

    process, start_s = start(whole), time.perf_counter()
    process.join()
    alone_s = time.perf_counter() - start_s
    assert process.exitcode == 0

    chance = random.Random(0)
    run, kills, in_checkpoint, starts = Run(killed), 0, 0, 0
    while kills < KILLS:
        process = start(killed)
        starts += 1
        assert starts < 4 * KILLS
        # Half of the kills come at any moment of a run, the others as soon as a checkpoint is being written.
        if chance.random() < 0.5:
            process.join(chance.uniform(0, 0.3 * alone_s))
        else:
            process.join(chance.uniform(0, 0.02))
            while process.is_alive() and not list(run.checkpoints.glob("*.tmp-*")):
                pass
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before the kill: start over for the rest
            break
        assert process.exitcode == -9
        kills += 1
        in_checkpoint += bool(list(run.checkpoints.glob("*.tmp-*")))
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    assert kills == KILLS, f"finished after {kills} kills: more steps are needed"
    assert in_checkpoint >= 3
    assert killed.read_bytes() == whole.read_bytes()
    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(killed)] == list(range(1, RECIPE.steps + 1))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000059", "step-000060"]

"""Runs in processes of their own that are killed, at any moment or at a given call to the disk, and started again."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from disk_calls import die_at, let, watching
from pictures import make_folder

from sdlora.config import Recipe
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run

PLAIN = Recipe(steps=40, batch_size=1, rank=2, precision="fp32", checkpoint_every=1, learning_rate=1e-2, flip=False)
RICH = Recipe(
    steps=16, batch_size=2, accumulation=2, rank=2, precision="fp32", checkpoint_every=1, learning_rate=1e-2,
    buckets=True, small_buckets=True, bucket_step_px=16, crop="random", crops=2, text_encoder=True, ema_decay=0.9,
    caption_variants=3, shuffle_tags=True, tag_dropout=0.3, dropout=0.1, rank_dropout=0.1, noise_offset=0.05,
    validation_share=0.2, validate_every=4, preview=("a cat",), preview_every=5,
)  # fmt: skip
"""All that a resumed run must take up: buckets, crops, wordings, averages, passes, the text encoder, and more."""
SHORT = Recipe(
    steps=3, batch_size=1, rank=1, warmup_steps=1, precision="fp32", checkpoint_every=1, learning_rate=1e-2,
    flip=False, preview=("a cat",),
)  # fmt: skip
RECIPES = {"plain": PLAIN, "rich": RICH, "short": SHORT}


def train(
    folder: Path, out: Path, name: str, begun: Any, die: tuple[int, bool] | None = None, told: Any = None
) -> None:
    """One run in a process of its own; `begun` is set when the work starts.

    `die` is the call to the disk at which it dies, and whether in its middle; `told` is put how many there were.
    """
    import torch
    from tiny import make_tiny_base

    from sdlora.training.loop import train_adapter

    torch.set_num_threads(1)
    begun.set()
    with watching(out.parent, die_at(*die) if die else let) as calls:
        train_adapter(folder, make_tiny_base(), RECIPES[name], out)
    if told is not None:
        told.put([(call.kind, call.path) for call in calls])


def make_context() -> Any:
    """Children that are forked from a server which has imported everything, so that a run starts in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm", "kills"])
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with patch.dict(os.environ, PYTHONPATH=paths):  # the server looks nowhere else, and says nothing of what it misses
        forkserver.ensure_running()
    return context


def make_data(place: Path, name: str) -> Path:
    """A data folder for a recipe, its captions tags."""
    folder = make_folder(place, 5 if name == "rich" else 2)
    if name == "rich":
        from PIL import Image

        for i, side in enumerate((48, 64, 96)):  # other shapes, so other buckets
            Image.open(folder / f"{i}.png").resize((64, side)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"a shape, tag {i}, another, one more")
    return folder


def rows_of(out: Path) -> list[dict[str, Any]]:
    """A run's metrics, but for its times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(Run(out).metrics)]


@dataclass
class Figures:
    """What came of killing: how often, how often in a save, how many runs ended, and what was wrong."""

    kills: int = 0
    in_save: int = 0
    runs: int = 0
    lost: int = 0
    """Runs that could not go on."""
    different: int = 0
    """Runs that ended in other bytes, or other metrics, than one that was left alone."""


class Killer:
    """Kills runs of one recipe, and holds what they come to against a run that nothing happened to."""

    def __init__(self, place: Path, name: str, context: Any) -> None:
        self.place, self.name, self.context = place, name, context
        self.folder = make_data(place / "data", name)
        self.whole = place / "whole" / "a.safetensors"
        process = self.start(self.whole)
        started_s = time.perf_counter()
        process.join()
        assert process.exitcode == 0
        self.alone_s = time.perf_counter() - started_s
        self.bytes, self.rows = self.whole.read_bytes(), rows_of(self.whole)

    def start(self, out: Path, die: tuple[int, bool] | None = None, told: Any = None) -> Any:
        """A run that has begun."""
        out.parent.mkdir(parents=True, exist_ok=True)
        begun = self.context.Event()
        process = self.context.Process(target=train, args=(self.folder, out, self.name, begun, die, told))
        process.start()
        assert begun.wait(120)
        return process

    def is_same(self, out: Path) -> bool:
        """Whether a run that ended is the one that was left alone, and left nothing half-written."""
        left = list(out.parent.rglob("*.tmp-*"))
        return not left and out.read_bytes() == self.bytes and rows_of(out) == self.rows

    def kill_at_random(self, kills: int, seed: int = 0) -> Figures:
        """Kills runs until so many were killed, half of them while a state is being saved."""
        chance, found = random.Random(seed), Figures()
        while found.kills < kills:
            out = self.place / f"run-{found.runs}" / "a.safetensors"
            self._kill_one(out, kills, chance, found)
            shutil.rmtree(out.parent)
        return found

    def _kill_one(self, out: Path, kills: int, chance: random.Random, found: Figures) -> None:
        run = Run(out)
        while True:
            process = self.start(out)
            if found.kills >= kills:
                process.join()
            elif chance.random() < 0.5:
                process.join(chance.uniform(0, 0.12 * self.alone_s))
            else:
                process.join(chance.uniform(0, 0.02))
                while process.is_alive() and not list(run.checkpoints.glob(f"*.tmp-{process.pid}")):
                    time.sleep(0.0005)
                process.join(chance.choice((0, chance.uniform(0, 0.003))))
            process.kill()
            process.join()
            if process.exitcode != -9:
                break
            found.kills += 1
            found.in_save += bool(list(run.checkpoints.glob(f"*.tmp-{process.pid}")))
        found.runs += 1
        found.lost += process.exitcode != 0
        found.different += process.exitcode == 0 and not self.is_same(out)

    def kill_at_every_call(self, first: str = "") -> tuple[Figures, list[str]]:
        """Kills a run before each of its calls to the disk, and in the middle of each write; and which calls there are.

        `first` is how the path begins, within the run folder, of the first call that it is killed at.
        """
        told = self.context.Queue()
        process = self.start(self.place / "counted" / "a.safetensors", told=told)
        kinds, paths = zip(*told.get(timeout=120), strict=True)
        process.join()
        found, folder = Figures(), str(Run(self.place / "counted" / "a.safetensors").folder)
        begin = next(i for i, path in enumerate(paths) if path.startswith(f"{folder}/{first}"))
        for number, kind in list(enumerate(kinds))[begin:]:
            for half in (False, True) if kind == "write" else (False,):
                out = self.place / f"call-{number}-{half}" / "a.safetensors"
                process = self.start(out, (number, half))
                process.join()
                assert process.exitcode == -9, (number, kind, process.exitcode)
                found.kills += 1
                process = self.start(out)
                process.join()
                found.runs += 1
                found.lost += process.exitcode != 0
                found.different += process.exitcode == 0 and not self.is_same(out)
                shutil.rmtree(out.parent)
        return found, list(kinds[begin:])

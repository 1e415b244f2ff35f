"""Imports, when it is imported, all that a run needs, late ones too: for processes to be forked from."""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import make_folder
from tiny import make_tiny_base

from sdlora.config import Recipe
from sdlora.training.loop import train_adapter

torch.set_num_threads(1)  # before any work: threads do not outlive a fork
with tempfile.TemporaryDirectory() as _place:
    train_adapter(
        make_folder(Path(_place) / "data", 1),
        make_tiny_base(),
        Recipe(steps=1, batch_size=1, rank=1, precision="fp32", preview=("a cat",)),
        Path(_place) / "a.safetensors",
    )

gc.collect()
gc.freeze()  # what the collector would look at, and so copy, in every process that is forked

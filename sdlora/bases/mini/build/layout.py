"""The text encoder learns where things are: each padding token says what one cell of the picture holds.

A UNet that must find out by itself how a word becomes a layout needs thousands of steps for it. Here the 64 last
tokens of a caption are taught to predict the latents of the picture's 8 x 8 cells, by a linear head that is thrown
away, and the first head of the UNet's cross-attentions is taught one thing for all words: to look up its own cell.
The models stay what they are.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fast import FastAttnProcessor
from .state import load_state, save_state

CELLS = 64
WIDTH = 128
FIRST_TOKEN = 77 - CELLS


def new_head() -> nn.Linear:
    """From a token's state to its cell's 2 x 2 latents of 4 channels."""
    return nn.Linear(WIDTH, 16)


def cells_of(x0: Tensor) -> Tensor:
    """Latents [B, 4, 16, 16] as cells [B, 64, 16]."""
    b = len(x0)
    return x0.view(b, 4, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, CELLS, 16)


def layout_loss(head: nn.Module, states: Tensor, x0: Tensor) -> Tensor:
    """Mean squared error of the layout that the text states [B, 77, 128] give, against scaled latents x0."""
    return F.mse_loss(head(states[:, FIRST_TOKEN:]).float(), cells_of(x0))


@functools.cache
def _own_tokens(queries: int) -> Tensor:
    """Which tokens [N, 77] stand for the cells that each of N queries, a square's, covers: 1 or 0."""
    side = math.isqrt(queries)
    own = torch.zeros(queries, FIRST_TOKEN + CELLS)
    for cell in range(CELLS):
        y, x = divmod(cell, 8)
        ys = range(y * side // 8, max(y * side // 8 + 1, (y + 1) * side // 8))
        xs = range(x * side // 8, max(x * side // 8 + 1, (x + 1) * side // 8))
        own[[r * side + c for r in ys for c in xs], FIRST_TOKEN + cell] = 1
    return own


class Lookup(threading.local):
    """Teaches the cross-attention's first heads to look up their own cell; collects by thread what they miss."""

    def __init__(self) -> None:
        self.misses: list[Tensor] = []

    def note(self, p: Tensor) -> None:
        """Takes one layer's first head, attention p [B, N, 77]."""
        hit = (p.float() * _own_tokens(p.shape[1])).sum(-1)
        self.misses.append(-(hit + 1e-4).log().mean())

    def take_loss(self) -> Tensor:
        """The mean miss (cross-entropy in nats) of the layers noted since the last call."""
        loss = torch.stack(self.misses).mean()
        self.misses = []
        return loss


def watch_lookup(unet: Any, lookup: Lookup) -> None:
    """Lets every cross-attention but the first level's, which cannot know where it is yet, be watched."""
    processors = {
        name: FastAttnProcessor(lookup.note if ".attn2." in name and not name.startswith("down_blocks.0") else None)
        for name in unet.attn_processors
    }
    unet.set_attn_processor(processors)


def train_layout(
    text: Any,
    tokenizer: Any,
    draw: Any,
    work: Path,
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> nn.Linear:
    """Trains the text encoder and the head on captions and latents alone; `draw(step, batch)` gives (x0, prompts)."""
    torch.manual_seed(seed)
    head = new_head()
    both = nn.ModuleDict({"text_encoder": text, "head": head})
    text.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(both.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start = 0
    saved = load_state(work / "layout.part.safetensors")
    if saved:
        both.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    began, losses = time.perf_counter(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = learning_rate * min(1, (step + 1) / 100) * (0.05 + 0.95 * decay)
        x0, prompts = draw(step, batch)
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            states = text(ids)[0]
            loss = layout_loss(head, states, x0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            pace = (time.perf_counter() - began) / (step + 1 - start)
            print(f"layout {step + 1}/{steps} error {np.mean(losses):.4f} {pace:.3f} s/step", flush=True)
            losses = []
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"model": both.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(work / "layout.part.safetensors", state)
    return head

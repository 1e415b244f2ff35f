"""The training benchmark: both loops learn with equal layers, and the table says what was measured."""

import json
import os
import time

import pytest
import torch

from benchmarks import training
from benchmarks.__main__ import count_flops, render, summarize
from benchmarks.plain_loop import train_plainly
from benchmarks.training import Case
from sdlora.adapter.layers import attach
from tests.tiny import make_tiny_base


def test_plain_loop_trains_as_many_factors_as_ours_and_moves_them(monkeypatch):
    base = make_tiny_base()
    ours = attach({"unet": base.unet}, {"unet": ("attention",)}, rank=4, alpha=4.0, seed=0)
    count = ours.count
    ours.detach_from_base()
    steps, seen = [], []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda factors, **more: seen.append(factors) or adamw(factors, **more))
    seconds = train_plainly(
        base.unet.bfloat16(),
        steps=5,
        batch_size=2,
        rank=4,
        latents=torch.randn(3, 4, 8, 8),
        text=torch.randn(3, 77, 32),
        alphas_cumprod=base.alphas_cumprod,
        after_step=lambda: steps.append(1),
    )
    (factors,) = seen
    assert sum(p.numel() for p in factors) == count
    assert all(p.dtype == torch.float32 for p in factors)
    assert all(bool(p.any()) for p in factors)  # up factors begin at zero
    assert len(seconds) == len(steps) == 5


def test_meter_counts_what_the_steps_add(monkeypatch):
    monkeypatch.setitem(os.environ, training.STARTED, str(time.time() - 5))
    meter = training.Meter()
    meter.begin()
    held = []
    for _ in range(3):
        held.append(torch.ones(8 * 2**20))  # 32 MiB
        meter.step()
    found = meter.found([9.0, 9.0, 1.0])
    assert found.seconds == [1.0]
    assert 90 < found.peak_bytes / 2**20 < 140
    assert 5 <= found.start_seconds < 10


def test_flops_of_a_step_are_about_twice_the_forward_pass():
    """SD 1.5 at 512 px: 0.806 TFLOP forward, 1.72 a LoRA step of one picture (computed elsewhere)."""
    assert count_flops("sd1", 512) == pytest.approx(1.65e12, rel=0.06)


def test_table_holds_ours_against_the_plain_loop():
    case = Case("sdlora", "sd1", 256, 2, 8, 6, "x.safetensors")
    run = {"seconds": [1.0, 2.0, 3.0], "cpu_seconds": 2.5, "peak_bytes": 2**30, "start_seconds": 7.0, "on": "2 threads"}
    plain = Case("plain", "sd1", 256, 2, 8, 6, "x.safetensors")
    rows = [
        summarize(case, [run], 1e12, 4e12),
        summarize(plain, [run | {"seconds": [5.0]}], 1e12, 4e12),
    ]
    assert rows[0]["share of the limit"] == 0.25
    assert rows[0]["pictures a second"] == 1.0
    assert "x.safetensors" not in json.dumps(rows)
    machine = {"cpu": "one", "gpu": "none"}
    text = render({"date": "d", "command": "", "machine": machine, "ceiling": {"matrix product": 4e12}, "rows": rows})
    assert (
        "| SD 1.5 256 px | 2 | 8 | sdlora | 2.000 (1.000, 3.000) | 2.50 | 2.50 | 1.00 | 1024 | 7.0 s | 25.0 % |" in text
    )
    assert "| plain | 5.000 (5.000, 5.000) | 1.00 |" in text
    assert "On a GPU: not measured." in text

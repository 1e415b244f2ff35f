"""Our SDXL and DoRA files in diffusers' pipelines: every key is taken, and the pictures' models compute the same."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import make_tiny_parts, make_tiny_pipeline

from sdlora.adapter import Adapter, Card, LayerPlan, attach, find_module, weight_on, write_adapter

pytest.importorskip("peft")
# As deep as the real one, since its names count the blocks.
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
}


def learnt_adapter(parts: dict[str, nn.Module], words: tuple[str, ...], family: str, plan: LayerPlan) -> Adapter:
    """Random factors (and lengths), all of one rank and alpha: diffusers scales mixed alphas of kohya files wrongly."""
    chosen = {part: module for part, module in parts.items() if part != "vae"}
    g = torch.Generator().manual_seed(5)
    with attach(chosen, dict.fromkeys(chosen, words), rank=3, alpha=1.5, seed=0, plan=plan) as layers:
        for layer in layers.layers:
            with torch.no_grad():
                layer.up.normal_(std=0.2, generator=g)
                if layer.magnitude is not None:
                    layer.magnitude.mul_(0.9 + 0.2 * torch.rand(layer.magnitude.shape, generator=g))
        return layers.adapter(Card(family, "tiny", "tok"))


def outputs(parts: dict[str, nn.Module], family: str) -> list[torch.Tensor]:
    """What the text encoders and the UNet give for fixed inputs."""
    torch.manual_seed(2)
    ids, z, t = torch.randint(0, 50, (2, 77)), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        encoded = [parts[part](ids) for part in sorted(parts) if part.startswith("text_encoder")]
        text = torch.cat([e.last_hidden_state for e in encoded], dim=-1)
        more = {}
        if family == "sdxl":
            sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
            more = {"added_cond_kwargs": {"text_embeds": encoded[1].text_embeds, "time_ids": sizes}}
        return [text, parts["unet"](z, t, encoder_hidden_states=text, **more).sample]


@pytest.mark.parametrize(
    ("family", "format", "words", "dora"),
    [
        ("sdxl", "kohya", ("attention", "feed-forward", "projections", "convolutions", "time"), False),
        ("sdxl", "diffusers", ("attention", "feed-forward"), False),
        ("sd1", "diffusers", ("attention",), True),
    ],
)
def test_diffusers_opens_the_file_and_computes_the_same(
    tmp_path: Path, family: str, format: str, words: tuple[str, ...], dora: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options = THREE_LEVELS if family == "sdxl" else {}
    parts = make_tiny_parts(0, family, **options)
    adapter = learnt_adapter(parts, words, family, LayerPlan(dora=dora))
    plain = outputs(parts, family)
    write_adapter(adapter, tmp_path / "a.safetensors", format)
    pipe = make_tiny_pipeline(0, family=family, **options)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    names = [part for part in parts if part != "vae"]
    adapted = {part: getattr(pipe, part) for part in names}
    assert sum(hasattr(m, "lora_A") for part in adapted.values() for m in part.modules()) == len(adapter.deltas)
    assert not [r for r in caplog.records if "unexpected" in r.message or "missing" in r.message]
    found = outputs(adapted, family)

    ours = make_tiny_parts(0, family, **options)
    for path, delta in adapter.deltas.items():
        weight = find_module(ours, path).weight
        weight.data += weight_on(delta, weight.data)  # type: ignore[arg-type, union-attr]
    for theirs, mine, before in zip(found, outputs(ours, family), plain, strict=True):
        error = float((theirs - mine).abs().max())
        assert error <= 2e-5 * max(1.0, float(mine.abs().max()))
        assert float((mine - before).abs().max()) > 100 * error

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

from sdlora.adapter import Adapter, Card, LayerPlan, attach, find_module, read_adapter, weight_on, write_adapter
from sdlora.adapter.resizing import resize
from sdlora.adapter.truncation import Keep
from sdlora.bases.stored import find_stored
from sdlora.combining.baking import bake
from sdlora.combining.extraction import extract
from sdlora.combining.plan import Plan

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
        ("sd1", "kohya", ("attention", "feed-forward", "projections", "convolutions", "time"), False),
        ("sd2", "kohya", ("attention", "feed-forward", "projections"), False),
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
    found = outputs(load_in_diffusers(tmp_path / "a.safetensors", adapter, family, options, caplog), family)
    check_outputs(adapter, family, options, plain, found)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_opens_resized_and_extracted_files_too(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = THREE_LEVELS if family == "sdxl" else {}
    parts = make_tiny_parts(0, family, **options)
    learnt = learnt_adapter(parts, ("attention", "feed-forward"), family, LayerPlan())
    plain = outputs(parts, family)
    write_adapter(resize(learnt, Keep(2)), tmp_path / "small.safetensors")
    make_tiny_pipeline(0, family=family, **options).save_pretrained(tmp_path / "base")
    stored = find_stored(str(tmp_path / "base"))
    bake(Plan.of([(learnt, 1.0)]), stored, tmp_path / "tuned")
    extracted = extract(find_stored(str(tmp_path / "tuned")), stored, rank=3)
    write_adapter(extracted.adapter, tmp_path / "extracted.safetensors")
    assert set(extracted.adapter.deltas) == set(learnt.deltas)
    for name in ("small", "extracted"):
        adapter = read_adapter(tmp_path / f"{name}.safetensors")
        found = outputs(load_in_diffusers(tmp_path / f"{name}.safetensors", adapter, family, options, caplog), family)
        check_outputs(adapter, family, options, plain, found)


def load_in_diffusers(
    file: Path, adapter: Adapter, family: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> dict[str, nn.Module]:
    """A pipeline's parts with the file loaded, once every module of it has a layer and no key is left over."""
    pipe = make_tiny_pipeline(0, family=family, **options)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    adapted = {part: getattr(pipe, part) for part in make_tiny_parts(0, family, **options) if part != "vae"}
    assert sum(hasattr(m, "lora_A") for part in adapted.values() for m in part.modules()) == len(adapter.deltas)
    assert not [
        r for r in caplog.records if any(word in r.message for word in ("unexpected", "missing", "No LoRA keys"))
    ]
    return adapted


def check_outputs(
    adapter: Adapter, family: str, options: dict[str, Any], plain: list[torch.Tensor], found: list[torch.Tensor]
) -> None:
    """What diffusers computes is what W + ΔW gives."""
    ours = make_tiny_parts(0, family, **options)
    for path, delta in adapter.deltas.items():
        weight = find_module(ours, path).weight
        weight.data += weight_on(delta, weight.data)  # type: ignore[arg-type, union-attr]
    for theirs, mine, before in zip(found, outputs(ours, family), plain, strict=True):
        error = float((theirs - mine).abs().max())
        assert error <= 2e-5 * max(1.0, float(mine.abs().max()))
        assert float((mine - before).abs().max()) > 100 * error

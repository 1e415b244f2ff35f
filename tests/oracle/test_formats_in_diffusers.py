"""Which kinds of LoRA file diffusers opens: what `docs/formats.md` says of it, tried."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_files_in_diffusers import outputs
from tiny import make_tiny_parts, make_tiny_pipeline

from sdlora.adapter import find_module, read_adapter, weight_on

pytest.importorskip("peft")
BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
CONV, NORM = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_down_blocks_0_resnets_0_norm1"


def rand(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair() -> dict[str, torch.Tensor]:
    """An ordinary module, so that each file has something that opens."""
    q = f"{BLOCK}_to_q"
    return {f"{q}.lora_down.weight": rand(2, 16), f"{q}.lora_up.weight": rand(16, 2), f"{q}.alpha": torch.tensor(2.0)}


def convolution(mid: bool) -> dict[str, torch.Tensor]:
    side = (1, 1) if mid else (3, 3)
    found = {f"{CONV}.lora_down.weight": rand(2, 16, *side), f"{CONV}.lora_up.weight": rand(16, 2, 1, 1)}
    found |= {f"{CONV}.lora_mid.weight": rand(2, 2, 3, 3)} if mid else {}
    return found | {f"{CONV}.alpha": torch.tensor(2.0)}


FILES: dict[str, dict[str, torch.Tensor]] = {
    "plain": pair(),
    "LoCon": pair() | convolution(mid=False),
    "CP": pair() | convolution(mid=True),
    "full difference": pair() | {f"{BLOCK}_to_k.diff": rand(16, 16)},
    "bias": pair() | {f"{BLOCK}_to_out_0.diff_b": rand(16)},
    "norm": pair() | {f"{NORM}.w_norm": rand(16), f"{NORM}.b_norm": rand(16)},
    "numbers": {"unet:0:up": rand(16, 2), "unet:0:down": rand(2, 16)},
    "embeddings": pair() | {"bundle_emb.tok.string_to_param.*": rand(1, 32)},
    "F8": {k: v if "alpha" in k else v.to(torch.float8_e4m3fn) for k, v in pair().items()},
    "NaN": {k: v * float("nan") if "up" in k else v for k, v in pair().items()},
    "DoRA": pair() | {f"{BLOCK}_to_q.dora_scale": rand(16, 1).abs()},
    "LoHa": {f"{BLOCK}_to_q.hada_w{n}_{s}": rand(16, 2) if s == "a" else rand(2, 16) for n in (1, 2) for s in "ab"},
    "LoKr": {f"{BLOCK}_to_q.lokr_w1": rand(2, 2), f"{BLOCK}_to_q.lokr_w2": rand(8, 8)},
    "scalar": pair() | {f"{BLOCK}_to_q.scalar": torch.tensor(0.5)},
}


def load(tensors: dict[str, torch.Tensor], place: Path) -> list[torch.Tensor]:
    """What diffusers computes with the file."""
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, place / "a.safetensors")
    pipe: Any = make_tiny_pipeline(0, family="sd1")
    pipe.load_lora_weights(str(place), weight_name="a.safetensors")
    return outputs({part: getattr(pipe, part) for part in ("unet", "text_encoder")}, "sd1")


def as_we_read_it(place: Path) -> list[torch.Tensor]:
    parts = make_tiny_parts(0, "sd1")
    for path, delta in read_adapter(place / "a.safetensors", warn=lambda line: None).deltas.items():
        weight: Any = find_module(parts, path).weight
        weight.data += weight_on(delta, weight.data)
    return outputs(parts, "sd1")


@pytest.mark.parametrize("kind", ["plain", "LoCon", "F8"])
def test_diffusers_opens_them_as_we_do(tmp_path, kind):
    found, before = load(FILES[kind], tmp_path), outputs(make_tiny_parts(0, "sd1"), "sd1")
    ours = as_we_read_it(tmp_path)
    assert float((found[1] - ours[1]).abs().max()) < 2e-5
    assert float((found[1] - before[1]).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "kind", ["CP", "full difference", "bias", "norm", "numbers", "embeddings", "LoHa", "LoKr", "scalar"]
)
def test_diffusers_refuses_the_whole_file(tmp_path, kind):
    with pytest.raises(ValueError, match=r"have not been correctly renamed|Invalid LoRA checkpoint"):
        load(FILES[kind], tmp_path)
    assert read_adapter(tmp_path / "a.safetensors", warn=lambda line: None).deltas  # and we read it


def test_diffusers_reads_nan_and_drops_lengths(tmp_path, caplog):
    assert not load(FILES["NaN"], tmp_path)[1].isfinite().any()
    with caplog.at_level(logging.WARNING):
        found = load(FILES["DoRA"], tmp_path)
    plain = load(FILES["plain"], tmp_path)
    assert torch.equal(found[1], plain[1])

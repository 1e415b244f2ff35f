"""What `inspect` says of a file holds against figures worked out by hand."""

import hashlib

import pytest
import torch

from sdlora.adapter.delta import Adapter, Card, Dora, LowRank
from sdlora.adapter.file import write_adapter
from sdlora.adapter.summary import list_summary, summarize

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
TEXT = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"


@pytest.fixture
def adapter():
    # every ΔW is all ones times the scale: its energy is the number of weights times the scale squared
    pairs = {
        Q: LowRank(torch.ones(2, 4) / 2, torch.ones(6, 2), alpha=2.0),
        MID: LowRank(torch.ones(1, 5), torch.ones(3, 1), alpha=0.5),
        TEXT: LowRank(torch.ones(2, 4) / 2, torch.ones(4, 2), alpha=2.0),
    }
    return Adapter(pairs, Card(family="mini", base="mini", trigger="ink"))


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "peft"])
def test_the_summary_counts_what_is_in_the_file(tmp_path, adapter, naming):
    path = tmp_path / "a.safetensors"
    write_adapter(adapter, path, format=naming, dtype=torch.float16)
    found = summarize(path)
    data = path.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    expected = {
        "format": naming,
        "family": "mini",
        "kinds": ["lora"],
        "modules": {"unet": 2, "text_encoder": 1, "text_encoder_2": 0},
        "ranks": {"1": 1, "2": 2},
        "alphas": {"0.5": 1, "2": 2},
        "dtype": "F16",
        "parameters": 2 * (4 + 6) + (5 + 3) + 2 * (4 + 4),
        "bytes": len(data),
        "trigger": "ink",
        "base": "mini",
        "sha256": hashlib.sha256(data).hexdigest(),
        "autov2": hashlib.sha256(data).hexdigest()[:10],
        "autov3": hashlib.sha256(tensors).hexdigest()[:12],
        "energy": {"text_encoder.layers.1": 16.0, "unet.down_blocks.0": 24.0, "unet.mid_block": 15 * 0.25},
        "warnings": [],
    }
    assert {key: found[key] for key in expected} == expected
    assert set(found) == {*expected, "file", "metadata"}
    lines = "\n".join(list_summary(found))
    assert "unet 2, text_encoder 1" in lines
    assert "unet.down_blocks.0 54.9 %" in lines


def test_a_dora_is_called_so_and_its_lengths_are_counted(tmp_path, adapter):
    path = tmp_path / "a.safetensors"
    deltas = {p: Dora(d, torch.ones(d.up.shape[0], 1)) for p, d in adapter.deltas.items()}
    write_adapter(Adapter(deltas, adapter.card), path, dtype=torch.float16)
    found = summarize(path)
    assert (found["kinds"], found["dtype"], found["ranks"]) == (["dora"], "F16", {"1": 1, "2": 2})
    assert found["parameters"] == 2 * (4 + 6) + (5 + 3) + 2 * (4 + 4) + 6 + 3 + 4
    assert found["energy"]["unet.down_blocks.0"] == 24.0
    (warning,) = found["warnings"]
    assert "low-rank factors" in warning

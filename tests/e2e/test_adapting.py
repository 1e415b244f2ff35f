"""Runs with every choice of what is adapted and how: they resume to the bit, and their files are what was trained."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import make_folder
from short_runs import rows, train_until
from stacks import hash_base, random_adapter
from tiny import make_tiny_base

import sdlora
from sdlora import cli
from sdlora.adapter import Dora, file_sha256, find_module, read_adapter, write_adapter
from sdlora.adapter.layers import LoraLayers
from sdlora.config import Recipe
from sdlora.errors import AdapterFileError, ConfigError, RunError
from sdlora.training.loop import train_adapter

RECIPE = Recipe(
    steps=6, batch_size=2, accumulation=2, rank=2, warmup_steps=1, precision="fp32", checkpoint_every=2,
    learning_rate=1e-2,
)  # fmt: skip
EVERY = ("attention", "feed-forward", "projections", "convolutions", "time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 4)


def change(**values):
    return dataclasses.replace(RECIPE, **values)


CHOICES = {
    "dora and dropout": {"dora": True, "dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2},
    "everything": {
        "targets": EVERY, "block_ranks": ("up=3:1",), "conv_rank": 1, "rank_stabilised": True, "lora_plus_ratio": 4.0,
        "max_norm": 0.05, "text_encoder": True, "text_encoder_learning_rate": 2e-3, "dropout": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, choice):
    recipe = change(**CHOICES[choice])
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    base = make_tiny_base()
    before = hash_base(base)
    train_adapter(folder, base, recipe, whole)
    assert hash_base(base) == before
    train_until(monkeypatch, 4, folder, make_tiny_base(), recipe, parts)
    train_adapter(folder, make_tiny_base(), recipe, parts)
    assert parts.read_bytes() == whole.read_bytes()
    assert rows(parts) == rows(whole)
    plain = tmp_path / "plain.safetensors"
    train_adapter(folder, make_tiny_base(), change(**CHOICES[choice] | {"dropout": 0.0, "rank_dropout": 0.0}), plain)
    assert rows(plain)[2:] != rows(whole)[2:]  # so dropout took part


def test_every_pass_of_a_step_has_its_own_dropout_masks(folder, tmp_path, monkeypatch):
    begun = []
    original = LoraLayers.begin

    def begin(layers, step, micro=0):
        begun.append((step, micro))
        original(layers, step, micro)

    monkeypatch.setattr(LoraLayers, "begin", begin)
    train_adapter(folder, make_tiny_base(), change(steps=2, dropout=0.2), tmp_path / "out.safetensors")
    assert begun == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_file_of_everything_holds_what_was_chosen(folder, tmp_path, capfd):
    out = tmp_path / "out.safetensors"
    adapter = train_adapter(folder, make_tiny_base(), change(**CHOICES["everything"]), out)
    read = read_adapter(out, warn=pytest.fail)
    assert read.deltas.keys() == adapter.deltas.keys()
    for path, delta in read.deltas.items():
        wide = delta.down.dim() == 4 and delta.down.shape[2] > 1
        assert delta.rank == (1 if wide else 3 if path.startswith("unet.up_blocks.") else 2), path
        assert delta.scale == pytest.approx((1 if wide else 1 / 3**0.5 if delta.rank == 3 else 2**0.5), rel=1e-6)
        assert float(delta.weight().norm()) <= 0.05 * 1.00001
    assert {path.partition(".")[0] for path in read.deltas} == {"unet", "text_encoder"}
    assert max(row["limited"] for row in rows(out)) > 0
    said = capfd.readouterr().err
    for word in (
        "targets attention, feed-forward", "ranks by block up=3:1", "convolutions of rank 1", "rank-stabilised",
        "drops 0.1 of the input", "up factors learn 4 times as fast", "text encoder's learning rate 0.002",
        "changes limited to a norm of 0.05",
    ):  # fmt: skip
        assert word in said
    assert adapter.card.settings["targets"] == EVERY


def test_sdxls_text_encoders_and_blocks(folder, tmp_path):
    out = tmp_path / "out.safetensors"
    recipe = change(
        steps=2, text_encoder=True, text_encoder_learning_rate=1e-3, text_encoder_2_learning_rate=2e-3,
        blocks=("style-only", "down"), dora=True,
    )  # fmt: skip
    train_adapter(folder, make_tiny_base(family="sdxl"), recipe, out)
    read = read_adapter(out, warn=pytest.fail)
    assert read.card.family == "sdxl"
    starts = {path.partition(".transformer_blocks")[0].partition(".encoder")[0] for path in read.deltas}
    assert starts == {
        "unet.up_blocks.0.attentions.1", "unet.down_blocks.1.attentions.0", "text_encoder.text_model",
        "text_encoder_2.text_model",
    }  # fmt: skip
    assert all(isinstance(delta, Dora) for delta in read.deltas.values())
    with safe_open(out, "pt") as file:
        names = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    assert any(name.startswith("lora_unet_output_blocks_1_1_transformer_blocks_0_attn1") for name in names)
    assert any(name.startswith("lora_te1_text_model_") for name in names)
    assert any(name.startswith("lora_te2_text_model_") for name in names)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"blocks": ("style-only",)}, "blocks = style-only is for sdxl; tiny is mini"),
        ({"targets": ("attn3.to_q",)}, "target 'attn3.to_q' matches no module"),
        ({"text_encoder": True, "targets": ("cross-attention",)}, "matches a module of text_encoder"),
        ({"text_encoder": True, "text_encoder_2_learning_rate": 1e-3}, "tiny has one text encoder"),
        ({"merge": ("a.safetensors",)}, "merge names 1 LoRAs and 0 are merged"),
    ],
)
def test_a_choice_that_the_base_has_not_is_refused_before_anything_is_written(folder, tmp_path, values, says):
    with pytest.raises(ConfigError) as error:
        train_adapter(folder, make_tiny_base(), change(**values), tmp_path / "out.safetensors")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_continued_run_starts_with_the_others_change_and_says_so_by_digest(folder, tmp_path, monkeypatch):
    first = tmp_path / "secret-name.safetensors"
    train_adapter(folder, make_tiny_base(), change(steps=2), first)
    started = []
    original = LoraLayers.attach

    def note(self):
        original(self)
        started.append({path: delta.weight() for path, delta in self.adapter().deltas.items()})

    out = tmp_path / "out.safetensors"
    recipe = change(steps=2, continue_from=str(first))
    with monkeypatch.context() as patch:
        patch.setattr(LoraLayers, "attach", note)
        adapter = train_adapter(folder, make_tiny_base(), recipe, out)
    wanted = read_adapter(first).deltas
    assert all(torch.equal(started[-1][path], delta.weight()) for path, delta in wanted.items())
    assert any(not torch.equal(adapter.deltas[path].weight(), delta.weight()) for path, delta in wanted.items())
    with safe_open(out, "pt") as file:
        text = json.dumps(file.metadata())
    assert "secret-name" not in text
    assert json.loads(json.loads(text)["sdlora.recipe"])["continued"] == file_sha256(first)

    moved = tmp_path / "moved.safetensors"
    first.rename(moved)
    again = dataclasses.replace(recipe, continue_from=str(moved))
    assert train_adapter(folder, make_tiny_base(), again, out).deltas.keys() == adapter.deltas.keys()
    other = tmp_path / "other.safetensors"
    train_adapter(folder, make_tiny_base(), change(steps=1), other)
    for file in (str(other), ""):
        with pytest.raises(RunError, match="the LoRA that is continued changed"):
            train_adapter(folder, make_tiny_base(), dataclasses.replace(recipe, continue_from=file), out)
    with pytest.raises(AdapterFileError, match=r"has rank 2 in it and 3 here; use its own rank \(--rank 2\)"):
        train_adapter(folder, make_tiny_base(), dataclasses.replace(again, rank=3), tmp_path / "new.safetensors")
    assert not (tmp_path / "new.run").exists()


def test_merged_loras_are_part_of_the_base_while_it_is_trained_and_not_after(folder, tmp_path):
    base = make_tiny_base()
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.safetensors")
        write_adapter(random_adapter(base, seed, text=True), files[-1])
    before = hash_base(base)
    values = {k: v for k, v in dataclasses.asdict(change(steps=2)).items() if k != "base"}
    merge = [f"{files[0]}:0.5", f"{files[1]}:-0.25:0"]
    both = sdlora.train(folder, base=base, out=tmp_path / "both.safetensors", **values | {"merge": merge})
    assert hash_base(base) == before
    again = sdlora.train(folder, base=base, out=tmp_path / "again.safetensors", **values | {"merge": merge[::-1]})
    assert all(torch.equal(d.weight(), again.deltas[p].weight()) for p, d in both.deltas.items())
    plain = sdlora.train(folder, base=base, **values)
    assert any(not torch.equal(d.weight(), plain.deltas[p].weight()) for p, d in both.deltas.items())
    settings = read_adapter(tmp_path / "both.safetensors").card.settings
    assert sorted(row["weight"] for row in settings["merged"]) == [-0.25, 0.5]
    assert str(tmp_path) not in json.dumps(settings)

    by_hand = dataclasses.replace(make_tiny_base(), fingerprint="another")
    for path, delta in random_adapter(base, 1, text=True).deltas.items():
        share = 0.25 * random_adapter(base, 2, text=True).deltas[path].weight() * (not path.startswith("text"))
        find_module(by_hand.modules, path).weight.data += 0.5 * delta.weight() - share
    expected = sdlora.train(folder, base=by_hand, **values)
    for path, delta in expected.deltas.items():
        torch.testing.assert_close(both.deltas[path].weight(), delta.weight(), rtol=1e-2, atol=1e-4)
    with pytest.raises(RunError, match="the base's weights changed"):
        sdlora.train(folder, base=base, out=tmp_path / "both.safetensors", **values)


@pytest.mark.parametrize("flag", ["--continue", "--merge"])
def test_the_command_line_misses_a_file_before_it_starts(folder, tmp_path, capsys, flag):
    out = str(tmp_path / "out.safetensors")
    assert cli.main(["train", str(folder), "--out", out, flag, str(tmp_path / "gone.safetensors")]) == 2
    assert "gone.safetensors: there is no such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""Runs that keep less: recomputation changes no byte, quantised bases train and go on to the bit."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import weakref

import pytest
import torch
from torch import nn

import sdlora
from sdlora import cli
from sdlora.adapter.file import read_adapter, write_adapter
from sdlora.adapter.quantised import QuantisedLinear
from sdlora.config import Recipe
from sdlora.errors import ConfigError, RunError
from sdlora.training import lessons, loop, step
from sdlora.training.loop import run_training, train_adapter
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run
from tests.pictures import make_folder
from tests.stacks import hash_base, random_adapter
from tests.tiny import make_tiny_base, save_tiny_pipeline

NEEDS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = ["int8", pytest.param("nf4", marks=NEEDS)]
RECIPE = Recipe(
    steps=4, batch_size=2, accumulation=2, rank=2, warmup_steps=0, precision="fp32", checkpoint_every=2,
    learning_rate=1e-2, dropout=0.1, rank_dropout=0.1, text_encoder=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 4)


def change(**values):
    return dataclasses.replace(RECIPE, **values)


def losses(out):
    return [row["loss"] for row in read_rows(Run(out).metrics)]


def stop_at(monkeypatch, at):
    original, calls = step.weighted_error, []
    monkeypatch.setattr(
        step, "weighted_error", lambda *a: calls.append(1) or (original(*a) if len(calls) < at else 1 / 0)
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_recomputing_changes_no_byte_and_may_be_turned_on_when_going_on(folder, tmp_path, monkeypatch, capsys, family):
    files = []
    for how in ("none", "feed-forward", "all"):
        out = tmp_path / how / "out.safetensors"
        train_adapter(folder, make_tiny_base(family=family), change(recompute=how), out)
        files.append(out.read_bytes())
    said = capsys.readouterr().err
    assert "feed-forward layers computed again in the backward pass" in said
    assert "everything computed again in the backward pass" in said
    assert files[0] == files[1] == files[2]
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(ZeroDivisionError):
            train_adapter(folder, make_tiny_base(family=family), RECIPE, out)
    train_adapter(folder, make_tiny_base(family=family), change(recompute="all"), out)
    assert out.read_bytes() == files[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_quantised_base_trains_goes_on_to_the_bit_and_stays_as_it_was(
    folder, tmp_path, monkeypatch, capsys, kind, text_encoder
):
    recipe = change(quantise=kind, text_encoder=text_encoder, preview=("ink",), recompute="feed-forward")
    base = make_tiny_base(family="sdxl")
    before = hash_base(base)
    plain, straight, stopped = (tmp_path / name / "out.safetensors" for name in "abc")
    train_adapter(folder, base, dataclasses.replace(recipe, quantise="none"), plain)
    capsys.readouterr()
    adapter = train_adapter(folder, base, recipe, straight)
    said = capsys.readouterr().err
    assert f"the base's linear layers in {8 if kind == 'int8' else 4} bits ({kind})" in said
    share = said.partition(" trainable parameters, ")[2].partition(" ")[0]
    assert 0 < float(share) < 10  # of the whole base's parameters, those in few bits too
    assert hash_base(base) == before
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(ZeroDivisionError):
            train_adapter(folder, base, recipe, stopped)
    train_adapter(folder, base, recipe, stopped)
    assert stopped.read_bytes() == straight.read_bytes()
    assert losses(stopped) == losses(straight)
    assert losses(straight) != losses(plain)
    assert losses(straight)[0] == pytest.approx(losses(plain)[0], rel={"int8": 0.02, "nf4": 0.4}[kind])
    assert adapter.card.settings["quantise"] == kind
    assert all(delta.weight().dtype == torch.float32 for delta in adapter.deltas.values())
    assert adapter.deltas.keys() == read_adapter(plain).deltas.keys()
    assert len(list(Run(straight).previews.iterdir())) == 1
    with pytest.raises(RunError, match=rf'quantise "{kind}" -> "none"'):
        train_adapter(folder, base, dataclasses.replace(recipe, quantise="none"), stopped)


def test_which_layers_are_quantised_while_training(folder, tmp_path, monkeypatch):
    """Those that a LoRA is on or may be on; a frozen text encoder encodes with its own weights."""
    seen = {}
    fit, encode = loop.fit, lessons.encode_folder

    def look(base):
        return {
            part: {isinstance(m, QuantisedLinear) for m in module.modules() if isinstance(m, nn.Linear)}
            for part, module in base.modules.items()
        }

    monkeypatch.setattr(
        lessons, "encode_folder", lambda base, *a, **k: seen.update(cached=look(base)) or encode(base, *a, **k)
    )
    monkeypatch.setattr(loop, "fit", lambda base, *a: seen.update(fit=look(base)) or fit(base, *a))
    for text_encoder in (False, True):
        recipe = change(steps=1, quantise="int8", text_encoder=text_encoder)
        train_adapter(folder, make_tiny_base(family="sdxl"), recipe, tmp_path / f"{text_encoder}.safetensors")
        assert seen["cached"]["unet"] == seen["fit"]["unet"] == {True}
        assert seen["cached"]["text_encoder"] == seen["cached"]["text_encoder_2"] == {text_encoder}
        assert seen["cached"]["vae"] == {False}
        assert ("text_encoder" in seen["fit"]) == text_encoder


def test_loras_are_merged_before_the_base_is_quantised(folder, tmp_path):
    source = save_tiny_pipeline(tmp_path / "base")
    lora = tmp_path / "lora.safetensors"
    write_adapter(random_adapter(make_tiny_base(), 3, size=2.0), lora)
    found = []
    for merge in ((), (str(lora),)):
        out = tmp_path / f"{len(merge)}.safetensors"
        argv = ["train", str(folder), "--base", str(source), "--out", str(out), "--steps", "2", "--batch-size", "2"]
        argv += ["--precision", "fp32", "--quantise", "int8", *(word for m in merge for word in ("--merge", m))]
        assert cli.main(argv) == 0
        plain = tmp_path / f"{len(merge)}-plain.safetensors"
        assert cli.main([str(plain) if word == str(out) else "none" if word == "int8" else word for word in argv]) == 0
        found.append(losses(out)[0])
        assert losses(out)[0] == pytest.approx(losses(plain)[0], rel=0.05)
    assert abs(found[0] / found[1] - 1) > 0.02  # so the LoRA is in it


@pytest.mark.parametrize("argv", [("--quantise", "nf4")])
def test_a_missing_package_is_one_line_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys, argv):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setattr(loop, "load_base", lambda *a, **k: pytest.fail("loaded"))
    out = tmp_path / "new" / "out.safetensors"
    assert cli.main(["train", str(folder), "--out", str(out), *argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        'error: quantise = "nf4" needs the package bitsandbytes; pip install bitsandbytes, or use quantise = "int8"\n'
    )
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        sdlora.train(folder, base="mini", quantise="nf4", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["command", "python"])
@pytest.mark.parametrize("preview", [(), ("ink",)])
@pytest.mark.parametrize("quantise", ["none", "int8"])
def test_parts_and_dense_weights_leave_memory_once_all_is_cached(folder, tmp_path, monkeypatch, how, preview, quantise):
    parts = {}

    def load(name, **options):
        base = make_tiny_base(family="sdxl")
        parts.update({part: weakref.ref(module) for part, module in base.modules.items()})
        parts["linear"] = weakref.ref(base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight)
        parts["convolution"] = weakref.ref(base.unet.conv_in.weight)
        return base

    fit, alive = loop.fit, set()

    def fit_and_look(*args):
        gc.collect()
        alive.update(part for part, thing in parts.items() if thing() is not None)
        fit(*args)

    monkeypatch.setattr(loop, "load_base", load)
    monkeypatch.setattr("sdlora.python.load_base", load)
    monkeypatch.setattr(loop, "fit", fit_and_look)
    recipe = change(steps=1, text_encoder=False, preview=preview, quantise=quantise, base="mini")
    if how == "command":
        run_training(folder, recipe, tmp_path / "out.safetensors")
    else:
        values = {"steps": 1, "batch_size": 2, "preview": preview, "quantise": quantise, "precision": "fp32"}
        sdlora.train(folder, base="mini", device="cpu", **values)
    wanted = {"unet", "convolution"} | ({"vae"} if preview else set()) | ({"linear"} if quantise == "none" else set())
    assert alive == wanted

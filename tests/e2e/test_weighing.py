"""`grid` and `balance` from the command line: what they write, that it can be drawn again, one line for a mistake."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora import cli
from sdlora.adapter.delta import Adapter, Card, LowRank
from sdlora.bases.family import load_base
from sdlora.generating.generate import generate
from sdlora.weighing import read_methods, read_weights
from tests.stacks import random_adapter
from tests.tiny import make_tiny_base, save_tiny_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the tiny base, and two LoRAs for it, both with a trigger."""
    folder = tmp_path_factory.mktemp("tiny")
    base = make_tiny_base()
    for seed, name in ((1, "ink"), (2, "cat")):
        random_adapter(base, seed, text=name == "cat").save(str(folder / f"{name}.safetensors"))
    return folder, save_tiny_pipeline(folder / "base")


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two LoRAs for mini: one damps all noise that is predicted, a look of its own, the other changes its words."""
    folder = tmp_path_factory.mktemp("mini")
    mini = load_base("mini")
    damped = LowRank(mini.unet.conv_out.weight.detach().clone(), -0.3 * torch.eye(4).view(4, 4, 1, 1), 4.0)
    Adapter({"unet.conv_out": damped}, Card("mini", "mini", "word1")).save(str(folder / "ink.safetensors"))
    subject = random_adapter(mini, 2, size=0.6, text=True)
    words = {path: delta for path, delta in subject.deltas.items() if path.startswith("text_encoder")}
    Adapter(words, subject.card).save(str(folder / "cat.safetensors"))
    return folder


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_grid_draws_what_generate_draws(tiny, tmp_path, capsys):
    folder, source = tiny
    out = tmp_path / "new" / "grid.png"
    files = [folder / "ink.safetensors", f"{folder / 'cat.safetensors'}:0.5:1"]
    code, shown, _ = run(
        capsys, "grid", "a cat", "--lora", files[0], "--lora", files[1], "--weights", "0,1", "--weights-down", "-1,0.4",
        "--combine", "np:mu=2", "--base", source, "--steps", 2, "--seed", 3, "--out", out,
    )  # fmt: skip
    assert (code, shown) == (0, f"{out}\n")
    from sdlora.adapter.file import read_adapter

    base = load_base(str(source))
    ink, cat = (read_adapter(folder / f"{name}.safetensors") for name in ("ink", "cat"))
    sheet = np.asarray(Image.open(out))
    for a, b in ((0, -1), (0, 0.4), (1, -1), (1, 0.4)):
        stack = [(ink, a), (cat, 0.5 * b, 1.0 * b)]
        picture = np.asarray(generate(base, "a cat", stack, seed=3, steps=2, method="np:mu=2")[0])
        windows = np.lib.stride_tricks.sliding_window_view(sheet, picture.shape)[:, :, 0]
        assert (windows == picture).all(axis=(2, 3, 4)).sum() == 1


@pytest.mark.slow
def test_balance_searches_recommends_and_says_how_to_draw_it(loras, tmp_path, capsys):
    out = tmp_path / "found"
    argv = ["balance", "a fox", "--lora", loras / "ink.safetensors", "--lora", loras / "cat.safetensors"]
    argv += ["--seeds", 2, "--weights", "1", "--steps", 4]
    code, shown, said = run(capsys, *argv, "--methods", "linear,klora", "--out", out, "--json")
    assert code == 0, said
    document = json.loads(shown)
    assert json.loads((out / "balance.json").read_text()) == document
    assert document["prompts"] == ["a fox"]
    assert document["seeds"] == {"search": [0, 2], "fresh": [2, 2]}
    assert document["features"] == "mini's judge"
    trials = document["trials"]
    assert [(t["method"], t["style_weight"], t["subject_weight"]) for t in trials[:2]] == [
        (method, 1, 1) for method in ("linear", "klora")
    ]
    assert {t["style_weight"] for t in trials[2:]} == {0.9, 1, 1.1}
    assert len(trials) == 10
    best = document["recommended"]
    assert best["score"] == max(t["score"] for t in trials)
    assert best in trials
    for trial in trials:
        assert trial["score"] == pytest.approx(sum(trial["scores"]) / 2)
    assert "warning: 'a fox' does not name 'word1', the trigger of ink.safetensors" in said
    assert document["measures"]["style"]["alone"] > document["measures"]["style"]["base"]

    words = shlex.split(document["generate"])
    assert words[:2] == ["sdlora", "generate"]
    assert cli.main([*words[1:], "--seed", "2", "--out", str(tmp_path / "drawn")]) == 0
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "00000.png"))
    sheet = np.asarray(Image.open(out / "sheet.png"))
    windows = np.lib.stride_tricks.sliding_window_view(sheet.astype(int), drawn.shape)[:, :, 0]
    middles = np.argwhere(abs(windows[:, :, 64, 64] - drawn[64, 64].astype(int)).max(-1) <= 1)
    # drawn with another batch, a picture may differ in its last bit
    assert any(abs(windows[y, x] - drawn).max() <= 1 for y, x in middles), "the sheet shows something else"
    assert Image.open(out / "pareto.png").size[0] > 800

    code, shown, _ = run(capsys, *argv, "--refine", 0, "--out", tmp_path / "again")
    assert code == 0
    assert "recommended   linear, style 1, subject 1: score" in shown
    assert "nothing that was tried does better than the plain sum at full weights" in shown
    assert shown.rstrip().endswith("balance.json")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["grid", "a", "--lora", "{ink}", "--base", "{base}", "--out", "x.png"], "two LoRAs, and 1 is given"),
        (["grid", "a", "--lora", "{ink}", "--lora", "{cat}"], "--out is missing; see sdlora grid --help"),
        (["grid", "a", "--lora", "{ink}", "--lora", "{cat}", "--out", "x.jpg"], "x.jpg does not end in .png"),
        (["grid", "a", "--lora", "{ink}", "--lora", "no.safetensors", "--out", "x.png"], "no.safetensors: there is no"),
        (["grid", "a", "--lora", "{ink}", "--lora", "{ink}", "--out", "x.png"], "two LoRAs are called ink"),
        (
            ["grid", "a", "--lora", "{ink}", "--lora", "{cat}", "--weights", "0,x", "--out", "x.png"],
            "--weights has 'x', which is no finite number; write a list such as 0.5,0.75,1",
        ),
        (
            ["grid", "a", "--lora", "{ink}", "--lora", "{cat}", "--weights-down", ",", "--out", "x.png"],
            "--weights-down is an empty list",
        ),
        (
            ["grid", "a", "--lora", "{ink}", "--lora", "{cat}", "--combine", "kloar", "--out", "x.png"],
            "method 'kloar' is not known; did you mean klora?",
        ),
        (["grid", "a", "--lora", "{ink}", "--lora", "{cat}", "--out", "x.png"], "another base (made for tiny)"),
        (["balance", "a", "--lora", "{ink}"], "balance weighs two LoRAs, and 1 given"),
        (["balance", "a <lora:ink:1>", "--lora", "{ink}", "--lora", "{cat}"], "names a LoRA; balance takes its two by"),
        (["balance", "a", "--lora", "{ink}", "--lora", "{cat}", "--seeds", "0"], "seeds 0 is out of range"),
        (["balance", "a", "--lora", "{ink}", "--lora", "{cat}", "--refine", "-1"], "refine -1 is out of range"),
        (["balance", "a", "--lora", "{ink}", "--lora", "{cat}", "--weights", "-1,1"], "weight -1 is out of range"),
        (["balance", "a", "--lora", "{ink}", "--lora", "{cat}", "--methods", "linear,klorra"], "did you mean klora?"),
        (
            ["balance", "a", "--lora", "{ink}", "--lora", "{cat}", "--base", "{base}"],
            "a base of family sd1 needs CLIP and DINO to look at its pictures; give --clip and --dino a folder",
        ),
        (
            ["balance", "a", "--lora", "{ink}", "--lora", "{cat}", "--base", "{base}", "--dino", "{base}"],
            "no DINO can be read there",
        ),
        (
            ["balance", "a", "--lora", "{ink}", "--lora", "{cat}", "--style-pictures", "nowhere", "--base", "{base}",
             "--clip", "{base}"],
            "nowhere",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(tiny, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    folder, source = tiny
    places = {"ink": folder / "ink.safetensors", "cat": folder / "cat.safetensors", "base": source}
    code, shown, said = run(capsys, *(word.format(**places) for word in argv))
    assert code == 2, said
    assert shown == ""
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_lists_of_weights_and_methods_are_read_once_each():
    assert read_weights("--weights", "0.5, 1,1.0,-2e-1") == [0.5, 1, -0.2]
    assert read_methods("linear,np:mu=1,klora,np:mu=1.0") == ["linear", "np:mu=1", "klora"]
    assert read_methods("dare:density=0.5,seed=1,ties") == ["dare:density=0.5,seed=1", "ties"]

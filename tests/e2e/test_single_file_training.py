"""A single file from the command line: trains, goes on, draws, and learns the same as its diffusers folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sdlora.cli import main
from tests.pictures import make_folder
from tests.single_files import FAMILIES, make_pipeline, write_tiny_file

STEPS = ("--steps", "2", "--batch-size", "2", "--rank", "2", "--precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def bases(request, tmp_path_factory):
    """The family, its folder and its file, both called `base`."""
    place = tmp_path_factory.mktemp(request.param)
    make_pipeline(request.param).save_pretrained(place / "folder" / "base")
    (place / "file").mkdir()
    file = write_tiny_file(place / "file" / "base.safetensors", request.param)
    return request.param, place / "folder" / "base", file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", count=4)


def train(data: Path, base: Path, out: Path, *flags: str) -> int:
    return main(["train", str(data), "--base", str(base), "--out", str(out), *STEPS, *flags])


def losses(out: Path) -> list[float]:
    text = (out.with_suffix(".run") / "metrics.jsonl").read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_folder_and_file_give_bit_identical_losses_and_loras(bases, data, tmp_path):
    _, folder, file = bases
    for base, name in ((folder, "a"), (file, "b")):
        assert train(data, base, tmp_path / f"{name}.safetensors", "--text-encoder") == 0
    a, b = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert losses(a) == losses(b)
    assert len(losses(a)) == 2
    first, second = safetensors.torch.load_file(a), safetensors.torch.load_file(b)
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(bool(value.any()) for key, value in first.items() if "lora_up" in key)
    raw = b.read_bytes()
    assert str(file.parent).encode() not in raw
    assert b"base" in raw


def test_file_trains_by_flag_on_velocity_with_zero_snr_and_draws(bases, data, tmp_path, capsys):
    _, _, file = bases
    plain, vee = tmp_path / "plain.safetensors", tmp_path / "vee.safetensors"
    flags = ("--prediction", "v", "--zero-terminal-snr")
    assert train(data, file, plain) == 0
    assert train(data, file, vee, *flags) == 0
    assert losses(plain) != losses(vee)
    assert "v_prediction" in str(safetensors.safe_open(vee, "pt").metadata())
    capsys.readouterr()
    draw = ["generate", "a cat", "--base", str(file), "--lora", str(vee), "--steps", "2", "--device", "cpu", "--json"]
    assert main([*draw, *flags, "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert Path(row["file"]).is_file()
    assert main([*draw, "--prediction", "epsilon", "--zero-terminal-snr", "--out", str(tmp_path / "no")]) == 2
    assert "zero terminal SNR needs a base that predicts velocity" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_finished_run_says_so_and_another_prediction_is_another_run(bases, data, tmp_path, capsys):
    _, _, file = bases
    out = tmp_path / "out.safetensors"
    assert train(data, file, out) == 0
    before = out.read_bytes()
    assert train(data, file, out) == 0
    assert "is finished already" in capsys.readouterr().err
    assert train(data, file, out, "--prediction", "v") == 2
    assert 'prediction "auto" -> "v"' in capsys.readouterr().err
    assert out.read_bytes() == before


def test_what_is_no_base_is_one_line_before_anything_is_written(data, tmp_path, capsys):
    lora = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, lora)
    for command in (["train", str(data), "--out", str(tmp_path / "o.safetensors")], ["generate", "a cat"]):
        assert main([*command, "--base", str(lora)]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert "is a LoRA, not a base" in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


def test_check_and_dry_run_read_a_file_as_a_base(bases, data, tmp_path, capsys):
    _, _, file = bases
    assert main(["check", str(data), "--base", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert train(data, file, tmp_path / "o.safetensors", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "64 x 64 px" in said
    assert 'prediction = "auto"' in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--blocks", "style-only"), "blocks = style-only is for sdxl; {base} is {family}, so leave it out"),
        (("--text-encoder", "--text-encoder-2-learning-rate", "1e-4"), "{base} has one text encoder; leave it out"),
        (("--text-encoder", "--block-ranks", "text_encoder_2=4"), "{base} has one text encoder; leave it out"),
    ],
)
def test_a_flag_for_another_family_is_one_line_before_weights_are_read(
    bases, data, tmp_path, capsys, monkeypatch, flags, says
):
    family, folder, file = bases
    out = tmp_path / "out.safetensors"
    if family == "sdxl":
        assert train(data, file, out, *flags, "--dry-run") == 0
        return
    monkeypatch.setattr("sdlora.training.loop.load_base", lambda *a, **k: pytest.fail("weights were read"))
    for base in (folder, file):
        for command in ((), ("--dry-run",)):
            capsys.readouterr()
            assert train(data, base, out, *flags, *command) == 2
            said = capsys.readouterr()
            assert said.err.count("\n") == 1
            assert says.format(base=base, family=family) in said.err
        assert main(["check", str(data), "--base", str(base), *flags]) == 2
        assert says.format(base=base, family=family) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_changed_folder_is_found_before_it_is_encoded(bases, tmp_path, capsys, monkeypatch):
    _, _, file = bases
    own, out = make_folder(tmp_path / "data", count=3), tmp_path / "out.safetensors"
    assert train(own, file, out, "--no-cache") == 0
    written = out.read_bytes()
    (own / "0.txt").write_text("another caption")
    monkeypatch.setattr("sdlora.training.lessons.encode_folder", lambda *a, **k: pytest.fail("encoded"))
    capsys.readouterr()
    assert train(own, file, out, "--no-cache") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(
        r"the pictures or captions changed \(\w{12} -> \w{12}\); use the same ones to go on, another", error
    )
    assert out.read_bytes() == written

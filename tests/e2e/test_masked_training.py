"""Runs with masks: what a mask leaves out is not learnt, and they go on where they stopped, to the bit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.adapter.layers import attach
from sdlora.bases.family import load_base
from sdlora.cli import main
from sdlora.data.cache import encode_folder
from sdlora.data.folder import scan_folder
from sdlora.errors import DataError, RunError
from sdlora.training.loop import train_adapter
from tests.pictures import make_folder
from tests.short_runs import SHORT, change, losses, train_until
from tests.tiny import make_tiny_base, save_tiny_pipeline


def make_masks(folder: Path, count: int, white: slice = slice(0, 32), side_px: int = 64) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.zeros((side_px, side_px), np.uint8)
        pixels[:, white] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_white_masks_change_no_bit_and_black_halves_do(tmp_path):
    data = make_folder(tmp_path / "data", 3)
    train_adapter(data, make_tiny_base(), SHORT, tmp_path / "plain.safetensors")
    for name, white in (("white", slice(None)), ("half", slice(0, 32))):
        masks = make_masks(tmp_path / name, 3, white)
        recipe = change(masks=str(masks))
        adapter = train_adapter(data, make_tiny_base(), recipe, tmp_path / f"{name}.safetensors")
        assert adapter.card.settings["masks"].isalnum()
        assert str(masks) not in json.dumps(adapter.card.settings)
    assert losses(tmp_path / "white.safetensors") == losses(tmp_path / "plain.safetensors")
    assert losses(tmp_path / "half.safetensors") != losses(tmp_path / "plain.safetensors")
    recipe = change(masks=str(tmp_path / "half"), mask_outside=1.0)
    train_adapter(data, make_tiny_base(), recipe, tmp_path / "one.safetensors")
    assert losses(tmp_path / "one.safetensors") == losses(tmp_path / "plain.safetensors")


def test_masked_run_resumes_with_buckets_crops_accumulation_and_a_text_encoder(tmp_path, monkeypatch, capsys):
    data, masks = tmp_path / "data", tmp_path / "masks"
    data.mkdir()
    masks.mkdir()
    for i, size in enumerate([(64, 64), (96, 48), (64, 64), (97, 49)]):
        Image.new("RGB", size, (40 * i, 90, 200 - 20 * i)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a cat")
        Image.linear_gradient("L").resize(size).save(masks / f"{i}.png")
    recipe = change(
        masks=str(masks), mask_outside=0.1, buckets=True, small_buckets=True, crop="random", crops=2, accumulation=2,
        text_encoder=True, validation_share=0.25,
    )  # fmt: skip
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train_adapter(data, make_tiny_base(), recipe, whole)
    assert "masks from a folder, 0.1 outside" in capsys.readouterr().err
    train_until(monkeypatch, 4, data, make_tiny_base(), recipe, parts)
    Image.new("L", (64, 64), 255).save(masks / "0.png")
    with pytest.raises(RunError, match="the masks changed"):
        train_adapter(data, make_tiny_base(), recipe, parts)
    with pytest.raises(RunError, match="the masks changed"):
        train_adapter(
            data, make_tiny_base(), change(**(dataclasses.asdict(recipe) | {"masks": "", "mask_outside": 0})), parts
        )
    Image.linear_gradient("L").resize((64, 64)).save(masks / "0.png")
    masks.rename(tmp_path / "moved")
    train_adapter(data, make_tiny_base(), dataclasses.replace(recipe, masks=str(tmp_path / "moved")), parts)
    assert parts.read_bytes() == whole.read_bytes()


def half_errors(base, encoded, adapter=None):
    """The error on epsilon of the left and the right half of all latents, with the same noise at the same times."""
    targets = {"unet": base.family.default_targets(False)["unet"]}
    layers = attach({"unet": base.unet}, targets, rank=8, alpha=8.0, seed=0)
    if adapter is not None:
        layers.load_factors({f"{p}.{s}": getattr(d, s) for p, d in adapter.deltas.items() for s in ("down", "up")})
    generator, found = torch.Generator().manual_seed(5), []
    with torch.no_grad():
        for t in (100, 300, 500, 700, 900):
            x0 = encoded.mean[0]
            noise = torch.randn(x0.shape, generator=generator)
            alpha_bar = float(base.alphas_cumprod[t])
            x_t = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise
            text = encoded.text[torch.arange(len(x0))]
            found.append((base.predict(x_t, torch.full((len(x0),), t), text) - noise).square().mean((0, 1, 2)))
    layers.detach_from_base()
    mean = torch.stack(found).mean(0)
    return float(mean[:4].mean()), float(mean[4:].mean())


@pytest.mark.slow
def test_the_half_under_the_mask_is_learnt_and_the_other_is_not(tmp_path):
    # Not on a tiny base: one of random weights learns what noise is, wherever it is shown some.
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        picture = Image.new("RGB", (64, 64), (200 + 10 * i, 20, 30))
        picture.paste((20, 40, 255 - 10 * i), (32, 0, 64, 64))
        picture.save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a wug")
    base = load_base("mini", precision="bf16")
    encoded = encode_folder(base, scan_folder(data), resolution_px=64, flip=False, text=True, progress=False)
    before = half_errors(base, encoded)
    recipe = change(
        precision="bf16", steps=30, batch_size=4, rank=8, learning_rate=2e-3, resolution=64, flip=False,
        caption_dropout=0.0, checkpoint_every=0,
    )  # fmt: skip
    gains = {}
    for name, masks in (("left", str(make_masks(tmp_path / "left", 4))), ("all", "")):
        adapter = train_adapter(data, base, dataclasses.replace(recipe, masks=masks), tmp_path / f"{name}.safetensors")
        after = half_errors(base, encoded, adapter)
        gains[name] = [round(1 - a / b, 3) for a, b in zip(after, before, strict=True)]
    print("share of the error that went, left and right:", gains)
    assert gains["left"][0] > 0.3, gains
    assert gains["all"][1] > 0.3, gains
    assert gains["left"][1] < 0.5 * gains["all"][1], gains


def test_what_is_wrong_with_masks_is_one_line_everywhere_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(save_tiny_pipeline(tmp_path / "tiny"))
    data, masks = make_folder(tmp_path / "data", 3), make_masks(tmp_path / "masks", 2)
    flags = ["--base", base, "--masks", str(masks)]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for argv in (["train", str(data), *flags], ["train", str(data), *flags, "--dry-run"]):
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert captured.err == (
            f"error: {data}: 2.png: has no mask in {masks} (1 of 3 pictures without) "
            "(put a grey picture of its name there); or go on without them with skip_bad = true (--skip-bad)\n"
        )
        assert captured.out == ""
    assert main(["check", str(data), *flags, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [p["file"] for p in report["problems"]] == ["2.png"]
    make_masks(masks, 3)
    wide = np.zeros((64, 128), np.uint8)
    wide[:, :20] = 255
    Image.fromarray(wide).save(masks / "1.png")
    Image.new("RGB", (128, 64)).save(data / "1.png")
    before = sorted(tmp_path.rglob("*"))
    for argv in (["train", str(data), *flags], ["train", str(data), *flags, "--dry-run"], ["check", str(data), *flags]):
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert "1.png: nothing of its mask is in the part that is cut out (" in captured.err.splitlines()[-1]
        assert argv[0] == "check" or captured.err.count("\n") == 1
    with pytest.raises(DataError, match="nothing of its mask"):
        train_adapter(data, make_tiny_base(), change(masks=str(masks)), tmp_path / "out.safetensors")
    assert sorted(tmp_path.rglob("*")) == before


def test_check_and_the_plan_say_what_masks_come_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(save_tiny_pipeline(tmp_path / "tiny"))
    data, masks = make_folder(tmp_path / "data", 2), make_masks(tmp_path / "masks", 3)
    flags = ["--base", base, "--masks", str(masks), "--mask-outside", "0.25"]
    line = f"{masks}: 50.0% of the pictures on average, 50.0% at least; the rest weighs 0.25"
    assert main(["train", str(data), *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"masks        {line}\n" in out
    assert f"masks        1 mask of no picture: {masks / '2.png'}\n" in out
    assert main(["check", str(data), *flags]) == 0
    assert f"masks             {line}\n" in capsys.readouterr().out
    assert main(["check", str(data), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] == {
        "source": str(masks), "kept": {"0.png": 0.5, "1.png": 0.5}, "of_no_picture": [str(masks / "2.png")],
    }  # fmt: skip
    assert main(["check", str(data), "--base", base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] is None

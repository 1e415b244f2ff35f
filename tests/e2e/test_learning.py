"""Runs with other objectives, optimizers, averages and a validation share go on where they stopped, to the bit."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from optimizers import ScheduleFree, make_module
from pictures import make_folder
from short_runs import rows, train_until
from tiny import make_tiny_base

from sdlora.adapter.layers import attach
from sdlora.cli import main
from sdlora.config import Recipe
from sdlora.data.cache import encode_folder
from sdlora.data.folder import scan_folder
from sdlora.errors import ConfigError, DataError
from sdlora.training import lessons
from sdlora.training.draws import Chances, generator
from sdlora.training.loop import describe_run, train_adapter
from sdlora.training.run import Run
from sdlora.training.validation import Validation, hold_out

RECIPE = Recipe(steps=6, batch_size=2, rank=2, warmup_steps=1, precision="fp32", checkpoint_every=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes")


def change(**values):
    return dataclasses.replace(RECIPE, **values)


def hold_resume(folder, tmp_path, monkeypatch, recipe):
    """Trains at once, and again with a stop in its fifth step; both must be the same. Returns the adapter and file."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    adapter = train_adapter(folder, make_tiny_base(), recipe, whole)
    train_until(monkeypatch, 5, folder, make_tiny_base(), recipe, parts)
    train_adapter(folder, make_tiny_base(), recipe, parts)
    assert parts.read_bytes() == whole.read_bytes()
    assert rows(parts) == rows(whole)
    return adapter, whole


def live_factors(out, step=6):
    place = Run(out).checkpoints / f"step-{step:06d}"
    return load_file(place / "factors.safetensors"), load_file(place / "optimizer.safetensors")


def test_every_objective_at_once_resumes_and_says_so(folder, tmp_path, monkeypatch, capsys):
    recipe = change(
        loss="huber", huber_schedule="snr", weighting="debiased", noise_offset=0.05, pyramid_noise=3,
        input_perturbation=0.1, t_min=0.1, t_max=0.9, t_bias="late", optimizer="adafactor", schedule="polynomial",
    )  # fmt: skip
    hold_resume(folder, tmp_path, monkeypatch, recipe)
    said = capsys.readouterr().err
    for words in (
        "huber loss, c 0.1, schedule snr", "debiased weighting", "noise offset 0.05", "pyramid noise of 3 levels",
        "input perturbation 0.1", "timesteps from 0.1 to 0.9", "timesteps drawn late", "optimizer adafactor",
        "schedule polynomial of power 2",
    ):  # fmt: skip
        assert words in said


def test_average_is_in_the_file_and_both_are_in_the_checkpoint(folder, tmp_path, monkeypatch):
    recipe = change(ema_decay=0.9, preview=("ink",), preview_every=3)
    adapter, out = hold_resume(folder, tmp_path, monkeypatch, recipe)
    factors, saved = live_factors(out)
    plain = tmp_path / "plain.safetensors"
    learnt = train_adapter(folder, make_tiny_base(), RECIPE, plain)
    for path, delta in adapter.deltas.items():
        assert torch.equal(delta.up, saved[f"average/{path}.up"])
        assert torch.equal(learnt.deltas[path].up, factors[f"{path}.up"])  # averaging changes nothing of the learning
        assert not torch.equal(delta.up, learnt.deltas[path].up)
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(plain)]


@pytest.mark.parametrize("real", [False, True])
def test_schedule_free_run_writes_its_averages(folder, tmp_path, monkeypatch, capsys, real):
    if real:
        pytest.importorskip("schedulefree")
    else:
        monkeypatch.setitem(sys.modules, "schedulefree", make_module(AdamWScheduleFree=ScheduleFree))
    recipe = change(optimizer="schedule-free")
    adapter, out = hold_resume(folder, tmp_path, monkeypatch, recipe)
    assert "advice: optimizer schedule-free is made for a constant schedule" in capsys.readouterr().err
    seen = tmp_path / "seen.safetensors"
    train_adapter(folder, make_tiny_base(), dataclasses.replace(recipe, preview=("ink",), preview_every=2,
                  checkpoint_every=1), seen)  # fmt: skip
    assert seen.read_bytes() == out.read_bytes()  # neither previews nor checkpoints change anything
    y, state = live_factors(out)
    for path, delta in adapter.deltas.items():
        x = (y[f"{path}.up"] - 0.1 * state[f"z/{path}.up"]) / 0.9
        torch.testing.assert_close(delta.up, x, rtol=1e-4, atol=1e-6)
        assert not torch.equal(delta.up, y[f"{path}.up"])


@pytest.mark.parametrize("name", ["prodigy", "lion"])
def test_other_optimizers_resume(folder, tmp_path, monkeypatch, name):
    pytest.importorskip({"prodigy": "prodigyopt", "lion": "lion_pytorch"}[name])
    hold_resume(folder, tmp_path, monkeypatch, change(optimizer=name, learning_rate=1.0 if name == "prodigy" else 1e-3))


def test_missing_optimizer_is_found_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    monkeypatch.setattr(lessons, "encode_folder", lambda *a, **k: pytest.fail("worked first"))
    with pytest.raises(ConfigError, match="needs the package prodigyopt"):
        train_adapter(folder, make_tiny_base(), change(optimizer="prodigy"), tmp_path / "new" / "out.safetensors")
    assert not (tmp_path / "new").exists()


def test_held_out_pictures_are_not_learnt_but_measured(folder, tmp_path, monkeypatch, capsys):
    recipe = change(validation_share=0.3, validate_every=4)
    held = hold_out(6, 0.3, recipe.seed)
    assert len(held) == 2
    shown, original = set(), Chances.draw

    def draw(self, *args):
        draws = original(self, *args)
        shown.update(draws.picture.tolist())
        return draws

    monkeypatch.setattr(Chances, "draw", draw)
    adapter, out = hold_resume(folder, tmp_path, monkeypatch, recipe)
    assert shown == set(range(6)) - set(held)
    measured = {row["step"]: row["validation_loss"] for row in rows(out) if "validation_loss" in row}
    assert list(measured) == [4, 6]
    assert "0.3 of the pictures held out, measured every 4 steps" in capsys.readouterr().err
    assert "6 pictures (2 held out), 6 steps of 2 (3 epochs)" in describe_run(recipe, scan_folder(folder), out)

    base = make_tiny_base()
    encoded = encode_folder(base, scan_folder(folder), resolution_px=64, flip=True, text=True, progress=False)
    targets = {"unet": base.family.default_targets(False)["unet"]}
    layers = attach({"unet": base.unet}, targets, rank=2, alpha=2.0, seed=0)
    layers.load_factors(
        {f"{path}.{side}": getattr(d, side) for path, d in adapter.deltas.items() for side in ("down", "up")}
    )
    errors = []
    with torch.no_grad():
        for picture in held:
            for i, t in enumerate((125, 375, 625, 875)):
                noise = torch.randn(4, 8, 8, generator=generator(0, 0, "validation-noise", 4 * picture + i))
                alpha_bar = float(base.alphas_cumprod[t])
                x_t = alpha_bar**0.5 * encoded.mean[0, picture] + (1 - alpha_bar) ** 0.5 * noise
                y = base.unet(x_t[None], t, encoder_hidden_states=encoded.text.states[picture][None]).sample[0]
                errors.append((y - noise).square().mean())
    assert measured[6] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
    assert Validation.of(recipe, 6).learnt([1, 2, 3, 4, 5, 6]) == [0 if i in held else i + 1 for i in range(6)]


def test_buckets_wordings_and_crops_go_with_shaped_noise_averages_and_validation(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i, size in enumerate([(64, 64), (96, 48), (64, 64), (97, 49), (66, 64), (95, 50)]):
        Image.new("RGB", size, (40 * i, 90, 200 - 20 * i)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"cat, {'abcdef'[i]}, ink" + ("\nink, cap" if i % 2 else ""))
    recipe = change(
        buckets=True, small_buckets=True, crop="random", crops=2, caption_lines=True, caption_variants=3,
        shuffle_tags=True, caption_dropout=0.5, text_encoder=True, loss="huber", noise_offset=0.1, pyramid_noise=3,
        ema_decay=0.9, validation_share=0.5, optimizer="adafactor",
    )  # fmt: skip
    captions, original = set(), Chances.draw

    def draw(self, *args):
        draws = original(self, *args)
        captions.update(draws.caption.tolist())
        assert not set(draws.picture.tolist()) & set(held)
        return draws

    held = hold_out(6, 0.5, recipe.seed)
    monkeypatch.setattr(Chances, "draw", draw)
    _, out = hold_resume(data, tmp_path, monkeypatch, recipe)
    first = [0, 3, 9, 12, 18, 21, 27]  # 3 variants of a line, every second picture has two; the last row is no caption
    assert 27 in captions
    assert captions - {27} <= {row for i in range(6) if i not in held for row in range(first[i], first[i + 1])}
    assert len(captions) > 3
    assert [row["step"] for row in rows(out) if "validation_loss" in row] == [6]
    assert "bucket 80 x 48 px: 3 pictures" in capsys.readouterr().err


def test_validation_reads_each_pictures_own_bucket_and_first_wording(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i, size in enumerate([(64, 64), (96, 48), (48, 96), (64, 64)]):
        Image.new("RGB", size, (60 * i, 90, 200 - 40 * i)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("abcd"[i])
    base, examples = make_tiny_base(), scan_folder(data)
    wordings = [["a", "x"], ["b", "y", "z"], ["c"], ["d", "cat"]]
    sizes = [(64, 64), (80, 48), (48, 80), (64, 64)]
    encoded = encode_folder(
        base, examples, resolution_px=64, sizes=sizes, wordings=wordings, flip=True, text=True, progress=False
    )
    for picture in range(4):
        (data / f"{picture}").mkdir()
        (data / f"{picture}.png").rename(data / f"{picture}" / "0.png")
        (data / f"{picture}" / "0.txt").write_text("abcd"[picture])
        alone = encode_folder(
            base, scan_folder(data / f"{picture}"), resolution_px=64, sizes=[sizes[picture]], flip=False, text=True,
            progress=False,
        )  # fmt: skip
        measured = Validation([picture], RECIPE).measure(base, encoded)
        errors = []
        for i, t in enumerate((125, 375, 625, 875)):
            noise = torch.randn(alone.mean.shape[2:], generator=generator(0, 0, "validation-noise", 4 * picture + i))
            alpha_bar = float(base.alphas_cumprod[t])
            x_t = alpha_bar**0.5 * alone.mean[0, 0] + (1 - alpha_bar) ** 0.5 * noise
            with torch.no_grad():
                y = base.unet(x_t[None], t, encoder_hidden_states=alone.text.states[:1]).sample[0]
            errors.append((y - noise).square().mean())
        assert measured == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("share", "says"), [(0.95, "leaves nothing to learn"), (0.05, "holds out none; give at least 0.17")]
)
def test_a_validation_share_that_leaves_nothing_is_one_line(folder, tmp_path, capsys, share, says):
    with pytest.raises(DataError, match=says):
        train_adapter(folder, make_tiny_base(), change(validation_share=share), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []
    argv = ["train", str(folder), "--out", str(tmp_path / "out.safetensors"), "--validation-share", str(share)]
    assert main(argv) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_who_is_held_out_hangs_on_the_seed_alone():
    assert hold_out(100, 0.1, 3) == hold_out(100, 0.1, 3) != hold_out(100, 0.1, 4)
    assert len(hold_out(100, 0.1, 3)) == 10
    assert hold_out(5, 0.0, 3) == []

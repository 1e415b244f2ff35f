"""SD 2.x and SDXL from folder to pictures: they train, go on to the bit, write a file, and draw with it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging

import numpy as np
import pytest
import torch

from sdlora.adapter.file import read_adapter
from sdlora.adapter.layers import attach
from sdlora.bases.family import load_base
from sdlora.bases.sampling import sample
from sdlora.config import Recipe
from sdlora.data.cache import encode_folder
from sdlora.data.folder import scan_folder
from sdlora.errors import BaseModelError, ConfigError
from sdlora.generating.generate import generate
from sdlora.training import lessons, step
from sdlora.training.loop import train_adapter
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run
from tests.pictures import make_folder
from tests.stacks import hash_base
from tests.tiny import make_tiny_base, make_tiny_sdxl_base, save_tiny_pipeline

RECIPE = Recipe(steps=4, batch_size=2, rank=2, warmup_steps=0, precision="fp32", checkpoint_every=2, learning_rate=1e-2)
V = {"prediction_type": "v_prediction"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 3)


def change(**values):
    return dataclasses.replace(RECIPE, **values)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_base_trains_goes_on_to_the_bit_and_draws_with_its_file(folder, tmp_path, monkeypatch, family, text_encoder):
    recipe = change(text_encoder=text_encoder, caption_dropout=0.5, preview=("a red circle",))
    straight, stopped = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    base = make_tiny_base(family=family, schedule=V if family == "sd2" else None)
    before = hash_base(base)
    adapter = train_adapter(folder, base, recipe, straight)
    assert hash_base(base) == before

    original, calls = step.weighted_error, []
    with monkeypatch.context() as patch:
        patch.setattr(step, "weighted_error", lambda *a: calls.append(1) or (original(*a) if len(calls) < 4 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            train_adapter(folder, base, recipe, stopped)
    train_adapter(folder, base, recipe, stopped)
    assert sha256(stopped) == sha256(straight)
    rows = [[r["loss"] for r in read_rows(Run(out).metrics)] for out in (straight, stopped)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    assert len(list(Run(straight).previews.iterdir())) == 1

    parts = {path.partition(".")[0] for path in adapter.deltas}
    encoders = set(base.family.text_parts) if text_encoder else set()
    assert parts == {"unet", *encoders}
    learnt = {path for path, delta in adapter.deltas.items() if float(delta.weight().abs().max()) > 0}
    # SDXL reads the first text encoder before its last layer, which therefore learns nothing
    last = {p for p in adapter.deltas if p.startswith("text_encoder.text_model.encoder.layers.2.") and family == "sdxl"}
    assert learnt == adapter.deltas.keys() - last
    assert bool(last) == (family == "sdxl" and text_encoder)

    again = read_adapter(straight)
    assert again.card.family == family
    assert again.deltas.keys() == adapter.deltas.keys()
    for path, delta in adapter.deltas.items():
        assert torch.equal(again.deltas[path].weight(), delta.weight())
    plain, styled = (generate(base, "a red circle", stack, steps=2)[0] for stack in ((), [(again, 1.0)]))
    assert abs(np.asarray(plain).astype(int) - np.asarray(styled).astype(int)).max() > 2


def test_the_unet_is_told_how_each_picture_was_cut_in_training(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "data", 2, side_px=80)
    base = make_tiny_sdxl_base()
    seen = []
    base.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    train_adapter(folder, base, change(steps=1), tmp_path / "out.safetensors")
    assert torch.cat(seen).tolist() == [[80, 80, 0, 0, 64, 64]] * 2


def test_sdxl_step_equals_a_plain_one(folder, tmp_path):
    """The loss of the first step, written out with diffusers' UNet and the draws alone."""
    recipe = change(steps=1, min_snr_gamma=0, caption_dropout=0.5, batch_size=4, seed=3)
    base = make_tiny_sdxl_base()
    encoded = encode_folder(base, scan_folder(folder), resolution_px=64, flip=True, text=True, progress=False)
    chances = step.Chances(step.Order(3, encoded.repeats), (4, 8, 8), 1000, 0.5, True)
    draws = chances.draw(0, 4)
    assert {len(encoded.ids) - 1} < set(draws.caption.tolist())  # one is without its caption, and one has it
    errors = []
    with torch.no_grad():
        for i in range(4):
            view, picture, row = int(draws.mirror[i]), int(draws.picture[i]), int(draws.caption[i])
            x0 = encoded.mean[view, picture] + encoded.std[view, picture] * draws.posterior[i]
            alpha_bar = float(base.alphas_cumprod[draws.t[i]])
            x_t = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * draws.noise[i]
            text, pooled = encoded.text.states[row], encoded.text.pooled[row]
            conditions = {"text_embeds": pooled[None], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
            y = base.unet(x_t[None], draws.t[i], encoder_hidden_states=text[None], added_cond_kwargs=conditions).sample[
                0
            ]
            errors.append((y - draws.noise[i]).square().mean())
    train_adapter(folder, base, recipe, tmp_path / "out.safetensors")
    loss = read_rows(Run(tmp_path / "out.safetensors").metrics)[0]["loss"]
    assert loss == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_cached_and_trained_text_give_the_same_first_loss(folder, tmp_path, family):
    losses = []
    for text_encoder in (False, True):
        recipe = change(steps=1, text_encoder=text_encoder, caption_dropout=0.5, batch_size=4, clip_skip=1)
        out = tmp_path / f"{text_encoder}.safetensors"
        train_adapter(folder, make_tiny_base(family=family), recipe, out)
        losses.append(read_rows(Run(out).metrics)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_long_captions_train_in_several_chunks(folder, tmp_path, capsys):
    data = make_folder(tmp_path / "data", 2)
    (data / "0.txt").write_text("x " * 100)
    adapters = []
    for chunks in (1, 2):
        recipe = change(steps=2, max_chunks=chunks, caption_dropout=0)
        adapters.append(train_adapter(data, make_tiny_sdxl_base(), recipe, tmp_path / f"{chunks}.safetensors"))
        assert ("loses its end: 0.png (102 tokens)" in capsys.readouterr().err) == (chunks == 1)
    path = next(iter(adapters[0].deltas))
    assert not torch.equal(adapters[0].deltas[path].weight(), adapters[1].deltas[path].weight())


def test_too_much_clip_skip_is_refused_before_anything_is_encoded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "encode_folder", lambda *a, **k: pytest.fail("encoded"))
    with pytest.raises(ConfigError, match="clip_skip = 2 is out of range for tiny; give 0 to 1"):
        train_adapter(folder, make_tiny_sdxl_base(), change(clip_skip=2), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_lora_of_the_second_text_encoder_acts():
    base = make_tiny_sdxl_base()
    targets = base.family.default_targets(True)
    with attach(dict(base.modules), targets, rank=2, alpha=2.0, seed=0) as layers:
        for layer in layers.layers:
            if layer.path.startswith("text_encoder_2."):
                torch.nn.init.normal_(layer.up)
        with torch.no_grad():
            attached = base.encode_text(base.tokenize(["a cat"])[0])
        adapter = layers.adapter()
    plain = base.encode_text(base.tokenize(["a cat"])[0])
    assert torch.equal(attached.states[..., :32], plain.states[..., :32])
    assert float((attached.states[..., 32:] - plain.states[..., 32:]).abs().max()) > 1e-2
    assert float((attached.pooled - plain.pooled).abs().max()) > 1e-3
    alone = {p: d for p, d in adapter.deltas.items() if p.startswith("text_encoder_2.")}
    assert len(alone) == 12
    pictures = [generate(base, "a cat", [(type(adapter)(alone), 1.0, te)], steps=2)[0].tobytes() for te in (0.0, 1.0)]
    assert pictures[0] == sample(base, ["a cat"], seeds=[0], steps=2)[0].tobytes() != pictures[1]


def test_sdxl_folder_loads_trains_and_lacks_nothing(folder, tmp_path, capfd):
    place = save_tiny_pipeline(tmp_path / "tinyxl", 1, family="sdxl")
    capfd.readouterr()
    base = load_base(str(place), device="cpu")
    assert (base.family.name, base.name, base.resolution_px) == ("sdxl", "tinyxl", 64)
    assert capfd.readouterr() == ("", "")
    assert hash_base(base) == hash_base(make_tiny_sdxl_base(1))
    adapters = [
        train_adapter(folder, b, change(steps=2), tmp_path / f"{i}.safetensors")
        for i, b in enumerate((base, make_tiny_sdxl_base(1)))
    ]
    for path, delta in adapters[0].deltas.items():
        assert torch.equal(delta.weight(), adapters[1].deltas[path].weight())


def refusal(place):
    with pytest.raises(BaseModelError) as caught:
        load_base(str(place), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_sdxl_refiner_and_an_incomplete_sdxl_are_one_line(tmp_path):
    place = save_tiny_pipeline(tmp_path / "xl", family="sdxl")
    index = place / "model_index.json"
    whole = index.read_text()
    index.write_text(whole.replace('"CLIPTextModel"', "null").replace('"transformers",\n    null', "null,\n    null"))
    assert "this is an SDXL refiner (it has no first text encoder); use the SDXL base" in refusal(place)
    index.write_text(whole.replace("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"))
    assert "inpainting model" in refusal(place)
    index.write_text(whole)
    for name in ("text_encoder_2/model.safetensors", "text_encoder_2/config.json", "tokenizer_2"):
        moved = (place / name).rename(tmp_path / "away")
        assert name.rpartition("/")[2] in refusal(place)
        moved.rename(place / name)
    assert load_base(str(place), device="cpu").family.name == "sdxl"


def test_parts_that_do_not_fit_the_family_are_one_line():
    sdxl, sd1 = make_tiny_sdxl_base(), make_tiny_base(family="sd1")
    options = (sd1.scheduler_config, sd1.device, sd1.dtype)
    with pytest.raises(BaseModelError, match="tiny: has no text_encoder_2, which every sdxl base has"):
        sdxl.family.assemble("tiny", sd1.modules, sd1.tokenizers, *options)
    with pytest.raises(BaseModelError, match="tiny: has 1 tokenizers for 2 text encoders"):
        sdxl.family.assemble("tiny", sdxl.modules, sd1.tokenizers, *options)
    with pytest.raises(BaseModelError, match="reads text 32 wide and its text encoders give 72"):
        sdxl.family.assemble("tiny", sdxl.modules | {"unet": sd1.unet}, sdxl.tokenizers, *options)
    with pytest.raises(BaseModelError, match="reads 80 numbers of pooled text and sizes where there are 72"):
        make_tiny_sdxl_base(projection_class_embeddings_input_dim=80)
    with pytest.raises(BaseModelError, match="is told no sizes, so it is no SDXL's"):
        make_tiny_sdxl_base(addition_embed_type=None)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)

"""SDXL and SD 2.x hold against diffusers' pipelines: sizes, predictions, latents, whole pictures."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from sdlora.bases.family import load_base
from sdlora.bases.sampling import make_noise, make_scheduler, sample
from sdlora.bases.text import Text
from tests.tiny import make_tiny_base, make_tiny_pipeline, make_tiny_sdxl_base, save_tiny_pipeline

SEEDS = [3, 11]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def pixels(pictures):
    return [np.asarray(p).astype(int) for p in pictures]


def draw_with(pipe, base, prompts, *, negative, sampler="dpm++", guidance=4.0, width_px=64, height_px=64):
    pipe.scheduler = make_scheduler(base, sampler)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.stack([make_noise(s, height_px, width_px) for s in SEEDS])
    options = {"width": width_px, "height": height_px, "num_inference_steps": 6, "guidance_scale": guidance}
    negative = None if negative is None else [negative] * len(prompts)
    return pixels(pipe(prompts, negative_prompt=negative, latents=noise, **options).images)


@pytest.mark.parametrize(
    ("family", "prediction_type", "options"),
    [
        ("sdxl", "epsilon", {}),
        ("sdxl", "epsilon", {"guidance": 1.0}),
        ("sdxl", "epsilon", {"width_px": 80, "height_px": 48}),
        ("sdxl", "epsilon", {"negative": None}),
        ("sdxl", "v_prediction", {}),
        ("sdxl", "v_prediction", {"sampler": "ddim"}),
        ("sd2", "v_prediction", {}),
        ("sd2", "v_prediction", {"sampler": "ddim"}),
        ("sd2", "v_prediction", {"width_px": 80, "height_px": 48}),
    ],
)
def test_picture_equals_the_pipelines(family, prediction_type, options):
    schedule = {"prediction_type": prediction_type}
    base = make_tiny_base(2, family=family, schedule=schedule)
    pipe = make_tiny_pipeline(2, family=family, schedule=schedule)
    options = {"negative": "blur"} | options
    prompts = ["a cat", "ink apple"]
    theirs = draw_with(pipe, base, prompts, **options)
    # SDXL's pipeline takes zeros where there is no negative prompt, as we do
    ours = pixels(sample(base, prompts, seeds=SEEDS, steps=6, **{"guidance": 4.0} | options | {
        "negative": options["negative"] or ""}))  # fmt: skip
    assert max(abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) <= 2
    assert ours[0].std() > 5


def test_zero_terminal_snr_base_draws_the_pipelines_picture():
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    base = make_tiny_sdxl_base(2, schedule=schedule)
    assert float(base.alphas_cumprod[-1]) == 0
    theirs = draw_with(make_tiny_pipeline(2, family="sdxl"), base, ["a cat", "ink"], negative="blur")
    ours = pixels(sample(base, ["a cat", "ink"], seeds=SEEDS, steps=6, guidance=4.0, negative="blur"))
    assert max(abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) <= 2
    assert ours[0].std() > 5


def test_sizes_are_the_pipelines_ids():
    base, pipe = make_tiny_sdxl_base(), make_tiny_pipeline(family="sdxl")
    seen = []
    base.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    text = base.encode_text(base.tokenize(["a cat", "ink"])[0])
    x_t, t = torch.randn(2, 4, 6, 10), torch.tensor([5, 900])
    width = pipe.text_encoder_2.config.projection_dim
    with torch.no_grad():
        base.predict(x_t, t, text)  # as generating does
        sizes = torch.tensor([[700.0, 500, 3, 0, 64, 64], [1023, 4000, 0, 77, 80, 48]])
        own = base.predict(x_t, t, text, sizes)
        swapped = base.predict(x_t, t, text, sizes[[1, 1]])
        expected = pipe.unet(x_t, t, text.states, added_cond_kwargs={"text_embeds": text.pooled, "time_ids": sizes})
    ids = pipe._get_add_time_ids((48, 80), (0, 0), (48, 80), torch.float32, width)
    assert torch.equal(seen[0]["time_ids"], ids.repeat(2, 1))
    assert torch.equal(seen[0]["text_embeds"], text.pooled)
    wanted = [((700, 500), (3, 0), (64, 64)), ((1023, 4000), (0, 77), (80, 48))]
    ids = torch.cat([pipe._get_add_time_ids(*one, torch.float32, width) for one in wanted])
    assert torch.equal(seen[1]["time_ids"], ids)
    torch.testing.assert_close(own, expected.sample, rtol=1e-4, atol=1e-5)
    assert float((own[0] - swapped[0]).abs().max()) > 1e-3
    assert torch.equal(own[1], swapped[1])


def test_sizes_stay_exact_in_bf16():
    base = make_tiny_sdxl_base(dtype=torch.bfloat16)
    seen = []
    base.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    text = base.encode_text(base.tokenize(["a cat"])[0])
    sizes = torch.tensor([[1023.0, 1025, 0, 0, 1024, 1024]])
    y = base.predict(torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([5]), text, sizes)
    assert y.dtype == torch.bfloat16
    assert torch.equal(seen[0]["time_ids"], sizes)


def test_other_families_are_told_no_sizes():
    base = make_tiny_base()
    text = base.encode_text(base.tokenize(["a cat"])[0])
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    sizes = torch.tensor([[700.0, 500, 3, 0, 64, 64]])
    assert torch.equal(base.predict(x_t, t, text), base.predict(x_t, t, text, sizes))


def test_sdxl_text_without_pooled_is_refused():
    base = make_tiny_sdxl_base()
    text = base.encode_text(base.tokenize(["a cat"])[0])
    with pytest.raises(ValueError, match="pooled"):
        base.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), Text(text.states))


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_half_precision_vae_is_float32_where_its_config_says_so(tmp_path, upcast, dtype):
    folder = save_tiny_pipeline(tmp_path / "sdxl", family="sdxl")
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"force_upcast": true', f'"force_upcast": {str(upcast).lower()}'))
    base = load_base(str(folder), device="cpu", precision="fp16")
    exact = load_base(str(folder), device="cpu")
    assert base.modules["vae"].dtype == dtype
    assert base.unet.dtype == base.modules["text_encoder_2"].dtype == torch.float16
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    same = [torch.equal(a, b) for a, b in zip(base.encode_pictures(x), exact.encode_pictures(x), strict=True)]
    assert same == [upcast, upcast]  # in float32 not even the weights were rounded
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(base.decode_latents(z), exact.decode_latents(z)) == upcast
    assert make_tiny_base(dtype=torch.float16).modules["vae"].dtype == torch.float16  # no other family's


def test_folders_own_word_on_empty_prompts_is_kept(tmp_path):
    folder = save_tiny_pipeline(tmp_path / "sdxl", family="sdxl")
    assert load_base(str(folder), device="cpu").zero_blank
    index = folder / "model_index.json"
    index.write_text(
        index.read_text().replace('"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false')
    )
    assert not load_base(str(folder), device="cpu").zero_blank

"""Our pictures hold against diffusers' StableDiffusionPipeline on the same folder, noise and scheduler."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from sdlora.bases.family import load_base
from sdlora.bases.sampling import make_noise, make_scheduler, sample
from sdlora.combining.plan import Plan
from sdlora.combining.stack import combine
from tests.stacks import random_adapter
from tests.tiny import save_tiny_pipeline

PROMPTS, SEEDS = ["a cat", "ink apple"], [3, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", seed=2)


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder), device="cpu")


@pytest.fixture
def pipe(folder):
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_with(pipe, base, sampler="dpm++", guidance=4.0, side_px=64) -> list[np.ndarray]:
    pipe.scheduler = make_scheduler(base, sampler)
    pictures = pipe(
        PROMPTS,
        negative_prompt=["blur"] * 2,
        latents=torch.stack([make_noise(s, side_px, side_px) for s in SEEDS]),
        num_inference_steps=6,
        guidance_scale=guidance,
        width=side_px,
        height=side_px,
    ).images
    return [np.asarray(p).astype(int) for p in pictures]


def draw(base, sampler="dpm++", guidance=4.0, side_px=64) -> list[np.ndarray]:
    options = {"negative": "blur", "steps": 6, "guidance": guidance, "sampler": sampler}
    pictures = sample(base, PROMPTS, seeds=SEEDS, width_px=side_px, height_px=side_px, **options)
    return [np.asarray(p).astype(int) for p in pictures]


def worst(a: list[np.ndarray], b: list[np.ndarray]) -> int:
    return max(int(abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim"}, {"guidance": 1.0}, {"side_px": 80}], ids=["dpm", "ddim", "unguided", "80px"]
)
def test_sampler_equals_diffusers_pipeline(pipe, base, options):
    ours, theirs = draw(base, **options), draw_with(pipe, base, **options)
    assert worst(ours, theirs) <= 2
    assert ours[0].std() > 5  # a picture, not a plain field


def test_initial_noise_equals_diffusers_own(pipe):
    generator = torch.Generator("cpu").manual_seed(5)
    theirs = pipe.prepare_latents(1, 4, 64, 64, torch.float32, torch.device("cpu"), generator)[0]
    assert torch.equal(make_noise(5, 64, 64), theirs)


def test_text_states_and_latents_equal_diffusers_own(pipe, base):
    theirs, negative = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, True, negative_prompt=["", ""])
    ours = base.encode_text(base.tokenize([*PROMPTS, ""])[0]).states
    torch.testing.assert_close(ours[:2], theirs)
    torch.testing.assert_close(ours[2], negative[0])
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = pipe.vae.encode(x).latent_dist
    mean, std = base.encode_pictures(x)
    torch.testing.assert_close(mean, posterior.mean * 0.18215, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.18215, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        base.decode_latents(mean), pipe.vae.decode(mean / 0.18215).sample.clamp(-1, 1), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(base.alphas_cumprod.float(), pipe.scheduler.alphas_cumprod) or torch.allclose(
        base.alphas_cumprod.float(), pipe.scheduler.alphas_cumprod, rtol=1e-5
    )


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_lora_file_through_diffusers_gives_our_picture(pipe, base, tmp_path, format):
    adapter = random_adapter(base, 7, rank=4, alpha=2.0, size=0.5, text=True)
    adapter.save(str(tmp_path / "one.safetensors"), format=format)
    with Plan.of([(adapter, 1.0)]).applied(base):
        ours = draw(base)
    pipe.load_lora_weights(tmp_path, weight_name="one.safetensors")
    assert worst(ours, draw_with(pipe, base)) <= 2
    assert worst(ours, draw(base)) > 20  # the LoRA does act


def test_combined_file_through_diffusers_gives_the_stacks_picture(pipe, base, tmp_path):
    stack = [(random_adapter(base, 1, rank=2, alpha=4.0, size=0.4, text=True), 0.7, 0.2)]
    stack += [(random_adapter(base, 2, rank=3, size=0.4), -0.4)]
    with Plan.of(stack).applied(base):
        ours = draw(base)
    combine(stack).save(str(tmp_path / "both.safetensors"))
    pipe.load_lora_weights(tmp_path, weight_name="both.safetensors")
    assert worst(ours, draw_with(pipe, base)) <= 2
    assert worst(ours, draw(base)) > 20

"""What decides a picture: its prompt and its seed, and nothing beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdlora.bases.sampling import make_noise, make_scheduler, sample, sample_encoded
from sdlora.errors import ConfigError
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base():
    return make_tiny_base()


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_batch_size_does_not_change_pictures(base):
    prompts, seeds = ["a cat", "ink", "a cat"], [5, 6, 7]
    together = sample(base, prompts, seeds=seeds, steps=4, batch_size=3)
    for size in (1, 2):
        apart = sample(base, prompts, seeds=seeds, steps=4, batch_size=size)
        for a, b in zip(together, apart, strict=True):
            assert abs(pixels(a) - pixels(b)).max() <= 1
    assert abs(pixels(together[0]) - pixels(together[2])).max() > 20


def test_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone(base):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(base, ["a cat"], seeds=[9], steps=3)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(base, ["a cat"], seeds=[9], steps=3)[0].tobytes() == first.tobytes()


def test_guidance_one_ignores_the_negative_prompt_and_more_does_not(base):
    def draw(guidance, negative):
        return sample(base, ["a cat"], seeds=[1], steps=3, guidance=guidance, negative=negative)[0].tobytes()

    assert draw(1, "ink") == draw(1, "")
    assert draw(4, "ink") != draw(4, "")


def test_guidance_extrapolates_from_uncond_to_cond(base):
    text = base.encode_text(base.tokenize(["a cat"])[0])
    negative = base.encode_text(base.tokenize([""])[0])
    noise = make_noise(4, 64, 64)[None]
    scheduler = make_scheduler(base)
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[:1]
    assert int(t) == 999
    with torch.no_grad():
        cond, uncond = base.predict(noise, t, text), base.predict(noise, t, negative)
    alpha = base.alphas_cumprod[999].float()
    x0 = (noise - (1 - alpha).sqrt() * (uncond + 3 * (cond - uncond))) / alpha.sqrt()
    expected = ((base.decode_latents(x0)[0] / 2 + 0.5) * 255).round().permute(1, 2, 0).numpy()
    got = pixels(sample_encoded(base, text, negative, seeds=[4], steps=1, guidance=3)[0])
    assert abs(got - expected).max() <= 1


def test_size_defaults_to_the_bases_own_and_can_be_another(base):
    assert sample(base, ["x"], seeds=[0], steps=1)[0].size == (64, 64)
    assert sample(base, ["x"], seeds=[0], steps=1, width_px=80, height_px=48)[0].size == (80, 48)


def test_needs_no_text_encoder_on_encoded_text():
    base = make_tiny_base()
    text = base.encode_text(base.tokenize(["a cat", ""])[0])
    whole = sample(base, ["a cat"], seeds=[2], steps=2)[0]
    base.release("text_encoder")
    assert sample_encoded(base, text[:1], text[1], seeds=[2], steps=2)[0].tobytes() == whole.tobytes()


def test_progress_counts_every_step_of_every_batch(base):
    seen = []
    sample(base, ["a"] * 3, seeds=[0, 1, 2], steps=2, batch_size=2, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_prompts_length_changes_no_other_prompts_picture(base):
    long = "a cat " + "ink " * 100
    alone = [sample(base, [p], seeds=[i], steps=2)[0] for i, p in enumerate(("a cat", long, "ink"))]
    seen = []
    together = sample(
        base, ["a cat", long, "ink"], seeds=[0, 1, 2], steps=2, batch_size=2, progress=lambda *c: seen.append(c)
    )
    for a, b in zip(alone, together, strict=True):
        assert abs(pixels(a) - pixels(b)).max() <= 1
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_all_of_a_long_prompt_and_of_a_long_negative_is_read(base):
    def draw(prompt, negative=""):
        return sample(base, [prompt], seeds=[0], steps=2, negative=negative)[0].tobytes()

    assert draw("x " * 90 + "cat") != draw("x " * 90 + "ink")
    assert draw("cat", "x " * 90 + "cat") != draw("cat", "x " * 90 + "ink")


def test_emphasis_acts_on_prompt_and_negative_and_one_is_none(base):
    def draw(prompt, negative="", guidance=4.0):
        return sample(base, [prompt], seeds=[0], steps=2, negative=negative, guidance=guidance)[0].tobytes()

    plain = draw("a cat", "ink")
    assert draw("a (cat:1.0)", "(ink:1)") == plain
    assert len({plain, draw("a (cat:1.4)", "ink"), draw("a cat", "[ink]"), draw("a [cat]", "ink")}) == 4
    assert draw("a ((cat))") == draw("a (cat:1.21)")


def test_clip_skip_changes_the_picture_and_too_much_is_refused(base):
    pictures = {sample(base, ["a cat"], seeds=[0], steps=2, clip_skip=skip)[0].tobytes() for skip in (0, 1)}
    assert len(pictures) == 2
    with pytest.raises(ConfigError, match="clip_skip = 2 is out of range for tiny; give 0 to 1"):
        sample(base, ["a cat"], seeds=[0], steps=2, clip_skip=2)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_velocity_and_noise_give_the_same_picture(family, sampler):
    """A base that predicts the velocity of what another says of the noise draws the other's picture."""
    noise_base = make_tiny_base(family=family)
    velocity_base = make_tiny_base(family=family, schedule={"prediction_type": "v_prediction"})

    class Velocity(type(noise_base.family)):
        def predict(self, base, x_t, t, text, sizes=None):
            noise = super().predict(base, x_t, t, text, sizes)
            alpha_bar = base.alphas_cumprod[t].float().view(-1, 1, 1, 1)
            x0 = (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
            return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0

    velocity_base.family = Velocity(family)
    a, b = (
        pixels(sample(base, ["a cat"], seeds=[3], steps=4, sampler=sampler, negative="ink")[0])
        for base in (noise_base, velocity_base)
    )
    assert abs(a - b).max() <= 2
    assert a.std() > 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps 0 is out of range"),
        ({"steps": 1001}, "steps 1001"),
        ({"width_px": 60}, "width 60 px is not a positive multiple of 8"),
        ({"height_px": 0}, "height 0 px"),
        ({"height_px": -8}, "height -8 px"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"seeds": [-1]}, "seed -1"),
        ({"seeds": [2**63]}, "seed 9223372036854775808"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"sampler": "euler"}, "sampler 'euler' is not known"),
    ],
)
def test_value_out_of_range_is_one_line(base, options, words):
    with pytest.raises(ConfigError) as caught:
        sample(base, ["a cat"], **({"seeds": [0]} | options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same_picture(base, dtype):
    exact = pixels(sample(base, ["a cat"], seeds=[3], steps=4)[0])
    half = pixels(sample(make_tiny_base(dtype=dtype), ["a cat"], seeds=[3], steps=4)[0])
    assert abs(exact - half).mean() < 4

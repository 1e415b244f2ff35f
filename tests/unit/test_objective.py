"""The objective against diffusers' DDPM and the papers' formulas written out."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora.errors import BaseModelError
from sdlora.training.objective import add_noise, min_snr_weight, prediction_type_of, target, weighted_error

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHA_BAR = torch.cumprod(1 - SCHEDULER.betas.double(), 0)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


T = torch.tensor([0, 1, 250, 500, 999])


def test_add_noise_equals_diffusers(pair):
    x0, noise = pair
    torch.testing.assert_close(
        add_noise(x0, noise, ALPHA_BAR[T]), SCHEDULER.add_noise(x0, noise, T), rtol=1e-5, atol=1e-6
    )


def test_velocity_equals_diffusers(pair):
    x0, noise = pair
    ours = target(x0, noise, ALPHA_BAR[T], "v_prediction")
    torch.testing.assert_close(ours, SCHEDULER.get_velocity(x0, noise, T), rtol=1e-5, atol=1e-6)


def test_epsilon_target_is_the_noise(pair):
    x0, noise = pair
    assert torch.equal(target(x0, noise, ALPHA_BAR[T], "epsilon"), noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_equals_the_written_formula(kind):
    weights = min_snr_weight(ALPHA_BAR[T], 5.0, kind)
    for t, weight in zip(T.tolist(), weights.tolist(), strict=True):
        snr = float(ALPHA_BAR[t]) / (1 - float(ALPHA_BAR[t]))
        expected = min(snr, 5.0) / (snr if kind == "epsilon" else snr + 1)
        assert math.isclose(weight, expected, rel_tol=1e-6), t


def test_min_snr_weight_at_zero_snr_is_its_limit():
    nothing_left = torch.zeros(1, dtype=torch.float64)
    assert min_snr_weight(nothing_left, 5.0, "epsilon").item() == 1.0
    assert min_snr_weight(nothing_left, 5.0, "v_prediction").item() == 0.0


def test_gamma_zero_weighs_all_alike():
    assert min_snr_weight(ALPHA_BAR[T], 0, "v_prediction").tolist() == [1.0] * 5


def test_weighted_error_equals_a_loop_over_samples(pair):
    prediction, goal = pair
    weight = torch.tensor([1.0, 0.5, 0.25, 2.0, 0.0])
    expected = sum(
        float(w) * float(((p - g) ** 2).mean()) for w, p, g in zip(weight, prediction, goal, strict=True)
    ) / len(weight)
    assert math.isclose(float(weighted_error(prediction, goal, weight)), expected, rel_tol=1e-6)


def test_half_precision_predictions_are_compared_in_float32(pair):
    prediction, goal = pair
    prediction = prediction.bfloat16()
    loss = weighted_error(prediction, goal, torch.ones(5))
    assert loss.dtype == torch.float32
    assert math.isclose(float(loss), float((prediction.double() - goal.double()).square().mean()), rel_tol=1e-6)


def test_unknown_prediction_type_is_named():
    assert prediction_type_of({}) == "epsilon"
    with pytest.raises(BaseModelError, match="'sample'"):
        prediction_type_of({"prediction_type": "sample"})

"""The objective against diffusers' DDPM and the papers' formulas written out."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora.config import Recipe
from sdlora.errors import BaseModelError
from sdlora.training.objective import (
    Objective,
    add_noise,
    debiased_weight,
    huber_width,
    min_snr_weight,
    prediction_type_of,
    target,
    weighted_error,
)

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


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_of_zero_snr_is_learnt_with_weight_one(kind):
    nothing_left = torch.zeros(1, dtype=torch.float64)
    assert min_snr_weight(nothing_left, 5.0, kind).item() == 1.0
    assert debiased_weight(nothing_left, kind).item() == 1.0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_debiased_equals_the_written_formula(kind):
    weights = debiased_weight(ALPHA_BAR[T], kind)
    assert weights.dtype == torch.float32
    for t, weight in zip(T.tolist(), weights.tolist(), strict=True):
        snr = float(ALPHA_BAR[t]) / (1 - float(ALPHA_BAR[t]))
        expected = 1 / math.sqrt(snr) * (1 if kind == "epsilon" else snr / (snr + 1))
        assert math.isclose(weight, expected, rel_tol=1e-6), t


@pytest.mark.parametrize("weighting", ["min-snr", "debiased"])
def test_both_kinds_of_prediction_weigh_the_same_mistake_alike(pair, weighting):
    x0, noise = (x.double() for x in pair)
    wrong = torch.randn(noise.shape, generator=torch.Generator().manual_seed(4)).double()
    alpha_bar = ALPHA_BAR[T]
    keep, loss = (f.view(-1, 1, 1, 1) for f in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    guess = noise + 0.1 * wrong  # of the noise; what it means for the picture, and so for the velocity:
    x0_guess = (keep * x0 + loss * noise - loss * guess) / keep
    losses = {}
    for kind, prediction in (("epsilon", guess), ("v_prediction", keep * guess - loss * x0_guess)):
        weight = Objective(Recipe(weighting=weighting), kind, 1000).weigh(alpha_bar)
        error = (prediction - target(x0, noise, alpha_bar, kind)).square().flatten(1).mean(1)
        losses[kind] = (error * weight).tolist()
    assert losses["epsilon"] == pytest.approx(losses["v_prediction"], rel=1e-5)


def test_huber_width_equals_the_written_schedules():
    for t, c in zip(T.tolist(), huber_width(ALPHA_BAR[T], T, 1000, 0.1, "exponential").tolist(), strict=True):
        assert math.isclose(c, 0.1 ** (t / 1000), rel_tol=1e-6)
    for t, c in zip(T.tolist(), huber_width(ALPHA_BAR[T], T, 1000, 0.1, "snr").tolist(), strict=True):
        sigma = math.sqrt((1 - float(ALPHA_BAR[t])) / float(ALPHA_BAR[t]))
        assert math.isclose(c, 0.9 / (1 + sigma) ** 2 + 0.1, rel_tol=1e-6)
    assert huber_width(ALPHA_BAR[T], T, 1000, 0.1, "constant").tolist() == pytest.approx([0.1] * 5)
    zero = torch.zeros(1, dtype=torch.float64)
    assert huber_width(zero, torch.tensor([999]), 1000, 0.1, "snr").item() == pytest.approx(0.1)


def test_huber_equals_the_written_formula(pair):
    prediction, goal = pair
    weight, width = torch.tensor([1.0, 0.5, 0.25, 2.0, 0.0]), torch.tensor([1.0, 0.5, 0.1, 0.01, 0.3])
    expected = 0.0
    for p, g, w, c in zip(prediction.double(), goal.double(), weight.tolist(), width.double().tolist(), strict=True):
        expected += w * float((2 * c * (((p - g) ** 2 + c**2).sqrt() - c)).mean()) / 5
    assert math.isclose(float(weighted_error(prediction, goal, weight, width)), expected, rel_tol=1e-5)


def test_huber_is_squared_for_small_errors_and_plain_for_large_ones():
    goal, one, c = torch.zeros(1, 4), torch.ones(1), torch.tensor([0.1])
    small = torch.tensor([[1e-5, -2e-5, 3e-5, 0.0]])
    assert float(weighted_error(small, goal, one, c)) == pytest.approx(
        float(weighted_error(small, goal, one)), rel=1e-5
    )
    large = torch.tensor([[1e3, -2e3, 1e3, 4e3]])
    assert float(weighted_error(large, goal, one, c)) == pytest.approx(2 * 0.1 * 2e3, rel=1e-3)


def test_the_recipe_chooses_the_objective():
    alpha_bar = ALPHA_BAR[T]
    plain = Objective(Recipe(), "epsilon", 1000)
    assert torch.equal(plain.weigh(alpha_bar), min_snr_weight(alpha_bar, 5.0, "epsilon"))
    assert plain.width(alpha_bar, T) is None
    other = Objective(Recipe(weighting="debiased", loss="huber", huber_schedule="snr"), "v_prediction", 1000)
    assert torch.equal(other.weigh(alpha_bar), debiased_weight(alpha_bar, "v_prediction"))
    assert torch.equal(other.width(alpha_bar, T), huber_width(alpha_bar, T, 1000, 0.1, "snr"))
    assert Objective(Recipe(weighting="none"), "epsilon", 1000).weigh(alpha_bar).tolist() == [1.0] * 5


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

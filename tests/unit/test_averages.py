"""Running means against diffusers' EMAModel, and what is shown of them."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from sdlora.training.averages import Averages, decay_at


def make():
    factors = {n: torch.nn.Parameter(torch.zeros(3)) for n in ("unet.a.down", "unet.a.up")}
    return factors, torch.optim.SGD(factors.values(), lr=1.0)


def test_means_equal_diffusers():
    factors, optimizer = make()
    averages, reference = Averages(factors, optimizer, 0.6), EMAModel(list(factors.values()), decay=0.6)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for factor in factors.values():
            factor.data.copy_(torch.randn(3, generator=generator))
        averages.update(step)
        reference.step(list(factors.values()))
        assert decay_at(step, 0.6) == pytest.approx(reference.cur_decay_value)
        for mine, theirs in zip(averages.values.values(), reference.shadow_params, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert decay_at(19, 0.6) == 0.6


def test_shown_are_the_means_and_learnt_stay_to_the_bit():
    factors, optimizer = make()
    averages = Averages(factors, optimizer, 0.9)
    for step in range(3):
        factors["unet.a.up"].data.fill_(step / 3)
        averages.update(step)
    with averages.shown():
        assert torch.equal(factors["unet.a.up"], averages.values["unet.a.up"])
    assert torch.equal(factors["unet.a.up"], torch.full((3,), 2 / 3))
    assert 0 < float(averages.values["unet.a.up"][0]) < 2 / 3
    averages.settle()
    assert torch.equal(factors["unet.a.up"], averages.values["unet.a.up"])


def test_without_a_decay_nothing_is_held():
    factors, optimizer = make()
    averages = Averages(factors, optimizer, 0.0)
    averages.update(0)
    with averages.shown():
        assert averages.values == {}

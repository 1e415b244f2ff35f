"""Shaped noise and chosen timesteps against their formulas; plain ones are as they were."""

import hashlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sdlora.training.draws import Chances, Order, generator
from sdlora.training.noise import NoiseShape, Times


def make(times=None, shape=None):
    return Chances(Order(7, [1] * 4), (4, 16, 16), 1000, 0.0, False, times or Times(), shape or NoiseShape())


def address(place=0, step=3):
    return partial(generator, 7, step, index=place)


def white(place=0, step=3):
    return torch.randn(4, 16, 16, generator=generator(7, step, "noise", place))


def drawn_times(**values):
    chances = make(Times(**values))
    return torch.cat([chances.draw(step, 16).t for step in range(125)])  # 2000


def test_plain_draws_are_what_they_were():
    draws = make().draw(3, 2)
    assert torch.equal(draws.noise, torch.stack([white(0), white(1)]))
    assert draws.added is not draws.noise
    assert torch.equal(draws.added, draws.noise)
    times = [int(torch.randint(1000, (), generator=generator(7, 3, "timestep", i))) for i in range(2)]
    assert draws.t.tolist() == times


def test_offset_shifts_each_channel_by_its_own_normal():
    noise = make(shape=NoiseShape(offset=0.1)).draw(3, 2).noise
    for place in range(2):
        shift = torch.randn(4, 1, 1, generator=generator(7, 3, "noise-offset", place))
        assert torch.equal(noise[place], white(place) + 0.1 * shift)
    assert len(set(shift.flatten().tolist())) == 4


def test_pyramid_equals_its_levels_written_out():
    noise = make(shape=NoiseShape(pyramid_levels=2, pyramid_discount=0.5)).draw(3, 1).noise[0]
    expected, side = white(), 16.0
    for level in (1, 2):
        drawing = generator(7, 3, f"pyramid-noise-{level}", 0)
        side /= 2 + 2 * float(torch.rand((), generator=drawing))
        coarse = torch.randn(1, 4, max(1, int(side)), max(1, int(side)), generator=drawing)
        expected = expected + 0.5**level * F.interpolate(coarse, size=(16, 16), mode="bilinear")[0]
        if int(side) <= 1:
            break
    torch.testing.assert_close(noise, expected / expected.std(), rtol=1e-5, atol=1e-6)


def test_pyramid_is_coarser_and_of_unit_deviation():
    plain, pyramid = (make(shape=s).draw(0, 64).noise for s in (NoiseShape(), NoiseShape(0, 6, 0.8)))
    assert pyramid.flatten(1).std(1).tolist() == pytest.approx([1.0] * 64, rel=1e-5)

    def neighbours(x):
        return float((x[..., 1:] * x[..., :-1]).mean())

    assert abs(neighbours(plain)) < 0.02
    assert neighbours(pyramid) > 0.2


def test_perturbation_is_in_the_picture_and_not_in_what_is_predicted():
    draws = make(shape=NoiseShape(perturbation=0.1)).draw(3, 2)
    for place in range(2):
        assert torch.equal(draws.noise[place], white(place))
        more = torch.randn(4, 16, 16, generator=generator(7, 3, "input-perturbation", place))
        assert torch.equal(draws.added[place], white(place) + 0.1 * more)


def test_shaped_draws_hang_on_their_address_alone():
    shape = NoiseShape(0.1, 3, 0.5, 0.2)
    times = Times(0.2, 0.7, "logit-normal")
    whole = make(times, shape).draw(11, 6)
    parts = [make(times, shape).draw(11, 2, micro, 3) for micro in range(3)]
    for name in ("noise", "added", "t"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_range_is_kept_by_every_bias():
    for bias in ("uniform", "logit-normal", "early", "late"):
        t = drawn_times(t_min=0.25, t_max=0.5, bias=bias)
        assert int(t.min()) >= 250
        assert int(t.max()) <= 499
        assert int(t.max()) - int(t.min()) > 200
    assert Times(0.0, 1.0).bounds(1000) == (0, 1000)
    assert Times(0.1, 0.3).bounds(1000) == (100, 300)  # 0.3 * 1000 is a little more than 300 in binary
    assert Times(0.999, 0.9991).bounds(10) == (9, 10)


@pytest.mark.parametrize(
    ("bias", "mean", "first_tenth"),
    [
        ("uniform", 1 / 2, 0.1),
        ("early", 1 / 3, 0.1**0.5),
        ("late", 2 / 3, 1 - 0.9**0.5),
        ("logit-normal", 1 / 2, 0.014),
    ],
)
def test_bias_has_its_distribution(bias, mean, first_tenth):
    t = drawn_times(bias=bias).double()
    assert float(t.mean()) / 1000 == pytest.approx(mean, abs=0.02)
    assert float((t < 100).double().mean()) == pytest.approx(first_tenth, abs=0.025)


def test_default_draws_are_these_bytes():
    draws = Chances(Order(7, [1, 3, 2]), (4, 8, 8), 1000, 0.25, True).draw(11, 6, 1, 2)
    found = hashlib.sha256()
    for x in (draws.picture, draws.mirror, draws.caption, draws.posterior, draws.noise, draws.t):
        found.update(x.numpy().tobytes())
    assert found.hexdigest() == "10810b9537d6a35db798134e2c5267566ffa9a1ce594c82443d25b05330421cc"

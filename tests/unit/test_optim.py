"""The optimizer against torch's plain AdamW, and the schedule against its formula."""

import math

import pytest
import torch

from sdlora.config import Recipe
from sdlora.training.optim import flatten_state, make_optimizer, rate_at, rate_factor, restore_state, set_rate


def make_factors():
    generator = torch.Generator().manual_seed(0)
    names = ("unet.a.down", "unet.a.up", "text_encoder.b.down", "text_encoder.b.up")
    return {n: torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for n in names}


def make(factors):
    return make_optimizer(factors, learning_rate=1e-2, text_encoder_learning_rate=1e-3, weight_decay=0.1)


def update(factors, optimizer, step):
    for i, factor in enumerate(factors.values()):
        factor.grad = torch.randn(factor.shape, generator=torch.Generator().manual_seed(100 * step + i))
    set_rate(optimizer, 0.5)
    optimizer.step()


def test_warmup_then_cosine():
    def at(step):
        return rate_factor(step, schedule="cosine", warmup_steps=10, steps=110)

    assert [at(0), at(4), at(9), at(10)] == [0.1, 0.5, 1.0, 1.0]
    assert math.isclose(at(60), 0.5)
    assert math.isclose(at(109), 0.5 * (1 + math.cos(math.pi * 0.99)))
    assert at(109) > 0


def test_constant_stays_and_no_warmup_starts_at_once():
    assert {rate_factor(s, schedule="constant", warmup_steps=0, steps=5) for s in range(5)} == {1.0}
    assert rate_factor(0, schedule="cosine", warmup_steps=0, steps=1) == 1.0


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("cosine", "cosine", {}),
        ("linear", "linear", {}),
        ("cosine-restarts", "cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", "polynomial", {"power": 2.5}),
        ("constant", "constant_with_warmup", {}),
    ],
)
def test_schedules_equal_diffusers(ours, theirs, options, warmup):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=50, **options)
    for step in range(50):
        share = rate_factor(step, schedule=ours, warmup_steps=warmup, steps=50, cycles=3, power=2.5)
        expected = (step + 1) / warmup if step < warmup else reference.get_last_lr()[0]
        assert share == pytest.approx(expected, abs=2e-7), step
        optimizer.step()
        reference.step()


def test_text_encoder_has_its_own_rate():
    factors = make_factors()
    optimizer = make(factors)
    assert set_rate(optimizer, 0.5) == 0.5e-2
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == {n: 0.5e-3 if n.startswith("text_encoder") else 0.5e-2 for n in factors}


def test_updates_equal_unfused_adamw():
    ours, plain = make_factors(), make_factors()
    optimizer = make(ours)
    rates = [1e-2 * 0.5] * 2 + [1e-3 * 0.5] * 2
    reference = torch.optim.AdamW(
        [{"params": [p], "lr": r} for p, r in zip(plain.values(), rates, strict=True)],
        weight_decay=0.1,
        fused=False,
        foreach=False,
    )
    for step in range(5):
        update(ours, optimizer, step)
        for name in plain:
            plain[name].grad = ours[name].grad
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-7)


def test_restored_state_goes_on_bit_for_bit():
    straight, stopped = make_factors(), make_factors()
    optimizer, before = make(straight), make(stopped)
    assert flatten_state(before) == {}
    for step in range(3):
        update(straight, optimizer, step)
        update(stopped, before, step)
    saved = {name: value.clone() for name, value in flatten_state(before).items()}
    assert len(saved) == 12
    after = make(stopped)
    restore_state(after, saved)
    for step in range(3, 6):
        update(straight, optimizer, step)
        update(stopped, after, step)
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)


def test_a_factor_without_a_gradient_has_no_state_and_strange_state_is_refused():
    factors = make_factors()
    optimizer = make(factors)
    for name, factor in factors.items():
        factor.grad = None if name == "text_encoder.b.up" else torch.ones_like(factor)
    optimizer.step()
    saved = {name: value.clone() for name, value in flatten_state(optimizer).items()}
    assert len(saved) == 9
    after = make(factors)
    restore_state(after, saved)
    assert flatten_state(after).keys() == saved.keys()
    with pytest.raises(KeyError, match=r"unet\.c\.down"):
        restore_state(after, saved | {"exp_avg/unet.c.down": torch.zeros(3, 2)})
    del saved["exp_avg/unet.a.down"]
    with pytest.raises(KeyError, match=r"exp_avg/unet\.a\.down"):
        restore_state(after, saved)


def test_every_part_and_side_has_its_rate_and_lengths_do_not_decay():
    names = [
        f"{part}.{x}.{side}"
        for part in ("unet", "text_encoder", "text_encoder_2")
        for x in "ab"
        for side in ("down", "up", "magnitude")
    ]
    factors = {n: torch.nn.Parameter(torch.ones(2)) for n in names}
    optimizer = make_optimizer(
        factors,
        learning_rate=1e-2,
        text_encoder_learning_rate=1e-3,
        text_encoder_2_learning_rate=1e-4,
        lora_plus_ratio=16.0,
        weight_decay=0.1,
    )
    assert set_rate(optimizer, 0.5) == 0.5e-2
    found = {n: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for n in group["names"]}
    rates = {"unet": 0.5e-2, "text_encoder": 0.5e-3, "text_encoder_2": 0.5e-4}
    for name in names:
        part, _, side = name.split(".")
        ratio, decay = 16 if side == "up" else 1, 0.0 if side == "magnitude" else 0.1
        assert found[name] == (pytest.approx(rates[part] * ratio), decay)
    for factor in factors.values():
        factor.grad = torch.ones(2)
    optimizer.step()
    saved = {name: value.clone() for name, value in flatten_state(optimizer).items()}
    assert len(saved) == 3 * len(names)
    other = make_optimizer(factors, learning_rate=1e-2, text_encoder_learning_rate=1e-3, weight_decay=0.1)
    restore_state(other, saved)  # by name, whatever the groups
    assert all(torch.equal(value, flatten_state(other)[name]) for name, value in saved.items())


def test_an_init_word_has_a_schedule_of_its_own():
    recipe = Recipe(
        steps=30, warmup_steps=6, learning_rate=1e-3, trigger="ink", init_word="cat", init_steps=10,
        init_learning_rate=4e-3,
    )  # fmt: skip
    word = [4 * rate_factor(s, schedule="cosine", warmup_steps=2, steps=10) for s in range(10)]
    pictures = [rate_factor(s, schedule="cosine", warmup_steps=6, steps=20) for s in range(20)]
    assert [rate_at(s, recipe) for s in range(30)] == pytest.approx(word + pictures)
    plain = Recipe(steps=30, warmup_steps=6)
    assert [rate_at(s, plain) for s in range(30)] == [
        rate_factor(s, schedule="cosine", warmup_steps=6, steps=30) for s in range(30)
    ]

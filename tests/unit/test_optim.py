"""The optimizer against torch's plain AdamW, and the schedule against its formula."""

import math

import torch

from sdlora.training.optim import flatten_state, make_optimizer, rate_factor, restore_state, set_rate


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

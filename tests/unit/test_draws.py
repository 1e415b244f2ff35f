"""Draws hang on their address alone."""

import torch

from sdlora.training.draws import Chances, Order, generator


def make_chances(repeats=(1, 3, 2), *, dropout=0.25, flip=True, seed=7):
    return Chances(Order(seed, list(repeats)), (4, 8, 8), 1000, dropout, flip)


def fields(draws):
    return (draws.picture, draws.mirror, draws.caption, draws.posterior, draws.noise, draws.t)


def test_every_epoch_shows_every_picture_its_repeats():
    order = Order(0, [1, 3, 2])
    for epoch in range(20):
        shown = [order.picture(epoch * 6 + i) for i in range(6)]
        assert sorted(shown) == [0, 1, 1, 1, 2, 2]
    assert len({tuple(order.picture(epoch * 6 + i) for i in range(6)) for epoch in range(20)}) > 10


def test_order_hangs_on_the_sample_not_on_what_was_asked_before():
    one, other = Order(5, [1] * 10), Order(5, [1] * 10)
    ahead = [one.picture(n) for n in range(50)]
    assert [other.picture(n) for n in reversed(range(50))] == ahead[::-1]
    assert [Order(6, [1] * 10).picture(n) for n in range(50)] != ahead


def test_batches_go_over_the_end_of_an_epoch_without_loss():
    chances = make_chances([1] * 5)
    shown = torch.cat([chances.draw(step, 4).picture for step in range(5)]).tolist()
    assert [sorted(shown[i : i + 5]) for i in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4


def test_micro_batches_cut_the_same_draws():
    chances = make_chances()
    whole = fields(chances.draw(11, 6))
    parts = [fields(chances.draw(11, 2, micro, 3)) for micro in range(3)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)


def test_a_resumed_run_makes_the_same_draws():
    ahead = make_chances()
    for step in range(8):
        ahead.draw(step, 4)
    for a, b in zip(fields(ahead.draw(8, 4)), fields(make_chances().draw(8, 4)), strict=True):
        assert torch.equal(a, b)


def test_steps_purposes_samples_and_seeds_differ():
    addresses = [(0, 0, "noise", 0), (1, 0, "noise", 0), (0, 1, "noise", 0), (0, 0, "posterior", 0), (0, 0, "noise", 1)]
    drawn = {tuple(torch.randn(4, generator=generator(*a)).tolist()) for a in addresses}
    assert len(drawn) == len(addresses)


def test_draws_have_their_distributions():
    chances = make_chances([1] * 4)
    batches = [chances.draw(step, 8) for step in range(250)]  # 2000 samples
    pictures, mirror, captions, posterior, noise, t = (
        torch.cat(parts) for parts in zip(*(fields(b) for b in batches), strict=True)
    )
    dropped = captions == 4
    assert abs(dropped.float().mean() - 0.25) < 0.03
    assert torch.equal(captions[~dropped], pictures[~dropped])
    assert abs(mirror.float().mean() - 0.5) < 0.03
    for normal in (posterior, noise):
        assert abs(normal.mean()) < 0.01
        assert abs(normal.std() - 1) < 0.01
    assert abs((posterior * noise).mean()) < 0.01
    assert int(t.min()) >= 0
    assert int(t.max()) <= 999
    assert torch.histc(t.float(), 10, 0, 1000).min() > 150


def test_no_flip_and_no_dropout_mean_none():
    draws = [make_chances(dropout=0, flip=False).draw(step, 8) for step in range(20)]
    assert not any(d.mirror.any() for d in draws)
    assert all(torch.equal(d.caption, d.picture) for d in draws)
    always = [make_chances(dropout=1).draw(step, 8).caption for step in range(5)]
    assert all((caption == 3).all() for caption in always)

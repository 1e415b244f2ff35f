"""Draws hang on their address alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


orders = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(orders, st.integers(1, 9), st.integers(0, 99))
def test_steps_hold_one_bucket_and_each_bucket_shows_every_picture_its_repeats(pictures, together, seed):
    named = sorted({b for _, b in pictures})
    repeats, buckets = [r for r, _ in pictures], [named.index(b) for _, b in pictures]
    order = Order(seed, repeats, buckets, together)
    epochs = 2 * together + 1
    steps = epochs * len(order) // together + len(named)
    shown = [[order.picture(step * together + i) for i in range(together)] for step in range(steps)]
    streams = [[] for _ in named]
    for step, sample in enumerate(shown):
        bucket = order.bucket(step * together)
        assert {buckets[p] for p in sample} == {bucket}
        streams[bucket] += sample
    for bucket, stream in enumerate(streams):
        epoch = sorted(p for p, r in enumerate(repeats) for _ in range(r) if buckets[p] == bucket)
        whole = len(stream) // len(epoch)
        assert whole >= epochs - together // len(epoch) - 2
        for i in range(whole):  # nothing dropped and nothing twice, however the steps cut it
            assert sorted(stream[i * len(epoch) : (i + 1) * len(epoch)]) == epoch
        # no bucket is ahead or behind of its share by more than a step
        assert abs(len(stream) - steps * together * len(epoch) / len(order)) <= together + len(epoch)
    again = Order(seed, repeats, buckets, together)
    assert [again.picture(n) for n in reversed(range(steps * together))] == [p for s in shown for p in s][::-1]


def test_one_bucket_is_the_order_it_always_was():
    repeats = [1, 3, 2, 1, 1]
    pictures = torch.arange(5).repeat_interleave(torch.tensor(repeats))
    expected = [pictures[torch.randperm(8, generator=generator(7, epoch, "order"))].tolist() for epoch in range(6)]
    for order in (Order(7, repeats), Order(7, repeats, [0] * 5, 3)):
        assert [order.picture(n) for n in range(48)] == [p for epoch in expected for p in epoch]


def test_micro_batches_of_several_buckets_cut_the_same_draws():
    shapes = ((4, 8, 8), (4, 4, 12))
    chances = Chances(Order(3, [1, 2, 1, 1], [0, 1, 0, 1], 6), shapes[0], 1000, 0.2, True, shapes=shapes)
    seen = set()
    for step in range(8):
        whole = fields(chances.draw(step, 6))
        parts = [fields(chances.draw(step, 2, micro, 3)) for micro in range(3)]
        seen.add(tuple(whole[4].shape[1:]))
        for i, expected in enumerate(whole):
            assert torch.equal(torch.cat([part[i] for part in parts]), expected)
    assert seen == set(shapes)


def test_every_wording_of_a_picture_is_drawn_as_often_and_only_its_own():
    chances = Chances(Order(7, [1, 1, 1]), (4, 8, 8), 1000, 0.25, False, wordings=(1, 4, 2))
    batches = [chances.draw(step, 8) for step in range(300)]
    pictures, captions = (torch.cat([getattr(b, name) for b in batches]) for name in ("picture", "caption"))
    dropped = captions == 7
    assert abs(dropped.float().mean() - 0.25) < 0.03
    for picture, rows in enumerate(([0], [1, 2, 3, 4], [5, 6])):
        own = captions[(pictures == picture) & ~dropped]
        assert set(own.tolist()) == set(rows)
        assert min(int((own == row).sum()) for row in rows) > 0.8 * len(own) / len(rows)
    plain = Chances(Order(7, [1, 1, 1]), (4, 8, 8), 1000, 0.25, False).draw(3, 8)
    for name in ("picture", "mirror", "posterior", "noise", "t"):  # the other draws are the ones they were
        assert torch.equal(getattr(batches[3], name), getattr(plain, name))


def test_every_crop_is_drawn_plain_and_mirrored():
    chances = Chances(Order(7, [1, 1, 1]), (4, 8, 8), 1000, 0.25, True, crops=3)
    views = torch.cat([chances.draw(step, 8).mirror for step in range(300)])
    shares = torch.bincount(views, minlength=6) / len(views)
    assert len(shares) == 6
    assert (shares - 1 / 6).abs().max() < 0.03
    one = torch.cat([make_chances([1, 1, 1]).draw(step, 8).mirror for step in range(300)])
    assert torch.equal(views // 3, one)  # the mirrored ones are those that they were

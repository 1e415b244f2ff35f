"""Sums, round trips and truncations of LoRA files, for random ranks, alphas, kinds and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdlora.adapter.delta import Adapter, Card, Dora, LowRank
from sdlora.adapter.file import read_adapter, write_adapter
from sdlora.adapter.resizing import resize
from sdlora.adapter.truncation import OVERSAMPLING, Cost, Keep, truncate_dense, truncate_factors
from sdlora.combining.stack import combine
from sdlora.errors import ConfigError, SdloraError

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {LINEAR: (10, 7), CONV: (6, 5, 3, 3), TEXT: (8, 8)}
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

alphas = st.floats(0.0625, 40.0, width=32)
weights = st.floats(-3.0, 3.0).filter(lambda w: abs(w) > 0.01)


def make_pair(path: str, rank: int, alpha: float, seed: int) -> LowRank:
    shape, g = SHAPES[path], torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=g)
    return LowRank(down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g), alpha)


@st.composite
def adapters(draw, dora: bool = False) -> Adapter:
    """A LoRA of some of the modules, each of its own rank and alpha; with `dora`, some of them DoRA of either kind."""
    paths = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=3, unique=True))
    deltas = {}
    for path in sorted(paths):
        deltas[path] = make_pair(path, draw(st.integers(1, 9)), draw(alphas), draw(st.integers(0, 10**6)))
        if dora and draw(st.booleans()):
            shape = SHAPES[path]
            ones = [1] * (len(shape) - 1)
            size = (shape[0], *ones) if draw(st.booleans()) else (1, shape[1], *ones[1:])
            deltas[path] = Dora(deltas[path], torch.rand(size) + 0.5)
    return Adapter(deltas, Card(family="sd1"))


def dense(adapter: Adapter, path: str) -> torch.Tensor:
    """ΔW in float64, by the definition."""
    if path not in adapter.deltas:
        return torch.zeros(SHAPES[path], dtype=torch.float64)
    pair = adapter.deltas[path]
    up, down = pair.up.double().flatten(1), pair.down.double().flatten(1)
    return (pair.alpha / len(down) * up @ down).reshape(SHAPES[path])


def relative(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> float:
    return float((found.double() - wanted).norm()) / max(scale, 1e-12)


@QUICK
@given(st.lists(st.tuples(adapters(), weights, weights), min_size=1, max_size=4))
def test_combine_equals_the_dense_sum_of_any_ranks_alphas_and_weights(stack):
    both = combine(stack)
    assert set(both.deltas) == {path for adapter, *_ in stack for path in adapter.deltas}
    for path, delta in both.deltas.items():
        terms = [(te if path == TEXT else w) * dense(adapter, path) for adapter, w, te in stack]
        assert relative(delta.weight(), sum(terms), sum(float(t.norm()) for t in terms)) < 1e-6


@QUICK
@given(adapters(), adapters(), weights, st.floats(0.1, 4.0))
def test_combine_is_linear_and_one_lora_at_weight_one_is_its_identity(one, two, weight, factor):
    whole = combine([(one, factor * weight), (two, -factor)])
    parts = combine([(combine([(one, weight), (two, -1.0)]), factor)])
    alone = combine([(one, 1.0)])
    for path in whole.deltas:
        scale = factor * float(abs(weight) * dense(one, path).norm() + dense(two, path).norm())
        assert relative(whole.deltas[path].weight(), parts.deltas[path].weight().double(), scale) < 1e-6
    for path, delta in alone.deltas.items():
        assert relative(delta.weight(), dense(one, path), float(dense(one, path).norm())) < 1e-6


@QUICK
@given(
    adapters(dora=True),
    st.permutations(["kohya", "diffusers", "peft"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_converting_there_and_back_gives_the_same_tensors_and_alphas(tmp_path, adapter, formats, dtype):
    by_input = any(isinstance(d, Dora) and not d.on_output for d in adapter.deltas.values())
    if by_input:  # the other two have no name for it, and say so
        with pytest.raises(SdloraError, match="use kohya"):
            write_adapter(adapter, tmp_path / "x.safetensors", "peft")
        formats = ["kohya"]
    first = Path(tmp_path / "0.safetensors")
    write_adapter(adapter, first, formats[0], dtype)
    before, now = read_adapter(first), read_adapter(first)
    for i, format in enumerate([*formats[1:], formats[0]], start=1):
        write_adapter(now, tmp_path / f"{i}.safetensors", format, dtype)
        now = read_adapter(tmp_path / f"{i}.safetensors")
    assert list(now.deltas) == list(before.deltas) == sorted(adapter.deltas)
    assert first.read_bytes() == (tmp_path / f"{i}.safetensors").read_bytes()
    for path, delta in now.deltas.items():
        for a, b, first_given in zip(*(parts(d.deltas[path]) for d in (now, before, adapter)), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.float(), first_given.to(a.dtype).float())
        assert parts(delta)[0].dtype == dtype


def parts(delta: LowRank | Dora) -> list[torch.Tensor]:
    """down, up and alpha, and a DoRA's lengths."""
    if isinstance(delta, Dora):
        return [*parts(delta.inner), delta.magnitude]
    return [delta.down, delta.up, torch.tensor(delta.alpha, dtype=torch.float32)]


@QUICK
@given(adapters(dora=True), st.integers(0, 5))
def test_resizing_to_full_rank_changes_nothing(adapter, more):
    cost = Cost()
    same = resize(adapter, Keep(9 + more), cost)
    assert cost.errors["all"] == 0.0
    for path, delta in same.deltas.items():
        if isinstance(delta, Dora):
            assert torch.equal(delta.magnitude, adapter.deltas[path].magnitude)
        for a, b in zip(parts(delta), parts(adapter.deltas[path]), strict=True):
            assert torch.equal(a, b)


@QUICK
@given(adapters(), st.integers(1, 8))
def test_resizing_costs_the_energy_of_the_singular_values_that_are_dropped(adapter, rank):
    cost = Cost()
    small = resize(adapter, Keep(rank), cost)
    lost = whole = found = 0.0
    for path, delta in small.deltas.items():
        values = torch.linalg.svdvals(dense(adapter, path).flatten(1))
        lost += float((values[min(rank, adapter.deltas[path].rank) :] ** 2).sum())
        whole += float((values**2).sum())
        found += float((delta.weight().double() - dense(adapter, path)).square().sum())
        own = adapter.deltas[path].rank
        assert delta.rank == (own if rank >= own else min(rank, *delta.weight().flatten(1).shape))
        assert delta.alpha == (adapter.deltas[path].alpha if rank >= adapter.deltas[path].rank else delta.rank)
    assert cost.errors["all"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4, abs=1e-6)
    assert (found / whole) ** 0.5 == pytest.approx((lost / whole) ** 0.5, rel=1e-4, abs=1e-6)


@QUICK
@given(adapters(), st.floats(0.01, 0.9), st.booleans())
def test_resizing_by_error_or_energy_keeps_the_fewest_ranks_that_do(adapter, share, by_error):
    allowed = share**2 if by_error else 1 - share
    small = resize(adapter, Keep(error=share) if by_error else Keep(energy=share))
    for path, delta in small.deltas.items():
        values = torch.linalg.svdvals(dense(adapter, path).flatten(1)) ** 2
        left = float((delta.weight().double() - dense(adapter, path)).square().sum() / values.sum())
        assert left <= allowed + 1e-5
        if delta.rank > 1 and delta.rank < adapter.deltas[path].rank:
            assert float(values[delta.rank - 1 :].sum() / values.sum()) > allowed - 1e-9


def test_a_kind_that_is_not_low_rank_becomes_so_and_what_is_no_matrix_stays():
    g = torch.Generator().manual_seed(0)

    class Full:
        def __init__(self, *shape: int) -> None:
            self.value = torch.randn(*shape, generator=g)

        def weight(self) -> torch.Tensor:
            return self.value

    matrix, lengths = Full(10, 7), Full(5)
    cost = Cost()
    found = resize(Adapter({LINEAR: matrix, "unet.conv_norm_out": lengths}), Keep(3), cost)
    values = torch.linalg.svdvals(matrix.value.double()) ** 2
    assert found.deltas["unet.conv_norm_out"] is lengths
    assert found.deltas[LINEAR].rank == 3
    assert cost.errors["down.0"] == pytest.approx(float(values[3:].sum() / values.sum()) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "not none; --rank 16 keeps"),
        ({"rank": 2, "error": 0.1}, "not --rank 2 and --error 0.1"),
        ({"rank": 0}, "rank 0 is out of range"),
        ({"error": -0.1}, "error -0.1 is out of range"),
        ({"energy": 1.5}, "energy 1.5 is out of range"),
    ],
)
def test_what_is_kept_is_said_in_exactly_one_way(given, says):
    with pytest.raises(ConfigError, match=says):
        Keep(**given)


def test_a_large_dense_change_is_sketched_and_loses_hardly_more_than_the_best():
    """Values that fall off as slowly as those of a fine-tune: the sketch is within 0.2 % of the full decomposition."""
    g = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(700, 640, generator=g)).Q
    v = torch.linalg.qr(torch.randn(640, 640, generator=g)).Q
    values = 1 / (1 + torch.arange(640.0)) ** 0.5
    delta = (u * values) @ v.T
    rank = 64
    assert 4 * (rank + OVERSAMPLING) < 640
    found, again = truncate_dense(delta, Keep(rank)), truncate_dense(delta, Keep(rank))
    best = float((values[rank:].double() ** 2).sum() / (values.double() ** 2).sum()) ** 0.5
    error = (found.lost / found.whole) ** 0.5
    assert best - 1e-5 <= error < 1.002 * best
    assert float((delta - found.up @ found.down).norm() / delta.norm()) == pytest.approx(error, rel=1e-4)
    assert torch.equal(found.down, again.down)


def test_factors_longer_than_the_weight_truncate_too():
    g = torch.Generator().manual_seed(2)
    up, down = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((4, 9), (9, 6)))
    found = truncate_factors(up, down, Keep(9))
    assert found.rank == 4
    torch.testing.assert_close(found.up @ found.down, up @ down)

"""A plan's sum of ΔWs, against sums done by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from sdlora.adapter.delta import Adapter, Card, Dora, LowRank
from sdlora.adapter.file import write_adapter
from sdlora.bases.sampling import sample
from sdlora.combining.merge import merge_for_good, merged_for_a_while
from sdlora.combining.plan import Plan, find_module
from sdlora.combining.stack import combine
from sdlora.errors import AdapterFileError, ConfigError
from tests.stacks import hash_base, random_adapter
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base():
    return make_tiny_base()


def by_hand(delta: LowRank) -> torch.Tensor:
    return delta.alpha / delta.down.shape[0] * delta.up.double() @ delta.down.double()


def test_stack_equals_merged_weights(base):
    one = random_adapter(base, 1, alpha=2.0, text=True)
    two = random_adapter(base, 2, rank=3, alpha=6.0, text=True)
    before = {p: find_module(base, p).weight.clone() for p in one.deltas}
    with Plan.of([(one, 0.8, 0.1), (two, -1.3)]).applied(base):
        for path, weight in before.items():
            a, b = (0.1, -1.3) if path.startswith("text_encoder") else (0.8, -1.3)
            expected = weight.double() + a * by_hand(one.deltas[path]) + b * by_hand(two.deltas[path])
            torch.testing.assert_close(find_module(base, path).weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert len(before) == 32 + 8


def test_applied_output_equals_lora_branches_by_hand(base):
    adapter = random_adapter(base, 3, rank=2, alpha=1.0)
    path = next(p for p in adapter.deltas if "attn2.to_k" in p)
    module, delta = find_module(base, path), adapter.deltas[path]
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
    expected = module(x) + 0.7 * 0.5 * (x @ delta.down.T) @ delta.up.T
    with Plan.of([(adapter, 0.7)]).applied(base):
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_order_of_the_stack_changes_no_bit(base):
    loras = [(random_adapter(base, seed, rank=1 + seed), 0.3 * seed - 0.7) for seed in range(4)]
    hashes = set()
    for order in itertools.permutations(loras):
        with Plan.of(list(order)).applied(base):
            hashes.add(hash_base(base))
    assert len(hashes) == 1


def test_weight_zero_and_empty_stack_leave_the_very_weights(base):
    adapter = random_adapter(base, 1, text=True)
    before = hash_base(base)
    addresses = [p.data_ptr() for p in base.unet.parameters()]
    for stack in ([], [(adapter, 0.0)], [(adapter, 0.0, 0.0), (random_adapter(base, 2), -0.0)]):
        with Plan.of(stack).applied(base):
            assert hash_base(base) == before
            assert [p.data_ptr() for p in base.unet.parameters()] == addresses
    with Plan.of([(adapter, 1.0), (adapter, -1.0)]).applied(base):
        assert hash_base(base) == before


def test_weight_zero_gives_the_bases_own_picture(base):
    def draw():
        return sample(base, ["a cat"], seeds=[3], steps=3)[0].tobytes()

    plain = draw()
    with Plan.of([(random_adapter(base, 1, text=True), 0.0)]).applied(base):
        assert draw() == plain
    with Plan.of([(random_adapter(base, 1, text=True), 1.0)]).applied(base):
        assert draw() != plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_adapters_in_and_out_leave_the_base_bit_identical(dtype):
    base = make_tiny_base(dtype=dtype)
    before = hash_base(base)
    loras = [random_adapter(base, seed, text=True) for seed in range(8)]
    for turn in range(100):
        with Plan.of([(lora, 0.1 * (i + turn % 7)) for i, lora in enumerate(loras)]).applied(base):
            assert hash_base(base) != before
        assert hash_base(base) == before


def test_base_is_restored_after_an_exception_and_after_nesting(base):
    before = hash_base(base)
    plan = Plan.of([(random_adapter(base, 1), 1.0)])
    with pytest.raises(ZeroDivisionError), plan.applied(base):
        1 / 0  # noqa: B018
    assert hash_base(base) == before
    with plan.applied(base):
        inside = hash_base(base)
        with Plan.of([(random_adapter(base, 2), 1.0)]).applied(base):
            assert hash_base(base) != inside
        assert hash_base(base) == inside
    assert hash_base(base) == before


def test_bfloat16_base_is_rounded_once():
    base = make_tiny_base(dtype=torch.bfloat16)
    loras = [random_adapter(base, seed) for seed in (1, 2, 3)]
    path = next(iter(loras[0].deltas))
    weight = find_module(base, path).weight.clone()
    total = sum(by_hand(lora.deltas[path]) for lora in loras)
    with Plan.of([(lora, 1.0) for lora in loras]).applied(base):
        assert torch.equal(find_module(base, path).weight, (weight.float() + total.float()).bfloat16())


def test_channels_last_convolutions_keep_layout_and_sum(base):
    path = "unet.conv_in"
    weight = find_module(base, path).weight
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, *weight.shape[1:], generator=generator)
    up = torch.randn(len(weight), 2, 1, 1, generator=generator)
    adapter = Adapter({path: LowRank(down, up, 2.0)})
    expected = weight + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    with Plan.of([(adapter, 1.0)]).applied(base):
        torch.testing.assert_close(weight, expected)
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_no_finite_number_is_refused(base, bad):
    adapter = random_adapter(base, 1)
    for stack in ([(adapter, bad)], [(adapter, 1.0, bad)]):
        with pytest.raises(ConfigError, match=r"LoRA 1: weight .* is not a finite number"):
            Plan.of(stack)


def test_adapter_of_another_base_is_refused_by_name_with_both_shapes(base):
    other = make_tiny_base(block_out_channels=(32, 64))
    plan = Plan.of([(random_adapter(other, 1), 1.0)], ["style.safetensors"])
    before = hash_base(base)
    with pytest.raises(AdapterFileError) as caught, plan.applied(base):
        pass
    text = str(caught.value)
    assert "\n" not in text
    assert "style.safetensors" in text
    assert "32 x 32" in text
    assert "16 x 16" in text
    assert "mini" in text
    assert hash_base(base) == before


def test_adapter_with_no_module_of_the_base_is_refused(base):
    alien = Adapter({"unet.middle.thing": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, Card(base="sdxl"))
    with pytest.raises(AdapterFileError, match=r"another base \(made for sdxl\).*none of its 1 modules"):
        Plan.of([(alien, 1.0)]).check(base)


def test_modules_left_out_are_counted_in_a_line(base):
    adapter = random_adapter(base, 1)
    extra = {"unet.down_blocks.9.attentions.0.to_q": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    lines = Plan.of([(Adapter(adapter.deltas | extra), 1.0)], ["a.safetensors"]).check(base)
    assert lines == ["a.safetensors: 1 of 33 modules left out: tiny has no unet.down_blocks.9.attentions.0.to_q"]


def test_non_finite_adapter_is_refused_and_the_base_restored(base):
    adapter = random_adapter(base, 1)
    last = sorted(adapter.deltas)[-1]
    adapter.deltas[last] = LowRank(adapter.deltas[last].down * float("inf"), adapter.deltas[last].up, 1.0)
    before = hash_base(base)
    with pytest.raises(AdapterFileError, match="no finite float32 weight"), Plan.of([(adapter, 1.0)]).applied(base):
        pass
    assert hash_base(base) == before


def test_combine_equals_the_weighted_sum_of_unequal_ranks_and_alphas(base):
    one = random_adapter(base, 1, rank=2, alpha=5.0, text=True)
    two = random_adapter(base, 2, rank=7, alpha=0.5)
    three = random_adapter(base, 3, rank=1)
    mixed = dict(three.deltas)
    first = next(iter(mixed))
    mixed[first] = LowRank(mixed[first].down, mixed[first].up, 3.5)  # one module's own alpha
    stack = [(one, 0.8, 0.3), (two, -1.5), (Adapter(mixed), 2.0)]
    both = combine(stack)
    for path, delta in both.deltas.items():
        assert delta.alpha == delta.rank
        terms = [
            ((w[1] if path.startswith("text_encoder") and len(w) > 1 else w[0]), a.deltas[path])
            for a, *w in stack
            if path in a.deltas
        ]
        expected = sum(w * by_hand(d) for w, d in terms)
        error = (delta.weight().double() - expected).norm() / expected.norm()
        assert error < 1e-6, (path, error)
    assert both.deltas[first].rank == 10
    assert set(both.deltas) == set(one.deltas)
    assert set(both.card.trigger.split(", ")) == {"word1", "word2"}


def test_combine_is_linear(base):
    one, two = random_adapter(base, 1), random_adapter(base, 2, rank=2)
    whole = combine([(one, 0.6), (two, 1.2)])
    half = combine([(one, 0.3), (two, 0.6)])
    path = next(iter(whole.deltas))
    torch.testing.assert_close(half.deltas[path].weight() * 2, whole.deltas[path].weight(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        combine([(whole, 1.0), (half, -2.0)]).deltas[path].weight(),
        torch.zeros_like(whole.deltas[path].weight()),
        rtol=0,
        atol=1e-5,
    )


def test_combined_convolutions_equal_the_sum():
    def conv(seed, rank, alpha):
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(rank, 3, 3, 3, generator=generator)
        return Adapter({"unet.conv_in": LowRank(down, torch.randn(5, rank, 1, 1, generator=generator), alpha)})

    one, two = conv(1, 2, 1.0), conv(2, 3, 3.0)
    both = combine([(one, 0.5), (two, -2.0)]).deltas["unet.conv_in"]
    expected = 0.5 * one.deltas["unet.conv_in"].weight() - 2 * two.deltas["unet.conv_in"].weight()
    torch.testing.assert_close(both.weight(), expected, rtol=1e-6, atol=1e-5)
    assert both.up.shape == (5, 5, 1, 1)


def test_nothing_to_combine_is_refused(base):
    with pytest.raises(ConfigError, match="no LoRA"):
        combine([])
    with pytest.raises(ConfigError, match="every weight is 0"):
        combine([(random_adapter(base, 1), 0.0)])
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    with pytest.raises(AdapterFileError, match="several families"):
        combine([(one, 1.0), (Adapter(two.deltas, Card(family="sd1")), 1.0)])


def test_a_dora_has_no_exact_sum_and_says_so(base):
    one = random_adapter(base, 1)
    path, delta = next(iter(one.deltas.items()))
    dora = Adapter(one.deltas | {path: Dora(delta, torch.ones(delta.up.shape[0], 1))})
    with pytest.raises(AdapterFileError, match="is Dora, which has no exact sum of ranks"):
        combine([(dora, 1.0), (one, 1.0)])
    plan = Plan.of([(dora, 1.0), (one, 0.5)])
    with pytest.raises(AdapterFileError, match="depends on the base's weight"):
        plan.delta(path)
    weight = find_module(base, path).weight
    turned = weight.double() + by_hand(delta)
    expected = turned / turned.norm(dim=1, keepdim=True) - weight.double() + 0.5 * by_hand(delta)
    torch.testing.assert_close(plan.delta(path, base=weight).double(), expected, rtol=1e-5, atol=1e-6)


def test_merging_for_good_is_what_a_plan_applies_and_changes_the_fingerprint(tmp_path):
    base, other = make_tiny_base(), make_tiny_base()
    files = []
    for seed in (1, 2):
        write_adapter(random_adapter(base, seed, text=True), tmp_path / f"{seed}.safetensors")
        files.append(f"{tmp_path}/{seed}.safetensors:0.{seed}")
    plain = hash_base(base)
    with merged_for_a_while(base, files) as merged:
        inside = hash_base(merged)
        assert hash_base(base) == inside != plain
    assert hash_base(base) == plain
    for_good = merge_for_good(other, files[::-1])
    assert hash_base(for_good) == inside
    assert merged.fingerprint == for_good.fingerprint != base.fingerprint
    assert merged.merged == for_good.merged
    assert str(tmp_path) not in str(merged.extra)
    assert merge_for_good(base, ()) is base
    assert base.merged == []

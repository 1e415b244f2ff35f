"""Each method of combining against its formula written out densely, and its limiting cases."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sdlora.adapter.delta import Adapter, LowRank
from sdlora.bases.sampling import sample
from sdlora.combining.methods import METHODS, make_method
from sdlora.combining.methods.method import Moment
from sdlora.combining.plan import Member, Plan, find_module
from sdlora.combining.stack import Cost, combine
from sdlora.errors import ConfigError
from sdlora.profiles import Profile, Schedule
from tests.stacks import hash_base, random_adapter
from tests.tiny import make_tiny_base

PATHS = ("unet.a", "unet.b", "unet.c")
OUT, IN = 12, 10


def make(seed: int, rank: int, alpha: float, paths=PATHS, size: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            path: LowRank(
                size * torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator), alpha
            )
            for path in paths
        }
    )


def dense(adapter: Adapter, path: str) -> torch.Tensor:
    d = adapter.deltas[path]
    return d.alpha / d.down.shape[0] * d.up.double() @ d.down.double()


def test_np_equals_its_projection():
    style, subject, other = make(1, 3, 6.0), make(2, 4, 1.0), make(3, 2, 2.0)
    for mu in (0.5, 3.0):
        kappa = mu / (1 + mu)
        plan = Plan.of([(style, 0.8), (subject, -1.2), (other, 0.3)], method=f"np:mu={mu}")
        for path in PATHS:
            q, _ = torch.linalg.qr(style.deltas[path].down.double().T)  # [in, r_s]
            keep = torch.eye(IN, dtype=torch.float64) - kappa * q @ q.T
            expected = 0.8 * dense(style, path) + (-1.2 * dense(subject, path) + 0.3 * dense(other, path)) @ keep
            torch.testing.assert_close(plan.delta(path).double(), expected, rtol=1e-6, atol=1e-6)


def test_np_protects_the_first_lora_whichever_way_the_sum_is_sorted():
    one, two = make(1, 3, 3.0), make(2, 4, 4.0)
    for style, subject in ((one, two), (two, one)):
        delta = Plan.of([(style, 1.0), (subject, 1.0)], method="np:mu=1e9").delta("unet.a").double()
        q, _ = torch.linalg.qr(style.deltas["unet.a"].down.double().T)
        torch.testing.assert_close(delta @ q, dense(style, "unet.a") @ q, rtol=1e-5, atol=1e-5)
        rest = torch.eye(IN, dtype=torch.float64) - q @ q.T
        torch.testing.assert_close(delta @ rest, dense(subject, "unet.a") @ rest, rtol=1e-5, atol=1e-5)


def test_np_without_mu_is_linear_and_alone_it_is_the_adapter():
    stack = [(make(1, 3, 6.0), 0.8), (make(2, 4, 1.0), -1.2)]
    for path in PATHS:
        torch.testing.assert_close(Plan.of(stack, method="np:mu=0").delta(path), Plan.of(stack).delta(path))
        alone = Plan.of(stack[:1], method="np").delta(path)
        torch.testing.assert_close(alone.double(), 0.8 * dense(stack[0][0], path), rtol=1e-6, atol=1e-6)


def test_np_takes_rows_that_depend_on_each_other():
    style = make(1, 2, 2.0)
    d = style.deltas["unet.a"]
    double = Adapter({"unet.a": LowRank(torch.cat([d.down, d.down]), torch.cat([d.up, d.up], 1), 4.0)})
    subject = make(2, 3, 3.0, ("unet.a",))
    found = Plan.of([(double, 1.0), (subject, 1.0)], method="np").delta("unet.a").double()
    q, _ = torch.linalg.qr(d.down.double().T)
    keep = torch.eye(IN, dtype=torch.float64) - q @ q.T / 3
    expected = dense(double, "unet.a") + dense(subject, "unet.a") @ keep
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def flips_of(method: str, style: Adapter, subject: Adapter) -> dict[str, float]:
    plan = Plan.of([(style, 1.0), (subject, 1.0)], method=method)
    return plan.method.prepare([plan.layer(path) for path in plan.paths if path.startswith("unet")]).flips


def test_klora_flips_each_layer_where_its_sums_say():
    style, subject = make(1, 2, 2.0), make(2, 3, 9.0)
    subject.deltas["unet.b"] = LowRank(3 * subject.deltas["unet.b"].down, subject.deltas["unet.b"].up, 9.0)
    flips = flips_of("klora", style, subject)
    tops, sums = {}, [0.0, 0.0]
    for path in PATHS:
        deltas = [dense(a, path).abs() for a in (style, subject)]
        sums = [total + float(d.sum()) for total, d in zip(sums, deltas, strict=True)]
        tops[path] = [float(d.flatten().sort(descending=True).values[:6].sum()) for d in deltas]
    gamma = sums[1] / sums[0]
    shown = set()
    for path in PATHS:
        for t in torch.linspace(0, 1, 41).tolist():
            subject_first = tops[path][1] >= tops[path][0] * gamma * (1.5 * t + 0.5)
            assert (t <= flips[path]) == subject_first, (path, t)
            shown.add(subject_first)
        limit = (tops[path][1] / (tops[path][0] * gamma) - 0.5) / 1.5
        assert flips[path] == pytest.approx(limit, rel=1e-9)
    assert shown == {True, False}


def test_est_flips_each_layer_where_its_energies_say():
    style, subject = make(1, 2, 2.0), make(2, 3, 3.0)
    flips = flips_of("est:d=0.3", style, subject)
    for path in PATHS:
        energy = [float((dense(a, path) ** 2).sum()) for a in (style, subject)]
        for t in torch.linspace(0, 1, 41).tolist():
            assert (t <= flips[path]) == (energy[1] >= (1.5 * t + 1 - 0.3) * energy[0]), (path, t)


def test_a_layer_that_one_lora_has_shows_that_one():
    style, subject = make(1, 2, 2.0, ("unet.a",)), make(2, 3, 3.0, ("unet.b",))
    for method in ("klora", "est"):
        plan = Plan.of([(style, 0.5), (subject, 1.0)], method=method)
        layers = {path: plan.layer(path) for path in plan.paths}
        filling = plan.method.prepare(layers.values())
        for t in (0.0, 1.0):
            assert filling.middle(layers["unet.a"], [0.5], Moment(t, 20)).tolist() == [0.5] * 2
            assert filling.middle(layers["unet.b"], [1.0], Moment(t, 20)).tolist() == [1.0] * 3


def test_ties_equals_its_three_steps_written_out():
    one, two, three = make(1, 2, 2.0), make(2, 3, 1.0), make(3, 1, 4.0)
    found = Plan.of([(one, 1.0), (two, -2.0), (three, 0.5)], method="ties:density=0.3").delta("unet.a").double()
    trimmed = []
    for w, a in ((1.0, one), (-2.0, two), (0.5, three)):
        d = w * dense(a, "unet.a")
        limit = d.abs().flatten().sort(descending=True).values[round(0.3 * d.numel()) - 1]
        trimmed.append(torch.where(d.abs() >= limit, d, 0.0))
    for i in range(OUT):
        for j in range(IN):
            values = [float(d[i, j]) for d in trimmed]
            sign = 1 if sum(values) > 0 else -1
            agreeing = [v for v in values if v * sign > 0]
            expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
            assert abs(float(found[i, j]) - expected) < 1e-6


def test_ties_and_dare_of_one_whole_lora_are_that_lora():
    one = make(1, 2, 2.0)
    for method in ("ties:density=1", "dare:density=1"):
        found = Plan.of([(one, 0.7)], method=method).delta("unet.a").double()
        torch.testing.assert_close(found, 0.7 * dense(one, "unet.a"), rtol=1e-6, atol=1e-6)


def test_dare_drops_by_seed_layer_and_place_and_keeps_the_mean():
    one, two = make(1, 2, 2.0), make(2, 3, 1.0)
    found = Plan.of([(one, 0.9), (two, -0.4)], method="dare:density=0.25,seed=7").delta("unet.b").double()
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for place, (w, a) in enumerate(((0.9, one), (-0.4, two))):
        number = int.from_bytes(hashlib.sha256(f"7/unet.b/{place}".encode()).digest()[:8], "big") >> 1
        keep = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(number)) < 0.25
        expected += w * dense(a, "unet.b") * keep / 0.25
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    one_lora = Plan.of([(one, 1.0)], method="dare:seed=8")
    assert not torch.equal(one_lora.delta("unet.b"), Plan.of([(one, 1.0)], method="dare").delta("unet.b"))
    many = [Plan.of([(one, 1.0)], method=f"dare:seed={seed}").delta("unet.b").double() for seed in range(400)]
    error = (torch.stack(many).mean(0) - dense(one, "unet.b")).abs() / dense(one, "unet.b").abs()
    assert error.mean() < 0.06  # ±1 by chance at density 0.5: 1 / sqrt(400) = 0.05 each


def test_switch_takes_turns_by_the_moment_and_skips_what_weighs_nothing():
    method = make_method("switch:every=2")
    steps = 6
    turns = [method.passes([1.0, 0.5, 0.0], Moment(i / steps, steps))[0].acting for i in range(steps)]
    assert turns == [{0}, {0}, {1}, {1}, {0}, {0}]
    halfway = method.passes([1.0, 0.5, 0.0], Moment(2.5 / steps, steps))[0]
    assert (halfway.acting, halfway.share, halfway.full) == ({1}, 1.0, False)
    assert method.passes([0.0, 0.0], Moment(0.0, steps))[0].acting == frozenset()


def test_composite_shares_by_weight():
    passes = make_method("composite").passes([0.5, 0.0, 1.5], Moment(0.0, 20))
    assert [(p.acting, p.share, p.full) for p in passes] == [({0}, 0.25, True), ({2}, 0.75, True)]
    with pytest.raises(ConfigError, match="takes none below 0"):
        Plan.of([(make(1, 1, 1.0), -1.0), (make(2, 1, 1.0), 1.0)], method="composite")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nq", "did you mean np?|use one of linear"),
        ("linear:mu=1", "takes no option"),
        ("np:mv=1", "it takes mu=0.5"),
        ("np:mu=x", "no finite number"),
        ("np:mu=-1", "out of range"),
        ("switch:every=1.5", "no whole number"),
        ("switch:every=0", "out of range"),
        ("ties:density=2", "out of range"),
        ("klora:mu", "takes no option"),
    ],
)
def test_a_method_that_cannot_be_read_is_one_clear_line(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        make_method(text)
    assert "\n" not in str(caught.value)


def test_pair_methods_refuse_another_number():
    for method in ("klora", "est"):
        for count in (1, 3):
            with pytest.raises(ConfigError, match=f"is for two LoRAs.*not for {count}"):
                Plan.of([(make(i, 1, 1.0), 1.0) for i in range(count)], method=method)


# --- as files -----------------------------------------------------------------------------------------------------


def test_np_as_a_file_is_exact():
    style, subject = make(1, 3, 6.0), make(2, 4, 1.0)
    stack = [(style, 0.8), (subject, -1.2)]
    both = combine(stack, "np")
    for path in PATHS:
        expected = Plan.of(stack, method="np").delta(path)
        error = (both.deltas[path].weight() - expected).norm() / expected.norm()
        assert error < 1e-6
        assert both.deltas[path].rank == 7
    assert "np" in both.card.settings["method"].lower()


def test_truncation_costs_what_the_singular_values_say():
    stack = [(make(1, 3, 6.0), 0.8), (make(2, 4, 1.0), -1.2)]
    for method, whole in (("linear", combine(stack)), ("ties", None)):
        cost = Cost()
        short = combine(stack, method, rank=5, cost=cost)
        lost = energy = 0.0
        for path in PATHS:
            delta = Plan.of(stack, method=method).delta(path).double() if whole is None else whole.deltas[path].weight()
            s = torch.linalg.svdvals(delta.double())
            lost += float((s[5:] ** 2).sum())
            energy += float((s**2).sum())
            found = float((short.deltas[path].weight().double() - delta.double()).norm() ** 2)
            assert found == pytest.approx(float((s[5:] ** 2).sum()), rel=1e-4)
            assert short.deltas[path].rank == 5
        assert cost.errors["all"] == pytest.approx((lost / energy) ** 0.5, rel=1e-5)
        assert cost.errors["all"] > 0.01
    exact = Cost()
    combine(stack, rank=7, cost=exact)
    assert exact.errors["all"] == 0


def test_what_no_file_can_hold_is_refused():
    stack = [(make(1, 3, 6.0), 0.8), (make(2, 4, 1.0), -1.2)]
    with pytest.raises(ConfigError, match="no file can hold"):
        combine(stack, "klora")
    with pytest.raises(ConfigError, match="say how many ranks"):
        combine(stack, "ties")
    with pytest.raises(ConfigError, match="rank 0"):
        combine(stack, rank=0)


# --- on a base ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return make_tiny_base()


@pytest.fixture(scope="module")
def loras(base):
    return random_adapter(base, 1, rank=2, alpha=1.0, text=True), random_adapter(base, 2, rank=3, text=True)


def predict(base, t: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    ids, _ = base.tokenize(["a cat", ""])
    with torch.no_grad():
        return base.predict(x, torch.tensor([t, t]), base.encode_text(ids)).float()


def own_forwards(base) -> list[object]:
    return [m.__dict__.get("forward") for m in base.unet.modules()]


def merged(base, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the base predicts with these ΔWs added to its weights by hand."""
    pristine = {path: find_module(base, path).weight.data for path in deltas}
    try:
        for path, delta in deltas.items():
            find_module(base, path).weight.data = pristine[path] + delta.float().view_as(pristine[path])
        return predict(base)
    finally:
        for path, weight in pristine.items():
            find_module(base, path).weight.data = weight


@pytest.mark.parametrize("method", ["klora", "est:d=-4.5", "switch", "composite"])
def test_a_moving_plan_equals_its_dense_sum_at_a_moment(base, loras, method):
    style, subject = loras
    weights = (0.7, 1.1)
    done = 1 - 500 / 999
    text = {p: weights[0] * style.deltas[p].weight() + weights[1] * subject.deltas[p].weight()
            for p in style.deltas if p.startswith("text_encoder")}  # fmt: skip
    unet = [p for p in style.deltas if p.startswith("unet")]

    def alone(which: int, weight: float) -> dict[str, torch.Tensor]:
        return text | {p: weight * loras[which].deltas[p].weight() for p in unet}

    if method == "composite":
        total = sum(weights)
        expected = sum(w / total * merged(base, alone(i, 1.0)) for i, w in enumerate(weights))
    elif method == "switch":
        step = int(done * 20)
        expected = merged(base, alone(step % 2, weights[step % 2]))
    else:
        flips = flips_of(method, style, subject)
        chosen = {p: int(done <= flips[p]) for p in unet}
        assert set(chosen.values()) == {0, 1}
        expected = merged(base, text | {p: weights[i] * loras[i].deltas[p].weight() for p, i in chosen.items()})
    before, forwards = hash_base(base), own_forwards(base)
    with Plan.of([(style, weights[0]), (subject, weights[1])], method=method).applied(base, steps=20) as stacked:
        torch.testing.assert_close(predict(stacked), expected, rtol=1e-4, atol=1e-5)
    assert hash_base(base) == before
    assert own_forwards(base) == forwards


def test_klora_of_a_lora_with_itself_is_that_lora(base, loras):
    style, _ = loras
    unet_only = Adapter({p: d for p, d in style.deltas.items() if p.startswith("unet")}, style.card)
    with Plan.of([(unet_only, 1.0)]).applied(base):
        expected = predict(base)
    for t_step in (100, 500, 900):
        with Plan.of([(unet_only, 1.0)]).applied(base):
            expected = predict(base, t_step)
        with Plan.of([(unet_only, 1.0), (unet_only, 1.0)], method="klora").applied(base) as stacked:
            torch.testing.assert_close(predict(stacked, t_step), expected, rtol=1e-4, atol=1e-5)


def test_composite_of_one_and_switch_of_one_are_that_lora(base, loras):
    style, _ = loras
    with Plan.of([(style, 1.0)]).applied(base):
        expected = predict(base)
    for method in ("composite", "switch"):
        with Plan.of([(style, 1.0)], method=method).applied(base) as stacked:
            torch.testing.assert_close(predict(stacked), expected, rtol=1e-4, atol=1e-5)


def test_a_moving_convolution_equals_the_merged_one(base):
    path = "unet.down_blocks.0.resnets.0.conv1"
    weight = find_module(base, path).weight
    generator = torch.Generator().manual_seed(0)
    down = 0.2 * torch.randn(2, *weight.shape[1:], generator=generator)
    one = Adapter({path: LowRank(down, torch.randn(len(weight), 2, 1, 1, generator=generator), 2.0)})
    with Plan.of([(one, 0.8)]).applied(base):
        expected = predict(base)
    assert not torch.allclose(expected, predict(base), atol=1e-3)
    with Plan.of([(one, 0.8)], method="switch").applied(base) as stacked:
        torch.testing.assert_close(predict(stacked), expected, rtol=1e-4, atol=1e-5)


def test_the_base_itself_refuses_to_predict_without_a_moment(base, loras):
    asked = pytest.raises(RuntimeError, match="sample with the base that it gives")
    with Plan.of([(loras[0], 1.0)], method="switch").applied(base), asked:
        predict(base)
    predict(base)


def test_weight_zero_is_the_base_bit_for_bit_under_every_method(base, loras):
    plain = sample(base, ["a cat"], seeds=[3], steps=3)[0].tobytes()
    for method in METHODS:
        plan = Plan.of([(loras[0], 0.0), (loras[1], 0.0)], method=method)
        with plan.applied(base, steps=3) as stacked:
            assert sample(stacked, ["a cat"], seeds=[3], steps=3)[0].tobytes() == plain, method


# --- regions ------------------------------------------------------------------------------------------------------


def test_a_mask_of_ones_is_no_mask_and_one_of_zeros_is_no_lora(base, loras):
    style, subject = loras
    unet = [Adapter({p: d for p, d in a.deltas.items() if p.startswith("unet")}) for a in (style, subject)]
    with Plan.of([(unet[0], 0.9), (unet[1], 0.6)]).applied(base):
        both = predict(base)
    with Plan.of([(unet[0], 0.9)]).applied(base):
        first = predict(base)
    for mask, expected in ((torch.ones(16, 16), both), (torch.zeros(16, 16), first)):
        members = [Member(unet[0], 0.9), Member(unet[1], 0.6, mask=mask)]
        with Plan.of(members).applied(base) as stacked:
            torch.testing.assert_close(predict(stacked), expected, rtol=1e-4, atol=1e-5)


def test_each_moment_of_a_moving_stack_has_its_own_layers(base, loras):
    """A stack that moved through other moments before predicts what a fresh one does."""
    members = [
        Member(loras[0], 1.0, profile=Profile(schedule=Schedule(((0.0, 1.0), (1.0, 0.2))))),
        Member(loras[1], 0.7),
    ]
    fresh = {}
    for t in (950, 500, 20):
        with Plan.of(members).applied(base) as stacked:
            fresh[t] = predict(stacked, t)
    with Plan.of(members).applied(base) as stacked:
        for t in (20, 950, 500, 950):
            assert torch.equal(predict(stacked, t), fresh[t])
    with Plan.of(members[1:]).applied(base) as stacked:
        assert not torch.allclose(predict(stacked, 20), fresh[20], atol=1e-3)


def test_a_mask_is_averaged_over_each_token(base):
    """One white pixel of the 8 x 8 that make a token lets the LoRA act there with 1 / 64."""
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    module = find_module(base, path)
    out, into = module.weight.shape
    generator = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 2.0)
    mask = torch.zeros(64, 64)
    mask[8 * 3 + 5, 8 * 2 + 7] = 1.0
    seen: dict[str, torch.Tensor] = {}
    with Plan.of([Member(Adapter({path: delta}), 1.0, mask=mask)]).applied(base) as stacked:
        handle = module.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
        predict(stacked)
        handle.remove()
    added = seen["y"] - module(seen["x"])
    expected = torch.zeros(64)
    expected[8 * 3 + 2] = 1 / 64
    whole = seen["x"] @ delta.weight().T
    torch.testing.assert_close(added, whole * expected[:, None], rtol=1e-3, atol=1e-5)


def test_a_mask_confines_a_layer_to_its_tokens(base):
    """On one to_out of the 8 x 8 level: inside the region the layer's output is the LoRA's, outside the base's."""
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    module = find_module(base, path)
    out, into = module.weight.shape
    generator = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 2.0)
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1.0
    seen: dict[str, torch.Tensor] = {}

    def watch(name):
        def hook(_, inputs, output):
            seen[name], seen["x"] = output.detach(), inputs[0].detach()

        return hook  # fmt: skip

    with Plan.of([Member(Adapter({path: delta}), 1.0, mask=mask)]).applied(base) as stacked:
        handle = module.register_forward_hook(watch("with"))
        predict(stacked)
        handle.remove()
    x = seen["x"]
    plain = module(x)
    whole = plain + x @ delta.weight().T
    inside = (torch.arange(64).view(8, 8) % 8 < 4).flatten()
    torch.testing.assert_close(seen["with"][:, inside], whole[:, inside], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["with"][:, ~inside], plain[:, ~inside], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-2)


def test_a_mask_on_the_texts_keys_and_values_blends_the_attention(base):
    """Its cross-attention gives the LoRA's output inside the region and the base's outside."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    attention = base.unet.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for end in ("to_k", "to_v"):
        out, into = attention.get_submodule(end).weight.shape
        deltas[f"unet.{name}.{end}"] = LowRank(
            torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 2.0
        )
    adapter = Adapter(deltas)
    mask = torch.zeros(8, 8)
    mask[:4] = 1.0
    seen: dict[str, torch.Tensor] = {}

    def watch(_, args, kwargs, output):
        seen["x"], seen["text"] = args[0].detach(), kwargs["encoder_hidden_states"].detach()
        seen["out"] = output.detach()

    handle = attention.register_forward_hook(watch, with_kwargs=True)
    with Plan.of([Member(adapter, 1.0, mask=mask)]).applied(base) as stacked:
        predict(stacked)
    handle.remove()
    with torch.no_grad():
        plain = attention(seen["x"], encoder_hidden_states=seen["text"])
        with Plan.of([(adapter, 1.0)]).applied(base):
            whole = attention(seen["x"], encoder_hidden_states=seen["text"])
    torch.testing.assert_close(seen["out"][:, :32], whole[:, :32], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["out"][:, 32:], plain[:, 32:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-2)


def test_a_mask_confines_a_convolution_to_its_pixels(base):
    path = "unet.down_blocks.0.resnets.0.conv1"
    module = find_module(base, path)
    generator = torch.Generator().manual_seed(0)
    down = 0.2 * torch.randn(2, *module.weight.shape[1:], generator=generator)
    delta = LowRank(down, torch.randn(len(module.weight), 2, 1, 1, generator=generator), 2.0)
    mask = torch.zeros(8, 8)
    mask[:3, 2:] = 1.0
    seen: dict[str, torch.Tensor] = {}

    def watch(_, inputs, output):
        seen["x"], seen["out"] = inputs[0].detach(), output.detach()

    handle = module.register_forward_hook(watch)
    with Plan.of([Member(Adapter({path: delta}), 1.0, mask=mask)]).applied(base) as stacked:
        predict(stacked)
    handle.remove()
    plain = module(seen["x"])
    whole = plain + torch.nn.functional.conv2d(seen["x"], delta.weight(), padding=1)
    torch.testing.assert_close(seen["out"], torch.where(mask.bool(), whole, plain), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-2)


def test_one_plan_follows_the_moments_it_is_asked_for(base, loras):
    """The same running plan, asked at several moments, gives what fresh ones give at each."""
    unet = [Adapter({p: d for p, d in a.deltas.items() if p.startswith("unet")}) for a in loras]
    plan = Plan.of([(unet[0], 1.0), (unet[1], 1.0)], method="switch")
    with plan.applied(base, steps=20) as stacked:
        found = [predict(stacked, t) for t in (999, 949, 899)]
    for which, t, prediction in zip((0, 1, 0), (999, 949, 899), found, strict=True):
        with Plan.of([(unet[which], 1.0)]).applied(base):
            torch.testing.assert_close(prediction, predict(base, t), rtol=1e-4, atol=1e-5)


def test_a_schedule_moves_the_shares_of_composite(base, loras):
    unet = [Adapter({p: d for p, d in a.deltas.items() if p.startswith("unet")}) for a in loras]
    fading = Member(unet[0], 1.0, profile=Profile(schedule=Schedule(((0.0, 1.0), (1.0, 0.0)))))
    t, done = 300, 1 - 300 / 999
    alone = []
    for adapter in unet:
        with Plan.of([(adapter, 1.0)]).applied(base):
            alone.append(predict(base, t))
    weights = [1 - done, 0.5]
    expected = sum(w / sum(weights) * x for w, x in zip(weights, alone, strict=True))
    with Plan.of([fading, (unet[1], 0.5)], method="composite").applied(base) as stacked:
        torch.testing.assert_close(predict(stacked, t), expected, rtol=1e-4, atol=1e-5)

"""Which modules are adapted, and with what rank: in the real models' module lists, and in layers on a tiny UNet."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from full_size import modules_of
from tiny import make_tiny_parts

from sdlora.adapter import Adapter, LayerPlan, LowRank, attach
from sdlora.adapter.sites import find_sites
from sdlora.errors import AdapterFileError, ConfigError

PLAIN = LayerPlan()


def sites(family: str, *words: str, plan: LayerPlan = PLAIN, parts: tuple[str, ...] = ("unet",)):
    return find_sites(modules_of(family), dict.fromkeys(parts, words), 8, 4.0, plan)


@pytest.mark.parametrize(
    ("family", "words", "count"),
    [
        ("sd1", ("attention",), 128),
        ("sd1", ("self-attention",), 64),
        ("sd1", ("cross-attention",), 64),
        ("sd1", ("attention", "feed-forward", "projections"), 192),  # as sd-scripts counts
        ("sd1", ("attention", "self-attention", "to_q"), 128),  # nothing twice
        ("sd1", ("convolutions",), 2 * 22 + 14 + 3 + 3),
        ("sd1", ("time",), 22),
        ("sd2", ("attention",), 128),
        ("sdxl", ("attention",), 560),
        ("sdxl", ("attention", "feed-forward", "projections"), 722),  # as sd-scripts counts
        ("sdxl", ("time",), 17),
    ],
)
def test_counts_of_the_unets(family: str, words: tuple[str, ...], count: int) -> None:
    found = sites(family, *words)
    assert len(found) == len({site.path for site in found}) == count


@pytest.mark.parametrize(
    ("family", "words", "count"),
    [
        ("sd1", ("attention",), 48),
        ("sd1", ("attention", "feed-forward"), 72),
        ("sd2", ("attention", "feed-forward"), 138),
        ("sdxl", ("attention", "feed-forward"), 72 + 192),
    ],
)
def test_counts_of_the_text_encoders(family: str, words: tuple[str, ...], count: int) -> None:
    parts = tuple(modules_of(family))
    found = sites(family, *words, parts=parts)
    assert sum(site.path.startswith("text_encoder") for site in found) == count


@pytest.mark.parametrize(
    ("blocks", "count"),
    [
        (("style-only",), 80),
        (("content-only",), 80),
        (("style-only", "content-only"), 160),
        (("down",), 192),
        (("mid",), 80),
        (("up",), 288),
        (("down.1", "up.1.attentions.2"), 48),
        (("up", "up.0"), 288),
    ],
)
def test_counts_of_sdxls_blocks(blocks: tuple[str, ...], count: int) -> None:
    assert len(sites("sdxl", "attention", plan=LayerPlan(blocks=blocks))) == count


def test_blocks_are_the_unets_and_leave_a_text_encoder_whole() -> None:
    found = sites("sd1", "attention", plan=LayerPlan(blocks=("mid",)), parts=("unet", "text_encoder"))
    assert len(found) == 8 + 48


def sizes(plan: LayerPlan, *words: str, rank: int = 8, alpha: float = 4.0) -> dict[str, tuple[int, float]]:
    found = find_sites(modules_of("sd1"), {"unet": words, "text_encoder": ("attention",)}, rank, alpha, plan)
    return {site.path: (site.rank, site.alpha) for site in found}


def test_the_longest_block_gives_the_rank_and_the_scale_stays_where_no_alpha_is_given() -> None:
    plan = LayerPlan(block_ranks=("up=16", "up.1.attentions.0=2:3", "up.1=32:8", "text_encoder=4"))
    found = sizes(plan, "attention")
    for path, size in found.items():
        if path.startswith("unet.up_blocks.1.attentions.0."):
            assert size == (2, 3.0)
        elif path.startswith("unet.up_blocks.1."):
            assert size == (32, 8.0)
        elif path.startswith("unet.up_blocks."):
            assert size == (16, 8.0)
        elif path.startswith("text_encoder."):
            assert size == (4, 2.0)
        else:
            assert size == (8, 4.0)


def test_convolutions_have_their_own_rank_but_not_those_of_1_by_1() -> None:
    found = sizes(LayerPlan(conv_rank=2, block_ranks=("up=16",)), "attention", "convolutions", "projections")
    wide = {path: size for path, size in found.items() if path.endswith((".conv1", ".conv2", "ers.0.conv"))}
    assert set(wide.values()) == {(2, 1.0)}
    assert found["unet.up_blocks.1.resnets.0.conv_shortcut"] == (16, 8.0)
    assert found["unet.mid_block.attentions.0.proj_in"] == (8, 4.0)  # 1 × 1 in SD 1.x
    found = sizes(LayerPlan(conv_alpha=1.0, block_ranks=("up=16",)), "attention", "convolutions")
    assert found["unet.up_blocks.1.resnets.0.conv1"] == (16, 1.0)
    assert found["unet.mid_block.resnets.0.conv1"] == (8, 1.0)


def test_a_rank_stabilised_scale_is_written_as_an_alpha() -> None:
    found = sizes(LayerPlan(rank_stabilised=True, block_ranks=("mid=64:8",)), "attention")
    for path, (rank, alpha) in found.items():
        asked = 8.0 if path.startswith("unet.mid_block.") else 4.0
        assert alpha / rank == pytest.approx(asked / math.sqrt(rank), rel=1e-6)
        assert alpha == float(torch.tensor(alpha, dtype=torch.float32))


@pytest.mark.parametrize(
    ("words", "plan", "says"),
    [
        (("attention", "nothing"), {}, "target 'nothing' matches no module of unet or text_encoder"),
        (("convolutions", "attention", "time"), {"blocks": ("mid.attentions",)}, "target 'convolutions' matches no"),
        (("to_q",), {}, "no target (to_q) matches a module of text_encoder"),
        (("attention",), {"blocks": ("up.0", "mid")}, "block 'up.0' has no module that is targeted; adapted are mid"),
        (("attention",), {"block_ranks": ("up.9=4",)}, "block_ranks has 'up.9=4', where nothing is adapted"),
        (("attention",), {"blocks": ("up.1",), "block_ranks": ("up.2=4",)}, "'up.2=4', where nothing is adapted"),
        (("attention",), {"conv_rank": 4}, "conv_rank has no convolution larger than 1×1 to act on; add convolutions"),
        (("attention", "projections"), {"conv_alpha": 4.0}, "conv_alpha has no convolution larger than 1×1"),
        (("attention", "group_norm"), {}, "group_norm"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_one_line(words: tuple[str, ...], plan: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        sites("sd1", *words, plan=LayerPlan(**plan), parts=("unet", "text_encoder"))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# Layers with all of it, on a tiny UNet

EVERY = ("attention", "feed-forward", "projections", "convolutions", "time")
MIXED = LayerPlan(block_ranks=("up=3:1.5", "mid=5"), conv_rank=2, rank_stabilised=True)


def test_every_kind_of_module_does_in_training_what_its_delta_says() -> None:
    unet = make_tiny_parts()["unet"].requires_grad_(False)
    torch.manual_seed(1)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 32)
    with attach({"unet": unet}, {"unet": EVERY}, rank=4, alpha=2.0, seed=0, plan=MIXED) as layers:
        for layer in layers.layers:
            nn.init.normal_(layer.up, std=0.1)
        with torch.no_grad():
            trained = unet(z, t, encoder_hidden_states=text).sample
        deltas = layers.adapter().deltas
        assert {delta.rank for delta in deltas.values()} == {2, 3, 4, 5}
        kinds = {path.rpartition(".")[2] for path in deltas}
        assert kinds >= {"to_q", "0", "2", "proj", "proj_in", "proj_out", "conv1", "conv2", "conv", "time_emb_proj"}
    with torch.no_grad():
        plain = unet(z, t, encoder_hidden_states=text).sample
        for path, delta in deltas.items():
            weight = unet.get_submodule(path.removeprefix("unet.")).weight
            weight += delta.weight().view_as(weight)
        merged = unet(z, t, encoder_hidden_states=text).sample
    torch.testing.assert_close(trained, merged, rtol=1e-4, atol=1e-4)
    assert float((trained - plain).abs().max()) > 0.01


def test_describe_says_all_that_is_not_the_default() -> None:
    unet = make_tiny_parts()["unet"].requires_grad_(False)
    with attach({"unet": unet}, {"unet": ("attention",)}, rank=4, alpha=4.0, seed=0) as layers:
        assert layers.notes == ()
    plan = LayerPlan(("up", "mid"), ("up=3:1.5",), 2, 1.0, True, True, 0.1, 0.2, 0.05)
    with attach({"unet": unet}, {"unet": EVERY}, rank=4, alpha=4.0, seed=0, plan=plan) as layers:
        line = layers.describe()
    for part in (
        "rank 4, alpha 4", "targets attention, feed-forward, projections, convolutions, time", "only in up, mid",
        "ranks by block up=3:1.5", "convolutions of rank 2, alpha 1", "rank-stabilised: scale alpha / √rank", "DoRA",
        "drops 0.1 of the input, 0.2 of the rank, 0.05 of whole modules",
    ):  # fmt: skip
        assert part in line
    assert "\n" not in line


def build(width: int = 16, *, plan: LayerPlan = PLAIN, rank: int = 4, alpha: float = 6.0):
    torch.manual_seed(0)
    model = nn.ModuleDict({"to_q": nn.Linear(width, 12), "conv1": nn.Conv2d(6, 10, 3), "to_k": nn.Linear(width, 8)})
    layers = attach({"unet": model}, {"unet": ("to_q", "conv1", "to_k")}, rank=rank, alpha=alpha, seed=1, plan=plan)
    for i, layer in enumerate(layers.layers):
        nn.init.normal_(layer.up, std=0.5, generator=torch.Generator().manual_seed(i))
    return model, layers


def test_a_norm_limit_scales_back_what_is_too_long_and_nothing_else() -> None:
    _, layers = build()
    before = {path: delta.weight() for path, delta in layers.adapter().deltas.items()}
    norms = {path: float(weight.norm()) for path, weight in before.items()}
    limit = sorted(norms.values())[1] * 0.999  # two of the three are above it
    factors = {name: factor.detach().clone() for name, factor in layers.named_factors().items()}
    assert layers.limit_norms(limit) == 2
    after = {path: delta.weight() for path, delta in layers.adapter().deltas.items()}
    for path, weight in after.items():
        if norms[path] > limit:
            torch.testing.assert_close(weight, before[path] * (limit / norms[path]), rtol=1e-5, atol=1e-6)
            share = float(layers.named_factors()[f"{path}.up"].detach().norm() / factors[f"{path}.up"].norm())
            assert share == pytest.approx(math.sqrt(limit / norms[path]), rel=1e-5)  # both factors alike
        else:
            assert torch.equal(weight, before[path])
    assert layers.limit_norms(limit * 1.001) == 0


def test_a_norm_limit_leaves_a_new_lora_alone() -> None:
    _, layers = build()
    for layer in layers.layers:
        nn.init.zeros_(layer.up)
    before = {name: factor.detach().clone() for name, factor in layers.named_factors().items()}
    assert layers.limit_norms(1e-3) == 0
    assert all(torch.equal(factor, before[name]) for name, factor in layers.named_factors().items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("alpha", [6.0, 1.5])
def test_an_adapter_is_continued_with_the_same_change(dora: bool, alpha: float) -> None:
    _, first = build(plan=LayerPlan(dora=dora))
    if dora:
        with torch.no_grad():
            for layer in first.layers:
                layer.magnitude.mul_(1.2)
    adapter = first.adapter()
    _, layers = build(plan=LayerPlan(dora=dora), alpha=alpha)
    layers.load_adapter(adapter, "a.safetensors")
    for path, delta in layers.adapter().deltas.items():
        old, new = (adapter.deltas[path].inner, delta.inner) if dora else (adapter.deltas[path], delta)
        assert torch.equal(old.down, new.down)
        torch.testing.assert_close(new.weight(), old.weight(), rtol=1e-6, atol=1e-7)
        if alpha == 6.0:
            assert torch.equal(old.up, new.up)
        if dora:
            assert torch.equal(delta.magnitude, adapter.deltas[path].magnitude)


def test_what_cannot_be_continued_names_the_first_module_that_differs_and_changes_nothing() -> None:
    _, layers = build()
    good = layers.adapter()
    path = "unet.conv1"
    delta = good.deltas[path]
    _, dora = build(plan=LayerPlan(dora=True))
    shorter = LowRank(delta.down[:3], delta.up[:, :3], 3.0)
    wider = LowRank(torch.ones(4, 7, 3, 3), delta.up, 3.0)
    before = {name: factor.detach().clone() for name, factor in layers.named_factors().items()}
    for deltas, says in (
        ({p: d for p, d in good.deltas.items() if p != path}, "unet.conv1 is not in it"),
        (good.deltas | {"unet.to_v": delta}, "unet.to_v is in it but is not adapted here"),
        (good.deltas | {path: shorter}, "unet.conv1 has rank 3 in it and 4 here; use its own rank (--rank 3)"),
        (good.deltas | {path: wider}, "unet.conv1 has another shape"),
        (dora.adapter().deltas, "is Dora in it, not LowRank; use its own kind"),
    ):
        with pytest.raises(AdapterFileError) as error:
            layers.load_adapter(Adapter(deltas), "a.safetensors")
        assert says in str(error.value)
        assert "a.safetensors" in str(error.value)
        assert all(torch.equal(factor, before[name]) for name, factor in layers.named_factors().items())

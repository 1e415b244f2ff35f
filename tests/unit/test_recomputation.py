"""What is computed again is not kept, gives the same gradients, and leaves the base as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdlora.adapter.layers import attach
from sdlora.adapter.sites import LayerPlan
from sdlora.training.recomputation import recomputing
from tests.saved import counting_saved
from tests.tiny import make_tiny_base

HOWS = ("none", "feed-forward", "all")
PLANS = {
    "lora": (LayerPlan(dropout=0.2, rank_dropout=0.3, module_dropout=0.1), ("attention",)),
    "everything": (LayerPlan(dropout=0.2), ("attention", "feed-forward", "convolutions", "projections")),
    "dora": (LayerPlan(dropout=0.2, dora=True), ("attention", "feed-forward")),
}


def compute_gradients(family: str, how: str, text_encoder: bool, plan: str = "lora", **options):
    """The gradients by factor after one backward pass, and the bytes kept for it."""
    base = make_tiny_base(family=family, **options)
    parts = tuple(base.family.default_targets(text_encoder))
    own, targets = PLANS[plan]
    with attach(
        {p: base.modules[p] for p in parts}, dict.fromkeys(parts, targets), rank=2, alpha=2.0, seed=0, plan=own
    ) as layers:
        for layer in layers.layers:
            nn.init.normal_(layer.up, std=0.1, generator=torch.Generator().manual_seed(1))
        layers.begin(3, 1)
        ids = base.tokenize(["a cat", "ink"])[0]
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)).to(base.dtype)
        weights = [p for m in base.modules.values() for p in m.parameters()]
        with recomputing(base.modules, how), counting_saved(*weights, *layers.parameters()) as saved:
            with torch.set_grad_enabled(text_encoder):
                text = base.encode_text(ids)
            base.predict(x, torch.tensor([5, 900]), text).float().square().mean().backward()
        return {name: p.grad for name, p in layers.named_factors().items()}, saved.bytes


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("family", ["mini", "sd1", "sd2", "sdxl"])
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(family: str, text_encoder: bool) -> None:
    found = {how: compute_gradients(family, how, text_encoder) for how in HOWS}
    kept = [found[how][1] for how in HOWS]
    assert kept[1] < 0.85 * kept[0]
    assert kept[2] < 0.3 * kept[0]
    plain = found["none"][0]
    assert sum(float(g.abs().sum()) > 0 for g in plain.values() if g is not None) > len(plain) / 2
    for how in HOWS[1:]:
        for name, gradient in plain.items():
            other = found[how][0][name]
            assert (gradient is None) == (other is None), name
            assert gradient is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["everything", "dora"])
def test_the_same_holds_for_every_kind_of_layer_and_in_half_precision(plan: str, dtype: torch.dtype) -> None:
    found = {how: compute_gradients("sdxl", how, False, plan, dtype=dtype) for how in HOWS}
    assert found["none"][1] > found["feed-forward"][1] > found["all"][1]
    for name, gradient in found["none"][0].items():
        assert torch.equal(gradient, found["feed-forward"][0][name]), name
        assert torch.equal(gradient, found["all"][0][name]), name


def test_text_encoders_are_computed_again_too() -> None:
    """By what is kept of them alone: transformers' own checkpointing does nothing in a model that is not training."""
    base = make_tiny_base(family="sdxl")
    parts = base.family.text_parts
    kept = []
    with attach(
        {p: base.modules[p] for p in parts}, dict.fromkeys(parts, ("attention",)), rank=2, alpha=2.0, seed=0
    ) as layers:
        weights = [p for m in base.modules.values() for p in m.parameters()]
        for how in HOWS:
            with recomputing(base.modules, how), counting_saved(*weights, *layers.parameters()) as saved:
                base.encode_text(base.tokenize(["a cat"])[0])
            kept.append(saved.bytes)
    assert kept[1] < 0.9 * kept[0]
    assert kept[2] < 0.4 * kept[0]


@pytest.mark.parametrize("how", HOWS)
def test_the_base_is_as_it_was_afterwards(how: str) -> None:
    base = make_tiny_base()

    def look():
        return [
            {name: value for name, value in m.__dict__.items() if not isinstance(value, dict)}
            for part in base.modules.values()
            for m in part.modules()
        ]

    before = look()
    base.unet.enable_gradient_checkpointing()
    already = look()
    with recomputing(base.modules, how):
        pass
    assert look() == already
    base.unet.disable_gradient_checkpointing()
    for module, values in zip((m for p in base.modules.values() for m in p.modules()), before, strict=True):
        if "_gradient_checkpointing_func" not in values:
            module.__dict__.pop("_gradient_checkpointing_func", None)
        else:
            module._gradient_checkpointing_func = values["_gradient_checkpointing_func"]
    assert look() == before
    with pytest.raises(ZeroDivisionError), recomputing(base.modules, how):
        1 / 0  # noqa: B018
    assert look() == before


def test_nothing_is_computed_again_where_no_gradient_is_wanted() -> None:
    base = make_tiny_base(family="sdxl")
    runs = []

    def run(function, *args):
        runs.append(function)
        return function(*args)

    with torch.no_grad():
        text = base.encode_text(base.tokenize(["a cat"])[0])
    kinds = [type(m).__name__ for m in base.unet.modules()]
    blocks = kinds.count("BasicTransformerBlock")
    # diffusers keeps the middle block's first resnet
    wanted = {"none": 0, "feed-forward": blocks, "all": blocks + kinds.count("ResnetBlock2D") - 1}
    for how in HOWS:
        for grad in (False, True):
            runs.clear()
            with recomputing(base.modules, how, run), torch.set_grad_enabled(grad):
                base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), text)
            assert len(runs) == (wanted[how] if grad else 0), how


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    base = make_tiny_base()
    layer = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
    own = layer.forward = lambda x: 2 * x
    x = torch.ones(1, 2, 16, requires_grad=True)
    with recomputing(base.modules, "feed-forward"):
        assert layer.forward is not own
        assert torch.equal(layer(x), 2 * x)
    assert layer.forward is own

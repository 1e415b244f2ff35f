"""Our DoRA layers against peft's: outputs and every gradient; and a plan with a DoRA against the written-out sum."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import make_tiny_base, make_tiny_parts

from sdlora.adapter import UNET_TARGETS, Adapter, Dora, LayerPlan, LowRank, attach, read_adapter, write_adapter
from sdlora.combining.plan import Plan, find_module

peft = pytest.importorskip("peft")
DORA = LayerPlan(dora=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Within the tolerance of the largest value (at least of 1)."""
    assert float((a.detach() - b.detach()).abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


def with_peft(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> nn.Module:
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), use_dora=True)
    return peft.inject_adapter_in_model(config, copy.deepcopy(model))  # type: ignore[no-any-return]


def share_factors(layers, reference: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """Random factors and lengths in both; peft's parameters by our paths."""
    theirs = {}
    modules = dict(reference.named_modules())
    g = torch.Generator().manual_seed(4)
    for layer in layers.layers:
        module = modules[layer.path.removeprefix("unet.")]
        mine = (layer.down, layer.up, layer.magnitude)
        others = (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
            module.lora_magnitude_vector["default"].weight,
        )
        close(layer.magnitude, others[2].flatten(), 1e-6)  # both start as the lengths of the base's rows
        with torch.no_grad():
            layer.up.normal_(std=0.3, generator=g)
            layer.magnitude.mul_(0.8 + 0.4 * torch.rand(layer.magnitude.shape, generator=g))
            for a, b in zip(mine, others, strict=True):
                b.copy_(a.view_as(b))
        theirs[layer.path] = others
    return theirs


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (8, 12.5), (1, 0.3)])
@pytest.mark.parametrize("crossed", [False, True])
def test_an_attention_block_equals_pefts(rank: int, alpha: float, crossed: bool) -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(64, 48 if crossed else None, heads=4, dim_head=16).requires_grad_(False)
    reference = with_peft(attention, UNET_TARGETS, rank, alpha)
    with attach({"unet": attention}, {"unet": UNET_TARGETS}, rank=rank, alpha=alpha, seed=3, plan=DORA) as layers:
        theirs = share_factors(layers, reference)
        x = torch.randn(2, 25, 64)
        text = torch.randn(2, 7, 48) if crossed else None
        results = []
        for model in (attention, reference):
            states = [s.clone().requires_grad_() for s in (x, text) if s is not None]
            y = model(*states)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            results.append((y, [s.grad for s in states]))
        (y, grads), (y_peft, grads_peft) = results
        close(y, y_peft)
        for g, h in zip(grads, grads_peft, strict=True):
            close(g, h)
        for layer in layers.layers:
            for mine, other in zip(layer.factors().values(), theirs[layer.path], strict=True):
                close(mine.grad, other.grad.view_as(mine))


def test_a_whole_unet_with_convolutions_equals_pefts() -> None:
    unet = make_tiny_parts()["unet"].requires_grad_(False)
    names = (*UNET_TARGETS, "conv1", "conv_shortcut", "proj_in", "time_emb_proj")
    reference = with_peft(unet, names, 4, 6.0)
    torch.manual_seed(1)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 32)
    with attach({"unet": unet}, {"unet": names}, rank=4, alpha=6.0, seed=0, plan=DORA) as layers:
        theirs = share_factors(layers, reference)
        outputs = []
        for model in (unet, reference):
            y = model(z, t, encoder_hidden_states=text).sample
            y.square().mean().backward()
            outputs.append(y)
        close(*outputs)
        assert len(layers.layers) > 40
        for layer in layers.layers:
            for mine, other in zip(layer.factors().values(), theirs[layer.path], strict=True):
                close(mine.grad, other.grad.view_as(mine))


def test_a_file_applied_with_a_weight_is_the_base_moved_that_far_towards_the_dora(tmp_path: Path) -> None:
    base = make_tiny_base()
    targets = {"unet": ("to_q", "conv2", "proj_in")}
    with attach({"unet": base.unet}, targets, rank=3, alpha=2.0, seed=0, plan=DORA) as layers:
        for layer in layers.layers:
            nn.init.normal_(layer.up, std=0.3)
            with torch.no_grad():
                layer.magnitude.mul_(1.3)
        x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([40]), torch.randn(1, 77, 32)
        with torch.no_grad():
            trained = base.unet(x, t, encoder_hidden_states=text).sample
        adapter = layers.adapter()
    write_adapter(adapter, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", warn=pytest.fail)
    g = torch.Generator().manual_seed(2)
    first = next(iter(adapter.deltas))
    inner = adapter.deltas[first].inner
    other = Adapter({first: LowRank(torch.randn(1, *inner.down.shape[1:], generator=g), inner.up[:, :1], 1.0)})
    before = {path: find_module(base, path).weight.clone() for path in adapter.deltas}
    with Plan.of([(adapter, 1.0)]).applied(base), torch.no_grad():
        close(base.unet(x, t, encoder_hidden_states=text).sample, trained)
    with Plan.of([(adapter, 0.4), (other, -0.7)]).applied(base):
        for path, delta in adapter.deltas.items():
            assert isinstance(delta, Dora)
            turned = before[path] + delta.inner.weight()
            lengths = turned.flatten(1).norm(dim=1).view_as(delta.magnitude)
            expected = before[path] + 0.4 * (delta.magnitude / lengths * turned - before[path])
            if path == first:
                expected = expected - 0.7 * other.deltas[first].weight()
            close(find_module(base, path).weight, expected, 1e-6)
    assert all(torch.equal(find_module(base, path).weight, weight) for path, weight in before.items())

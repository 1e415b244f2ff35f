"""Dropout: what the masks are, that they are the same when asked again, and that without them nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdlora.adapter import LayerPlan, attach
from sdlora.adapter.dropout import Dropout, Masks

ALL = LayerPlan(dropout=0.3, rank_dropout=0.25, module_dropout=0.2)


def build(plan: LayerPlan, kind: str = "linear", *, seed: int = 1):
    torch.manual_seed(0)
    module = nn.Linear(32, 24) if kind == "linear" else nn.Conv2d(6, 10, 3, padding=1)
    module.requires_grad_(False)
    layers = attach({"unet": nn.ModuleDict({"a": module})}, {"unet": ("a",)}, rank=8, alpha=6, seed=seed, plan=plan)
    nn.init.normal_(layers.layers[0].up, generator=torch.Generator().manual_seed(2))
    x = torch.randn(3, 5, 32) if kind == "linear" else torch.randn(3, 6, 8, 8)
    return module, layers, x


def test_shares_and_means_of_the_masks() -> None:
    masks = Masks("0/0/0/unet.a", 0.3, 0.25, 0.0)
    x = masks.of_input(torch.zeros(200, 200))
    assert x.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((x == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.02)
    rank = masks.of_rank(300, torch.zeros(1, 64))
    assert rank.shape == (300, 64)
    assert float((rank == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    dropped = [
        bool((m := Masks(f"{i}", 0, 0, 0.2).of_rank(2, torch.zeros(1, 4))) is not None and not m.any())
        for i in range(500)
    ]
    assert sum(dropped) / 500 == pytest.approx(0.2, abs=0.06)
    assert Masks("", 0, 0, 0).of_input(x) is None
    assert Masks("", 0, 0, 0).of_rank(1, x) is None


def test_masks_hang_on_seed_step_micro_batch_and_module_alone() -> None:
    def mask(seed: int, step: int, micro: int, path: str) -> Tensor:
        dropout = Dropout(seed, 0.5)
        dropout.begin(9, 9)
        dropout.masks("unet.z").of_input(torch.zeros(3, 3))  # what was drawn before is of no matter
        dropout.begin(step, micro)
        return dropout.masks(path).of_input(torch.zeros(8, 8))

    first = mask(0, 5, 1, "unet.a")
    assert torch.equal(first, mask(0, 5, 1, "unet.a"))
    for other in (mask(1, 5, 1, "unet.a"), mask(0, 6, 1, "unet.a"), mask(0, 5, 2, "unet.a"), mask(0, 5, 1, "unet.b")):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_without_dropout_and_outside_of_a_step_nothing_changes(kind: str) -> None:
    module, layers, x = build(LayerPlan(), kind)
    plain = module(x)
    layers.begin(3, 0)
    assert torch.equal(module(x), plain)
    dropping, others, _ = build(ALL, kind)
    assert torch.equal(dropping(x), plain)  # no step has begun
    others.begin(3, 0)
    assert not torch.equal(dropping(x), plain)
    others.end()
    assert torch.equal(dropping(x), plain)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_output_and_gradients_are_those_of_the_masks_written_out(kind: str, dora: bool) -> None:
    plan = LayerPlan(dora=dora, dropout=0.3, rank_dropout=0.25)
    module, layers, x = build(plan, kind)
    layer = layers.layers[0]
    layers.begin(7, 1)
    x = x.requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    ours = [y, x.grad, *(p.grad for p in layer.factors().values())]

    masks = Masks("1/7/1/unet.a", 0.3, 0.25, 0.0)
    x2 = x.detach().clone().requires_grad_()
    down, up = layer.down.detach().requires_grad_(), layer.up.detach().requires_grad_()
    if kind == "linear":
        dropped = x2 * masks.of_input(x2.detach().view(-1, 32)).view_as(x2)
        ax = dropped @ down.T * masks.of_rank(3, torch.zeros(1, 8))[:, None]
        z = x2 @ module.weight.T + 0.75 * ax @ up.T
        bias, view = module.bias, (1, 1, -1)
    else:
        ax = nn.functional.conv2d(x2 * masks.of_input(x2.detach()), down, padding=1)
        ax = ax * masks.of_rank(3, torch.zeros(1, 8))[:, :, None, None]
        z = nn.functional.conv2d(x2, module.weight, padding=1) + nn.functional.conv2d(ax, 0.75 * up)
        bias, view = module.bias.view(1, -1, 1, 1), (1, -1, 1, 1)
    factors = [down, up]
    if dora:
        factors.append(layer.magnitude.detach().requires_grad_())
        z = z * (factors[2] / layer.norms()).view(view)
    y2 = z + bias
    (y2 * torch.linspace(-1, 1, y2.numel()).view_as(y2)).sum().backward()
    for a, b in zip(ours, [y2, x2.grad, *(p.grad for p in factors)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradient_checkpointing_meets_the_same_masks(kind: str, reentrant: bool) -> None:
    module, layers, x = build(ALL, kind)
    layers.begin(4, 0)
    x = x.requires_grad_()
    module(x).square().sum().backward()
    plain = [p.grad.clone() for p in [x, *layers.parameters()]]
    for p in [x, *layers.parameters()]:
        p.grad = None
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, [x, *layers.parameters()], strict=True))


def test_a_dropped_module_has_gradients_of_zero_and_the_bases_output() -> None:
    module, layers, x = build(LayerPlan(module_dropout=0.999))
    layers.begin(0, 0)
    x = x.requires_grad_()
    y = module(x)
    assert torch.equal(y, nn.functional.linear(x, module.weight, module.bias))
    y.square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layers.parameters())


def test_input_dropout_of_a_linear_keeps_no_mask() -> None:
    module, layers, _ = build(LayerPlan(dropout=0.3))
    layers.begin(0, 0)
    x = torch.randn(1, 4096, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    assert sum(kept.values()) <= 1.1 * x.untyped_storage().nbytes()

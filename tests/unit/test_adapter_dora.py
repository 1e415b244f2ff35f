"""DoRA layers: they start as the base, keep little, and their file is what was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sdlora.adapter import LayerPlan, attach, weight_on
from sdlora.adapter.operators import DoraLinear

DORA = LayerPlan(dora=True)


def build(width: int = 32, out: int = 48, *, rank: int = 4, dtype: torch.dtype = torch.float32, bias: bool = True):
    torch.manual_seed(0)
    model = nn.ModuleDict({"to_q": nn.Linear(width, out, bias=bias)}).to(dtype).requires_grad_(False)
    layers = attach({"unet": model}, {"unet": ("to_q",)}, rank=rank, alpha=6.0, seed=1, plan=DORA)
    return model, layers


def stir(layers) -> None:
    """Factors and lengths that are not the first ones."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers.layers:
            layer.up.normal_(std=0.2, generator=g)
            layer.magnitude.mul_(0.8 + 0.4 * torch.rand(layer.magnitude.shape, generator=g))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_new_dora_is_the_base_to_the_last_bit_of_its_weight(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(32, 48) if kind == "linear" else nn.Conv2d(8, 6, 3, padding=1)
    x = torch.randn(2, 5, 32) if kind == "linear" else torch.randn(2, 8, 5, 5)
    before = module(x)
    with attach({"unet": nn.ModuleDict({"a": module})}, {"unet": ("a",)}, rank=2, alpha=2, seed=0, plan=DORA) as layers:
        assert torch.equal(layers.layers[0].magnitude / layers.layers[0].norms(), torch.ones(len(module.weight)))
        torch.testing.assert_close(module(x), before, rtol=1e-6, atol=1e-6)
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("rank", [1, 4])  # Ax computed again in the backward pass for 4 of 32, kept for 1
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_hold_against_finite_differences(rank: int, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(32, 5, bias=bias).double().requires_grad_(False)
    down, up = torch.randn(rank, 32).double().requires_grad_(), torch.randn(5, rank).double().requires_grad_()
    magnitude, norm = torch.rand(5).double().requires_grad_(), torch.rand(5).double() + 1
    x = torch.randn(3, 2, 32, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
        return DoraLinear.apply(x, x, down, up, magnitude, norm, module.weight, module.bias, 0.7, None)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (x, down, up, magnitude))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32_and_factors_stay_float32(dtype: torch.dtype) -> None:
    model, layers = build(64)
    stir(layers)
    half = copy.deepcopy(model).to(dtype)
    theirs = half["to_q"].forward.__self__
    x = torch.randn(4, 16, 64).to(dtype)
    y, z = model["to_q"](x.float()), half["to_q"](x)
    y.square().mean().backward()
    z.float().square().mean().backward()
    assert z.dtype == dtype
    assert float((y - z.float()).detach().norm() / y.detach().norm()) < 0.02
    for a, b in zip(layers.layers[0].factors().values(), theirs.factors().values(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        assert float((a.grad - b.grad).norm() / a.grad.norm()) < 0.03


def saved_bytes(run, x: Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(x)
    assert out.requires_grad
    return sum(storages.values())


def test_a_dora_keeps_x_and_little_more() -> None:
    model, _ = build(320, 320, rank=16, dtype=torch.bfloat16)
    x = torch.randn(1, 4096, 320, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(model["to_q"], x) <= 1.25 * x.untyped_storage().nbytes()


def test_a_convolutions_dora_keeps_x_and_y() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1).bfloat16().requires_grad_(False)
    attach({"unet": nn.ModuleDict({"a": conv})}, {"unet": ("a",)}, rank=4, alpha=4, seed=0, plan=DORA)
    x = torch.randn(1, 32, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(conv, x) <= 2.6 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_delta_is_what_the_layer_does(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(12, 10) if kind == "linear" else nn.Conv2d(6, 10, 3, stride=2, padding=1)
    x = torch.randn(2, 5, 12) if kind == "linear" else torch.randn(2, 6, 8, 8)
    with attach({"unet": nn.ModuleDict({"a": module})}, {"unet": ("a",)}, rank=3, alpha=1, seed=0, plan=DORA) as layers:
        stir(layers)
        trained, delta = module(x), layers.adapter().deltas["unet.a"]
    module.weight.data += weight_on(delta, module.weight)
    torch.testing.assert_close(module(x), trained, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_stay_zeros() -> None:
    model, layers = build()
    with torch.no_grad():
        model["to_q"].weight[3] = 0
    layers.detach_from_base()
    layers = attach({"unet": model}, {"unet": ("to_q",)}, rank=4, alpha=4, seed=1, plan=DORA)
    y = model["to_q"](torch.randn(2, 32))
    assert bool(y.isfinite().all())
    assert torch.equal(y[:, 3], model["to_q"].bias[3].expand(2))
    assert bool(weight_on(layers.adapter().deltas["unet.to_q"], model["to_q"].weight).isfinite().all())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, layers = build()
    stir(layers)
    x = torch.randn(2, 5, 32, requires_grad=True)
    model["to_q"](x).square().sum().backward()
    plain = [p.grad.clone() for p in [x, *layers.parameters()]]
    for p in [x, *layers.parameters()]:
        p.grad = None
    torch.utils.checkpoint.checkpoint(model["to_q"], x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, [x, *layers.parameters()], strict=True))

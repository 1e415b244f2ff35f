"""Convolutions on packed weights, held against PyTorch's own: outputs, gradients, and all that must not be packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdlora.bases.packing import packing


def make_convolution(kernel: int = 3, padding: int = 1, channels: tuple[int, int] = (128, 160), **more) -> nn.Conv2d:
    torch.manual_seed(kernel)
    module = nn.Conv2d(*channels, kernel, padding=padding, **more).requires_grad_(False)
    return module.to(memory_format=torch.channels_last)


def run(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def inputs(channels: tuple[int, int] = (128, 160), side: int = 5, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(7)
    x, dy = (torch.randn(2, c, side, side + 2, generator=rng).to(dtype) for c in channels)
    return x.contiguous(memory_format=torch.channels_last), dy


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (5, 2)])
def test_packed_equals_plain_in_float64(kernel, padding):
    module = make_convolution(kernel, padding)
    x, dy = inputs()
    exact = run(module.double(), x.double(), dy.double())
    module.float()
    with packing(module) as packed:
        assert packed == [module]
        for _ in range(2):  # packed in the first call, used in the second
            for ours, true in zip(run(module, x, dy), exact, strict=True):
                assert (ours.double() - true).abs().max() <= 1e-5 * true.abs().max()
        other_x, other_dy = inputs(side=9)  # a layout is not bound to the size it was made for
        ours = run(module, other_x, other_dy)
    for got, true in zip(ours, run(module.double(), other_x.double(), other_dy.double()), strict=True):
        assert (got.double() - true).abs().max() <= 1e-5 * true.abs().max()


def test_padding_that_is_not_the_half_kernel_gives_the_gradient_its_own():
    module = make_convolution(3, 0)
    x, _ = inputs(side=6)
    dy = torch.randn(2, 160, 4, 6, generator=torch.Generator().manual_seed(1))
    exact = run(module.double(), x.double(), dy.double())
    module.float()
    with packing(module):
        for ours, true in zip(run(module, x, dy), exact, strict=True):
            assert ours.shape == true.shape
            assert (ours.double() - true).abs().max() <= 1e-5 * true.abs().max()


def test_bfloat16_is_as_near_as_the_plain_one():
    module = make_convolution().bfloat16()
    x, dy = inputs(dtype=torch.bfloat16)
    exact = run(module.double(), x.double(), dy.double())
    module.bfloat16()
    plain = run(module, x, dy)
    with packing(module):
        ours = run(module, x, dy)
    for got, theirs, true in zip(ours, plain, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - true).norm() <= 1.05 * (theirs.double() - true).norm()


def test_a_contiguous_input_and_gradient_give_the_same():
    module = make_convolution()
    x, dy = inputs()
    plain = run(module, x, dy)
    with packing(module):
        ours = run(module, x.contiguous(), dy.contiguous(memory_format=torch.channels_last))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_packed_or_does_not_pay_is_left_alone():
    trained = make_convolution().requires_grad_(True)
    given = make_convolution()
    given.forward = lambda x: x  # type: ignore[method-assign]
    left = [
        trained,
        given,
        make_convolution(stride=2),
        make_convolution(dilation=2),
        make_convolution(groups=2),
        make_convolution(padding_mode="reflect"),
        make_convolution(1, 0),
        make_convolution(channels=(128, 4)),
        make_convolution().half(),
    ]
    forwards = [m.__dict__.get("forward") for m in left]
    with packing(nn.ModuleList(left)) as packed:
        assert packed == []
        assert [m.__dict__.get("forward") for m in left] == forwards


def test_a_weight_that_changes_meanwhile_is_followed():
    module = make_convolution()
    x, dy = inputs()
    with packing(module):
        before = run(module, x, dy)
        module.weight.mul_(2)
        after = run(module, x, dy)
    for a, b in zip(run(module, x, dy), after, strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(before[0], after[0])


def test_autocast_and_another_dtype_go_the_plain_way():
    module = make_convolution()
    x, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        plain = module(x)
    assert plain.dtype == torch.bfloat16
    with packing(module):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain)
        with pytest.raises(RuntimeError, match="type"):
            module(x.bfloat16())


def test_weights_packed_in_inference_mode_serve_training_afterwards():
    module = make_convolution()
    x, dy = inputs()
    plain = run(module, x, dy)
    with packing(module):
        with torch.inference_mode():
            torch.testing.assert_close(module(x.clone()), plain[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(run(module, x, dy), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_weights_tree_and_forward_are_as_before_afterwards():
    model = nn.Sequential(make_convolution(), make_convolution(channels=(160, 128)))
    before = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    x, dy = inputs((128, 128))
    with packing(model) as packed:
        run(model, x, dy)
        assert len(packed) == 2
    with pytest.raises(ZeroDivisionError), packing(model):
        1 / 0  # noqa: B018
    assert all("forward" not in m.__dict__ for m in model)
    for k, v in model.state_dict().items():
        assert v.data_ptr() == before[k][0]
        assert torch.equal(v, before[k][1])

"""Frozen layers in the CPU's order, held against torch's and diffusers': outputs, gradients, and what must be left."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from sdlora.adapter.products import linear
from sdlora.bases import fast_layers as under_test
from sdlora.bases.fast_layers import fast_layers
from sdlora.bases.norm import normalise
from tests.saved import counting_saved


@pytest.fixture(autouse=True)
def every_size_is_large(monkeypatch) -> None:
    monkeypatch.setattr(under_test, "LARGE", 1)
    monkeypatch.setattr(under_test, "LARGE_WITHOUT_AMX", 1)
    monkeypatch.setattr(under_test, "ROWS", 10)


def make_convolution(kernel=3, padding=1, channels=(48, 80), **more) -> nn.Conv2d:
    torch.manual_seed(7)
    module = nn.Conv2d(*channels, kernel, padding=padding, **more).requires_grad_(False)
    return module.to(memory_format=torch.channels_last)


def run(module: nn.Module, x: Tensor, dy: Tensor, *more: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x, *more)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def inputs(
    module: nn.Module, shape: tuple[int, ...], dtype=torch.float32, *more: Tensor | None
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=rng).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
    with torch.no_grad():
        y = module(x.to(next(module.parameters()).dtype), *more)
    return x, torch.randn(y.shape, generator=rng).to(dtype)


def saved_bytes(module: nn.Module, x: Tensor, *more: Tensor | None) -> int:
    """What a call of the module on an input that needs a gradient keeps beside the weights."""
    x = x.detach().requires_grad_()
    with counting_saved(*module.parameters()) as saved:
        y = module(x, *more)
    return saved.bytes if y.requires_grad else 0


def assert_near(ours, truth, share=1e-5) -> None:
    for got, true in zip(ours, truth, strict=True):
        assert got.shape == true.shape
        assert (got.double() - true).abs().max() <= share * true.abs().max()


CONVOLUTIONS = {
    "3 x 3": {},
    "point": {"kernel": 1, "padding": 0},
    "5 x 5": {"kernel": 5, "padding": 2},
    "no padding": {"padding": 0},
    "stride 2": {"stride": 2},
    "stride 2 by 1": {"stride": (2, 1), "padding": (0, 1)},
    "1 x 3": {"kernel": (1, 3), "padding": (0, 1)},
    "point, stride 2": {"kernel": 1, "padding": 0, "stride": 2},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("size", [(5, 7), (4, 4)])
def test_a_convolution_equals_torchs_in_float64(options, size):
    module = make_convolution(**options)
    x, dy = inputs(module, (2, 48, *size))
    truth = run(copy.deepcopy(module).double(), x.double(), dy.double())
    with fast_layers(module) as chosen:
        assert chosen == [module]
        assert_near(run(module, x, dy), truth)
        assert_near(run(module, x.contiguous(), dy.contiguous()), truth)


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_equals_torchs_in_float64(rows, bias):
    torch.manual_seed(0)
    module = nn.Linear(300, 260, bias=bias).requires_grad_(False)
    x, dy = inputs(module, (1, rows, 300))
    truth = run(copy.deepcopy(module).double(), x.double(), dy.double())
    with fast_layers(module) as chosen:
        assert chosen == [module]
        assert_near(run(module, x, dy), truth)


@pytest.mark.parametrize("rows", [1, 16, 64, 65])
def test_a_product_with_the_weight_first_is_the_product(rows):
    rng = torch.Generator().manual_seed(5)
    x, weight, bias = (torch.randn(s, generator=rng) for s in ((2, rows, 300), (520, 300), (520,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_near([linear(x, weight, bias), linear(x, weight) + bias], [exact, exact])
    assert linear(x, weight).is_contiguous()
    with pytest.raises(RuntimeError, match="dtype"):  # another dtype is as torch has it
        linear(x, weight.bfloat16())


def test_few_rows_are_multiplied_with_the_weight_first(monkeypatch):
    turned = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: turned.append(a.shape) or product(a, b))
    weight = torch.randn(512, 300)
    for rows, first in ((1, 0), (2, 1), (128, 1), (129, 0)):
        turned.clear()
        linear(torch.randn(rows, 300), weight)
        assert len(turned) == first, rows


def test_bfloat16_is_about_as_near_as_torchs():
    module = make_convolution(channels=(128, 160)).bfloat16()
    x, dy = inputs(module, (2, 128, 6, 6), torch.bfloat16)
    truth = run(copy.deepcopy(module).double(), x.double(), dy.double())
    plain = run(module, x, dy)
    with fast_layers(module):
        ours = run(module, x, dy)
    # the gradient is a sum of parts that were rounded each, so its rounding is twice that of one number
    for got, theirs, true, times in zip(ours, plain, truth, (1.05, 1.6), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - true).norm() <= times * (theirs.double() - true).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_equals_diffusers_and_keeps_its_input_alone(dtype):
    torch.manual_seed(1)
    module = GEGLU(24, 40).requires_grad_(False).to(dtype)
    x, dy = inputs(module, (2, 9, 24), dtype)
    truth = run(copy.deepcopy(module).double(), x.double(), dy.double())
    plain, plain_bytes = run(module, x, dy), saved_bytes(module, x)
    with fast_layers(module):
        ours, bytes_ = run(module, x, dy), saved_bytes(module, x)
    for got, theirs, true in zip(ours, plain, truth, strict=True):
        assert (got.double() - true).norm() <= 1.2 * (theirs.double() - true).norm() + 1e-6 * true.norm()
    assert bytes_ == 2 * 9 * 80 * x.element_size() < plain_bytes


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_its_silu_equals_torchs(silu, dtype):
    torch.manual_seed(2)
    norm = nn.GroupNorm(8, 64)
    nn.init.normal_(norm.weight, 1, 0.5)
    nn.init.normal_(norm.bias)
    module = nn.Sequential(norm, nn.SiLU() if silu else nn.Identity()).requires_grad_(False).to(dtype)
    x, dy = inputs(module, (3, 64, 5, 6), dtype)
    x = (2 * x + 1).contiguous(memory_format=torch.channels_last)
    truth = run(copy.deepcopy(module).double(), x.double(), dy.double())
    plain = run(module, x, dy)
    x.requires_grad_()
    y = normalise(norm, x, silu)
    ours = y.detach(), torch.autograd.grad(y, x, dy)[0]
    for got, theirs, true in zip(ours, plain, truth, strict=True):
        assert got.dtype == dtype
        assert (got.double() - true).norm() <= 1.5 * (theirs.double() - true).norm() + 1e-5 * true.norm()


RESNETS = {
    "plain": {"in_channels": 32},
    "wider": {"in_channels": 32, "out_channels": 64},
    "scaled": {"in_channels": 32, "output_scale_factor": 2.0},
    "without time": {"in_channels": 32, "temb_channels": None},
    "time as it is": {"in_channels": 32, "skip_time_act": True},
}


@pytest.mark.parametrize("options", RESNETS.values(), ids=RESNETS.keys())
def test_a_resnet_equals_diffusers_and_keeps_less(options):
    torch.manual_seed(3)
    module = ResnetBlock2D(**{"temb_channels": 24, "groups": 8, **options}).requires_grad_(False)
    for norm in (module.norm1, module.norm2):
        nn.init.normal_(norm.weight, 1, 0.5)
        nn.init.normal_(norm.bias)
    module = module.to(memory_format=torch.channels_last)
    time = torch.randn(2, 24) if module.time_emb_proj is not None else None
    x, dy = inputs(module, (2, 32, 6, 5), torch.float32, time)
    truth = run(copy.deepcopy(module).double(), x.double(), dy.double(), None if time is None else time.double())
    plain_bytes = saved_bytes(module, x, time)
    with fast_layers(module) as chosen:
        assert chosen[0] is module
        assert_near(run(module, x, dy, time), truth, 2e-5)
        assert saved_bytes(module, x, time) < 0.75 * plain_bytes


def test_a_resnet_that_is_built_another_way_is_left_alone():
    for options in (
        {"time_embedding_norm": "scale_shift"},
        {"up": True},
        {"down": True},
        {"non_linearity": "gelu"},
        {"dropout": 0.1},
    ):
        module = ResnetBlock2D(in_channels=32, temb_channels=24, groups=8, **options).requires_grad_(False)
        with fast_layers(module) as chosen:
            assert module not in chosen, options


def test_what_is_trained_or_has_another_forward_is_left_alone():
    given = make_convolution()
    given.forward = lambda x: x  # type: ignore[method-assign]
    left = [
        given,
        make_convolution(dilation=2),
        make_convolution(groups=2),
        make_convolution(padding_mode="reflect"),
        make_convolution(padding="same"),
    ]
    forwards = [m.__dict__.get("forward") for m in left]
    with fast_layers(nn.ModuleList(left)) as chosen:
        assert chosen == []
        assert [m.__dict__.get("forward") for m in left] == forwards
    trained = make_convolution().requires_grad_(True)
    x, dy = inputs(trained, (2, 48, 4, 4))
    with fast_layers(trained):
        trained(x).backward(dy)
    assert trained.weight.grad is not None


def test_small_weights_and_many_pixels_go_the_plain_way(monkeypatch):
    monkeypatch.setattr(under_test, "ROWS", 0.4)
    ran = []
    monkeypatch.setattr(
        under_test._Convolution, "apply", lambda x, m: ran.append(x.shape) or m._conv_forward(x, m.weight, m.bias)
    )
    module = make_convolution()  # 80 channels: up to 32 pixels
    with fast_layers(module):
        module(torch.randn(2, 48, 4, 4))
        module(torch.randn(2, 48, 4, 5))
    assert ran == [(2, 48, 4, 4)]
    for name in ("LARGE", "LARGE_WITHOUT_AMX"):
        monkeypatch.setattr(under_test, name, module.weight.numel() + 1)
    with fast_layers(module) as chosen:
        assert chosen == []


def test_autocast_and_another_dtype_go_the_plain_way():
    module = make_convolution()
    x, _ = inputs(module, (2, 48, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        plain = module(x)
    assert plain.dtype == torch.bfloat16
    with fast_layers(module):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain)
        with pytest.raises(RuntimeError, match="type"):
            module(x.bfloat16())


def test_a_weight_changed_between_the_passes_is_an_error():
    for module, shape in ((make_convolution(), (2, 48, 4, 4)), (nn.Linear(300, 260).requires_grad_(False), (4, 300))):
        x, dy = inputs(module, shape)
        with fast_layers(module):
            y = module(x.requires_grad_())
            module.weight.mul_(2)
            with pytest.raises(RuntimeError, match="changed between"):
                y.backward(dy)


def test_weights_tree_and_forward_are_as_before_afterwards():
    model = nn.Sequential(make_convolution(), make_convolution(channels=(80, 48)))
    before = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    x, dy = inputs(model, (2, 48, 4, 4))
    with fast_layers(model) as chosen:
        run(model, x, dy)
        assert len(chosen) == 2
    with pytest.raises(ZeroDivisionError), fast_layers(model):
        1 / 0  # noqa: B018
    assert all("forward" not in m.__dict__ for m in model)
    for k, v in model.state_dict().items():
        assert v.data_ptr() == before[k][0]
        assert torch.equal(v, before[k][1])

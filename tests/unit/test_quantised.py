"""Linear layers in 8 and 4 bits: what they hold, what they compute, and LoRAs on top, against dense ones."""

from __future__ import annotations

import copy
import importlib.util
import sys
import weakref

import pytest
import torch
from torch import nn

from sdlora.adapter.layers import attach
from sdlora.adapter.quantised import Int8Weight, QuantisedLinear, count_parameters
from sdlora.adapter.sites import LayerPlan
from sdlora.bases.quantisation import check_quantise, quantise_base
from sdlora.errors import ConfigError
from tests.saved import counting_saved
from tests.stacks import hash_base
from tests.tiny import make_tiny_base

NEEDS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = ["int8", pytest.param("nf4", marks=NEEDS)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_linear(out: int = 96, into: int = 64, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(out + into)
        return nn.Linear(into, out, bias=bias).to(dtype).requires_grad_(False)


def dense_of(layer: QuantisedLinear) -> nn.Linear:
    """A plain layer that holds the weight made dense again."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
    plain.weight.data = layer.weight.dense(layer.weight.dtype)
    if layer.bias is not None:
        plain.bias.data = layer.bias.data
    return plain.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_off_by_at_most_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    weight = make_linear(dtype=dtype).weight
    weight[3] *= 50  # another row's size costs this one nothing
    weight[5] = 0
    packed = Int8Weight.of(weight)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    off = (packed.dense(torch.float32) - weight.float()).abs()
    rounding = weight.float().abs() * torch.finfo(dtype).eps
    assert bool((off <= step / 2 * 1.001 + rounding).all())
    assert bool((off[5] == 0).all())
    assert float(off.max()) > 0
    assert packed.codes.dtype == torch.int8
    assert packed.codes.abs().amax(1).tolist() == [0 if i == 5 else 127 for i in range(96)]
    assert packed.stored_bytes == 96 * 64 + 96 * 4
    assert torch.equal(packed.dense(torch.float32), packed.dense(dtype).float())  # the same weight whoever asks


@NEEDS
def test_nf4_is_bitsandbytes_own_and_close() -> None:
    import bitsandbytes.functional as reference

    linear = make_linear(256, 128)
    layer = QuantisedLinear(linear, "nf4")
    codes, state = reference.quantize_4bit(linear.weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight.dense(torch.float32), reference.dequantize_4bit(codes, state))
    off = (layer.weight.dense(torch.float32) - linear.weight).norm() / linear.weight.norm()
    assert 0.05 < float(off) < 0.12
    bits = 8 * layer.weight.stored_bytes / linear.weight.numel()
    assert 4.1 < bits < 4.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_as_a_dense_one_with_the_same_weight(kind: str, dtype: torch.dtype, bias: bool) -> None:
    layer = QuantisedLinear(make_linear(dtype=dtype, bias=bias), kind)
    plain = dense_of(layer)
    x = torch.randn(3, 5, 64).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with counting_saved() as saved:
        y = layer(a)
    assert saved.bytes == 0
    assert torch.equal(y, plain(b))
    dy = torch.randn(3, 5, 96).to(dtype)
    y.backward(dy)
    plain(b).backward(dy)
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_on_it_equals_one_on_the_dense_weight(kind: str, dora: bool, dtype: torch.dtype) -> None:
    packed = nn.ModuleDict({"to_q": QuantisedLinear(make_linear(dtype=dtype), kind)})
    plain = nn.ModuleDict({"to_q": dense_of(packed["to_q"])})
    results = []
    for model in (packed, plain):
        plan = LayerPlan(dora=dora, dropout=0.2)
        layers = attach({"unet": model}, {"unet": ("to_q",)}, rank=4, alpha=2.0, seed=5, plan=plan)
        nn.init.normal_(layers.layers[0].up, std=0.3, generator=torch.Generator().manual_seed(0))
        layers.begin(0, 0)
        x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = model["to_q"](x)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in layers.parameters())])
        assert all(p.dtype == torch.float32 for p in layers.parameters())
    for a, b in zip(*results, strict=True):
        assert float(b.detach().float().abs().max()) > 0
        assert torch.equal(a, b)


def test_a_lora_on_it_keeps_no_dense_weight() -> None:
    model = nn.ModuleDict({"to_q": QuantisedLinear(make_linear(512, 512), "int8")})
    layers = attach({"unet": model}, {"unet": ("to_q",)}, rank=2, alpha=2.0, seed=5)
    x = torch.randn(1, 3, 512, requires_grad=True)
    with counting_saved(*layers.parameters()) as saved:
        y = model["to_q"](x)
    assert saved.bytes < 512 * 512
    assert isinstance(y.grad_fn.weight, Int8Weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_quantised_copy_leaves_the_base_as_it_was(kind: str, family: str) -> None:
    base = make_tiny_base(family=family)
    before, modules = hash_base(base), {id(m) for part in base.modules.values() for m in part.modules()}
    packed = quantise_base(base, kind, ("unet",), own=False)
    assert hash_base(base) == before
    assert not any(isinstance(m, QuantisedLinear) for part in base.modules.values() for m in part.modules())
    linears = [n for n, m in base.unet.named_modules() if isinstance(m, nn.Linear)]
    assert [n for n, m in packed.unet.named_modules() if isinstance(m, QuantisedLinear)] == linears
    assert not {id(m) for m in packed.unet.modules()} & modules
    assert packed.unet.conv_in.weight is base.unet.conv_in.weight
    assert packed.modules["vae"] is base.modules["vae"]
    assert packed.modules["text_encoder"] is base.modules["text_encoder"]
    assert (
        count_parameters(packed.unet) == count_parameters(base.unet) == sum(p.numel() for p in base.unet.parameters())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_predicts_as_one_with_the_dense_weights(kind: str) -> None:
    base = make_tiny_base(family="sdxl")
    packed = quantise_base(base, kind, ("unet", "text_encoder", "text_encoder_2"), own=False)
    dense = copy.deepcopy(base)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in packed.modules[part].named_modules():
            if isinstance(module, QuantisedLinear):
                dense.modules[part].get_submodule(name).weight.data = module.weight.dense(torch.float32)
    found = []
    for b in (packed, dense, base):
        with torch.no_grad():
            text = b.encode_text(b.tokenize(["a cat", "ink"])[0])
            x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
            found.append(b.predict(x, torch.tensor([5, 900]), text))
    assert torch.equal(found[0], found[1])
    off = float((found[0] - found[2]).norm() / found[2].norm())
    assert 0 < off < {"int8": 0.02, "nf4": 0.25}[kind]


def test_own_weights_leave_memory_as_they_are_packed() -> None:
    base = make_tiny_base()
    module = base.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    old = weakref.ref(module.to_q)
    packed = quantise_base(base, "int8", ("unet",), own=True)
    assert packed.unet is base.unet
    assert isinstance(module.to_q, QuantisedLinear)
    assert old() is None


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r'^quantise = "nf4" needs the package bitsandbytes; pip install') as error:
        check_quantise("nf4", torch.device("cuda"))
    assert "\n" not in str(error.value)
    check_quantise("int8", torch.device("mps"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    with pytest.raises(
        ConfigError, match=r'^quantise = "nf4" runs on cuda and cpu, not on mps; use quantise = "int8"$'
    ):
        check_quantise("nf4", torch.device("mps"))
    check_quantise("nf4", torch.device("cpu"))


def test_a_quantised_layer_is_not_moved_in_silence() -> None:
    with pytest.raises(RuntimeError, match="stays on the device"):
        nn.Sequential(QuantisedLinear(make_linear(), "int8")).to(torch.bfloat16)


def test_codes_that_are_a_parameter_act_as_before_and_are_held_once():
    layer = QuantisedLinear(make_linear(), "int8")
    x = torch.randn(3, layer.in_features, requires_grad=True)
    before, dense, codes = layer(x), layer.weight.dense(torch.float32), layer.weight.codes
    (gradient,) = torch.autograd.grad(before.sum(), x)
    layer.expose_codes()
    assert "codes" in dict(layer.named_parameters())
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight.dense(torch.float32), dense)
    assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], gradient)
    assert layer.codes.data_ptr() == codes.data_ptr()
    assert layer._packed.codes.numel() == 0
    layer.codes = torch.nn.Parameter(-codes, requires_grad=False)  # as what splits them does
    assert torch.equal(layer.weight.dense(torch.float32), -dense)

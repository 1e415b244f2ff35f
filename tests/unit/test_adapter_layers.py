"""The trainable layers: what they compute, what they keep, and what they leave behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from sdlora.adapter import Adapter, LoraLayers, attach
from sdlora.errors import ConfigError, RunError


class Attention(nn.Module):
    """q, k and v of one attention; `to_out.0` too."""

    def __init__(self, width: int, text_width: int | None = None) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(text_width or width, width, bias=False)
        self.to_v = nn.Linear(text_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        source = x if text is None else text
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out[0](weights @ v)  # type: ignore[no-any-return]


TARGETS = {"unet": ("to_q", "to_k", "to_v", "to_out.0")}


def build(width: int = 32, *, rank: int = 4, alpha: float = 6.0, dtype: torch.dtype = torch.float32, seed: int = 0):
    """An attention with a LoRA whose B is not zero."""
    torch.manual_seed(seed)
    model = Attention(width).to(dtype).requires_grad_(False)
    layers = attach({"unet": model}, TARGETS, rank=rank, alpha=alpha, seed=1)
    for layer in layers.layers:
        nn.init.normal_(layer.up, std=0.2)
    return model, layers


def dense(model: Attention, layers: LoraLayers) -> Attention:
    """The same model in float64 with every ΔW added to its weight."""
    merged = Attention(model.to_q.in_features).double()
    merged.load_state_dict(model.state_dict())
    for layer in layers.layers:
        weight = merged.get_submodule(layer.path.removeprefix("unet.")).weight
        weight.data += layer.scale * layer.up.detach().double() @ layer.down.detach().double()
    return merged


def test_output_and_input_gradient_equal_the_dense_float64_model() -> None:
    model, layers = build()
    x = torch.randn(2, 10, 32)
    x32, x64 = x.clone().requires_grad_(), x.double().requires_grad_()
    y32, y64 = model(x32), dense(model, layers)(x64)
    y32.square().sum().backward()
    y64.square().sum().backward()
    torch.testing.assert_close(y32.double(), y64, rtol=0, atol=1e-6)
    torch.testing.assert_close(x32.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])  # Ax computed again in the backward pass for 4 of 32, kept for 1
def test_gradients_hold_against_finite_differences(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"to_q": nn.Linear(32, 5)}).double().requires_grad_(False)
    layers = attach({"unet": model}, {"unet": ("to_q",)}, rank=rank, alpha=3.0, seed=0)
    nn.init.normal_(layers.layers[0].up)
    down, up = (p.detach().double().requires_grad_() for p in layers.parameters())
    x = torch.randn(3, 2, 32, dtype=torch.float64, requires_grad=True)
    layer = layers.layers[0]
    layer.down, layer.up = down, up  # type: ignore[assignment]
    assert torch.autograd.gradcheck(lambda *_: model["to_q"](x), (x, down, up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32_and_factors_stay_float32(dtype: torch.dtype) -> None:
    model, layers = build(64)
    half = copy.deepcopy(model).to(dtype)  # a copy carries its own LoRA along
    ours, theirs = layers.parameters(), [p for m in half.modules() if "forward" in m.__dict__ for p in _factors(m)]
    assert all(a is not b and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    x = torch.randn(4, 16, 64).to(dtype)
    y, z = model(x.float()), half(x)
    y.square().mean().backward()
    z.float().square().mean().backward()
    assert z.dtype == dtype
    assert float((y - z.float()).detach().norm() / y.detach().norm()) < 0.02
    for a, b in zip(ours, theirs, strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        assert float((a.grad - b.grad).norm() / a.grad.norm()) < 0.03


def _factors(module: nn.Module) -> list[nn.Parameter]:
    layer = module.forward.__self__
    return [layer.down, layer.up]


def test_autocast_computes_in_bfloat16_as_a_bfloat16_base_does() -> None:
    model, layers = build(64)
    x = torch.randn(4, 16, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().mean().backward()  # inside autocast, as some loops do
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    full = model(x.detach()).detach()
    assert float((y.detach().float() - full).norm() / full.norm()) < 0.02
    assert all(p.grad.dtype == torch.float32 for p in layers.parameters())


def saved_bytes(model: Attention, x: Tensor, text: Tensor | None = None, autocast: bool = False) -> int:
    """Bytes of the distinct storages that q, k and v keep for their backward passes."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    source = x if text is None else text
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = model.to_q(x), model.to_k(source), model.to_v(source)
    assert all(y.requires_grad for y in out)
    return sum(storages.values())


def test_q_k_and_v_keep_x_once() -> None:
    model, _ = build(320, rank=16, dtype=torch.bfloat16)
    x = torch.randn(1, 4096, 320, dtype=torch.bfloat16, requires_grad=True)
    ratio = saved_bytes(model, x) / x.untyped_storage().nbytes()
    assert 1.0 <= ratio <= 1.25


def test_q_k_and_v_keep_x_once_at_a_high_rank() -> None:
    model, _ = build(320, rank=128, dtype=torch.bfloat16)
    x = torch.randn(1, 4096, 320, dtype=torch.bfloat16, requires_grad=True)
    factors = 3 * 2 * 128 * 320 * 2
    assert saved_bytes(model, x) <= x.untyped_storage().nbytes() + factors


def test_autocast_keeps_one_bfloat16_copy_of_x_for_all_three_and_lets_go_of_it() -> None:
    model, layers = build(320, rank=16)
    x = torch.randn(1, 4096, 320, requires_grad=True)
    assert saved_bytes(model, x, autocast=True) <= 0.5 * 1.25 * x.untyped_storage().nbytes()
    assert len(layers.layers[0]._casts) == 1
    del x
    assert len(layers.layers[0]._casts) == 0


def test_autocast_sees_that_x_was_changed_in_place() -> None:
    model, _ = build()
    x = torch.randn(2, 3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model.to_q(x)
        x.mul_(2)
        after = model.to_k(x), model.to_q(x)
    torch.testing.assert_close(after[1].float(), 2 * before.float(), rtol=1e-6, atol=0)


def test_attaching_and_detaching_leave_the_base_bit_identical() -> None:
    torch.manual_seed(0)
    model = Attention(32).requires_grad_(False)
    x = torch.randn(2, 5, 32)
    before, output = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}

    def same() -> bool:
        now = model.state_dict()
        return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)

    with attach({"unet": model}, TARGETS, rank=4, alpha=4, seed=0) as layers:
        assert torch.equal(model(x), output)  # B is zero
        assert same()
        optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
        assert not torch.allclose(model(x), output, atol=1e-2)
        assert same()
        assert all(p.grad is None for p in model.parameters())
    assert same()
    assert torch.equal(model(x), output)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    layers.detach_from_base()
    with attach({"unet": model}, TARGETS, rank=4, alpha=4, seed=0):
        assert torch.equal(model(x), output)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, layers = build()
    x = torch.randn(2, 5, 32, requires_grad=True)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in [x, *layers.parameters()]]
    for p in [x, *layers.parameters()]:
        p.grad = None
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, [x, *layers.parameters()], strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("autocast", [False, True])
def test_previews_see_the_same_model(mode: type, autocast: bool) -> None:
    model, _ = build()
    x = torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = model(x)
        with mode():
            shown = model(x.clone())
    assert torch.equal(trained, shown)
    assert not shown.requires_grad


def test_initial_factors_do_not_depend_on_order_or_company() -> None:
    def factors(targets: tuple[str, ...], seed: int = 5) -> dict[str, Tensor]:
        with attach({"unet": Attention(32)}, {"unet": targets}, rank=4, alpha=4, seed=seed) as layers:
            return {k: v.detach().clone() for k, v in layers.named_factors().items()}

    torch.manual_seed(1)
    every, alone = factors(("to_out.0", "to_v", "to_k", "to_q")), factors(("to_v",))
    assert torch.equal(every["unet.to_v.down"], alone["unet.to_v.down"])
    assert not torch.equal(every["unet.to_v.down"], every["unet.to_q.down"])
    assert not torch.equal(alone["unet.to_v.down"], factors(("to_v",), seed=6)["unet.to_v.down"])
    down, bound = every["unet.to_q.down"], 1 / math.sqrt(32)  # Kaiming-uniform with a = √5
    assert float(down.abs().max()) <= bound
    assert float(down.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert not every["unet.to_q.up"].any()


def test_targets_match_whole_names_from_their_end() -> None:
    model = nn.ModuleDict({"a": Attention(8), "to_q": nn.Linear(8, 8), "not_to_q": nn.Linear(8, 8)})
    with attach({"unet": model}, {"unet": ("to_q",)}, rank=2, alpha=2, seed=0) as layers:
        assert [x.path for x in layers.layers] == ["unet.a.to_q", "unet.to_q"]


@pytest.mark.parametrize(
    ("targets", "rank", "alpha", "named"),
    [
        ({"unet": ("to_q", "to_x")}, 4, 4.0, "to_x"),
        ({"unet": ("to_out.1",)}, 4, 4.0, "Dropout"),
        ({"text_encoder": ("q_proj",)}, 4, 4.0, "text_encoder"),
        ({"unet": ()}, 4, 4.0, "target"),
        ({}, 4, 4.0, "target"),
        (TARGETS, 0, 4.0, "rank is 0"),
        (TARGETS, 2.5, 4.0, "rank is 2.5"),
        (TARGETS, 4, 0.0, "alpha is 0.0"),
        (TARGETS, 4, float("nan"), "alpha is nan"),
    ],
)
def test_wrong_requests_name_the_thing_and_touch_nothing(targets: dict, rank: int, alpha: float, named: str) -> None:
    model = Attention(8)
    with pytest.raises(ConfigError) as caught:
        attach({"unet": model}, targets, rank=rank, alpha=alpha, seed=0)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_second_lora_on_the_same_module_is_refused() -> None:
    model, layers = build()
    with pytest.raises(ConfigError, match="detach"):
        attach({"unet": model}, TARGETS, rank=2, alpha=2, seed=0)
    layers.detach_from_base()


def test_changing_a_weight_before_the_backward_pass_is_noticed() -> None:
    model, _ = build()
    y = model.to_q(torch.randn(2, 32, requires_grad=True))
    model.to_q.weight.data.mul_(1)  # .data does not count; an ordinary change does
    with torch.no_grad():
        model.to_q.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed"):
        y.sum().backward()


def test_saved_factors_come_back_and_others_are_refused_whole() -> None:
    model, layers = build()
    saved = {k: v.detach().clone() for k, v in layers.named_factors().items()}
    x = torch.randn(1, 3, 32)
    y = model(x)
    for p in layers.parameters():
        nn.init.zeros_(p)
    layers.load_factors(saved)
    assert torch.equal(model(x), y)
    changed = {k: torch.zeros_like(v) for k, v in saved.items()}
    for wrong in (
        {k: v for k, v in changed.items() if k != "unet.to_v.up"},
        changed | {"unet.to_x.up": torch.zeros(1)},
        changed | {"unet.to_v.up": torch.zeros(32, 5)},
    ):
        with pytest.raises(RunError, match=r"unet\.to_[vx]\.up"):
            layers.load_factors(wrong)
        assert torch.equal(model(x), y)


def test_adapter_is_a_copy_with_the_models_delta() -> None:
    model, layers = build(alpha=6.0)
    adapter = layers.adapter()
    assert isinstance(adapter, Adapter)
    layer = layers.layers[0]
    expected = 1.5 * layer.up.detach() @ layer.down.detach()
    nn.init.zeros_(layer.up)
    torch.testing.assert_close(adapter.deltas["unet.to_q"].weight(), expected, rtol=1e-6, atol=1e-7)
    assert layers.count == 4 * 2 * 4 * 32 == sum(p.numel() for p in layers.parameters("unet"))
    assert layers.parameters("text_encoder") == []
    base = sum(p.numel() for p in model.parameters())
    assert layers.share == pytest.approx(1024 / base)
    assert f"1,024 trainable parameters, {100 * 1024 / base:.2f} % of the base's {base:,}" in layers.describe()
    assert "\n" not in layers.describe()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "padding_mode"), [(1, 1, 0, "zeros"), (3, 2, 1, "zeros"), (3, 1, 1, "circular")]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_convolutions_equal_the_merged_weight(
    kernel: int, stride: int, padding: int, padding_mode: str, autocast: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, kernel, stride, padding, padding_mode=padding_mode).requires_grad_(False)
    model = nn.ModuleDict({"conv": conv})
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    with attach({"unet": model}, {"unet": ("conv",)}, rank=3, alpha=1.0, seed=0) as layers:
        nn.init.normal_(layers.layers[0].up)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = conv(x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        delta = layers.adapter().deltas["unet.conv"].weight()
    conv.weight.data += delta
    expected = conv(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    tolerance = 0.02 if autocast else 1e-5
    assert float((y - expected).detach().norm() / expected.detach().norm()) < tolerance
    assert float((grad - expected_grad).norm() / expected_grad.norm()) < tolerance

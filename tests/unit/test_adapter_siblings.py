"""q, k and v as one node, held against the layers one by one: values, gradients, and when they must part again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sdlora.adapter import LoraLayers, attach
from sdlora.adapter import siblings as under_test
from sdlora.adapter.sites import LayerPlan
from sdlora.config import Recipe
from sdlora.training.adapting import attach_layers
from tests.tiny import make_tiny_base


class Block(nn.Module):
    """What a transformer block has: attn1 reads x alone, attn2 the text too."""

    def __init__(self, width: int = 32, text: int = 24, bias: bool = False) -> None:
        super().__init__()
        for name, source in (("attn1", width), ("attn2", text)):
            attention = nn.Module()
            attention.to_q = nn.Linear(width, width, bias=bias)
            attention.to_k, attention.to_v = (nn.Linear(source, width, bias=bias) for _ in range(2))
            setattr(self, name, attention)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.attn1.to_q(x) * self.attn1.to_k(x) - self.attn1.to_v(x).sin()
        k, v = self.attn2.to_k(text), self.attn2.to_v(text)
        return self.attn2.to_q(y) * k.mean(1, keepdim=True) + v.cos().mean(1, keepdim=True)


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(**options), Block(**options)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


TARGETS = {"unet": ("to_q", "to_k", "to_v")}
RNG = torch.Generator().manual_seed(2)
X, TEXT = torch.randn(2, 9, 32, generator=RNG), torch.randn(2, 7, 24, generator=RNG)


def build(dtype=torch.float32, *, rank=4, alpha=6.0, plan=None, **options) -> tuple[Model, LoraLayers]:
    torch.manual_seed(0)
    model = Model(**options).to(dtype).requires_grad_(False)
    layers = attach({"unet": model}, TARGETS, rank=rank, alpha=alpha, seed=1, plan=plan)
    for layer in layers.layers:
        nn.init.normal_(layer.up, std=0.2)
    return model, layers


def alone(layers: LoraLayers) -> None:
    """Each layer computes by itself."""
    for layer in layers.layers:
        layer.module.forward = layer.linear  # type: ignore[method-assign]


def count_nodes(monkeypatch) -> list[int]:
    """Grows by how many layers were computed together, at each computation."""
    made: list[int] = []
    apply = under_test.LoraLinears.apply
    monkeypatch.setattr(
        under_test.LoraLinears, "apply", lambda *of: made.append((len(of) - 4) // 2) or apply(*of), raising=False
    )
    return made


def run(model: nn.Module, layers: LoraLayers, x: Tensor = X, text: Tensor = TEXT, learn_text: bool = False):
    for p in layers.parameters():
        p.grad = None
    x, text = x.clone().requires_grad_(), text.clone().requires_grad_(learn_text)
    y = model(x, text)
    y.float().sin().sum().backward()
    return [y.detach(), x.grad, *([text.grad] if learn_text else []), *(p.grad for p in layers.parameters())]


@pytest.mark.parametrize("learn_text", [False, True])
def test_values_and_gradients_are_those_of_the_layers_alone(learn_text, monkeypatch):
    model, layers = build()
    made = count_nodes(monkeypatch)
    together = run(model, layers, learn_text=learn_text)
    assert made == [3, 2, 3, 2]
    alone(layers)
    for ours, theirs in zip(together, run(model, layers, learn_text=learn_text), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    assert made == [3, 2, 3, 2]


def test_in_bfloat16_they_are_as_near_to_the_truth():
    exact = run(*build())
    model, layers = build(torch.bfloat16)
    together = run(model, layers, X.bfloat16(), TEXT.bfloat16())
    alone(layers)
    one_by_one = run(model, layers, X.bfloat16(), TEXT.bfloat16())
    for ours, theirs, true in zip(together, one_by_one, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - true).norm() <= 1.25 * (theirs - true).norm() + 1e-3 * true.norm()


def test_the_base_keeps_its_weights_and_is_itself_again_afterwards():
    torch.manual_seed(0)
    plain = Model().requires_grad_(False)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    y = plain(X, TEXT)
    layers = attach({"unet": plain}, TARGETS, rank=4, alpha=4, seed=1)
    run(plain, layers)
    layers.detach_from_base()
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())
    assert torch.equal(plain(X, TEXT), y)


@pytest.mark.parametrize(
    ("options", "made_of"),
    [
        ({"bias": True}, []),
        ({"rank": 40}, []),
        ({"rank": 21}, [3, 2] * 2),
        ({"plan": LayerPlan(dora=True)}, []),
        ({"dtype": torch.float64}, [3, 2] * 2),
    ],
)
def test_only_those_that_are_alike_are_computed_together(options, made_of, monkeypatch):
    model, layers = build(**options)
    made = count_nodes(monkeypatch)
    dtype = options.get("dtype", torch.float32)
    found = run(model, layers, X.to(dtype), TEXT.to(dtype))
    assert made == made_of
    alone(layers)
    for ours, theirs in zip(found, run(model, layers, X.to(dtype), TEXT.to(dtype)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_the_recipe_can_switch_it_off(monkeypatch):
    made = count_nodes(monkeypatch)
    base = make_tiny_base()
    x, text = torch.randn(1, 4, 8, 8), base.encode_text(base.tokenize(["a cat"])[0])
    before = {name: p.data_ptr() for name, p in base.unet.named_parameters()}
    for fast_layers in (False, True):
        with attach_layers(base, Recipe(rank=2, precision="fp32", fast_layers=fast_layers)):
            base.predict(x, torch.tensor([500]), text)
        assert bool(made) is fast_layers
        moved = any(before[name] != p.data_ptr() for name, p in base.unet.named_parameters())
        assert moved is fast_layers


def test_dropout_and_autocast_go_layer_by_layer(monkeypatch):
    model, layers = build(plan=LayerPlan(dropout=0.5))
    made = count_nodes(monkeypatch)
    layers.begin(0, 0)
    dropped = run(model, layers)[0]
    assert made == []
    layers.end()
    assert not torch.allclose(run(model, layers)[0], dropped)
    assert made == [3, 2] * 2
    with torch.autocast("cpu", torch.bfloat16):
        run(model, layers)
    assert len(made) == 4


def test_another_input_is_computed_anew():
    model, layers = build()
    attention = model.blocks[0].attn1
    with torch.no_grad():
        q, other = attention.to_q(X), attention.to_k(2 * X)
        changed = X.clone()
        attention.to_q(changed)
        changed.mul_(3)
        k = attention.to_k(changed)
    alone(layers)
    for ours, theirs in ((q, attention.to_q(X)), (other, attention.to_k(2 * X)), (k, attention.to_k(3 * X))):
        torch.testing.assert_close(ours, theirs.detach(), rtol=2e-5, atol=2e-6)


def test_what_was_computed_without_gradients_is_not_taken_with_them():
    model, _ = build()
    attention = model.blocks[0].attn1
    with torch.no_grad():
        attention.to_q(X)
    assert attention.to_k(X).requires_grad


def test_nothing_is_held_once_all_have_taken_theirs():
    model, layers = build()
    run(model, layers)
    assert all(layer.siblings is None or not layer.siblings._ready for layer in layers.layers)


def test_a_weight_that_lies_elsewhere_now_is_the_one_that_counts(monkeypatch):
    model, layers = build()
    made = count_nodes(monkeypatch)
    module = model.blocks[0].attn1.to_k
    module.weight = nn.Parameter(module.weight.detach() * 2, requires_grad=False)
    found = run(model, layers)
    assert made == [2, 3, 2]
    alone(layers)
    for ours, theirs in zip(found, run(model, layers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_weights_are_moved_once_and_again_only_where_they_were_replaced():
    model, layers = build()
    module = model.blocks[0].attn1.to_k
    placed = module.weight.data_ptr()
    with layers.aside():
        pass
    assert module.weight.data_ptr() == placed
    with layers.aside():
        module.weight = nn.Parameter(module.weight.detach() * 2, requires_grad=False)
    attention = layers.layers[0].siblings
    assert attention is not None
    assert attention.are_in_place()
    found = run(model, layers)
    alone(layers)
    for ours, theirs in zip(found, run(model, layers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_a_weight_changed_in_place_counts_too():
    model, layers = build()
    before = run(model, layers)[0]
    with torch.no_grad():
        model.blocks[0].attn1.to_k.weight.mul_(2)
    after = run(model, layers)[0]
    assert not torch.allclose(before, after)
    alone(layers)
    torch.testing.assert_close(after, run(model, layers)[0], rtol=2e-5, atol=2e-6)


def test_a_copy_of_the_model_has_layers_of_its_own():
    model, layers = build()
    other = copy.deepcopy(model)
    before = other(X, TEXT).detach()
    torch.testing.assert_close(before, model(X, TEXT).detach(), rtol=2e-5, atol=2e-6)
    with torch.no_grad():
        for p in layers.parameters():
            p.mul_(2)
    assert torch.equal(other(X, TEXT).detach(), before)

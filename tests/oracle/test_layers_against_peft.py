"""Our layers against peft's in real diffusers and transformers modules, and files against diffusers' loader."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import SCHEDULE, make_tiny_parts, make_tiny_tokenizer

from sdlora.adapter import (
    TEXT_ENCODER_TARGETS,
    UNET_TARGETS,
    Adapter,
    Card,
    LoraLayers,
    LowRank,
    attach,
    find_module,
    read_adapter,
    write_adapter,
)

peft = pytest.importorskip("peft")


def with_peft(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float) -> nn.Module:
    """A copy of the frozen model with peft's layers in it."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    return peft.inject_adapter_in_model(config, copy.deepcopy(model))  # type: ignore[no-any-return]


def copy_factors(ours: LoraLayers, theirs: nn.Module, part: str = "unet") -> dict[str, tuple[Tensor, Tensor]]:
    """Gives peft's layers our factors, by name; returns its factors by our paths."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(theirs.named_modules())
    for layer in ours.layers:
        name = layer.path.removeprefix(f"{part}.").removeprefix("text_model.")
        a, b = modules[name].lora_A["default"].weight, modules[name].lora_B["default"].weight
        a.data.copy_(layer.down.data)
        b.data.copy_(layer.up.data)
        factors[layer.path] = a, b
    assert len(factors) == sum(n.endswith("lora_A.default") for n in modules)
    return factors


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    """Within the tolerance of the largest value (at least of 1)."""
    assert float((a.detach() - b.detach()).abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.0), (8, 12.5), (1, 0.3)])
@pytest.mark.parametrize("crossed", [False, True])
def test_an_attention_block_equals_pefts(rank: int, alpha: float, crossed: bool) -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(64, 48 if crossed else None, heads=4, dim_head=16).requires_grad_(False)
    reference = with_peft(attention, UNET_TARGETS, rank, alpha)
    with attach({"unet": attention}, {"unet": UNET_TARGETS}, rank=rank, alpha=alpha, seed=3) as layers:
        for layer in layers.layers:
            nn.init.normal_(layer.up, std=0.3)
        theirs = copy_factors(layers, reference)
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
            close(layer.down.grad, theirs[layer.path][0].grad)
            close(layer.up.grad, theirs[layer.path][1].grad)


def test_a_whole_unet_and_text_encoder_equal_pefts() -> None:
    parts = make_tiny_parts()
    unet, text = parts["unet"].requires_grad_(False), parts["text_encoder"].requires_grad_(False)
    references = with_peft(unet, UNET_TARGETS, 4, 6.0), with_peft(text, TEXT_ENCODER_TARGETS, 4, 6.0)
    torch.manual_seed(1)
    ids, z, t = torch.randint(0, 50, (2, 77)), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    targets = {"unet": UNET_TARGETS, "text_encoder": TEXT_ENCODER_TARGETS}
    with attach({"unet": unet, "text_encoder": text}, targets, rank=4, alpha=6.0, seed=0) as layers:
        for layer in layers.layers:
            nn.init.normal_(layer.up, std=0.1)
        unet_layers = [x for x in layers.layers if x.path.startswith("unet.")]
        text_layers = [x for x in layers.layers if not x.path.startswith("unet.")]
        assert (len(unet_layers), len(text_layers)) == (32, 8)
        theirs = copy_factors(LoraLayers(unet_layers, 1, 4, 6.0), references[0])
        theirs |= copy_factors(LoraLayers(text_layers, 1, 4, 6.0), references[1], "text_encoder")
        outputs = []
        for model, encoder in ((unet, text), references):
            y = model(z, t, encoder_hidden_states=encoder(ids)[0]).sample
            y.square().mean().backward()
            outputs.append(y)
        close(*outputs, tolerance=1e-5)
        for layer in layers.layers:
            close(layer.down.grad, theirs[layer.path][0].grad, 1e-5)
            close(layer.up.grad, theirs[layer.path][1].grad, 1e-5)


def pipeline(parts: dict[str, nn.Module]) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = {k: v for k, v in SCHEDULE.items() if k != "clip_sample"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusionPipeline(
            **parts,
            tokenizer=make_tiny_tokenizer(),
            scheduler=PNDMScheduler(**scheduler, skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def learnt_adapter(alpha: float, mixed: bool) -> Adapter:
    """Random factors for the tiny base; `mixed`: every module has its own rank and alpha."""
    parts = make_tiny_parts()
    targets = {"unet": UNET_TARGETS, "text_encoder": TEXT_ENCODER_TARGETS}
    with attach(parts, targets, rank=4, alpha=alpha, seed=0) as layers:
        adapter = layers.adapter(Card("mini", "mini", "tok"))
    g = torch.Generator().manual_seed(9)
    deltas = {}
    for i, (path, delta) in enumerate(adapter.deltas.items()):
        assert isinstance(delta, LowRank)
        rank = 1 + i % 4 if mixed else 4
        up = 0.3 * torch.randn(delta.up.shape[0], rank, generator=g)
        deltas[path] = LowRank(delta.down[:rank], up, 0.5 + i % 5 if mixed else alpha)
    return Adapter(dict(deltas), adapter.card)


@pytest.mark.parametrize(("format", "alpha", "mixed"), [("kohya", 6.0, False), ("diffusers", 6.0, False),
                                                       ("diffusers", 4.0, True)])  # fmt: skip
def test_diffusers_opens_the_file_and_computes_the_same(
    tmp_path: Path, format: str, alpha: float, mixed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # kohya files with mixed alphas are left out: diffusers itself scales those wrongly
    adapter = learnt_adapter(alpha, mixed)
    write_adapter(adapter, tmp_path / "a.safetensors", format)
    pipe = pipeline(make_tiny_parts())
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    loaded = {
        (part, n)
        for part in ("unet", "text_encoder")
        for n, m in getattr(pipe, part).named_modules()
        if hasattr(m, "lora_A")
    }
    assert len(loaded) == len(adapter.deltas) == 40
    assert not [r for r in caplog.records if "unexpected" in r.message or "missing" in r.message]

    ours = make_tiny_parts()
    for path, delta in adapter.deltas.items():
        find_module(ours, path).weight.data += delta.weight()  # type: ignore[union-attr]
    torch.manual_seed(2)
    ids, z, t = torch.randint(0, 50, (2, 77)), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        text, text_diffusers = ours["text_encoder"](ids)[0], pipe.text_encoder(ids)[0]
        y = ours["unet"](z, t, encoder_hidden_states=text).sample
        y_diffusers = pipe.unet(z, t, encoder_hidden_states=text_diffusers).sample
        plain = make_tiny_parts()["unet"](z, t, encoder_hidden_states=text).sample
    close(text_diffusers, text, 1e-5)
    close(y_diffusers, y, 1e-5)
    assert float((y - plain).abs().max()) > 100 * float((y - y_diffusers).abs().max())


def test_diffusers_own_file_of_the_adapter_reads_as_the_same_deltas(tmp_path: Path) -> None:
    adapter = learnt_adapter(6.0, False)
    write_adapter(adapter, tmp_path / "a.safetensors")
    pipe = pipeline(make_tiny_parts())
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="default")
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder, adapter_name="default"),
        weight_name="b.safetensors",
        **_collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}),
    )
    again = read_adapter(tmp_path / "b.safetensors", warn=pytest.fail)
    assert again.deltas.keys() == adapter.deltas.keys()
    for path, delta in adapter.deltas.items():
        close(again.deltas[path].weight(), delta.weight(), 1e-6)


def test_a_peft_file_of_one_part_is_what_peft_loads(tmp_path: Path) -> None:
    adapter = learnt_adapter(4.0, False)
    adapter = Adapter({p: d for p, d in adapter.deltas.items() if p.startswith("unet.")}, adapter.card)
    write_adapter(adapter, tmp_path / "adapter_model.safetensors", "peft")
    peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(UNET_TARGETS)).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(make_tiny_parts()["unet"], tmp_path)
    merged = model.merge_and_unload()
    ours = make_tiny_parts()["unet"]
    for path, delta in adapter.deltas.items():
        name = path.removeprefix("unet.")
        close(merged.get_submodule(name).weight, ours.get_submodule(name).weight + delta.weight())

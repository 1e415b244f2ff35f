"""The estimate of memory, against what runs keep, against real weights and optimizers, and published figures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from sdlora import cli
from sdlora.adapter.layers import attach
from sdlora.adapter.quantised import QuantisedLinear, packed_bytes
from sdlora.bases.architecture import make_part, part_names, read_family
from sdlora.bases.empty import assemble_empty, make_empty_base
from sdlora.bases.quantisation import quantise_base
from sdlora.config import Recipe
from sdlora.errors import ConfigError
from sdlora.training import step
from sdlora.training.counting import Peak
from sdlora.training.loop import train_adapter
from sdlora.training.memory import describe_memory, estimate, estimate_memory, optimizer_bytes, show_bytes
from sdlora.training.optimizers import PACKAGES, build_optimizer
from tests.pictures import make_folder
from tests.saved import counting_saved
from tests.tiny import make_tiny_base, save_tiny_pipeline

GIB = 2**30
RECIPE = Recipe(steps=1, batch_size=2, rank=2, warmup_steps=0, precision="fp32", caption_dropout=0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Tiny bases as folders, by family."""
    place = tmp_path_factory.mktemp("bases")
    return {family: save_tiny_pipeline(place / family, family=family) for family in ("sd1", "sdxl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 4)


def measure_saved(folder, out, recipe, family, monkeypatch) -> int:
    """What one training step keeps on the CPU."""
    base = make_tiny_base(family=family)
    original, found = step._error, []

    def error(base, *rest):
        weights = [p for m in base.modules.values() for p in m.parameters()]
        with counting_saved(*weights, *measured[0].parameters()) as saved:
            loss = original(base, *rest)
        found.append(saved.bytes)
        return loss

    measured: list = []
    accumulate = step.accumulate
    monkeypatch.setattr(step, "_error", error)
    monkeypatch.setattr("sdlora.training.loop.accumulate", lambda *a: measured.append(a[2]) or accumulate(*a))
    train_adapter(folder, base, recipe, out)
    return max(found)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"recompute": "feed-forward"},
        {"recompute": "all", "batch_size": 4},
        {"text_encoder": True},
        {"text_encoder": True, "recompute": "all"},
        {"targets": ("attention", "feed-forward", "convolutions"), "dora": True},
        {"quantise": "int8"},
    ],
    ids=str,
)
def test_activations_are_within_a_fifth_of_what_a_step_keeps(
    sources, folder, tmp_path, monkeypatch, family: str, values: dict
) -> None:
    recipe = dataclasses.replace(RECIPE, **values)
    estimated = estimate_memory(sources[family], recipe, (64, 64))["activations"]
    measured = measure_saved(folder, tmp_path / "out.safetensors", recipe, family, monkeypatch)
    assert estimated == pytest.approx(measured, rel=0.2)


def make_full_size(family: str):
    parts = {part: make_part(family, part, read_family(family)[part]) for part in part_names(family)}
    return assemble_empty(family, parts, torch.bfloat16, Path(family))


@pytest.mark.parametrize(
    ("family", "side_px", "published"),
    [
        ("sd1", 512, {"none": 0.75, "all": 0.14}),
        pytest.param("sdxl", 1024, {"none": 5.22, "all": 0.45}, marks=pytest.mark.slow),
    ],
)
def test_full_size_bases_keep_what_was_published(family: str, side_px: int, published: dict[str, float]) -> None:
    recipe = Recipe(batch_size=1, rank=8, precision="bf16", fast_layers=False)  # as on a GPU
    base, found = make_full_size(family), {}
    for how in published:
        memory = estimate(base, dataclasses.replace(recipe, recompute=how), (side_px, side_px))
        found[how] = memory["activations"] / GIB
    assert found == {how: pytest.approx(size, rel=0.25) for how, size in published.items()}


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_weights_are_those_of_the_loaded_base(sources, kind: str, text_encoder: bool) -> None:
    recipe = dataclasses.replace(RECIPE, quantise=kind, text_encoder=text_encoder)
    memory = estimate_memory(sources["sdxl"], recipe, (64, 64))
    base = make_tiny_base(family="sdxl")
    dense = {n: sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for n, m in base.modules.items()}
    parts = ("unet", "text_encoder", "text_encoder_2") if text_encoder else ("unet",)
    wanted = dict(dense)
    if kind != "none":
        if kind == "nf4":
            pytest.importorskip("bitsandbytes")
        for part, module in quantise_base(base, kind, parts, own=True).modules.items():
            packed = sum(m.weight.stored_bytes for m in module.modules() if isinstance(m, QuantisedLinear))
            wanted[part] = packed + sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        assert all((wanted[part] < dense[part]) == (part in parts) for part in dense)
    assert memory["weights"] == wanted
    assert memory["weights_training"] == sum(wanted[part] for part in parts)
    assert memory["when"]["loading"] == sum(dense.values())
    assert memory["when"]["encoding"] == sum(wanted.values()) + memory["encoding"]


def test_what_is_learnt_counts_four_bytes_a_number(sources) -> None:
    recipe = dataclasses.replace(RECIPE, ema_decay=0.9)
    memory = estimate_memory(sources["sd1"], recipe, (64, 64))
    with attach({"unet": make_tiny_base(family="sd1").unet}, {"unet": ("attention",)}, rank=2, alpha=2, seed=0) as own:
        count = own.count
    assert memory["adapter"] == {
        "factors": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "average": 4 * count,
    }
    assert memory["based_on"]["trained_parameters"] == count
    training = memory["weights_training"] + 20 * count + memory["activations"] + memory["working"]
    assert memory["when"]["training"] == training
    assert memory["total"] == max(memory["when"].values())


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "lion", "schedule-free"])
def test_optimizers_keep_what_is_said(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name][0])
    factors = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 320), (640, 4), (320,), (4, 32, 3, 3))]
    optimizer = build_optimizer(name, [{"params": factors, "lr": 1e-3, "weight_decay": 0.0}], 0.0)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(2):
        for p in factors:
            p.grad = torch.randn_like(p)
        optimizer.step()
    kept = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    assert optimizer_bytes(name, [p.shape for p in factors]) == pytest.approx(sum(t.nbytes for t in kept), rel=0.01)


def test_an_optimizer_of_8_bits_is_a_quarter_of_adamw() -> None:
    shapes = [(8, 1280), (1280, 8)]
    assert optimizer_bytes("adamw8bit", shapes) == pytest.approx(optimizer_bytes("adamw", shapes) / 4, rel=0.02)
    assert optimizer_bytes("adamw8bit", [(4, 32)]) == optimizer_bytes("adamw", [(4, 32)])  # too small for it


def test_the_peak_is_what_is_alive_at_once() -> None:
    weight = torch.empty(1000, device="meta")
    with Peak() as peak:
        a = weight * 2
        b = a + 1
        del a
        c = b.view(10, 100)[:5] * 3
        del b
        d = torch.empty(250, device="meta")
        weight.mul_(2)
    assert peak.peak_bytes == 4 * 2000
    assert peak.now_bytes == 4 * (500 + 250)
    del c, d
    assert peak.now_bytes == 0


def test_more_needs_more(sources) -> None:
    def total(size=(64, 64), **values):
        return estimate_memory(sources["sdxl"], dataclasses.replace(RECIPE, **values), size)

    plain = total()
    assert total(batch_size=4)["activations"] == pytest.approx(2 * plain["activations"], rel=0.05)
    assert total((128, 64))["activations"] > 1.7 * plain["activations"]  # the factors' copies stay
    assert total((128, 64))["encoding"] == pytest.approx(plain["encoding"], rel=0.01)  # half as many at once
    kept = [total(recompute=how) for how in ("none", "feed-forward", "all")]
    assert kept[0]["activations"] > kept[1]["activations"] > kept[2]["activations"]
    assert kept[2]["working"] > kept[0]["working"]  # a block's are needed when it is computed again
    assert kept[0]["when"]["training"] > kept[1]["when"]["training"] > kept[2]["when"]["training"]
    assert total(preview=("ink",))["when"]["preview"] > 0
    assert total(preview=("ink",))["weights_training"] - plain["weights_training"] == plain["weights"]["vae"]
    assert 2 * total(precision="bf16")["weights"]["unet"] == pytest.approx(plain["weights"]["unet"], rel=0.01)
    assert total(optimizer="lion")["adapter"]["optimizer"] == plain["adapter"]["optimizer"] / 2


def test_a_target_that_matches_nothing_shows_without_weights(sources) -> None:
    with pytest.raises(ConfigError, match="matches no module"):
        estimate_memory(sources["sd1"], dataclasses.replace(RECIPE, targets=("nowhere",)), (64, 64))


def test_an_empty_base_holds_nothing_and_is_of_the_right_sizes(sources) -> None:
    for family, source in sources.items():
        empty, base = make_empty_base(source, torch.float32), make_tiny_base(family=family)
        assert empty.family.name == family
        assert empty.resolution_px == base.resolution_px
        for part, module in base.modules.items():
            own = dict(empty.modules[part].named_parameters())
            assert all(p.is_meta for p in own.values())
            assert {n: (p.shape, p.dtype) for n, p in own.items()} == {
                n: (p.shape, p.dtype) for n, p in module.named_parameters()
            }


def test_check_and_dry_run_say_it(sources, folder, capsys) -> None:
    argv = [str(folder), "--base", str(sources["sdxl"]), "--batch-size", "2", "--recompute", "all", "--rank", "2"]
    assert cli.main(["check", *argv, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    recipe = Recipe(batch_size=2, recompute="all", rank=2)
    assert memory == json.loads(json.dumps(estimate_memory(sources["sdxl"], recipe, (64, 64))))
    lines = describe_memory(memory)
    assert cli.main(["check", *argv]) == 0
    out = capsys.readouterr().out
    assert all(f"memory            {line}\n" in out for line in lines)
    assert cli.main(["train", *argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(f"memory       {line}\n" in out for line in lines)
    assert (
        f"{show_bytes(memory['activations'])} kept for the backward pass (batch 2 of 64x64 px, all recomputed)" in out
    )
    assert f"{show_bytes(memory['total'])} in all" in out


def test_sizes_are_written_as_people_read_them() -> None:
    sizes = {5.22 * GIB: "5.22 GiB", 78.4 * GIB: "78 GiB", 14 * 2**20: "14 MiB", 1.5 * 2**20: "1.50 MiB", 1000: "1 KiB"}
    assert {size: show_bytes(math.ceil(size)) for size in sizes} == sizes


def test_packed_sizes_of_odd_layers() -> None:
    assert packed_bytes((3, 5), "int8") == 15 + 12
    assert packed_bytes((3, 5), "nf4") == 8 + 1 + 4
    assert packed_bytes((640, 640), "nf4") == 204800 + 6400 + 100

"""Changes of biases and norms: read, added by every kind of plan, baked, combined, and written again."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import sdlora
from sdlora.adapter.delta import Adapter, Card, LowRank
from sdlora.adapter.file import check_fit, read_adapter, write_adapter
from sdlora.adapter.keys import find_parameter
from sdlora.adapter.layers import attach
from sdlora.adapter.resizing import resize
from sdlora.adapter.summary import summarize
from sdlora.adapter.truncation import Cost, Keep
from sdlora.adapter.vector import Vector
from sdlora.bases.stored import Reader, find_stored
from sdlora.cli import main
from sdlora.combining.baking import bake
from sdlora.combining.diagnose import diagnose
from sdlora.combining.methods import METHODS
from sdlora.combining.plan import Member, Plan
from sdlora.combining.stack import combine
from sdlora.combining.ziplora import zip_loras
from sdlora.errors import AdapterFileError
from sdlora.profiles import BlockWeights, Profile, Schedule
from tests.single_files import make_pipeline, write_tiny_file
from tests.tiny import make_tiny_base

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PATHS = {
    "unet.down_blocks.0.resnets.0.norm1": "w_norm",
    "unet.down_blocks.0.resnets.0.norm1.bias": "b_norm",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm2": "w_norm",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm2.bias": "b_norm",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": "diff_b",
    "unet.mid_block.resnets.0.conv1.bias": "diff_b",
    "unet.time_embedding.linear_1.bias": "diff_b",
    "unet.conv_norm_out": "w_norm",
    "unet.conv_norm_out.bias": "b_norm",
    "text_encoder.text_model.encoder.layers.0.layer_norm1": "w_norm",
    "text_encoder.text_model.encoder.layers.0.layer_norm1.bias": "b_norm",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.bias": "diff_b",
}


@pytest.fixture(scope="module")
def base():
    return make_tiny_base()


def make_vectors(base, seed: int, paths=tuple(PATHS), pair: bool = True) -> Adapter:
    """Vectors for these paths, and a plain pair so that the file is a LoRA too."""
    g = torch.Generator().manual_seed(seed)
    deltas: dict = {}
    for path in paths:
        deltas[path] = Vector(0.4 * torch.randn(find_parameter(base.modules, path).shape, generator=g), PATHS[path])
    if pair:
        out, into = find_parameter(base.modules, Q).shape
        deltas[Q] = LowRank(torch.randn(2, into, generator=g), 0.2 * torch.randn(out, 2, generator=g), 2.0)
    return Adapter(deltas, Card(family=base.family.name))


def predict(base, t: int = 500) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    ids, _ = base.tokenize(["a cat", ""])
    with torch.no_grad():
        return base.predict(x, torch.tensor([t, t]), base.encode_text(ids)).float()


def by_hand(base, deltas: dict[str, torch.Tensor], t: int = 500) -> torch.Tensor:
    """What the base predicts with these changes added to its parameters."""
    parameters = {path: find_parameter(base.modules, path) for path in deltas}
    pristine = {path: p.data for path, p in parameters.items()}
    try:
        for path, p in parameters.items():
            p.data = pristine[path] + deltas[path]
        return predict(base, t)
    finally:
        for path, p in parameters.items():
            p.data = pristine[path]


def bytes_of(base) -> dict[str, bytes]:
    return {f"{n}.{k}": v.numpy().tobytes() for n, m in base.modules.items() for k, v in m.state_dict().items()}


def weigh(adapter: Adapter, unet: float, text: float | None = None) -> dict[str, torch.Tensor]:
    shares = {"unet": unet, "text_encoder": unet if text is None else text}
    return {p: shares[p.partition(".")[0]] * d.weight() for p, d in adapter.deltas.items()}


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_keeps_them_under_their_own_names(tmp_path, base, capsys):
    adapter = make_vectors(base, 1)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_adapter(adapter, first)
    stored = safetensors.torch.load_file(first)
    block = "lora_unet_down_blocks_0"
    for key, path in {
        f"{block}_resnets_0_norm1.w_norm": "unet.down_blocks.0.resnets.0.norm1",
        f"{block}_resnets_0_norm1.b_norm": "unet.down_blocks.0.resnets.0.norm1.bias",
        f"{block}_attentions_0_transformer_blocks_0_attn1_to_out_0.diff_b": (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias"
        ),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.diff_b": (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.bias"
        ),
    }.items():
        assert torch.equal(stored[key], adapter.deltas[path].weight())
    assert len(stored) == len(PATHS) + 3  # and the pair with its alpha
    found = read_adapter(first)
    assert {p: d.role for p, d in found.deltas.items() if isinstance(d, Vector)} == PATHS
    assert main(["convert", str(first), "--to", "kohya", "--out", str(second)]) == 0
    again = safetensors.torch.load_file(second)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    assert capsys.readouterr().err == ""
    check_fit(found, base.modules, "a")


def test_sdxl_names_them_as_its_first_release_does(tmp_path):
    deltas = {
        "unet.down_blocks.1.resnets.0.norm1": "lora_unet_input_blocks_4_0_in_layers_0.w_norm",
        "unet.down_blocks.1.resnets.0.conv2.bias": "lora_unet_input_blocks_4_0_out_layers_3.diff_b",
        "unet.mid_block.attentions.0.norm.bias": "lora_unet_middle_block_1_norm.b_norm",
        "text_encoder_2.text_model.final_layer_norm": "lora_te2_text_model_final_layer_norm.w_norm",
    }
    roles = {path: key.rpartition(".")[2] for path, key in deltas.items()}
    values = {path: torch.arange(4.0) + i for i, path in enumerate(deltas)}
    file = tmp_path / "a.safetensors"
    write_adapter(Adapter({p: Vector(values[p], roles[p]) for p in deltas}, Card(family="sdxl")), file)
    assert set(safetensors.torch.load_file(file)) == set(deltas.values())
    found = read_adapter(file).deltas
    assert all(torch.equal(found[p].weight(), values[p]) and found[p].role == roles[p] for p in deltas)


def test_a_norms_weight_may_be_called_a_difference(tmp_path, base):
    path = "unet.down_blocks.0.resnets.0.norm1"
    name = "lora_unet_down_blocks_0_resnets_0_norm1"
    tensors = {f"{name}.diff": torch.arange(16.0), f"{name}.diff_b": -torch.arange(16.0)}
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.torch.save_file(tensors, file)
    found = read_adapter(file).deltas
    assert torch.equal(found[path].weight(), torch.arange(16.0))
    assert torch.equal(found[f"{path}.bias"].weight(), -torch.arange(16.0))
    assert main(["convert", str(file), "--to", "kohya", "--out", str(out)]) == 0
    assert set(safetensors.torch.load_file(out)) == set(tensors)


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_names_that_have_no_room_for_them_leave_them_out_and_say_so(tmp_path, base, capsys, format):
    adapter = make_vectors(base, 1)
    out = tmp_path / "b.safetensors"
    write_adapter(adapter, out, format=format)
    said = capsys.readouterr().err
    assert f"{format} files hold no changes of biases and norms; {len(PATHS)} left out, {min(PATHS)} for one" in said
    assert list(read_adapter(out).deltas) == [Q]
    file, alone = tmp_path / "a.safetensors", tmp_path / "c.safetensors"
    write_adapter(make_vectors(base, 1, pair=False), file)
    assert main(["convert", str(file), "--to", format, "--out", str(alone)]) == 2
    said = capsys.readouterr().err
    assert "is a change of a bias or norm, as all in it are" in said
    assert said.count("\n") == 1
    assert not alone.exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"norm1.w_norm": torch.ones(4, 4)}, "tensors that do not go together: w_norm \\[4, 4\\]"),
        ({"norm1.w_norm": torch.tensor([1.0, float("nan")])}, "w_norm holds NaN or infinity"),
        ({"norm1.b_norm": torch.ones(4), "norm1.diff_b": torch.ones(4)}, "change of a bias and has diff_b too"),
        ({"norm1.w_norm": torch.ones(4), "norm1.lora_up.weight": torch.ones(4, 1)}, "change of a norm1 and has up too"),
        ({"conv1.diff_b": torch.ones(4, dtype=torch.int32)}, "diff_b is I32; a factor must be a float"),
        ({"conv1.diff": torch.ones(4)}, "do not go together: diff \\[4\\]"),
    ],
)
def test_what_is_no_vector_is_one_line(tmp_path, keys, says):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"lora_unet_down_blocks_0_resnets_0_{k}": v for k, v in keys.items()}, file)
    with pytest.raises(AdapterFileError, match=f"a.safetensors: .*{says}"):
        read_adapter(file)


def test_inspect_counts_modules_numbers_and_energy(tmp_path, base):
    adapter = make_vectors(base, 1)
    file = tmp_path / "a.safetensors"
    write_adapter(adapter, file)
    found = summarize(file)
    assert found["kinds"] == ["bias", "lora", "norm"]
    assert found["modules"] == {"unet": 7, "text_encoder": 2, "text_encoder_2": 0}  # a norm of two is one module
    pair = adapter.deltas[Q]
    numbers = sum(d.value.numel() for d in adapter.deltas.values() if isinstance(d, Vector))
    assert found["parameters"] == numbers + pair.down.numel() + pair.up.numel()
    assert found["ranks"] == {"2": 1}
    path = "unet.mid_block.resnets.0.conv1.bias"
    assert found["energy"]["unet.mid_block"] == pytest.approx(float(adapter.deltas[path].weight().square().sum()))


@pytest.mark.parametrize(("role", "kind"), [("b_norm", "norm"), ("w_norm", "norm"), ("diff_b", "bias")])
def test_inspect_tells_biases_from_norms(tmp_path, role, kind):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"lora_unet_down_blocks_0_resnets_0_norm1.{role}": torch.ones(4)}, file)
    assert summarize(file)["kinds"] == [kind]


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_static_stack_equals_the_base_changed_by_hand_and_leaves_it_as_it_was(base):
    one, two = make_vectors(base, 1), make_vectors(base, 2)
    before, plain = bytes_of(base), predict(base)
    expected = {p: d + weigh(two, -1.3)[p] for p, d in weigh(one, 0.6, 0.25).items()}
    with Plan.of([(one, 0.6, 0.25), (two, -1.3)]).applied(base) as stacked:
        found = predict(stacked)
    torch.testing.assert_close(found, by_hand(base, expected), rtol=1e-4, atol=1e-5)
    assert float((found - plain).abs().max()) > 0.1
    assert bytes_of(base) == before
    assert torch.equal(predict(base), plain)


def test_pictures_are_those_of_the_base_changed_by_hand(base):
    adapter = make_vectors(base, 1)
    (plain,) = sdlora.generate(base, "a cat", seed=1, steps=3)
    (found,) = sdlora.generate(base, "a cat", adapters=[(adapter, 0.8, 0.3)], seed=1, steps=3)
    changed = make_tiny_base()
    for path, value in weigh(adapter, 0.8, 0.3).items():
        find_parameter(changed.modules, path).data += value
    (expected,) = sdlora.generate(changed, "a cat", seed=1, steps=3)
    pixels = [np.asarray(picture, np.int16) for picture in (plain, found, expected)]
    assert np.abs(pixels[1] - pixels[2]).max() <= 1
    assert np.abs(pixels[0] - pixels[1]).max() > 8


@pytest.mark.parametrize("path", PATHS)
def test_each_of_them_acts_and_acts_linearly_in_its_weight(base, path):
    adapter = make_vectors(base, 3, (path,), pair=False)
    plain = find_parameter(base.modules, path).detach().clone()
    for weight in (-0.7, 0.5, 2.0):
        with Plan.of([(adapter, weight)]).applied(base) as stacked:
            found = find_parameter(stacked.modules, path).detach() - plain
            drawn = predict(stacked)
        torch.testing.assert_close(found, weight * adapter.deltas[path].weight(), rtol=1e-4, atol=1e-6)
        assert float((drawn - predict(base)).abs().max()) > 1e-4


def test_block_weights_reach_them(base):
    adapter = make_vectors(base, 1)
    profile = Profile(blocks=BlockWeights((("down.0", 0.5), ("mid", 0.0))))
    with Plan.of([Member(adapter, 1.0, profile=profile)]).applied(base) as stacked:
        found = predict(stacked)
    shares = {"unet.down_blocks.0": 0.5, "unet.mid_block": 0.0}
    wanted = {p: next((s for b, s in shares.items() if p.startswith(b)), 1.0) * d for p, d in weigh(adapter, 1).items()}
    torch.testing.assert_close(found, by_hand(base, wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not kind.moves])
def test_static_methods_add_them_as_they_are(base, method):
    one, two = make_vectors(base, 1, pair=False), make_vectors(base, 2, pair=False)
    plan = Plan.of([(one, 0.6), (two, -1.3)], method=method)
    for path in PATHS:
        expected = 0.6 * one.deltas[path].weight() - 1.3 * two.deltas[path].weight()
        torch.testing.assert_close(plan.delta(path), expected)


@pytest.mark.parametrize("t", [900, 500, 20])
def test_a_schedule_moves_them_with_the_steps(base, t):
    adapter = make_vectors(base, 1)
    profile = Profile(BlockWeights((("down.0", 0.5),)), Schedule(((0.0, 1.0), (1.0, 0.0))))
    members = [Member(adapter, 1.5, 0.5, profile=profile)]
    before = bytes_of(base)
    with Plan.of(members).applied(base) as stacked:
        found = predict(stacked, t)
    deltas = weigh(adapter, 1.5 * t / 999, 0.5)
    expected = by_hand(base, {p: d * (0.5 if p.startswith("unet.down_blocks.0") else 1) for p, d in deltas.items()}, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bytes_of(base) == before
    assert not any("forward" in m.__dict__ for m in base.unet.modules() if isinstance(m, nn.LayerNorm | nn.Conv2d))


@pytest.mark.parametrize("method", ["klora", "switch", "composite"])
def test_methods_that_move_add_them_with_the_weights_of_the_moment(base, method):
    one, two = (make_vectors(base, seed, pair=False) for seed in (1, 2))
    with Plan.of([(one, 0.7), (two, 1.1)], method=method).applied(base, steps=20) as stacked:
        found = predict(stacked)
    text = {p: d + weigh(two, 1.1)[p] for p, d in weigh(one, 0.7).items() if p.startswith("text")}
    alone = [{p: d for p, d in weigh(a, 1.0).items() if p.startswith("unet")} for a in (one, two)]
    if method == "klora":
        expected = by_hand(base, text | {p: 0.7 * alone[0][p] + 1.1 * alone[1][p] for p in alone[0]})
    elif method == "switch":
        step = int((1 - 500 / 999) * 20) % 2
        expected = by_hand(base, text | {p: (0.7, 1.1)[step] * d for p, d in alone[step].items()})
    else:
        parts = [by_hand(base, text | a) for a in alone]
        expected = (0.7 * parts[0] + 1.1 * parts[1]) / 1.8
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_masks_of_ones_and_zeros_are_all_and_nothing(base):
    unet = tuple(p for p in PATHS if p.startswith("unet"))
    one, two = (make_vectors(base, seed, unet) for seed in (1, 2))
    both = {p: d + weigh(two, 0.6)[p] for p, d in weigh(one, 0.9).items()}
    for mask, deltas in ((torch.ones(16, 16), both), (torch.zeros(16, 16), weigh(one, 0.9))):
        expected = by_hand(base, deltas)
        with Plan.of([Member(one, 0.9), Member(two, 0.6, mask=mask)]).applied(base) as stacked:
            torch.testing.assert_close(predict(stacked), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.0.resnets.0.norm1",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm2",
        "unet.mid_block.resnets.0.conv1",
    ],
)
def test_a_mask_confines_them_to_its_place(base, name):
    """A layer's output is the changed one where the picture is white, and the base's elsewhere."""
    paths = tuple(p for p in (name, f"{name}.bias") if p in PATHS)
    adapter = make_vectors(base, 1, paths, pair=False)
    mask = torch.zeros(8, 8)
    mask[:4, 4:] = 1.0
    module = base.unet.get_submodule(name.removeprefix("unet."))
    seen: dict[str, torch.Tensor] = {}
    with Plan.of([Member(adapter, 0.8, mask=mask)]).applied(base) as stacked:
        handle = module.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
        predict(stacked)
        handle.remove()
        inputs, found = seen["x"], seen["y"]
    plain = module(inputs)
    with Plan.of([(adapter, 0.8)]).applied(base), torch.no_grad():
        changed = module(inputs)
    side = found.shape[-1] if found.dim() == 4 else int(found.shape[1] ** 0.5)
    inside = nn.functional.interpolate(mask[None, None], (side, side), mode="area")
    inside = inside if found.dim() == 4 else inside.view(1, -1, 1)
    torch.testing.assert_close(found, torch.lerp(plain, changed, inside), rtol=1e-4, atol=1e-5)
    assert float((changed - plain).abs().max()) > 0.1


def test_what_a_base_has_not_is_named_and_what_is_of_another_size_refused(base):
    adapter = Adapter({f"{Q}.bias": Vector(torch.ones(16), "diff_b"), **make_vectors(base, 1).deltas})
    (line,) = Plan.of([(adapter, 1.0)], ["a"]).check(base)
    assert line == f"a: 1 of {len(PATHS) + 2} modules left out: tiny has no {Q}.bias"
    with Plan.of([(adapter, 1.0)]).applied(base):
        pass
    with Plan.of([(adapter, 1.0)], method="switch").applied(base) as stacked:
        predict(stacked)
    wrong = Adapter({"unet.conv_norm_out": Vector(torch.ones(5), "w_norm")})
    with pytest.raises(AdapterFileError, match=r"unet\.conv_norm_out is 5 in the file and 16 in tiny"):
        Plan.of([(wrong, 1.0)]).check(base)


# --- what is made of them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 1])
def test_combining_sums_them_and_keeps_their_names(tmp_path, base, rank):
    one, two = make_vectors(base, 1), make_vectors(base, 2, tuple(PATHS)[:5])
    cost = Cost()
    both = combine([(one, 0.5, 0.2), (two, -2.0)], rank=rank, cost=cost)
    for path, role in PATHS.items():
        expected = weigh(one, 0.5, 0.2)[path] + (weigh(two, -2.0)[path] if path in two.deltas else 0)
        torch.testing.assert_close(both.deltas[path].weight(), expected)
        assert both.deltas[path].role == role
    block = [p for p in PATHS if p.startswith("unet.mid_block")]
    assert cost.lost["mid"] == 0
    assert cost.whole["mid"] == pytest.approx(sum(float(both.deltas[p].weight().square().sum()) for p in block))
    write_adapter(both, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").deltas.keys() == both.deltas.keys()


def test_resizing_leaves_them_as_they_are(base):
    adapter = make_vectors(base, 1)
    smaller = resize(adapter, Keep(1))
    assert smaller.deltas[Q].rank == 1
    assert all(smaller.deltas[path] is adapter.deltas[path] for path in PATHS)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_baking_adds_them_wherever_the_file_keeps_them(tmp_path, family):
    """The biases of q, k and v lie in one tensor of an OpenCLIP, three thirds of it."""
    file, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    write_tiny_file(file, family, torch.float16, prediction="epsilon")
    stored = find_stored(str(file))
    layer = f"{'text_encoder_2' if family == 'sdxl' else 'text_encoder'}.text_model.encoder.layers.0"
    roles = {
        f"{layer}.self_attn.q_proj.bias": "diff_b",
        f"{layer}.self_attn.v_proj.bias": "diff_b",
        f"{layer}.layer_norm2": "w_norm",
        "unet.mid_block.resnets.0.norm1.bias": "b_norm",
        "unet.mid_block.resnets.0.conv1.bias": "diff_b",
    }
    g = torch.Generator().manual_seed(1)
    values = {p: torch.randn(stored.places[p].shape, generator=g) for p in roles}
    adapter = Adapter({p: Vector(values[p], roles[p]) for p in roles}, Card(family=family))
    done = bake(Plan.of([(adapter, 0.7)]), stored, out)
    before, after = safetensors.torch.load_file(file), safetensors.torch.load_file(out)
    baked = find_stored(str(out))
    for path, value in values.items():
        place = stored.places[path]
        old, new = place.take(before[place.key]), baked.places[path].take(after[place.key])
        assert torch.equal(new, (old.float() + (0.7 * value.double()).float()).half())
    touched = {stored.places[p].key for p in roles}
    assert done.changed == len(touched)
    assert len(touched) == (5 if family == "sd1" else 4)
    assert all(torch.equal(before[k], after[k]) for k in before if k not in touched)
    if family != "sd1":  # what belongs to k stays
        k = stored.places[f"{layer}.self_attn.k_proj.bias"]
        assert torch.equal(k.take(before[k.key]), k.take(after[k.key]))


def test_baking_into_a_folder_adds_them_too(tmp_path):
    make_pipeline("sd1").save_pretrained(tmp_path / "base")
    stored = find_stored(str(tmp_path / "base"))
    values = {p: torch.arange(float(stored.places[p].shape[0])) for p in PATHS}
    adapter = Adapter({p: Vector(values[p], PATHS[p]) for p in PATHS}, Card(family="sd1"))
    assert bake(Plan.of([(adapter, 0.5)]), stored, tmp_path / "out").changed == len(PATHS)
    readers = Reader(stored), Reader(find_stored(str(tmp_path / "out")))
    for path, value in values.items():
        assert torch.equal(readers[1].weight(path), readers[0].weight(path) + 0.5 * value)


def test_zip_learns_on_matrices_and_adds_the_rest(base):
    adapters = [make_vectors(base, seed) for seed in (1, 2)]
    members = [Member(a, w, name=n) for a, w, n in zip(adapters, (0.5, 0.8), "ab", strict=True)]
    found = zip_loras(base, *members, "a cat", "a cat", steps=2, pictures=1)
    for path, role in PATHS.items():
        expected = 0.5 * adapters[0].deltas[path].weight() + 0.8 * adapters[1].deltas[path].weight()
        torch.testing.assert_close(found.deltas[path].weight(), expected)
        assert found.deltas[path].role == role


def test_diagnosing_looks_at_matrices_alone(base):
    plain, with_vectors = (make_vectors(base, 1, paths) for paths in ((), tuple(PATHS)))
    other = Member(make_vectors(base, 2, ()), name="b")
    kept = {**with_vectors.deltas, Q: plain.deltas[Q]}
    found = [diagnose(Member(a, name="a"), other).to_json() for a in (plain, Adapter(kept))]
    assert found[0] == found[1]


def test_training_goes_on_from_none_and_says_why(base):
    layers = attach(base.modules, {"unet": ("to_q",)}, rank=2, alpha=2.0, seed=0)
    try:
        with pytest.raises(
            AdapterFileError, match=r"a cannot be continued: text_encoder.* is a change of a bias or norm"
        ):
            layers.load_adapter(make_vectors(base, 1), "a")
    finally:
        layers.detach_from_base()

"""`sdlora extract`: what a fine-tuned checkpoint differs in, found again; `sdlora resize` from the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora import cli
from sdlora.adapter.delta import Adapter, LowRank
from sdlora.adapter.file import read_adapter, write_adapter
from sdlora.bases.stored import Reader, find_stored
from tests.single_files import make_pipeline, write_tiny_file
from tests.stored_loras import make_lora
from tests.tiny import save_tiny_pipeline

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By family and form the base, and a fine-tune of it whose changes have rank 3 (2 of the 3 × 3 convolutions)."""
    root, found = tmp_path_factory.mktemp("bases"), {}
    for family in FAMILIES:
        make_pipeline(family).save_pretrained(root / family)
        write_tiny_file(root / f"{family}.safetensors", family, torch.float32, prediction="epsilon")
        lora = make_lora(root / family, 1)
        write_adapter(lora, root / f"{family}-lora.safetensors")
        for form, end in (("folder", ""), ("file", ".safetensors")):
            tuned = root / f"{family}-tuned{end}"
            argv = [root / f"{family}-lora.safetensors", "--base", root / f"{family}{end}", "--out", tuned]
            assert cli.main(["bake", *map(str, argv)]) == 0
            found[family, form] = (root / f"{family}{end}", tuned, lora)
    return found


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv: object) -> int:
    return cli.main([str(word) for word in argv])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tuned_form", "base_form"), [("folder", "folder"), ("file", "file"), ("folder", "file")])
def test_what_was_baked_in_is_found_again(bases, capsys, family, tuned_form, base_form):
    base, tuned = bases[family, base_form][0], bases[family, tuned_form][1]
    lora: Adapter = bases[family, tuned_form][2]
    argv = ("extract", tuned, "--base", base, "--rank", 3, "--conv-rank", 3, "--out", "x.safetensors")
    assert run(*argv) == 0
    captured = capsys.readouterr()
    assert captured.out == "x.safetensors\n"
    found = read_adapter("x.safetensors")
    assert set(found.deltas) == set(lora.deltas)
    for path, delta in found.deltas.items():
        wanted = lora.deltas[path].weight()
        assert delta.weight().shape == wanted.shape
        assert float((delta.weight() - wanted).norm() / wanted.norm()) < 2e-6, path
    assert (found.card.family, found.card.base) == (family, base.stem)
    assert found.card.settings["extracted"]["conv_rank"] == 3
    assert str(base.parent) not in Path("x.safetensors").read_bytes().decode("latin-1")
    said = captured.err
    assert re.search(r"^all +relative error 0\.00%$", said, re.MULTILINE)
    same = int(re.search(r"(\d+) modules do not differ and are left out", said)[1])
    both = find_stored(str(base)).places
    assert same > 10
    assert len(found.deltas) + same <= len(both)
    first = Path("x.safetensors").read_bytes()
    assert run(*argv) == 0
    assert Path("x.safetensors").read_bytes() == first


def test_fewer_ranks_cost_what_is_said_by_block(bases, capsys):
    base, tuned, lora = bases["sdxl", "file"]
    assert run("extract", tuned, "--base", base, "--rank", 2, "--format", "diffusers", "--out", "x.safetensors") == 0
    said = dict(re.findall(r"^(\S+) +relative error ([\d.]+)%$", capsys.readouterr().err, re.MULTILINE))
    found = read_adapter("x.safetensors")
    assert all(len(delta.weight().shape) == 2 for delta in found.deltas.values())  # no 3 × 3 unless asked
    for block, part in (("text_encoder_2", "text_encoder_2."), ("mid", "unet.mid_block"), ("all", "")):
        lost = whole = 0.0
        for path, delta in found.deltas.items():
            if path.startswith(part):
                wanted = lora.deltas[path].weight().double()
                lost += float((delta.weight() - wanted).square().sum())
                whole += float(wanted.square().sum())
        assert float(said[block]) == pytest.approx(100 * (lost / whole) ** 0.5, abs=0.01)
        assert float(said[block]) > 5


def test_convolutions_have_a_rank_of_their_own(bases):
    base, tuned, _ = bases["sd1", "file"]
    argv = (
        "extract",
        tuned,
        "--base",
        base,
        "--rank",
        2,
        "--conv-rank",
        1,
        "--dtype",
        "bf16",
        "--out",
        "x.safetensors",
    )
    assert run(*argv) == 0
    pairs = read_adapter("x.safetensors").deltas.values()
    wide = [pair for pair in pairs if pair.down.dim() == 4 and pair.down.shape[-1] == 3]
    assert {pair.rank for pair in wide} == {1}
    assert {pair.rank for pair in pairs if not any(pair is one for one in wide)} == {2}
    assert {pair.alpha / pair.rank for pair in pairs} == {1.0}
    assert {pair.down.dtype for pair in pairs} == {torch.bfloat16}
    assert len(wide) > 3


def test_targets_choose_what_is_looked_at(bases, capsys):
    base, tuned, lora = bases["sd1", "folder"]
    assert (
        run("extract", tuned, "--base", base, "--rank", 3, "--targets", "fc1, attn2.to_q", "--out", "x.safetensors")
        == 0
    )
    wanted = {p for p in lora.deltas if p.endswith((".fc1", ".attn2.to_q"))}
    assert set(read_adapter("x.safetensors").deltas) == wanted
    assert len(wanted) > 3


def test_rounding_to_half_precision_is_no_difference(tmp_path, capsys):
    base = write_tiny_file(tmp_path / "base.safetensors", "sd1", torch.float32)
    half = write_tiny_file(tmp_path / "half.safetensors", "sd1", torch.float16)
    assert run("extract", half, "--base", base, "--rank", 2, "--out", "x.safetensors") == 2
    assert "half does not differ from base in any of" in capsys.readouterr().err
    values = load_file(half)
    key = next(k for k in values if k.endswith("attn1.to_q.weight"))
    values[key] = values[key] + 1
    with safe_open(half, "pt") as f:
        save_file(values, tmp_path / "tuned.safetensors", f.metadata())
    assert run("extract", "tuned.safetensors", "--base", base, "--rank", 1, "--out", "x.safetensors") == 0
    (delta,) = read_adapter("x.safetensors").deltas.values()
    torch.testing.assert_close(delta.weight(), torch.ones_like(delta.weight()), rtol=0, atol=2e-3)


def test_wrong_pairs_are_one_line_and_nothing_is_written(bases, tmp_path, capsys):
    sd1, tuned, _ = bases["sd1", "folder"]
    sdxl = bases["sdxl", "file"][0]
    wide = save_tiny_pipeline(tmp_path / "wide", block_out_channels=(32, 64))
    broken = bases["sd1", "file"][1]
    values = load_file(broken)
    key = next(k for k in values if k.endswith("attn1.to_q.weight"))
    values[key] = values[key] * float("nan")
    with safe_open(broken, "pt") as f:
        save_file(values, tmp_path / "nan.safetensors", f.metadata())
    capsys.readouterr()
    for argv, says in (
        ((sdxl, "--base", sd1), "sdxl is of family sdxl and sd1 of sd1; give its own base"),
        ((wide, "--base", sd1), "give the base it was tuned from"),
        ((sd1, "--base", sd1), "are the same checkpoint"),
        ((tuned, "--base", sd1, "--targets", "to_x"), "target 'to_x' matches no module of sd1"),
        ((tuned, "--base", sd1, "--targets", "norm1"), "target 'norm1' matches no module of sd1"),
        ((tuned, "--base", sd1, "--rank", "0"), "rank 0 is out of range"),
        ((tuned, "--base", sd1, "--conv-rank", "0"), "conv_rank 0 is out of range"),
        (("nan.safetensors", "--base", bases["sd1", "file"][0]), "holds NaN or infinity in nan or sd1"),
        (("gone.safetensors", "--base", sd1), "gone.safetensors: there is no such file"),
    ):
        rank = () if "--rank" in argv else ("--rank", 2)
        assert run("extract", *argv, *rank, "--out", "x.safetensors") == 2
        said = capsys.readouterr().err
        assert says in said, (argv, said)
        assert said.count("\n") == 1
        assert not Path("x.safetensors").exists()


def test_resize_prints_its_error_and_keeps_format_dtype_and_card(bases, capsys):
    lora = bases["sdxl", "file"][2]
    write_adapter(lora, "a.safetensors", "kohya", torch.float16)
    whole = read_adapter("a.safetensors")
    assert run("resize", "a.safetensors", "--rank", 1, "--out", "b.safetensors", "--format", "peft") == 0
    captured = capsys.readouterr()
    assert captured.out == "b.safetensors\n"
    small = read_adapter("b.safetensors")
    lost = total = 0.0
    for path, delta in small.deltas.items():
        assert isinstance(delta, LowRank)
        assert (delta.rank, delta.down.dtype) == (1, torch.float16)
        values = torch.linalg.svdvals(whole.deltas[path].weight().double().flatten(1)) ** 2
        lost, total = lost + float(values[1:].sum()), total + float(values.sum())
    printed = float(re.search(r"^all +relative error ([\d.]+)%$", captured.err, re.MULTILINE)[1])
    assert printed == pytest.approx(100 * (lost / total) ** 0.5, abs=0.01)
    assert small.card.trigger == "word1"
    assert small.card.settings["resized"] == "rank 1"
    assert any(key.startswith("base_model.model.") for key in load_file("b.safetensors"))
    assert run("resize", "a.safetensors", "--rank", 3, "--out", "c.safetensors") == 0
    for key, value in load_file("a.safetensors").items():
        assert torch.equal(load_file("c.safetensors")[key], value)
    assert run("resize", "a.safetensors", "--error", 0.9, "--dtype", "bf16", "--out", "d.safetensors") == 0
    assert (
        load_file("d.safetensors")[next(k for k in load_file("d.safetensors") if "lora_up" in k)].dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "give one of --rank, --error and --energy, not none; --rank 16 keeps"),
        (("--rank", "4", "--energy", "0.9"), "not --rank 4 and --energy 0.9"),
        (("--error", "1.5"), "error 1.5 is out of range; give a share from 0 to 1"),
        (("--rank", "4", "--out", "a.safetensors"), "a.safetensors is read and would be replaced"),
    ],
)
def test_a_wrong_resize_is_one_line(bases, capsys, flags, says):
    write_adapter(bases["sd1", "file"][2], "a.safetensors")
    out = () if "--out" in flags else ("--out", "b.safetensors")
    assert run("resize", "a.safetensors", *flags, *out) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not Path("b.safetensors").exists()


def test_each_weight_is_read_right_from_fused_and_separate_tensors(bases):
    """OpenCLIP's q, k and v lie in one tensor; a folder has three. Both give the same weights under the same names."""
    folder, file = (find_stored(str(bases["sdxl", form][0])) for form in ("folder", "file"))
    readers = Reader(folder), Reader(file)
    both = set(folder.places) & set(file.places)
    assert both == set(folder.places)
    assert "text_encoder_2.text_projection" in both
    for path in both:
        assert torch.equal(readers[0].weight(path), readers[1].weight(path)), path

"""`sdlora bake`: W + ΔW, rounded once; it draws what the stack draws, and all else is the base's to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdlora import cli
from sdlora.adapter.delta import Adapter, Card, LowRank, weight_on
from sdlora.adapter.file import write_adapter
from sdlora.bases.family import load_base
from sdlora.bases.sampling import sample
from sdlora.bases.single_file import read_checkpoint
from sdlora.bases.source import MINI_FOLDER
from sdlora.bases.stored import find_stored
from sdlora.combining.baking import bake as write_baked
from sdlora.combining.plan import Member, Plan
from tests.single_files import make_pipeline, write_tiny_file
from tests.stored_loras import make_lora, read_bytes

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family a diffusers folder and a single file of the same weights."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for family in FAMILIES:
        make_pipeline(family).save_pretrained(root / family)
        write_tiny_file(root / f"{family}.safetensors", family, torch.float32, prediction="epsilon")
        found[family] = root / family
    return found


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def bake(*argv: str | Path) -> int:
    return cli.main(["bake", *map(str, argv)])


def files_below(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def expect(adapter: Adapter, weight: float, te: float, path: str, w: torch.Tensor) -> torch.Tensor:
    """W + ΔW in float64, one LoRA's."""
    if path not in adapter.deltas:
        return w.double()
    share = te if path.startswith("text_encoder") else weight
    return w.double() + share * weight_on(adapter.deltas[path], w.float()).double()


def weights_of(folder: Path, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    return {
        f"{part}.{key}": value
        for part in parts
        for key, value in load_file(folder / part / f"{stems.get(part, 'model')}.safetensors").items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_baked_weights_are_the_sum_and_pictures_are_the_stacks(folders, tmp_path, capsys, family, form):
    source = folders[family] if form == "folder" else folders[family].with_suffix(".safetensors")
    out = tmp_path / ("new/baked" if form == "folder" else "new/baked.safetensors")
    one, two = make_lora(source, 1, dora=True), make_lora(source, 2, rank=2)
    for name, adapter in (("one", one), ("two", two)):
        write_adapter(adapter, tmp_path / f"{name}.safetensors")
    loras = ("one.safetensors:0.8:0.3", "two.safetensors:-0.5:0.5:blocks=mid=0.5")
    assert bake(*loras, "--base", source, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"

    stored = find_stored(str(source))
    before, after = (find_stored(str(x)) for x in (source, out))
    if form == "file":
        old, new = read_checkpoint(source), read_checkpoint(out)
        values = [{f"{part}.{key}": v for part in state for key, v in state[part].items()} for state in (old, new)]
        assert read_bytes(out)[0] == read_bytes(source)[0]
    else:
        parts = (*sorted({path.partition(".")[0] for path in stored.places}), "vae")
        values = [weights_of(folder, parts) for folder in (source, out)]
        for file in before.files:
            assert read_bytes(out / file.relative_to(source))[0] == read_bytes(file)[0]
        kept = {k: v for k, v in files_below(source).items() if not k.endswith(".safetensors")}
        assert {k: v for k, v in files_below(out).items() if not k.endswith(".safetensors")} == kept
    names = {path: path.replace("text_model.", "", 1) for path in one.deltas}
    changed = 0
    for key, old in values[0].items():
        path = next((p for p in one.deltas if key in (f"{p}.weight", f"{names[p]}.weight")), "")
        if not path:
            assert torch.equal(values[1][key], old), key
            continue
        changed += 1
        share = 0.5 if path.startswith("unet.mid_block") else 1.0
        wanted = expect(one, 0.8, 0.3, path, old) + expect(two, -0.5 * share, 0.5, path, old) - old.double()
        torch.testing.assert_close(values[1][key].double(), wanted, rtol=1e-6, atol=1e-6)
        assert not torch.equal(values[1][key], old)
    assert changed == len(one.deltas) == len(two.deltas)
    assert set(after.places) == set(before.places)

    from sdlora.profiles import parse_stacked

    spec = parse_stacked(loras[1])
    plan = Plan.of([Member(one, 0.8, 0.3), Member(two, -0.5, 0.5, profile=spec.profile)])
    base = load_base(str(source), device="cpu", prediction="epsilon")
    plain = sample(base, ["a cat"], seeds=[3], steps=3)[0]
    with plan.applied(base):
        stacked = sample(base, ["a cat"], seeds=[3], steps=3)[0]
    baked = sample(load_base(str(out), device="cpu", prediction="epsilon"), ["a cat"], seeds=[3], steps=3)[0]
    pictures = [np.asarray(p, np.int16) for p in (plain, stacked, baked)]
    assert np.abs(pictures[1] - pictures[2]).max() <= 1
    assert np.abs(pictures[0] - pictures[1]).max() > 8


@pytest.mark.parametrize("form", ["folder", "file"])
def test_weight_zero_leaves_every_byte(folders, tmp_path, form):
    source = folders["sdxl"] if form == "folder" else folders["sdxl"].with_suffix(".safetensors")
    write_adapter(make_lora(source, 1), tmp_path / "a.safetensors")
    out = tmp_path / ("out" if form == "folder" else "out.safetensors")
    assert bake("a.safetensors:0", "--base", source, "--out", out) == 0
    if form == "file":
        assert out.read_bytes() == source.read_bytes()
    else:
        assert files_below(out) == files_below(source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_and_rounded_once(tmp_path, dtype):
    source = write_tiny_file(tmp_path / "base.safetensors", "sd1", dtype)
    loras = [make_lora(source, seed, size=0.02) for seed in (1, 2, 3)]
    for i, lora in enumerate(loras):
        write_adapter(lora, tmp_path / f"{i}.safetensors")
    assert bake(*(f"{i}.safetensors:0.7" for i in range(3)), "--base", source, "--out", "b.safetensors") == 0
    old, new = read_checkpoint(source)["unet"], read_checkpoint(tmp_path / "b.safetensors")["unet"]
    exact = stepwise = 0
    for path in (p for p in loras[0].deltas if p.startswith("unet.")):
        key = path.removeprefix("unet.") + ".weight"
        terms = [0.7 * lora.deltas[path].weight().double() for lora in loras]
        assert new[key].dtype == dtype
        exact += torch.equal(new[key], (old[key].float() + sum(terms).float()).to(dtype))
        step = old[key]
        for term in terms:
            step = (step.float() + term.float()).to(dtype)
        stepwise += torch.equal(new[key], step)
    assert exact == sum(p.startswith("unet.") for p in loras[0].deltas)
    assert stepwise < exact


def test_shards_keep_their_names_order_and_index(tmp_path):
    pipe = make_pipeline("sd1")
    pipe.save_pretrained(tmp_path / "base", max_shard_size="150KB")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"another form of the same")
    source = tmp_path / "base"
    shards = sorted(p.name for p in (source / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    lora = make_lora(source, 1)
    write_adapter(lora, tmp_path / "a.safetensors")
    assert bake("a.safetensors", "--base", source, "--out", "out") == 0
    assert sorted(p.name for p in (tmp_path / "out" / "unet").glob("*")) == [
        "config.json", *shards, "diffusion_pytorch_model.safetensors.index.json",
    ]  # fmt: skip
    plain = {k: v for p in (source / "unet").glob("*.safetensors") for k, v in load_file(p).items()}
    for shard in shards:
        assert read_bytes(tmp_path / "out" / "unet" / shard)[0] == read_bytes(source / "unet" / shard)[0]
        for key, value in load_file(tmp_path / "out" / "unet" / shard).items():
            path = f"unet.{key.removesuffix('.weight')}"
            wanted = plain[key] + lora.deltas[path].weight() if path in lora.deltas else plain[key]
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_mini_bakes_into_a_folder_that_is_a_base(tmp_path, capsys):
    """Untouched parts are mini's own bytes, and what is baked can be extracted again."""
    write_adapter(make_lora("mini", 1, size=0.05), tmp_path / "a.safetensors")
    assert bake("a.safetensors:0.5", "--base", "mini", "--out", "inked") == 0
    old, new = files_below(MINI_FOLDER), files_below(tmp_path / "inked")
    assert {name for name in old if old[name] != new[name]} == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert set(old) == set(new)
    capsys.readouterr()
    argv = ["extract", "inked", "--base", "mini", "--rank", "4", "--targets", "to_q", "--out", "b.safetensors"]
    assert cli.main(argv) == 0
    assert "all              relative error" in capsys.readouterr().err


def test_a_hash_of_the_tensors_in_the_metadata_is_made_anew(tmp_path):
    import hashlib

    from sdlora.adapter.header import read_header, replace_metadata

    source = write_tiny_file(tmp_path / "base.safetensors", "sd1")
    old = "0x" + "ab" * 32
    own = read_header(source)[1]
    source.write_bytes(replace_metadata(source.read_bytes(), own | {"modelspec.hash_sha256": old, "other": "kept"}))
    write_adapter(make_lora(source, 1), tmp_path / "a.safetensors")
    assert bake("a.safetensors", "--base", source, "--out", "b.safetensors") == 0
    data = Path("b.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:start])["__metadata__"]
    new = {"modelspec.hash_sha256": f"0x{hashlib.sha256(data[start:]).hexdigest()}", "other": "kept"}
    assert metadata == own | new


def test_a_lora_that_changes_nothing_leaves_every_byte_and_says_so(tmp_path, capsys):
    from sdlora.adapter.header import read_header, replace_metadata

    source = write_tiny_file(tmp_path / "base.safetensors", "sd1")
    more = {"modelspec.hash_sha256": "0x" + "ab" * 32}
    source.write_bytes(replace_metadata(source.read_bytes(), read_header(source)[1] | more))
    nothing = {p: LowRank(d.down, torch.zeros_like(d.up), 1.0) for p, d in make_lora(source, 1).deltas.items()}
    write_adapter(Adapter(nothing, Card(family="sd1")), tmp_path / "a.safetensors")
    assert bake("a.safetensors", "--base", source, "--out", "b.safetensors") == 0
    assert capsys.readouterr().err == "0 tensors changed, everything else is the base's to the byte\n"
    assert Path("b.safetensors").read_bytes() == source.read_bytes()


def test_a_change_of_a_norm_is_baked_too(tmp_path):
    class Full:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

        def weight(self) -> torch.Tensor:
            return self.value

    source = write_tiny_file(tmp_path / "base.safetensors", "sd1", torch.float32)
    path = "unet.down_blocks.0.resnets.0.norm1"
    more = torch.arange(16.0)
    base = find_stored(str(source))
    write_baked(Plan.of([(Adapter({path: Full(more)}), 0.5)]), base, tmp_path / "b.safetensors")
    old, new = (read_checkpoint(p)["unet"] for p in (source, tmp_path / "b.safetensors"))
    key = "down_blocks.0.resnets.0.norm1.weight"
    assert torch.equal(new[key], old[key] + 0.5 * more)
    assert [k for k in old if not torch.equal(old[k], new[k])] == [key]


def test_modules_that_the_base_has_not_are_named(folders, tmp_path, capsys):
    lora = make_lora(folders["sd1"], 1)
    extra = {"unet.down_blocks.2.attentions.0.proj_in": LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    write_adapter(Adapter({**lora.deltas, **extra}, Card(family="sd1")), tmp_path / "a.safetensors")
    assert bake("a.safetensors", "--base", folders["sd1"], "--out", "out") == 0
    assert "1 of" in (said := capsys.readouterr().err)
    assert "has no unet.down_blocks.2.attentions.0.proj_in" in said


def test_what_cannot_be_baked_is_one_line_and_leaves_nothing(folders, tmp_path, capsys):
    source, file = folders["sd1"], folders["sd1"].with_suffix(".safetensors")
    write_adapter(make_lora(source, 1), tmp_path / "a.safetensors")
    huge = make_lora(source, 1)
    last = sorted(p for p in huge.deltas if p.startswith("unet."))[-1]
    pair = huge.deltas[last]
    huge.deltas[last] = LowRank(pair.down * 1e30, pair.up * 1e30, 1.0)
    write_adapter(huge, tmp_path / "huge.safetensors")
    write_adapter(make_lora(folders["sdxl"], 1), tmp_path / "xl.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    Path("there.safetensors").write_bytes(b"keep")
    before = files_below(tmp_path)
    for argv, says in (
        (["a.safetensors:1:schedule=0@0,1@1", "--base", source, "--out", "o"], "no checkpoint can hold a schedule"),
        (["a.safetensors:1:start=0.2", "--base", source, "--out", "o"], "no checkpoint can hold a schedule"),
        (["a.safetensors", "--base", source, "--out", "o", "--method", "switch"], "change over the picture"),
        (["xl.safetensors", "--base", source, "--out", "o"], "a LoRA for another base"),
        (["xl.safetensors", "--base", file, "--out", "o.safetensors"], "a LoRA for another base"),
        (["huge.safetensors", "--base", source, "--out", "o"], "add up to no finite F32 weight; lower"),
        (["huge.safetensors", "--base", file, "--out", "there.safetensors"], "add up to no finite F32 weight; lower"),
        (["a.safetensors", "--base", source, "--out", "o.safetensors"], "is a diffusers folder, so --out must be one"),
        (["a.safetensors", "--base", file, "--out", "o"], "is a single file, so --out must end in .safetensors"),
        (["a.safetensors", "--base", source, "--out", "full"], "full exists and is not empty"),
        (["a.safetensors", "--base", file, "--out", "a.safetensors"], "is read and would be replaced"),
        (["a.safetensors", "--base", file, "--out", file], "is the base and would be replaced"),
        (["a.safetensors", "--base", source, "--out", source / "unet" / "x"], "lies in the base's own folder"),
        (["a.safetensors", "--base", "gone", "--out", "o"], "gone: there is no such folder"),
    ):
        assert bake(*argv) == 2, argv
        said = capsys.readouterr()
        assert says in said.err, (argv, said.err)
        assert (said.out, said.err.count("\n"), said.err[:7]) == ("", 1, "error: ")
        assert files_below(tmp_path) == before


def test_a_file_is_never_in_memory_as_a_whole(tmp_path):
    """Peak memory beyond the start, of rewriting 256 MB in tensors of 8 MB: a tenth of the file."""
    code = """
import resource, sys, json, struct, torch
from pathlib import Path
from sdlora.bases.weights_file import WeightsFile, rewrite_weights
path, out = Path(sys.argv[1]), Path(sys.argv[1] + ".out")
count, size = 32, 2 * 1024 * 1024
names = [f"t{i:02}" for i in range(count)]
spans = [[4 * size * i, 4 * size * (i + 1)] for i in range(count)]
rows = {n: {"dtype": "F32", "shape": [size], "data_offsets": span} for n, span in zip(names, spans)}
text = json.dumps(rows).encode()
with path.open("wb") as f:
    f.write(struct.pack("<Q", len(text)) + text)
    f.truncate(8 + len(text) + 4 * size * count)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
changed = rewrite_weights(WeightsFile(path), out, {name: lambda t: t.add_(1) for name in names})
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
last = WeightsFile(out).read("t31")
print(changed, grown, float(last.min()), float(last.max()), out.stat().st_size == path.stat().st_size)
"""
    root = str(Path(cli.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in")], capture_output=True, text=True, cwd=root, check=True
    )
    changed, grown, low, high, same = run.stdout.split()
    assert (changed, low, high, same) == ("32", "1.0", "1.0", "True")
    assert int(grown) < 26_000_000

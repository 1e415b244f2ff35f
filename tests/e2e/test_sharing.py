"""A LoRA made ready for others: what its file, its page and its sidecars say, and what they never say."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file

from sdlora import cli
from sdlora.adapter.delta import Adapter, Card, Dora
from sdlora.adapter.file import read_adapter, write_adapter
from sdlora.adapter.lycoris import Full
from sdlora.adapter.vector import Vector
from sdlora.generating.model_card import escape
from tests.stored_loras import make_lora
from tests.tiny import save_tiny_pipeline

CANARIES = (
    "canaryfolder", "canarypicture", "canarycaption", "canaryuser", "canaryhost", "canaryout", "canaryprompt",
    "canarycache",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)


def make_data(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"canarypicture{i}.png")
        (folder / f"canarypicture{i}.txt").write_text(f"{colour}, canarycaption thing, ink")
    return folder


def run(*argv: object) -> int:
    return cli.main([str(word) for word in argv])


def train(data: Path, base: Path, out: Path, *more: object, cached: bool = False) -> int:
    flags = ["--steps", 2, "--batch-size", 1, "--rank", 2, "--precision", "fp32", "--device", "cpu"]
    flags += [] if cached else ["--no-cache"]
    return run("train", data, "--base", base, "--out", out, "--trigger", "ink style", *flags, *more)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as f:
        return f.metadata()


def tensors_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_nothing_private_is_in_what_is_shared(base, tmp_path, monkeypatch, capsys):
    for name, value in (("USER", "canaryuser"), ("LOGNAME", "canaryuser"), ("HOSTNAME", "canaryhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "canaryuser"))
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "canarycache"))
    monkeypatch.setattr("socket.gethostname", lambda: "canaryhost")
    monkeypatch.setattr("platform.node", lambda: "canaryhost")
    data = make_data(tmp_path / "canaryuser" / "canaryfolder")
    out = tmp_path / "canaryuser" / "canaryout" / "ink.safetensors"
    assert train(data, base, out, "--preview", "canaryprompt", "--seed", 1, cached=True) == 0
    for to in ("kohya", "diffusers", "peft"):
        assert run("convert", out, "--to", to, "--out", tmp_path / "shared" / f"{to}.safetensors") == 0
    assert run("resize", out, "--rank", 1, "--out", tmp_path / "shared" / "small.safetensors") == 0
    assert run("combine", out, f"{out}:0.5", "--out", tmp_path / "shared" / "both.safetensors") == 0
    assert run("card", out, "--out", tmp_path / "shared") == 0
    shared = [out, *sorted((tmp_path / "shared").iterdir())]
    assert [p.name for p in shared[1:]] == [
        "both.safetensors", "diffusers.safetensors", "ink.json", "ink.md", "ink.preview.png", "kohya.safetensors",
        "peft.safetensors", "small.safetensors",
    ]  # fmt: skip
    draw = ["--base", base, "--steps", 1, "--device", "cpu", "--lora", out]
    assert run("generate", "a cat, ink style", *draw, "--out", tmp_path / "canaryout") == 0
    both = ["--lora", tmp_path / "shared" / "small.safetensors"]
    assert run("grid", "a cat, ink style", *draw, *both, "--weights", "0,1", "--out", tmp_path / "grid.png") == 0
    drawn = [tmp_path / "canaryout" / "00000.png", tmp_path / "grid.png", *out.with_suffix(".run").rglob("*-*.png")]
    assert len(drawn) == 3  # a preview too
    for path in [*shared, *drawn]:
        content = path.read_bytes()
        if path.suffix == ".png":
            with Image.open(path) as picture:
                content += repr(picture.info).encode()
        for canary in (*CANARIES, str(tmp_path)):
            assert canary.encode() not in content, (path.name, canary)
    assert "ink style" in metadata_of(out)["modelspec.trigger_phrase"]

    told = out.with_name("told.safetensors")
    assert train(data, base, told, "--share-captions") == 0
    tags = {"images": {"blue": 1, "canarycaption thing": 2, "ink": 2, "ink style": 2, "red": 1}}
    assert json.loads(metadata_of(told)["ss_tag_frequency"]) == tags
    assert [c for c in CANARIES if c.encode() in told.read_bytes()] == ["canarycaption"]
    assert run("convert", told, "--to", "peft", "--out", "told-peft.safetensors") == 0
    assert metadata_of(Path("told-peft.safetensors"))["ss_tag_frequency"] == metadata_of(told)["ss_tag_frequency"]


def test_another_tools_captions_and_folders_do_not_go_into_a_converted_file(tmp_path):
    from sdlora.adapter.header import replace_metadata

    write_adapter(Adapter(make_lora("mini", 1).deltas, Card(family="sd1")), "a.safetensors")
    foreign = {
        "ss_tag_frequency": json.dumps({"10_canaryfolder": {"canarycaption": 3}}),
        "ss_dataset_dirs": json.dumps({"10_canaryfolder": {"img_count": 3}}),
        "modelspec.title": "Somebody's",
        "modelspec.license": "CC-BY-4.0",
    }
    Path("b.safetensors").write_bytes(replace_metadata(Path("a.safetensors").read_bytes(), foreign))
    assert run("convert", "b.safetensors", "--to", "kohya", "--out", "c.safetensors") == 0
    assert not [c for c in CANARIES if c.encode() in Path("c.safetensors").read_bytes()]
    said = metadata_of(Path("c.safetensors"))
    assert (said["modelspec.title"], said["modelspec.license"]) == ("Somebody's", "CC-BY-4.0")


def test_metadata_is_all_that_modelspec_and_the_interfaces_read(base, tmp_path, monkeypatch):
    card = Card("sdxl", "owner/xl", "riso print", {"resolution": 1024, "t_min": 0.2, "t_max": 0.5, "clip_skip": 1})
    pair = next(d for p, d in make_lora("mini", 1).deltas.items() if p.endswith("to_q"))
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    write_adapter(Adapter({path: pair}, card), "a.safetensors")
    said = metadata_of(Path("a.safetensors"))
    assert {k: v for k, v in said.items() if not k.startswith("sdlora.")} == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "riso print LoRA",
        "modelspec.description": "riso print LoRA for SDXL",
        "modelspec.hash_sha256": f"0x{tensors_hash(Path('a.safetensors'))}",
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "epsilon",
        "modelspec.timestep_range": "200,499",
        "modelspec.trigger_phrase": "riso print",
        "modelspec.usage_hint": "Trigger: riso print",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_clip_skip": "2",
        "ss_network_alpha": "1.5",
        "ss_network_dim": "3",
        "ss_network_module": "networks.lora",
        "ss_output_name": "riso_print",
        "ss_sd_model_name": "owner/xl",
        "ss_v2": "False",
        "sshs_model_hash": tensors_hash(Path("a.safetensors")),
    }
    before = Path("a.safetensors").read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    write_adapter(Adapter({path: pair}, card), "b.safetensors")
    assert metadata_of(Path("b.safetensors"))["modelspec.date"] == "2026-01-01"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert run("convert", "a.safetensors", "--to", "kohya", "--out", "c.safetensors") == 2
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    write_adapter(Adapter({path: pair}, card), "b.safetensors")
    assert Path("b.safetensors").read_bytes() == before


def test_what_convert_is_told_is_in_the_file_and_stays(tmp_path):
    write_adapter(make_lora("mini", 1), "a.safetensors", dtype=torch.float16)
    info = PngInfo()
    info.add_text("parameters", "canaryprompt")
    Image.effect_mandelbrot((600, 400), (-2, -1.2, 1, 1.2), 60).convert("RGB").save("p.png", pnginfo=info)
    flags = ("--date", "2026-02-28", "--title", "Ink", "--author", "me", "--license", "CC0-1.0", "--thumbnail", "p.png")
    assert run("convert", "a.safetensors", "--to", "diffusers", *flags, "--out", "b.safetensors") == 0
    assert run("convert", "b.safetensors", "--to", "kohya", "--out", "c.safetensors") == 0
    for name in ("b", "c"):
        said = metadata_of(Path(f"{name}.safetensors"))
        found = {key: said[f"modelspec.{key}"] for key in ("date", "title", "author", "license")}
        assert found == {"date": "2026-02-28", "title": "Ink", "author": "me", "license": "CC0-1.0"}
        kind, data = said["modelspec.thumbnail"].split(",")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (kind, picture.size, picture.format) == ("data:image/jpeg;base64", (256, 256), "JPEG")
        assert not picture.getexif()
        assert b"canaryprompt" not in base64.b64decode(data)
        assert len(data) < 40_000
        assert said["modelspec.hash_sha256"] == f"0x{tensors_hash(Path(f'{name}.safetensors'))}"
    for key, value in load_file("a.safetensors").items():
        again = load_file("c.safetensors")[key]
        assert again.dtype == value.dtype
        assert torch.equal(again, value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--date", "soon"), "--date soon is no date; write it as 2026-01-31"),
        (("--thumbnail", "gone.png"), "--thumbnail gone.png: there is no such file"),
        (("--thumbnail", "a.safetensors"), "a.safetensors: is a safetensors file, not a picture"),
    ],
)
def test_what_convert_cannot_say_is_one_line(capsys, flags, says):
    write_adapter(make_lora("mini", 1), "a.safetensors")
    assert run("convert", "a.safetensors", "--to", "kohya", *flags, "--out", "b.safetensors") == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not Path("b.safetensors").exists()


def test_a_recipe_is_repeated_from_a_file_to_the_same_bytes(base, tmp_path, capsys):
    data = make_data(tmp_path / "data")
    assert train(data, base, tmp_path / "a.safetensors", "--alpha", 3, "--flip", "--targets", "to_q,to_k") == 0
    like = ("train", data, "--like", "a.safetensors", "--device", "cpu", "--no-cache")
    assert run(*like, "--base", base, "--out", "b.safetensors") == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert run(*like, "--base", base, "--seed", 5, "--out", "c.safetensors") == 0
    assert metadata_of(Path("c.safetensors"))["sdlora.recipe"] == metadata_of(Path("a.safetensors"))[
        "sdlora.recipe"
    ].replace('"seed": 0', '"seed": 5')
    capsys.readouterr()
    assert run(*like, "--out", "d.safetensors") == 2
    assert "was trained on tiny, which is not here; say where (--base)" in capsys.readouterr().err


def test_files_that_a_run_read_are_named_for_its_repetition(base, tmp_path, capsys):
    data = make_data(tmp_path / "data")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(2):
        Image.new("L", (64, 64), 255).save(masks / f"canarypicture{i}.png")
    assert train(data, base, tmp_path / "a.safetensors") == 0
    classes = make_data(tmp_path / "classes")
    more = ("--masks", masks, "--mask-outside", 0.2, "--continue", "a.safetensors", "--merge", "a.safetensors:0.1")
    more = (*more, "--class-data", classes)
    assert train(data, base, tmp_path / "b.safetensors", *more) == 0
    capsys.readouterr()
    like = ("train", data, "--like", "b.safetensors", "--base", base, "--device", "cpu", "--no-cache", "--dry-run")
    assert run(*like) == 0
    captured = capsys.readouterr()
    assert re.findall(r"was trained with (\S+),", captured.err) == [
        "--masks",
        "--class-data",
        "--continue",
        "--merge",
    ]
    assert 'masks = ""' in captured.out
    assert 'class_data = ""' in captured.out
    assert run(*like, *more) == 0
    captured = capsys.readouterr()
    assert "was trained with" not in captured.err
    assert "mask_outside = 0.2" in captured.out


def test_what_names_no_recipe_cannot_be_repeated(base, tmp_path, capsys):
    data = make_data(tmp_path / "data")
    write_adapter(make_lora("mini", 1), "foreign.safetensors")
    Path("x.toml").write_text("steps = 3\n")
    Path("broken.safetensors").write_bytes(b"{}")
    before = sorted(tmp_path.rglob("*"))
    for argv, says in (
        (("--like", "foreign.safetensors"), "foreign.safetensors names no recipe: sdlora did not train it"),
        (("--like", "gone.safetensors"), "gone.safetensors: there is no such file"),
        (("--like", "broken.safetensors"), "broken.safetensors has only 2 bytes"),
        (("--like", "foreign.safetensors", "--config", "x.toml"), "contradict each other; leave one out"),
    ):
        assert run("train", data, *argv) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    bad = Adapter(make_lora("mini", 1).deltas, Card("mini", "mini", settings={"steps": -1, "base": "mini"}))
    write_adapter(bad, "bad.safetensors")
    assert run("train", data, "--like", "bad.safetensors") == 2
    assert "bad.safetensors: steps = -1 is out of range" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "bad.safetensors"])


def test_a_page_says_what_it_is_how_to_use_it_and_how_it_was_made(base, tmp_path, capsys):
    data = make_data(tmp_path / "data")
    preview = ("--preview", "one", "--preview", "two", "--preview-every", 1)
    assert train(data, base, tmp_path / "ink.safetensors", "--alpha", 3, *preview) == 0
    capsys.readouterr()
    assert run("card", "ink.safetensors") == 0
    assert capsys.readouterr().out.split() == ["ink.md", "ink.json", "ink.preview.png"]
    page = Path("ink.md").read_text()
    for part in (
        "# ink\n",
        "A LoRA for Stable Diffusion 1.x. Its trigger is `ink style`.",
        "![preview](ink.preview.png)",
        "sdlora generate 'ink style' --lora ink.safetensors:1 --base tiny",
        "put the file into `models/loras`",
        "<lora:ink:1> ink style",
        "pipe.load_lora_weights(\".\", weight_name='ink.safetensors')",
        "| steps | 2 |",
        "| alpha | 3.0 |",
        "| learning rate | 0.001 |",
        "`sdlora train FOLDER --like ink.safetensors`",
        "## Licence",
    ):
        assert part in page, part
    shares = [float(x) for x in re.findall(r"\| unet\S* \| ([\d.]+) % \|", page)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "| dora |" not in page  # defaults are left out
    assert json.loads(Path("ink.json").read_text()) == {
        "description": "ink style LoRA",
        "sd version": "SD1",
        "activation text": "ink style",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "Trained with sdlora.",
    }
    newest = Image.open(tmp_path / "ink.run" / "previews" / "step-000002-0.png")
    assert Image.open("ink.preview.png").tobytes() == newest.tobytes()

    before = {p.name: p.read_bytes() for p in tmp_path.glob("ink.*") if p.is_file()}
    assert run("card", "ink.safetensors") == 2
    assert "ink.md exists; add --force to replace it" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.glob("ink.*") if p.is_file()} == before
    Image.new("RGB", (32, 32), "green").save("mine.png")
    assert run("card", "ink.safetensors", "--force", "--preview", "mine.png") == 0
    assert Image.open("ink.preview.png").getpixel((3, 3)) == (0, 128, 0)
    assert Path("ink.md").read_bytes() == before["ink.md"]


def test_a_page_tells_of_each_format_and_kind_only_what_works(tmp_path):
    lora = make_lora("mini", 1)
    dora = Adapter(
        {p: Dora(d, torch.ones(d.up.shape[0], *[1] * (d.down.dim() - 1))) for p, d in lora.deltas.items()},
        Card("sd2", "owner/two"),
    )
    write_adapter(dora, "d.safetensors")
    write_adapter(Adapter(lora.deltas, Card("sd1", "some-model")), "p.safetensors", "peft")
    write_adapter(lora, "m.safetensors")
    other, path = Card("sd1", "some-model"), next(iter(lora.deltas))
    write_adapter(Adapter({**lora.deltas, path: Full(lora.deltas[path].weight())}, other), "f.safetensors")
    write_adapter(
        Adapter({**lora.deltas, "unet.conv_out.bias": Vector(torch.ones(4), "diff_b")}, other), "b.safetensors"
    )
    pages = {}
    for name in ("d", "p", "m", "f", "b"):
        assert run("card", f"{name}.safetensors", "--out", "pages") == 0
        pages[name] = Path(f"pages/{name}.md").read_text()
    assert "A1111 takes a DoRA's lengths for those of its inputs" in pages["d"]
    assert "`sdlora convert d.safetensors --to diffusers --out …`" in pages["d"]
    assert "opens no PEFT names: `sdlora convert p.safetensors --to diffusers --out …`" in pages["p"]
    assert 'base_model: "owner/two"' in pages["d"]
    assert "<lora:" not in pages["p"]
    assert "`sdlora convert p.safetensors --to kohya --out …`" in pages["p"]
    assert "base_model" not in pages["p"]
    assert "opens no full file; as plain LoRA, nearly the same: `sdlora resize f.safetensors --rank 32" in pages["f"]
    assert "without them: `sdlora convert b.safetensors --to diffusers --out …`" in pages["b"]
    assert not any("load_lora_weights" in pages[name] for name in "dpfb")
    for command in ("resize f.safetensors --rank 32 --format diffusers", "convert b.safetensors --to diffusers"):
        assert run(*command.split(), "--out", "again.safetensors") == 0  # what the page says to do works
    assert "Other tools have no such base" in pages["m"]
    assert not list(Path("pages").glob("*.png"))


def test_text_from_a_file_cannot_reach_into_the_page(tmp_path):
    trigger = "<script>alert(1)</script> `code` | [x](javascript:1)\x1b[31m\n# head"
    lora = Adapter(make_lora("mini", 1).deltas, Card("sd1", "a|b<i>", trigger, {"steps": 1, "targets": ["<b>"]}))
    write_adapter(lora, "a.safetensors")
    assert run("card", "a.safetensors") == 0
    page = Path("a.md").read_text()
    outside = re.sub(r"(`+)(.+?)\1", "", re.sub(r"(?s)^---.*?\n---\n|(`{3,}).*?\n\1", "", page))
    assert "<" not in re.sub(r"\\<", "", outside)
    assert "\x1b" not in page
    assert "\n# head" not in page
    assert "javascript" not in outside
    assert json.loads(Path("a.json").read_text())["activation text"].startswith("<script>")
    assert escape("a*b_c <x>") == r"a\*b\_c \<x\>"


def test_a_file_written_again_says_the_same_of_itself(tmp_path):
    write_adapter(make_lora("mini", 3), "a.safetensors")
    again = read_adapter("a.safetensors")
    write_adapter(again, "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()

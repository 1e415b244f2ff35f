"""Pictures on disk: their numbers, their text, and that nothing is written where something is wrong."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from PIL import Image

from sdlora.adapter.file import autov2, file_sha256
from sdlora.combining.stack import combine
from sdlora.errors import AdapterFileError, ConfigError, SdloraError
from sdlora.generating.generate import generate, generate_files
from sdlora.generating.infotext import parse_infotext
from tests.stacks import hash_base, random_adapter
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base():
    return make_tiny_base()


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    """A folder with ink.safetensors and cat.safetensors, the second with a text encoder part."""
    folder = tmp_path_factory.mktemp("loras")
    random_adapter(base, 1, alpha=2.0).save(str(folder / "ink.safetensors"))
    random_adapter(base, 2, text=True).save(str(folder / "cat.safetensors"))
    return folder


def test_picture_depends_on_its_own_seed_only(base):
    adapters = [(random_adapter(base, 1), 0.5)]
    many = generate(base, "a cat", adapters, seed=4, images=3, steps=3)
    one = generate(base, "a cat", adapters, seed=6, steps=3)[0]
    assert abs(np.asarray(many[2]).astype(int) - np.asarray(one).astype(int)).max() <= 1
    assert len({p.tobytes() for p in many}) == 3


def test_text_encoders_weight_acts_on_the_prompt_alone(base):
    adapter = random_adapter(base, 2, text=True)

    def draw(*adapters):
        return generate(base, "a cat", adapters, steps=2)[0].tobytes()

    only_text = {p: d for p, d in adapter.deltas.items() if p.startswith("text_encoder")}
    assert draw((adapter, 0.0, 1.0)) == draw((type(adapter)(only_text), 1.0)) != draw()
    assert draw((adapter, 1.0)) == draw((adapter, 1.0, 1.0)) != draw((adapter, 1.0, 0.0))


def test_same_stack_in_another_order_gives_the_same_bytes(base):
    stack = [(random_adapter(base, seed), 0.4) for seed in range(3)]
    assert generate(base, "a", stack, steps=2)[0].tobytes() == generate(base, "a", stack[::-1], steps=2)[0].tobytes()


def test_combined_adapter_draws_the_stacks_picture(base):
    stack = [(random_adapter(base, 1, rank=2), 0.8), (random_adapter(base, 2, text=True), 0.6, -0.5)]
    a = np.asarray(generate(base, "a cat", stack, steps=3)[0]).astype(int)
    b = np.asarray(generate(base, "a cat", [(combine(stack), 1.0)], steps=3)[0]).astype(int)
    assert abs(a - b).max() <= 1


def test_files_take_the_next_free_numbers_and_say_what_made_them(base, shelf, tmp_path):
    out = tmp_path / "new" / "out"
    before = hash_base(base)
    rows = generate_files(
        base, "a cat <lora:cat:0.5:-1>", [(shelf / "ink.safetensors", 0.8, 0.8)], lora_dir=shelf, out=out,
        negative="blur, dark", seed=7, images=3, steps=2, guidance=4.5, width=72, height=64, batch_size=2,
    )  # fmt: skip
    assert [r["file"] for r in rows] == [str(out / f"0000{i}.png") for i in range(3)]
    assert [r["seed"] for r in rows] == [7, 8, 9]
    assert rows[0]["prompt"] == "a cat <lora:cat:0.5:-1>"
    assert rows[0]["loras"] == [
        {
            "file": str(shelf / f"{name}.safetensors"),
            "weight": weight,
            "sha256": file_sha256(shelf / f"{name}.safetensors"),
        }
        for name, weight in (("ink", 0.8), ("cat", -1.0))
    ]
    assert all(r["seconds"] >= 0 for r in rows)
    for row in rows:
        with Image.open(row["file"]) as picture:
            assert picture.size == (72, 64)
            prompt, negative, settings = parse_infotext(picture.text["parameters"])
        assert prompt == "a cat <lora:ink:0.8> <lora:cat:0.5:-1>"
        assert negative == "blur, dark"
        assert settings["Seed"] == str(row["seed"])
        assert settings["Size"] == "72x64"
        assert settings["Sampler"] == "DPM++ 2M"
        assert settings["CFG scale"] == "4.5"
        hashes = [f"{name}: {autov2(shelf / f'{name}.safetensors')}" for name in ("ink", "cat")]
        assert settings["Lora hashes"] == ", ".join(hashes)
        assert re.fullmatch(r"sdlora \d+\.\d+.*", settings["Version"])
    assert hash_base(base) == before
    more = generate_files(base, "a cat", [], out=out, steps=1)
    assert more[0]["file"] == str(out / "00003.png")
    assert sorted(os.listdir(out)) == [f"0000{i}.png" for i in range(4)]


def test_same_command_writes_the_same_bytes(base, shelf, tmp_path):
    for name in "ab":
        generate_files(base, "ö cat", [(shelf / "ink.safetensors", 1.0, 1.0)], out=tmp_path / name, steps=2)
    first = (tmp_path / "a" / "00000.png").read_bytes()
    assert first == (tmp_path / "b" / "00000.png").read_bytes()
    with Image.open(tmp_path / "a" / "00000.png") as picture:
        assert picture.text["parameters"].startswith("ö cat <lora:ink:1>")


def test_tag_and_flag_draw_the_same_picture(base, shelf, tmp_path):
    file = shelf / "ink.safetensors"
    by_flag = generate_files(base, "a cat", [(file, 0.8, 0.8)], out=tmp_path / "a", steps=2)
    by_tag = generate_files(base, "a <lora:ink:0.8> cat", [], lora_dir=shelf, out=tmp_path / "b", steps=2)
    with Image.open(by_flag[0]["file"]) as a, Image.open(by_tag[0]["file"]) as b:
        assert a.tobytes() == b.tobytes()
    assert by_flag[0]["loras"] == by_tag[0]["loras"]


def test_long_prompt_is_read_whole_and_nothing_is_said(base, caplog):
    a, b = (generate(base, "x " * 90 + end, steps=1)[0].tobytes() for end in ("cat", "ink"))
    assert a != b
    assert caplog.text == ""


def test_clip_skip_is_written_as_other_tools_count_it(base, tmp_path):
    rows = [generate_files(base, "a (cat:1.3)", [], out=tmp_path, steps=1, clip_skip=skip)[0] for skip in (0, 1)]
    texts = []
    for row in rows:
        with Image.open(row["file"]) as picture:
            texts.append(parse_infotext(picture.text["parameters"]))
    assert [prompt for prompt, _, _ in texts] == ["a (cat:1.3)"] * 2
    assert [settings.get("Clip skip") for _, _, settings in texts] == [None, "2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "<lora:inc:1>"}, r"<lora:inc>: .* has no inc.safetensors; nearest: ink"),
        ({"prompt": "<lora:ink:1>", "lora_dir": None}, "give --lora-dir DIR"),
        ({"images": 0}, "images 0"),
        ({"steps": 0}, "steps 0"),
        ({"width": 65}, "width 65 px"),
        ({"sampler": "x"}, "sampler 'x'"),
        ({"batch_size": 0}, "batch size 0"),
        ({"clip_skip": 2}, "clip_skip = 2 is out of range for tiny; give 0 to 1"),
        ({"prompt": "a (cat:" + "9" * 400 + ")"}, "the weight of 'cat' in the prompt is not finite"),
        ({"loras": [("ink.safetensors", float("nan"), 1.0)]}, "weight nan"),
    ],
)
def test_bad_request_is_one_line_and_writes_nothing(base, shelf, tmp_path, options, words):
    options = {"prompt": "a cat", "loras": [], "lora_dir": shelf, "out": tmp_path / "out"} | options
    loras = [(shelf / name, *weights) for name, *weights in options.pop("loras")]
    with pytest.raises(SdloraError, match=words) as caught:
        generate_files(base, options.pop("prompt"), loras, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_lora_of_another_base_writes_nothing(shelf, tmp_path):
    other = make_tiny_base(block_out_channels=(32, 64))
    with pytest.raises(AdapterFileError, match=r"ink.safetensors: a LoRA for another base \(made for tiny\)"):
        generate_files(other, "a cat", [(shelf / "ink.safetensors", 1.0, 1.0)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_a_folder_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="give --out"):
            generate_files(base, "a cat", [], out=out, steps=1)


def test_a_stack_is_refused_before_the_base_is_loaded(base, shelf, tmp_path, monkeypatch, capsys):
    """Each in one line, exit 2, with nothing written and no weights read."""
    from sdlora.bases import family
    from sdlora.cli import main

    def refuse(*args, **kwargs):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(family, "load_base", refuse)
    ink = str(shelf / "ink.safetensors")
    mini_fits = tmp_path / "fits.safetensors"
    other = tmp_path / "other"
    other.mkdir()
    (other / "ink.safetensors").write_bytes((shelf / "ink.safetensors").read_bytes())
    for name, size in (("black", (32, 32)), ("wide", (64, 32))):
        Image.new("L", size, 0 if name == "black" else 255).save(tmp_path / f"{name}.png")
    vector = ",".join(["1"] * 17)
    cases = [
        ([ink], "a LoRA for another base"),
        ([ink, str(other / "ink.safetensors")], "two LoRAs are called ink"),
        ([ink, ink], "give it once, with the sum of the weights"),
        ([f"{ink}:nan"], "no finite number"),
        ([f"{ink}:mask={tmp_path / 'black.png'}"], "black all over"),
        ([f"{ink}:mask={tmp_path / 'none.png'}"], "there is no such file"),
        ([f"{ink}:mask={tmp_path / 'wide.png'}"], "cannot be scaled"),
        ([f"{ink}:lbw=1,2"], "2 block weights fit no scheme"),
        ([f"{ink}:lbw={vector}"], "17 block weights are sd1-17"),
        ([ink, "--combine", "klora"], "is for two LoRAs"),
        ([ink, "--combine", "nq"], "method 'nq' is not known"),
    ]
    for loras, says in cases:
        more = loras[loras.index("--combine") :] if "--combine" in loras else []
        flags = [word for lora in loras[: len(loras) - len(more)] for word in ("--lora", lora)]
        assert main(["generate", "a cat", *flags, *more, "--out", str(tmp_path / "out")]) == 2, says
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert error.count("\n") == 1, error
        assert says in error, error
    assert not (tmp_path / "out").exists()
    assert not mini_fits.exists()


def test_a_picture_says_how_its_loras_acted(base, shelf, tmp_path):
    from sdlora.generating.generate import draw_files
    from sdlora.generating.stacking import gather_stack
    from sdlora.profiles import parse_stacked

    Image.new("L", (64, 64), 255).save(tmp_path / "all.png")
    specs = [
        parse_stacked(f"{shelf / 'ink.safetensors'}:0.8:blocks=mid=0.5:start=0.25"),
        parse_stacked(f"{shelf / 'cat.safetensors'}:1:0.5:mask={tmp_path / 'all.png'}"),
    ]
    stack = gather_stack("a cat", specs, method="np:mu=1")
    (row,) = draw_files(base, "a cat", stack, out=tmp_path / "out", steps=2)
    with Image.open(row["file"]) as picture:
        prompt, _, settings = parse_infotext(picture.info["parameters"])
    assert prompt == "a cat <lora:ink:0.8:lbw=mid=0.5:start=0.25> <lora:cat:0.5:1:mask=all.png>"
    assert settings["Combine"] == "np:mu=1"
    again = gather_stack(prompt.replace("all.png", str(tmp_path / "all.png")), [], shelf, settings["Combine"])
    (second,) = draw_files(base, prompt, again, out=tmp_path / "again", steps=2)
    with Image.open(row["file"]) as one, Image.open(second["file"]) as two:
        assert one.tobytes() == two.tobytes()

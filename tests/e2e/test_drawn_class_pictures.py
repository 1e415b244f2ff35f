"""Class pictures that the base draws: which they are, that they are learnt as given ones are, and drawn but once."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sdlora.adapter.quantised import QuantisedLinear
from sdlora.bases.family import load_base
from sdlora.bases.mini.judge import load_judge
from sdlora.bases.quantisation import quantise_base
from sdlora.bases.sampling import sample
from sdlora.cli import main
from sdlora.config import make_recipe
from sdlora.data.drawn import list_drawn
from sdlora.data.material import class_recipe
from sdlora.errors import ConfigError, RunError
from sdlora.training import class_pictures
from sdlora.training.class_pictures import provide_drawn
from sdlora.training.loop import train_adapter
from sdlora.training.processes import Processes
from sdlora.training.run import Run
from tests.pictures import make_folder
from tests.short_runs import Stop, change, losses, rows, stop_at, train_until
from tests.tiny import make_tiny_base, save_tiny_pipeline

OWN = class_recipe(change()).seed
"""The seed of a run's class pictures, which is made of the run's."""


def seed_of(seed, number):
    """The address of a drawn picture's seed, written out; a run has the class pictures' own seed for it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/class-picture/{number}".encode()).digest()[:8], "big") // 2


def read(paths):
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


def draw(base, recipe, place, given=()):
    wanted = list_drawn(recipe, given, 64, place)
    provide_drawn(base, recipe, wanted, Processes())
    return [example.path for example in wanted]


@pytest.fixture
def counted(monkeypatch):
    """The seeds of all that is drawn."""
    seen, original = [], class_pictures.sample_encoded

    def call(*args, **options):
        seen.extend(options["seeds"])
        return original(*args, **options)

    monkeypatch.setattr(class_pictures, "sample_encoded", call)
    return seen


@pytest.mark.parametrize("family", ["mini", "sdxl"])
def test_they_are_what_the_base_draws_from_each_prompt_in_turn(tmp_path, family):
    base = make_tiny_base(family=family)
    recipe = change(class_prompt=("a cat", "ink  (cat)"), class_images=5, seed=3)
    paths = draw(base, recipe, tmp_path / "class")
    assert [p.name for p in paths] == [f"{i:05d}.png" for i in range(5)]
    assert [p.with_suffix(".txt").read_text() for p in paths] == ["a cat\n", "ink (cat)\n"] * 2 + ["a cat\n"]
    prompts = ["a cat", r"ink \(cat\)"]  # a caption has no emphasis, so its brackets are brackets
    options = {"steps": 20, "guidance": 5.0, "width_px": 64, "height_px": 64}
    expected = sample(base, [prompts[i % 2] for i in range(5)], seeds=[seed_of(3, i) for i in range(5)], **options)
    for found, picture in zip(read(paths), expected, strict=True):
        assert abs(found - np.asarray(picture)).max() <= 1
    assert len({path.read_bytes() for path in paths}) == 5


def test_they_are_learnt_as_given_ones_are(tmp_path, capsys):
    data = make_folder(tmp_path / "data", 3)
    out, given = tmp_path / "out.safetensors", tmp_path / "given.safetensors"
    recipe = change(class_prompt=("a cat",), class_images=3, prior_weight=0.5)
    adapter = train_adapter(data, make_tiny_base(), recipe, out)
    said = capsys.readouterr().err
    place = Run(out).folder / "class"
    assert f"{place}: 3 class pictures, 2 in each step beside yours (2.67 epochs), their loss times 0.5" in said
    assert (
        f'3 class pictures drawn by the base before the first step: 3 from "a cat"; 64 x 64 px, 20 steps, guidance 5; '
        f"kept in {place}"
    ) in said
    assert "class pictures' loss times 0.5" in said
    assert (adapter.card.settings["class_images"], adapter.card.settings["class_prompt"]) == (3, ("a cat",))
    train_adapter(data, make_tiny_base(), change(class_data=str(place), prior_weight=0.5), given)
    assert losses(given) == losses(out)
    train_adapter(data, make_tiny_base(), change(), tmp_path / "plain.safetensors")
    assert all(b > a for a, b in zip(losses(tmp_path / "plain.safetensors"), losses(out), strict=True))


def test_only_what_the_folder_is_short_of_is_drawn(tmp_path, counted, capsys):
    data, classes = make_folder(tmp_path / "data", 3), make_folder(tmp_path / "classes", 4)
    out = tmp_path / "out.safetensors"
    recipe = change(class_data=str(classes), class_prompt=("a cat",), class_images=6)
    train_adapter(data, make_tiny_base(), recipe, out)
    assert counted == [seed_of(OWN, 0), seed_of(OWN, 1)]
    assert f"{classes} and 2 drawn: 6 class pictures, 2 in each step" in capsys.readouterr().err
    both = shutil.copytree(classes, tmp_path / "both")
    for path in (Run(out).folder / "class").iterdir():
        shutil.copy(path, both / f"9{path.name}")
    train_adapter(data, make_tiny_base(), change(class_data=str(both)), tmp_path / "both.safetensors")
    assert losses(tmp_path / "both.safetensors") == losses(out)
    enough = change(class_data=str(classes), class_prompt=("a cat",), class_images=4)
    train_adapter(data, make_tiny_base(), enough, tmp_path / "enough.safetensors")
    assert len(counted) == 2
    assert "no class picture drawn: 4 pictures are there, of class_images = 4" in capsys.readouterr().err


def test_a_run_stopped_while_drawing_and_in_a_step_goes_on_to_the_same_bytes(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(class_pictures, "BATCH_PX", 2 * 64 * 64)  # two pictures at a time
    data = make_folder(tmp_path / "data", 3)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    recipe = change(class_prompt=("a cat", "ink"), class_images=5, accumulation=2, text_encoder=True, dropout=0.1)
    train_adapter(data, make_tiny_base(), recipe, whole)
    seeds = [seed_of(OWN, i) for i in range(5)]
    assert counted == seeds
    counted.clear()
    with monkeypatch.context() as patch:
        stop_at(patch, "sample_encoded", 3, class_pictures)
        with pytest.raises(Stop):
            train_adapter(data, make_tiny_base(), recipe, parts)
    assert counted == seeds[:4]
    (Run(parts).folder / "class" / "00001.png").write_bytes(b"half a picture")  # and so its batch is drawn again
    train_until(monkeypatch, 4, data, make_tiny_base(), recipe, parts)
    assert counted == seeds[:4] + seeds[:2] + seeds[4:]
    train_adapter(data, make_tiny_base(), recipe, parts)
    assert counted == seeds[:4] + seeds[:2] + seeds[4:]
    assert parts.read_bytes() == whole.read_bytes()
    assert rows(parts) == rows(whole)
    places = [Run(out).folder / "class" for out in (whole, parts)]
    names = sorted(path.name for path in places[0].iterdir())
    assert len(names) == 11
    assert all((places[1] / name).read_bytes() == (places[0] / name).read_bytes() for name in names)
    with pytest.raises(RunError, match=r"class_images 5 -> 6"):
        train_adapter(data, make_tiny_base(), change(class_prompt=("a cat", "ink"), class_images=6), parts)
    train_adapter(data, make_tiny_base(), recipe, parts, restart=True)  # they hang on no step
    assert counted == seeds[:4] + seeds[:2] + seeds[4:]
    assert parts.read_bytes() == whole.read_bytes()


def test_whatever_decides_a_picture_draws_it_anew_and_nothing_else_does(tmp_path, counted):
    place = tmp_path / "class"
    recipe = change(class_prompt=("a cat",), class_images=2)
    first = [path.read_bytes() for path in draw(make_tiny_base(), recipe, place)]
    assert len(counted) == 2
    same = change(class_prompt=("a cat",), class_images=2, steps=9, learning_rate=1e-3, rank=4, flip=False)
    assert [path.read_bytes() for path in draw(make_tiny_base(), same, place)] == first
    assert len(counted) == 2
    others = [
        (make_tiny_base(), {"seed": 1}),
        (make_tiny_base(), {"class_prompt": ("a cap",)}),
        (make_tiny_base(), {"clip_skip": 1}),
        (make_tiny_base(seed=1), {}),
        (make_tiny_base(schedule={"prediction_type": "v_prediction"}), {}),
        (quantise_base(make_tiny_base(), "int8", ("unet",), own=True), {}),
    ]
    for base, values in others:
        counted.clear()
        again = shutil.copytree(place, tmp_path / "again", dirs_exist_ok=True)
        paths = draw(base, change(**{"class_prompt": ("a cat",), "class_images": 2, **values}), again)
        assert len(counted) == 2, values
        assert [path.read_bytes() for path in paths] != first
    base, _ = others[-1]
    layer = next(module for module in base.unet.modules() if isinstance(module, QuantisedLinear))
    layer.weight.codes.neg_()
    counted.clear()
    draw(base, recipe, again)
    assert len(counted) == 2  # what is packed is in no state_dict, and counts all the same


def test_what_contradicts_itself_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_pipeline(tmp_path / "tiny")
    data = make_folder(tmp_path / "data", 3)
    before = sorted(tmp_path.rglob("*"))
    prompt = ["--class-prompt", "a cat"]
    none, few = prompt, ["--class-images", "4"]
    wrong = {
        "class_prompt = [\"a cat\"] has no use while class_images = 0; set class_images above 0": none,
        "class_images = 4 has no use while class_prompt = []; set class_prompt (--class-prompt)": few,
        "class_images = 1 cannot show 2 class prompts; give 2 or more": [
            *prompt, "--class-prompt", "a cap", "--class-images", "1",
        ],
        "leave out an empty prompt, and give each once": [*prompt, "--class-prompt", " a  cat", "--class-images", "9"],
        "class_images = -1 is out of range": [*prompt, "--class-images", "-1"],
        "prior_weight = 2.0 has no use without class pictures; give class_data (--class-data) or class_prompt": [
            "--prior-weight", "2",
        ],
        'class_prompt = "a cat" holds the trigger "Cat"': [*prompt, "--class-images", "4", "--trigger", "Cat"],
    }  # fmt: skip
    capsys.readouterr()
    for message, flags in wrong.items():
        for verb, *more in (["train"], ["train", "--dry-run"], ["check"]):
            assert main([verb, str(data), "--base", "tiny", *flags, *more]) == 2
            captured = capsys.readouterr()
            assert message in captured.err
            assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert sorted(tmp_path.rglob("*")) == before
    make_recipe({"class_prompt": ["a cat"], "class_images": 4, "trigger": "ca"})
    classes = make_folder(tmp_path / "out.run" / "class", 2)
    flags = ["--base", "tiny", *prompt, "--class-images", "3", "--class-data", str(classes), "--out", "out.safetensors"]
    for more in ([], ["--dry-run"]):
        assert main(["train", str(data), *flags, *more]) == 2
        assert "where this run draws the missing class pictures; leave out class_data" in capsys.readouterr().err
    recipe = change(class_prompt=("a cat",), class_images=3, class_data=str(tmp_path / "out.run" / "class"))
    with pytest.raises(ConfigError, match="where this run draws"):
        train_adapter(data, make_tiny_base(), recipe, tmp_path / "out.safetensors")


def test_check_and_the_plan_say_what_will_be_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_pipeline(tmp_path / "tiny")
    data, classes = make_folder(tmp_path / "data", 2), make_folder(tmp_path / "classes", 2)
    flags = ["--base", "tiny", "--class-prompt", "x " * 80, "--class-images", "3", "--batch-size", "3", "--steps", "4"]
    assert main(["train", str(data), *flags, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    place = "runs/data.run/class"
    assert (
        f"class        {place}: 3 class pictures, 3 in each step beside yours (4 epochs), their loss times 1\n" in plan
    )
    assert f'3 from "{"x " * 79}x"; 64 x 64 px, 20 steps, guidance 5; kept in {place}\n' in plan
    assert "  class_images = 3\n" in plan
    assert not (tmp_path / "runs").exists()
    assert main(["check", str(data), *flags]) == 0
    said = capsys.readouterr().out
    assert "class             the run folder/class: 3 class pictures, 3 in each step" in said
    assert "caption too long  the run folder/class/00000.png: 82 tokens, the base reads 77" in said
    assert main(["check", str(data), *flags, "--class-data", str(classes), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["class_pictures"]
    assert (report["folder"], report["drawn"], report["pictures"], report["images_per_epoch"]) == (
        str(classes),
        1,
        2,
        3,
    )
    assert [row["file"] for row in report["truncated"]] == ["class/00000.png"]
    assert main(["check", str(data), *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["class_pictures"]
    assert (report["folder"], report["drawn"], report["pictures"], report["images_per_epoch"]) == (None, 3, 0, 3)


@pytest.mark.slow
def test_mini_draws_its_class_and_learns_it_beside_the_pictures(tmp_path, counted):
    data = make_folder(tmp_path / "data", 4, 128)
    out = tmp_path / "out.safetensors"
    recipe = change(precision="bf16", steps=2, batch_size=4, class_prompt=("a red apple", "a rose"), class_images=6)
    base = load_base("mini", precision="bf16")
    train_adapter(data, base, recipe, out)
    pictures = [Image.open(path) for path in sorted((Run(out).folder / "class").glob("*.png"))]
    assert {picture.size for picture in pictures} == {(128, 128)}
    ranks = load_judge().rank_of(pictures, ["red apple", "rose"] * 3)
    print("the judge's ranks of apple, rose, …:", ranks)
    assert sum(rank < 5 for rank in ranks) >= 5
    content = out.read_bytes()
    train_adapter(data, base, recipe, out)
    assert len(counted) == 6
    train_adapter(data, base, recipe, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == content

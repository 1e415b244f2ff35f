"""Buckets too small for a step: one line before anything is loaded or written, and a run where they are allowed."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from sdlora.cli import main
from sdlora.config import Recipe
from sdlora.data.buckets import Bucketing, plan_cuts
from sdlora.data.folder import scan_folder
from sdlora.data.material import Material, find_short_buckets
from sdlora.errors import DataError
from sdlora.training.lessons import Lessons
from sdlora.training.loop import train_adapter
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run
from tests.pictures import make_folder
from tests.tiny import make_tiny_base, save_tiny_pipeline

SQUARE, WIDE, TALL = (64, 64), (80, 48), (48, 80)


def make_shapes(folder, *sizes):
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_pipeline(tmp_path / "tiny")
    return tmp_path


def test_a_bucket_with_fewer_images_than_a_step_is_one_line_everywhere_and_writes_nothing(place, capsys):
    data = make_shapes(place / "data", SQUARE, SQUARE, SQUARE, WIDE)
    flags = ["--base", "tiny", "--buckets", "--batch-size", "2"]
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    line = (
        f"error: {data}: a bucket has fewer images an epoch than the 2 of a step, so that a step would show one twice: "
        "80 x 48 px has 1 (3.png); give a smaller batch_size or accumulation, a bucket_step_px of 32, more repeats "
        "(a subfolder called 2_name), or allow it with small_buckets = true (--small-buckets)"
    )
    for more in ([], ["--dry-run"]):
        assert main(["train", str(data), *flags, *more]) == 2
        assert capsys.readouterr() == ("", f"{line}\n")
    assert main(["check", str(data), *flags]) == 2
    assert capsys.readouterr().err == f"{line}\n"
    assert main(["check", str(data), *flags, "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["file"] == str(data)
    assert f"error: {data}: {problem['problem']}; {problem['fix']}" == line
    recipe = Recipe(buckets=True, batch_size=1, accumulation=2, precision="fp32", steps=2, warmup_steps=0)
    with pytest.raises(DataError, match=r"than the 2 of a step.*80 x 48 px has 1 \(3\.png\)"):
        train_adapter(data, make_tiny_base(), recipe, place / "out.safetensors")
    assert sorted(place.rglob("*")) == before


def test_where_it_is_allowed_it_trains_and_the_plan_says_so(place, capsys):
    data = make_shapes(place / "data", SQUARE, SQUARE, SQUARE, WIDE)
    flags = ["--base", "tiny", "--buckets", "--small-buckets", "--batch-size", "2", "--steps", "4"]
    assert main(["check", str(data), *flags]) == 0
    assert main(["train", str(data), *flags, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "its 1 image an epoch is fewer than the 2 of a step, which it fills by repeating" in plan
    assert "  small_buckets = true\n" in plan
    assert main(["train", str(data), *flags, "--device", "cpu", "--precision", "fp32"]) == 0
    out = place / "runs" / "data.safetensors"
    assert len(read_rows(Run(out).metrics)) == 4
    capsys.readouterr()
    # It decides nothing of what is learnt, so a run may be gone on with under another word for it.
    assert main(["train", str(data), *flags, "--device", "cpu", "--precision", "fp32"]) == 0
    assert "is finished already" in capsys.readouterr().err


def test_a_folder_of_one_shape_may_be_as_small_as_it_is(place, capsys):
    data = make_folder(place / "data", 3)
    for more in ([], ["--buckets"]):
        flags = ["--base", "tiny", "--batch-size", "8", *more]
        assert main(["train", str(data), *flags, "--dry-run"]) == 0
        assert main(["check", str(data), *flags]) == 0
    assert "fewer than" not in capsys.readouterr().out


def test_held_out_pictures_repeats_and_processes_count(tmp_path):
    data = make_shapes(tmp_path / "data", SQUARE, SQUARE, SQUARE, SQUARE, WIDE, WIDE, TALL)
    (data / "3_tall").mkdir()
    for suffix in (".png", ".txt"):
        (data / f"6{suffix}").rename(data / "3_tall" / f"6{suffix}")
    cuts = plan_cuts(scan_folder(data), Bucketing(64, 16))

    def short(recipe, cuts=cuts, processes=1):
        return [p.problem.partition("twice: ")[2] for p in find_short_buckets(data, cuts, recipe, processes)]

    recipe = Recipe(buckets=True, batch_size=1)
    assert short(recipe) == []
    assert short(Recipe(buckets=True, batch_size=2)) == []
    assert short(Recipe(buckets=True, batch_size=3)) == ["80 x 48 px has 2 (4.png, 5.png)"]
    assert short(Recipe(buckets=True, batch_size=1, accumulation=3)) == ["80 x 48 px has 2 (4.png, 5.png)"]
    assert short(recipe, processes=3) == ["80 x 48 px has 2 (4.png, 5.png)"]
    both = ["48 x 80 px has 3 (3_tall/6.png), 80 x 48 px has 2 (4.png, 5.png)"]
    assert short(recipe, processes=4) == both
    assert short(Recipe(buckets=True, batch_size=4, small_buckets=True)) == []
    by_name = dict(zip(cuts.names, cuts.repeats, strict=True))

    def hold(*names):
        kept = tuple(0 if name in names else n for name, n in by_name.items())
        return type(cuts)(cuts.bucketing, cuts.names, kept, cuts.cuts)

    assert short(Recipe(buckets=True, batch_size=2), hold("4.png")) == ["80 x 48 px has 1 (5.png)"]
    assert short(Recipe(buckets=True, batch_size=2), hold("4.png", "5.png")) == []
    only = hold(*(name for name in by_name if name not in ("4.png", "5.png")))
    assert short(Recipe(buckets=True, batch_size=9), only) == []  # one bucket is left to learn


def test_lessons_count_the_images_of_all_processes(tmp_path):
    full, small = (make_shapes(tmp_path / name, *[SQUARE] * 4, *[WIDE] * n) for name, n in (("full", 4), ("small", 3)))
    recipe = Recipe(buckets=True, batch_size=3)
    mine, others = (Material(folder, scan_folder(folder)) for folder in (full, small))
    assert Lessons.plan(others, recipe, 64).cuts.images(WIDE) == 3
    with pytest.raises(DataError, match="than the 6 of a step"):
        Lessons.plan(others, recipe, 64, processes=2)
    recipe = Recipe(buckets=True, batch_size=2, class_data=str(small))
    both = replace(mine, prior=others)
    Lessons.plan(both, recipe, 64, processes=2)
    assert Lessons.of_prior(both, recipe, 64, tmp_path).examples == others.examples
    with pytest.raises(DataError, match=f"{small}: a bucket has fewer images an epoch than the 4 of a step"):
        Lessons.of_prior(both, recipe, 64, tmp_path, processes=2)


def test_class_pictures_have_buckets_of_their_own(place, capsys):
    data, classes = make_folder(place / "data", 4), make_shapes(place / "class", SQUARE, SQUARE, WIDE)
    flags = ["--base", "tiny", "--buckets", "--batch-size", "2", "--class-data", str(classes)]
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    for verb, *more in (["train"], ["train", "--dry-run"]):
        assert main([verb, str(data), *flags, *more]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {classes}: a bucket has fewer images an epoch than the 2 of a step")
        assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert main(["check", str(data), *flags, "--json"]) == 2
    assert [p["file"] for p in json.loads(capsys.readouterr().out)["problems"]] == [str(classes)]
    assert sorted(place.rglob("*")) == before

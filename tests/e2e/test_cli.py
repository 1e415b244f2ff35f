"""The command line holds against the contract: exit codes, one line for a mistake, nothing written."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import sdlora
from sdlora import cli
from sdlora.errors import RunInterrupted
from tests.tiny import save_tiny_pipeline

VERBS = tuple(cli.VERBS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "3_more").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("3_more/b.png", "blue")):
        Image.new("RGB", (70, 64), colour).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a {colour} cat")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, which finds the package whether it is installed or not."""
    root = str(Path(sdlora.__file__).parents[1])
    env = os.environ | {"COLUMNS": "80", "PYTHONPATH": root}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, check=False, timeout=100)


def files_below(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def fail(capsys, *argv) -> str:
    """Runs a command that must be refused: exit 2, one line, nothing on stdout, nothing written."""
    before = files_below(Path())
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert files_below(Path()) == before
    return captured.err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_no_torch_and_fits_80_columns(argv):
    code = (
        f"import sys; from sdlora.cli import main; code = main({argv!r}); "
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers'} & set(sys.modules); "
        "print(heavy or '', file=sys.stderr, end=''); sys.exit(code)"
    )
    run = start("-c", code)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_help_answers_in_half_a_second_of_processor_time():
    # Not by the clock: on a busy machine that would measure the others.
    before = os.times()
    assert start("-m", "sdlora", "train", "--help").returncode == 0
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 0.5


def test_the_package_imports_no_torch_and_gives_its_names_when_asked():
    code = (
        "import sys, sdlora, sdlora.config, sdlora.data.folder, sdlora.data.captions; "
        "assert 'torch' not in sys.modules; "
        "assert set(sdlora.__all__) <= set(dir(sdlora)); sdlora.SdloraError; assert 'torch' not in sys.modules; "
        "[getattr(sdlora, name) for name in sdlora.__all__]; "
        "assert sdlora.load_adapter.__module__ == 'sdlora.adapter.file'"
    )
    assert start("-c", code).stderr == ""
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = sdlora.nothing_such


def test_the_version_is_the_projects():
    pyproject = tomllib.loads((Path(sdlora.__file__).parents[1] / "pyproject.toml").read_text())
    assert sdlora.__version__ == pyproject["project"]["version"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no verb; use one of demo, check, train"),
        (["trian"], "unknown verb trian; did you mean train?"),
        (["xyzzy"], "unknown verb xyzzy; use one of demo"),
        (["--helpp"], "unknown flag --helpp; did you mean --help?"),
        (["train"], "DATA is missing; see sdlora train --help"),
        (["train", "pictures", "--lerning-rate", "1"], "unknown flag --lerning-rate; did you mean --learning-rate?"),
        (["train", "pictures", "--rank", "0"], "rank = 0 is out of range; give 1"),
        (["train", "pictures", "--learning-rate", "-1e-3"], "learning_rate = -0.001 is out of range; give"),
        (["train", "pictures", "--batch-size", "0"], "batch_size = 0"),
        (["train", "pictures", "--resolution", "100"], "resolution = 100 is out of range; give a multiple of 8"),
        (["train", "pictures", "--caption-dropout", "2"], "caption_dropout = 2.0"),
        (["train", "pictures", "--schedule", "rex"], 'schedule = "rex" is not known; use cosine or constant or linear'),
        (["train", "pictures", "--device", "gpu"], "--device: invalid choice: 'gpu'"),
        (["train", "pictures", "--config", "gone.toml"], "gone.toml: cannot be read"),
        (["train", "gone"], "gone: does not exist; check the path of the data folder"),
        (["train", "pictures/a.png"], "a.png: is a file; give the folder"),
        (["train", "pictures", "--out", "a.ckpt"], "a.ckpt does not end in .safetensors; name the file"),
        (["train", "pictures", "--out", "pictures/a.png/x.safetensors"], "x.safetensors cannot be written"),
        (["train", "pictures", "--out", "/proc/x.safetensors"], "/proc/x.safetensors cannot be written"),
        (["train", "pictures", "--base", "gone", "--dry-run"], "gone: there is no such folder; give mini"),
        (["train", "pictures", "--base", "gone"], "gone: there is no such folder; give mini"),
        (["generate", "a cat", "--lora", "gone.safetensors:0.5"], "gone.safetensors: there is no such file; give"),
        (["generate", "a cat", "--lora", "gone.safetensors:x"], "weight 'x' is no finite number; write FILE:WEIGHT"),
        (["generate", "a cat", "--images", "two"], "--images: 'two' is not a whole number"),
        (["generate", "a cat", "--out", "/proc/x"], "/proc/x cannot be written"),
        (["generate", "a cat", "--out", "pictures/a.png"], "pictures/a.png is a file; choose another --out"),
        (["generate", "a cat", "--base", "gone"], "gone: there is no such folder; give mini"),
        (["combine", "gone.safetensors", "--out", "x.safetensors"], "gone.safetensors: there is no such file"),
        (["combine", "gone.safetensors"], "--out is missing"),
        (["convert", "gone.safetensors", "--to", "peft", "--out", "x.safetensors"], "there is no such file"),
        (["convert", "x.safetensors", "--to", "a1111", "--out", "y.safetensors"], "--to: invalid choice: 'a1111'"),
        (["inspect", "pictures"], "pictures: it is a folder; give the path"),
        (["demo", "--out", "/proc/x"], "/proc/x cannot be written"),
    ],
)
def test_a_wrong_request_is_one_line_exit_2_and_nothing_written(capsys, data, argv, says):
    assert says in fail(capsys, *argv)


def test_a_recipe_file_with_an_unknown_key_names_the_file_and_the_nearest_key(capsys, data, tmp_path):
    (tmp_path / "r.toml").write_text("lerning_rate = 1e-3")
    line = fail(capsys, "train", data, "--config", "r.toml")
    assert line == "error: r.toml: unknown key lerning_rate; did you mean learning_rate?\n"


def test_all_of_a_folders_problems_are_in_the_one_line(capsys, data):
    (data / "a.txt").unlink()
    (data / "zero.png").write_bytes(b"")
    (data / "bad\nname.png").write_text("text")
    line = fail(capsys, "train", data)
    for part in (
        "a.png",
        "has no caption",
        "--trigger",
        "zero.png",
        "is empty (0 bytes)",
        "bad name.png",
        "is not a picture",
    ):
        assert part in line


def test_check_is_silent_of_trouble_where_training_would_start(capsys, data, base):
    assert cli.main(["check", str(data), "--base", str(base), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    memory = report.pop("memory")  # tests/unit/test_memory.py holds its figures
    assert memory["total"] == max(memory["when"].values()) > memory["activations"] > 0
    assert report == {
        "pictures": 2, "captions": 2, "problems": [], "left_out": [], "truncated": [], "duplicates": [],
        "near_duplicates": [],
        "buckets": {"64x64": 2}, "cut_away": {"3_more/b.png": 0.0857, "a.png": 0.0857}, "images_per_epoch": 4,
        "steps": 300, "epochs": 600.0, "masks": None, "class_pictures": None,
    }  # fmt: skip


def test_check_tells_of_every_problem_in_its_document_and_exits_2(capsys, data, base):
    (data / "a.txt").write_text("cat " * 80)
    shutil.copy(data / "a.png", data / "c.png")
    (data / "c.txt").write_bytes(b"\xff\xfea\0")
    shutil.copy(data / "a.png", data / "d.png")
    (data / "d.txt").write_text("a copy")
    assert cli.main(["check", str(data), "--base", str(base), "--json"]) == 2
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["problems"] == [
        {"file": "c.txt", "problem": "is not UTF-8 at byte 0 but UTF-16", "fix": "save it as UTF-8 text"}
    ]
    assert report["truncated"] == [{"file": "a.png", "tokens": 82, "limit": 77}]
    assert report["duplicates"] == [["a.png", "d.png"]]
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert cli.main(["check", str(data), "--base", str(base)]) == 2
    assert "caption too long  a.png: 82 tokens, the base reads 77" in capsys.readouterr().out


def test_check_counts_long_captions_by_the_chunks_they_may_fill(capsys, data, base):
    (data / "a.txt").write_text("cat " * 80)
    (data / "3_more" / "b.txt").write_text("cat " * 151)
    for chunks, expected in ((1, [(153, 77), (82, 77)]), (2, [(153, 152)]), (3, [])):
        assert cli.main(["check", str(data), "--base", str(base), "--max-chunks", str(chunks), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["truncated"]
        assert [(row["tokens"], row["limit"]) for row in found] == expected


def test_check_counts_a_base_that_is_not_there_as_a_problem(capsys, data):
    assert cli.main(["check", str(data), "--base", "gone", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["problems"][0]["file"] == "gone"
    assert report["problems"][0]["problem"] == "there is no such folder"
    assert report["truncated"] is None
    assert report["buckets"] == {}


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, data, base, tmp_path):
    (tmp_path / "r.toml").write_text("rank = 4\nsteps = 10\nbatch_size = 2\n")
    before = files_below(tmp_path)
    assert cli.main(["train", str(data), "--base", str(base), "--config", "r.toml", "--steps", "6", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in (
        "2 pictures, 2 different captions",
        "4 images, with repeats",
        "64 x 64 px",
        "6 steps x 2 = 12 images, 3.0 epochs",
        "runs/pictures.safetensors",
        "runs/pictures.run",
        "rank = 4\n",
        "steps = 6\n",
        "warmup_steps = 1\n",
    ):
        assert part in out
    assert files_below(tmp_path) == before


def test_plans_count_what_a_validation_share_leaves(capsys, data, base):
    from sdlora.data.folder import scan_folder
    from sdlora.training.validation import hold_out

    names = [example.name for example in scan_folder(data)]
    learnt = {"a.png": 1, "3_more/b.png": 3}[names[1 - hold_out(2, 0.5, 0)[0]]]
    flags = ["--base", str(base), "--validation-share", "0.5", "--batch-size", "6", "--steps", "2"]
    assert cli.main(["train", str(data), *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"an epoch     {learnt} images, with repeats, without those held out" in out
    assert f"= 12 images, {12 / learnt:.1f} epochs" in out
    assert cli.main(["check", str(data), *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images_per_epoch"], report["epochs"]) == (learnt, 12 / learnt)


def test_an_interruption_exits_130_and_says_how_to_go_on(capsys, monkeypatch):
    def stop(error):
        def run(args):
            raise error

        return cli.Verb("x", lambda parser: None, run)

    monkeypatch.setitem(cli.VERBS, "demo", stop(RunInterrupted("saved; run the same command again")))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "saved; run the same command again\n"
    monkeypatch.setitem(cli.VERBS, "demo", stop(KeyboardInterrupt()))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_anything_else_keeps_its_traceback_and_exits_1():
    code = (
        "import sys; from sdlora import cli; "
        "cli.VERBS['demo'] = cli.Verb('x', lambda p: None, lambda a: 1 / 0); sys.exit(cli.main(['demo']))"
    )
    run = start("-c", code)
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "ZeroDivisionError" in run.stderr


def test_check_shows_the_buckets_crops_and_near_duplicates_that_train_would_have(capsys, data, base):
    picture = Image.effect_mandelbrot((192, 100), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    picture.save(data / "wide.png")
    picture.resize((150, 78)).save(data / "wide2.png")
    flags = [
        "--base",
        str(base),
        "--trigger",
        "x",
        "--buckets",
        "--crop",
        "random",
        "--crops",
        "3",
        "--batch-size",
        "2",
    ]
    assert cli.main(["check", str(data), *flags]) == 0
    said = capsys.readouterr().out
    assert "nearly the same   wide.png, wide2.png" in said
    assert "steps             300, which are 100 epochs" in said
    assert "cut               bucket 80 x 48 px: 2 pictures, 13." in said
    assert "cut               3 random crops of each picture, drawn by the seed" in said
    assert cli.main(["train", str(data), *flags, "--dry-run"]) == 0
    assert "cut          bucket 80 x 48 px: 2 pictures, 13." in capsys.readouterr().out
    assert cli.main(["check", str(data), *flags, "--resolution", "72"]) == 2
    assert "error: resolution = 72 is no multiple of the buckets' step of 16 px" in capsys.readouterr().err
    assert cli.main(["check", str(data), "--base", str(base), "--shuffle-tags"]) == 2
    assert "set caption_variants = 8 (--caption-variants)" in capsys.readouterr().err


def test_train_keeps_what_it_encodes_where_it_is_told(capsys, data, base, tmp_path):
    flags = ["--base", str(base), "--steps", "1", "--batch-size", "1", "--precision", "fp32", "--device", "cpu"]
    cache = tmp_path / "kept"
    for name, found in (("a", "0 found, 5 made"), ("b", "5 found, 0 made")):
        out = tmp_path / f"{name}.safetensors"
        assert cli.main(["train", str(data), *flags, "--out", str(out), "--cache", str(cache)]) == 0
        assert f"cache {cache}: {found}" in capsys.readouterr().err
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert cli.main(["train", str(data), *flags, "--out", str(out), "--restart", "--no-cache"]) == 0
    assert "cache " not in capsys.readouterr().err
    assert cli.main(["train", str(data), *flags, "--out", str(out), "--cache", str(cache), "--no-cache"]) == 2
    assert "contradict each other" in capsys.readouterr().err

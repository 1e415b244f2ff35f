"""skip_bad: a run goes on without the pictures that cannot be used, and says which and why."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import make_folder
from short_runs import SHORT, losses
from tiny import make_tiny_base

from sdlora.cli import main
from sdlora.data.material import gather
from sdlora.errors import DataError, RunError
from sdlora.training.loop import train_adapter

SKIP = dataclasses.replace(SHORT, skip_bad=True)


@pytest.fixture
def folder(tmp_path):
    """Four pictures that are good, and five things that are not."""
    folder = make_folder(tmp_path / "data", 4)
    content = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "cut.txt").write_text("a cut one")
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    (folder / "page.txt").write_text("no picture")
    shutil.copy(folder / "1.png", folder / "silent.png")
    shutil.copy(folder / "2.png", folder / "latin.png")
    (folder / "latin.txt").write_bytes("une tête".encode("latin-1"))
    (folder / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "climbs"}\n')
    return folder


REASONS = {
    "cut.png": "cannot be decoded",
    "page.jpg": "is a web page, not a picture",
    "silent.png": "has no caption",
    "latin.txt": "is not UTF-8 at byte 5",
    "metadata.jsonl line 1": "climbs out of the folder",
}


def test_without_it_all_are_named_with_the_way_around_them(folder, tmp_path):
    with pytest.raises(DataError) as raised:
        train_adapter(folder, make_tiny_base(), SHORT, tmp_path / "a.safetensors")
    said = str(raised.value)
    assert "\n" not in said
    assert all(name in said and reason in said for name, reason in REASONS.items())
    assert said.endswith("; or go on without them with skip_bad = true (--skip-bad)")
    assert not (tmp_path / "a.run").exists()


def test_with_it_the_rest_is_learnt_as_if_they_were_not_there(folder, tmp_path, capsys):
    clean = make_folder(tmp_path / "clean", 4)
    train_adapter(clean, make_tiny_base(), SHORT, tmp_path / "clean.safetensors")
    capsys.readouterr()
    train_adapter(folder, make_tiny_base(), SKIP, tmp_path / "a.safetensors")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out ")]
    assert len(lines) == len(REASONS)
    for name, reason in REASONS.items():
        assert any(name in line and reason in line for line in lines), name
    assert losses(tmp_path / "a.safetensors") == losses(tmp_path / "clean.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "clean.safetensors").read_bytes()


def test_one_that_is_mended_in_between_is_changed_data(folder, tmp_path):
    out = tmp_path / "a.safetensors"
    train_adapter(folder, make_tiny_base(), dataclasses.replace(SKIP, steps=2), out)
    (folder / "silent.txt").write_text("a caption")
    with pytest.raises(RunError, match="pictures or captions changed"):
        train_adapter(folder, make_tiny_base(), SKIP, out)


def test_where_nothing_is_left_it_is_an_error_all_the_same(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no picture left: a\.png: has no caption .*is empty \(0 bytes\)|is empty"):
        gather(folder, SKIP)
    with pytest.raises(DataError, match="does not exist"):
        gather(tmp_path / "nowhere", SKIP)
    with pytest.raises(DataError) as raised:
        gather(folder, SHORT)
    assert "skip_bad" not in str(raised.value)  # that would not help


def test_masks_and_class_pictures_follow_it(tmp_path):
    folder, masks, classes = (make_folder(tmp_path / name, 3) for name in ("data", "masks", "classes"))
    for path in [*masks.glob("*.txt"), masks / "2.png"]:
        path.unlink()
    Image.new("L", (64, 64), 255).save(masks / "0.png")
    (masks / "1.png").write_bytes(b"not a mask")
    (classes / "1.png").write_bytes(b"")
    recipe = dataclasses.replace(SKIP, masks=str(masks), class_data=str(classes))
    found = gather(folder, recipe)
    assert [e.name for e in found.examples] == ["0.png"]
    assert [e.name for e in found.prior.examples] == ["0.png", "2.png"]
    assert len(found.masks) == 1
    assert len(found.left_out) == 3
    with pytest.raises(DataError, match="does not exist"):
        gather(folder, dataclasses.replace(recipe, masks=str(tmp_path / "no masks")))


def test_names_reach_the_terminal_without_what_moves_it(tmp_path, capfd):
    folder = make_folder(tmp_path / "data", 2)
    name = "b\x1b[31m\u202egnp\u2066\nx\x9b1m"
    shutil.copy(folder / "0.png", folder / f"{name}.png")
    shown = "b\\x1b[31m\\u202egnp\\u2066 x\\x9b1m.png"
    for command in (
        ["check", str(folder)],
        ["check", str(folder), "--skip-bad"],
        ["train", str(folder), "--skip-bad", "--dry-run", "--out", str(tmp_path / "a.safetensors")],
        ["train", str(folder), "--out", str(tmp_path / "a.safetensors")],
    ):
        main(command)
        said = "".join(capfd.readouterr())
        assert shown in said, command
        assert not set(said) & set("\x1b\u202e\u2066\x9b"), command
    train_adapter(folder, make_tiny_base(), SKIP, tmp_path / "b.safetensors")
    said = capfd.readouterr().err
    assert f"left out {shown}: has no caption\n" in said


def test_check_and_dry_run_say_it(folder, tmp_path, capsys):
    assert main(["check", str(folder)]) == 2
    assert "--skip-bad" in capsys.readouterr().err
    assert main(["check", str(folder), "--skip-bad", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert {row["file"] for row in report["left_out"]} == set(REASONS)
    assert main(["check", str(folder), "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "left out          silent.png: has no caption\n" in said
    assert said.endswith("ready to train\n")
    assert main(["train", str(folder), "--skip-bad", "--dry-run", "--out", str(tmp_path / "a.safetensors")]) == 0
    assert "left out cut.png: cannot be decoded" in capsys.readouterr().out

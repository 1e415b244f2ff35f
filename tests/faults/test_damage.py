"""Checkpoints and run files that are damaged on the disk: found, named, passed over, and nothing deleted."""

import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from pictures import make_folder
from states import make, same
from tiny import make_tiny_base

from sdlora.config import Recipe
from sdlora.errors import RunError
from sdlora.training.checkpoint import find_damage, load_newest, save_checkpoint
from sdlora.training.loop import train_adapter
from sdlora.training.run import Run

FILES = ("factors.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
KINDS = ("flip", "byte", "cut", "grow", "zeros", "empty", "gone", "swap", "folder", "older", "shuffle", "repeat")
RECIPE = Recipe(steps=3, batch_size=1, rank=1, warmup_steps=1, precision="fp32", checkpoint_every=1, flip=False)


def damage(place: Path, older: Path, kind: str, chance: random.Random) -> str:
    """Changes something of a checkpoint, so that it is not the one that was written; says what."""
    name = chance.choice(FILES)
    path = place / name
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        content[at] = (content[at] + chance.randrange(1, 256)) % 256
    elif kind == "cut":
        del content[at:]
    elif kind == "grow":
        content += bytes(chance.randrange(1, 50))
    elif kind == "zeros":
        count = chance.randrange(1, len(content) - at + 1)
        content[at : at + count] = b"\xff" * count if not any(content[at : at + count]) else bytes(count)
    elif kind == "empty":
        content.clear()
    elif kind == "swap":
        content = bytearray((older / name).read_bytes())
    elif kind == "older":  # all of an earlier one under this one's name
        shutil.rmtree(place)
        shutil.copytree(older, place)
        return "older"
    elif kind == "shuffle":
        other = chance.choice([n for n in FILES if n != name])
        content = bytearray((place / other).read_bytes())
    elif kind == "repeat":
        content += bytes(content)
    if kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        path.write_bytes(content)
    return name


def test_two_hundred_and_forty_damaged_checkpoints_are_found_and_the_one_before_is_used(tmp_path, tell):
    chance = random.Random(7)
    found = 0
    for _ in range(20):
        for kind in KINDS:
            root = tmp_path / "checkpoints"
            if root.exists():
                shutil.rmtree(root)
            older, newer = (save_checkpoint(root, make(step, size=40)) for step in (1, 2))
            what = damage(newer, older, kind, chance)
            problem = find_damage(newer)
            assert problem, (kind, what)
            lines: list[str] = []
            loaded = load_newest(root, lines.append)
            assert same(loaded, make(1, size=40)), (kind, what)
            assert len(lines) == 1, (kind, what)
            assert "step-000002 is damaged (" in lines[0]
            assert lines[0].endswith("; going on from step-000001")
            assert newer.exists()
            found += 1
    assert found == 240
    tell(f"{found} damaged checkpoints, all found")


@pytest.fixture
def done(tmp_path):
    """A run that ended, its data, and what it wrote."""
    data = make_folder(tmp_path / "data", 2)
    out = tmp_path / "a.safetensors"
    train_adapter(data, make_tiny_base(), RECIPE, out)
    return data, out, out.read_bytes()


def snapshot(run):
    return {p: p.read_bytes() for p in sorted(run.folder.rglob("*")) if p.is_file() and p.name != "lock"}


@pytest.mark.parametrize("name", ["origin.json", "recipe.toml", "done.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN', bytes(200), b"[" * 100_000])
def test_a_damaged_file_of_a_run_is_one_line_and_deletes_nothing(done, name, content):
    data, out, _ = done
    run = Run(out)
    (run.folder / name).write_bytes(content)
    before = snapshot(run)
    with pytest.raises(RunError) as raised:
        train_adapter(data, make_tiny_base(), RECIPE, out)
    assert "\n" not in str(raised.value)
    assert str(run.folder) in str(raised.value)
    assert "--restart" in str(raised.value)
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["origin.json", "recipe.toml"])
def test_checkpoints_without_what_they_belong_to_are_not_deleted(done, name):
    data, out, whole = done
    run = Run(out)
    out.unlink()
    (run.folder / name).unlink()
    before = snapshot(run)
    with pytest.raises(RunError, match=f"has checkpoints but no {name}.*bring it back"):
        train_adapter(data, make_tiny_base(), RECIPE, out)
    assert snapshot(run) == before
    train_adapter(data, make_tiny_base(), RECIPE, out, restart=True)
    assert out.read_bytes() == whole


def test_a_run_whose_checkpoints_are_all_damaged_stops_and_deletes_nothing(done):
    data, out, _ = done
    run = Run(out)
    run.done.unlink()
    for place in run.checkpoints.iterdir():
        (place / "state.json").write_text("{}")
    before = snapshot(run)
    with pytest.raises(RunError, match=r"no checkpoint in .* can be used: step-000003 is damaged .*step-000002 is dam"):
        train_adapter(data, make_tiny_base(), RECIPE, out)
    assert snapshot(run) == before


def test_metrics_that_are_damaged_are_kept_up_to_there(done):
    data, out, whole = done
    run = Run(out)
    run.done.unlink()
    shutil.rmtree(run.checkpoints / "step-000003")
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join(lines[:2]) + bytes(50) + b'5\n{"step": "x"}\n' + lines[2][:9])
    train_adapter(data, make_tiny_base(), RECIPE, out)
    assert out.read_bytes() == whole
    assert [line[:11] for line in run.metrics.read_bytes().splitlines()] == [b'{"step": %d,' % n for n in (1, 2, 3)]

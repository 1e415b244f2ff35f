"""Checkpoints are whole or not there, whatever fails."""

import shutil

import pytest
import torch

from sdlora.errors import RunError
from sdlora.training import checkpoint as module
from sdlora.training.checkpoint import Checkpoint, find_damage, load_newest, save_checkpoint


def make(step):
    generator = torch.Generator().manual_seed(step)
    factors = {
        "unet.a.down": torch.randn(3, 4, generator=generator),
        "unet.a.up": torch.randn(5, 3, generator=generator),
    }
    optimizer = {"step/unet.a.down": torch.tensor(float(step)), "exp_avg/unet.a.down": torch.randn(3, 4)}
    return Checkpoint(step, factors, optimizer, {"threads": 2, "loss_scaler": None})


def same(a, b):
    return (
        a.step == b.step
        and all(torch.equal(a.factors[n], b.factors[n]) for n in a.factors.keys() | b.factors.keys())
        and all(torch.equal(a.optimizer[n], b.optimizer[n]) for n in a.optimizer.keys() | b.optimizer.keys())
    )


@pytest.fixture
def lines():
    return []


def test_reads_back_what_was_saved(tmp_path, lines):
    saved = make(7)
    save_checkpoint(tmp_path, saved)
    loaded = load_newest(tmp_path, lines.append)
    assert same(loaded, saved)
    assert loaded.state == {"threads": 2, "loss_scaler": None, "step": 7}
    assert lines == []


def test_nothing_saved_is_none(tmp_path, lines):
    assert load_newest(tmp_path / "checkpoints", lines.append) is None
    assert lines == []


def test_keeps_the_newest_two(tmp_path):
    for step in (5, 10, 15, 1000000, 1000005):
        save_checkpoint(tmp_path, make(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-1000005"]


@pytest.mark.parametrize("name", ["factors.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_one_line(tmp_path, lines, name, how):
    before = make(1)
    save_checkpoint(tmp_path, before)
    path = save_checkpoint(tmp_path, make(2)) / name
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[-5] ^= 0x40  # in the tensors, not in their header
    path.write_bytes(content if how == "flip" else content[:-5])
    if how == "gone":
        path.unlink()
    assert same(load_newest(tmp_path, lines.append), before)
    assert len(lines) == 1
    assert "step-000002 is damaged" in lines[0]
    assert "going on from step-000001" in lines[0]


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path, lines):
    for place in [save_checkpoint(tmp_path, make(step)) for step in (1, 2)]:
        (place / "state.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError) as raised:
        load_newest(tmp_path, lines.append)
    assert "step-000002 is damaged (state.json has 2 bytes instead of 52), step-000001 is damaged" in str(raised.value)
    assert str(raised.value).endswith("bring one back from a copy, or start over with --restart")
    assert lines == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_of_the_same_or_a_later_step_is_replaced(tmp_path, lines):
    save_checkpoint(tmp_path, make(1))
    for step in (2, 3):
        shutil.copytree(tmp_path / "step-000001", tmp_path / f"step-{step:06d}")
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{}")
    save_checkpoint(tmp_path, make(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert same(load_newest(tmp_path, lines.append), make(2)) is False  # the random optimizer part is new each time
    assert load_newest(tmp_path, lines.append).step == 2


def test_leftovers_of_a_killed_run_go(tmp_path):
    (tmp_path / "step-000004.tmp-123").mkdir()
    (tmp_path / "step-000004.tmp-123" / "factors.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, make(5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_a_disk_that_gives_back_other_bytes_is_an_error_and_prunes_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, make(step))
    write = module.write_synced

    def write_wrongly(path, content):
        write(path, content[:-1] + b"?" if path.name == "factors.safetensors" else content)

    monkeypatch.setattr(module, "write_synced", write_wrongly)
    with pytest.raises(RunError, match="check the disk"):
        save_checkpoint(tmp_path, make(3))
    assert not find_damage(tmp_path / "step-000001")
    assert not find_damage(tmp_path / "step-000002")

"""The power goes at every moment of a save, of a whole run and of a restart: old state or new, and never a mix."""

import dataclasses
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from disk_calls import Call, let, watching
from pictures import make_folder
from power import MOST, Disk, Node, address, write_out
from states import make, same
from tiny import make_tiny_base

from sdlora.adapter.delta import Adapter, LowRank
from sdlora.adapter.file import read_adapter, write_adapter
from sdlora.config import Recipe
from sdlora.errors import RunError
from sdlora.training.checkpoint import find_damage, load_newest, save_checkpoint
from sdlora.training.loop import train_adapter
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
RECIPE = Recipe(
    steps=4, batch_size=1, rank=1, warmup_steps=1, precision="fp32", checkpoint_every=1, learning_rate=1e-2,
    flip=False, preview=("a cat",), preview_every=2, schedule="constant",
)  # fmt: skip


class Moments:
    """Everything that may be on the disk, moment by moment of some recorded calls; each state is looked at once."""

    def __init__(self, root: Path, place: Path, most: int = MOST) -> None:
        self.disk, self.place, self.most = Disk(root), place, most
        self.seen: set[object] = set()
        self.looked = 0

    def after(self, calls: list[Call], number: int):
        """The states in which the disk may be after so many calls, each written out to a folder."""
        for node in self.disk.crashes(number, self.most):
            self.looked += 1
            key = (number, address(node))
            if key not in self.seen:
                self.seen.add(key)
                yield self._write(node)

    def _write(self, node: Node) -> Path:
        if self.place.exists():
            shutil.rmtree(self.place)
        write_out(node, self.place)
        return self.place


def record(root: Path, work):
    with watching(root, let) as calls:
        work()
    return calls


@pytest.mark.parametrize("before", [(), (1,), (1, 2)])
def test_a_save_is_there_or_is_not(tmp_path, before, tell):
    root = tmp_path / "run"
    root.mkdir()
    for step in before:
        save_checkpoint(root / "checkpoints", make(step))
    moments = Moments(root, tmp_path / "after")
    calls = record(root, lambda: save_checkpoint(root / "checkpoints", make(3)))
    assert len(calls) > 15
    found = []
    for number in range(len(calls) + 1):
        for place in moments.after(calls, number):
            checkpoint = load_newest(place / "checkpoints", lambda line: None)
            if checkpoint is None:
                assert not before, number
            else:
                assert same(checkpoint, make(checkpoint.step)), number
                assert checkpoint.step in {3, *before[-1:]}, number
            found.append((number, checkpoint.step if checkpoint else 0))
            save_checkpoint(place / "checkpoints", make(4))  # whatever was left, the next save is whole
            assert same(load_newest(place / "checkpoints", lambda line: None), make(4))
            assert all(not find_damage(p) for p in (place / "checkpoints").iterdir())
        if number < len(calls):
            moments.disk.apply(calls[number])
    renamed = next(i for i, call in enumerate(calls) if call.kind == "rename")
    assert {step for number, step in found if number <= renamed} == {before[-1] if before else 0}
    assert {step for number, step in found if number >= renamed + 2} == {3}  # the folder is synced behind the rename
    tell(f"{moments.looked:,} states of the disk")
    assert moments.looked > 60


def test_the_model_finds_a_save_that_syncs_too_little(tmp_path, monkeypatch):
    """The same, with each kind of sync left out: each is needed, and the test is one that can fail."""
    from sdlora import disk
    from sdlora.training import checkpoint as module

    for left_out in ("files", "the folder before its rename", "the folder of checkpoints"):
        root = tmp_path / left_out / "run"
        root.mkdir(parents=True)
        for step in (1, 2):
            save_checkpoint(root / "checkpoints", make(step))
        with monkeypatch.context() as patch:
            if left_out == "files":
                patch.setattr(module, "write_synced", lambda path, content: path.open("wb").write(content))
            else:
                inner = left_out.endswith("rename")
                patch.setattr(
                    module,
                    "sync_folder",
                    lambda place, inner=inner: None if (".tmp-" in place.name) == inner else disk.sync_folder(place),
                )
            moments = Moments(root, tmp_path / "after")
            calls = record(root, lambda root=root: save_checkpoint(root / "checkpoints", make(3)))
        wrong = 0
        for number in range(len(calls) + 1):
            for place in moments.after(calls, number):
                try:
                    checkpoint = load_newest(place / "checkpoints", lambda line: None)
                except RunError:
                    checkpoint = None
                wrong += checkpoint is None or not same(checkpoint, make(checkpoint.step)) or checkpoint.step < 2
                wrong += number == len(calls) and (checkpoint is None or checkpoint.step != 3)
                damaged = [p for p in (place / "checkpoints").glob("step-??????") if find_damage(p)]
                wrong += any(p.name == "step-000003" for p in damaged)
            if number < len(calls):
                moments.disk.apply(calls[number])
        assert wrong > 0, left_out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of four steps, its calls, and what they came to."""
    place = tmp_path_factory.mktemp("whole")
    data, root = make_folder(place / "data", 2), place / "out"
    root.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = Disk(root)
    calls = record(root, lambda: train_adapter(data, make_tiny_base(), RECIPE, root / "a.safetensors"))
    yield data, root, start, calls
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_run_goes_on_from_what_is_left_to_the_same_bytes(run, tmp_path, tell):
    data, root, start, calls = run
    whole = (root / "a.safetensors").read_bytes()
    moments = Moments(root, tmp_path / "after", 150)
    moments.disk = start
    chance = random.Random(0)
    saved, resumed = 0, 0
    for number in range(len(calls) + 1):
        for place in moments.after(calls, number):
            run = Run(place / "a.safetensors")
            checkpoint = load_newest(run.checkpoints, lambda line: None)
            step = checkpoint.step if checkpoint else 0
            assert saved <= step <= saved + 1, number
            assert [row["step"] for row in read_rows(run.metrics)][:step] == list(range(1, step + 1)), number
            if checkpoint is not None:  # nobody could tell whose they are without
                assert run.recipe.exists(), number
                assert run.origin.exists(), number
            if run.out.exists():
                assert run.out.read_bytes() == whole, number
            if run.done.exists():
                assert run.out.exists(), number
            if chance.random() < 0.03 and resumed < 40:
                train_adapter(data, make_tiny_base(), RECIPE, run.out)
                assert run.out.read_bytes() == whole, number
                assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3, 4]
                assert not list(place.rglob("*.tmp-*"))
                resumed += 1
        if number < len(calls):
            call = calls[number]
            moments.disk.apply(call)
            if call.kind == "sync folder" and call.path.endswith("checkpoints"):
                saved = max([saved, *_named_steps(moments.disk, root)])
    assert saved == RECIPE.steps
    assert resumed >= 20
    tell(f"{moments.looked:,} states of the disk after {len(calls)} calls, {resumed} of them gone on from")


def _named_steps(disk: Disk, root: Path) -> list[int]:
    names = disk.find(str(Path(disk.root_path) / "a.run" / "checkpoints")).synced_names
    return [int(name[5:]) for name in names if name[5:].isdigit()]


def test_a_restart_leaves_the_old_run_or_none(run, tmp_path, tell):
    _, root, _, _ = run
    work = tmp_path / "work"
    shutil.copytree(root, work)
    other = dataclasses.replace(RECIPE, rank=2)
    origin = {"pictures or captions": "x"}
    moments = Moments(work, tmp_path / "after", 40)
    calls = record(work, lambda: Run(work / "a.safetensors").start(other, origin, restart=True))
    told = set()
    for number in range(len(calls) + 1):
        for place in moments.after(calls, number):
            run = Run(place / "a.safetensors")
            for recipe in (RECIPE, other):
                try:
                    told.add(run.start(recipe, origin, restart=False))
                except RunError as error:
                    told.add(str(error)[len(str(place)) :][:25])
            assert run.start(other, origin, restart=True) is False
            assert not list(run.checkpoints.glob("*")), number
            assert run.out.read_bytes() == (root / "a.safetensors").read_bytes()
        if number < len(calls):
            moments.disk.apply(calls[number])
    assert {type(x) for x in told} == {bool, str}
    tell(f"{moments.looked:,} states of the disk")


def test_a_lora_is_the_old_one_or_the_new(tmp_path):
    root = tmp_path / "loras"
    root.mkdir()

    def adapter(value: float) -> Adapter:
        return Adapter({Q: LowRank(torch.full((1, 4), value), torch.ones(3, 1), 1.0)})

    write_adapter(adapter(1), root / "a.safetensors")
    moments = Moments(root, tmp_path / "after")
    calls = record(root, lambda: write_adapter(adapter(2), root / "a.safetensors"))
    found = []
    for number in range(len(calls) + 1):
        for place in moments.after(calls, number):
            held = read_adapter(place / "a.safetensors").deltas[Q].down[0, 0].item()
            found.append((number, held))
        if number < len(calls):
            moments.disk.apply(calls[number])
    assert {held for _, held in found} == {1.0, 2.0}
    assert {held for number, held in found if number == len(calls)} == {2.0}

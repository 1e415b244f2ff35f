"""What trackers are told: the numbers of metrics.jsonl and the recipe, no path; and nothing changes by it."""

import dataclasses
import getpass
import os
import socket
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import make_folder
from tiny import make_tiny_base

from sdlora.cli import main
from sdlora.config import Recipe, compare
from sdlora.errors import ConfigError, RunError, RunInterrupted
from sdlora.training import loop, trackers
from sdlora.training.loop import train_adapter
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run

RECIPE = Recipe(
    steps=4, batch_size=2, rank=2, warmup_steps=2, precision="fp32", checkpoint_every=2, learning_rate=1e-2,
    validation_share=0.2, validate_every=2,
)  # fmt: skip
NAMES = ("loss", "lr", "grad_norm", "validation_loss")


class Noted(tracking.GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "wandb", False
    made: list["Noted"] = []  # noqa: RUF012

    def __init__(self, run_name, **options):
        super().__init__()
        self.run_name, self.options = run_name, options
        self.settings, self.rows, self.finished = {}, [], 0
        self.made.append(self)

    tracker = property(lambda self: self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **options):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 5)


@pytest.fixture
def noted(monkeypatch):
    """wandb, replaced."""
    monkeypatch.setattr(Noted, "made", [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Noted)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [*tracking._available_trackers, LoggerType("wandb")])
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that it is put back afterwards, whatever a run sets
    monkeypatch.delenv("TRACKIO_DIR")
    return Noted.made


def change(*names, **values):
    return dataclasses.replace(RECIPE, tracker=names, **values)


def test_a_tracker_is_told_each_row_and_the_recipe(folder, tmp_path, noted):
    out = tmp_path / "mine.safetensors"
    train_adapter(folder, make_tiny_base(), change("wandb", merge=(), trigger="mio"), out)
    (tracker,) = noted
    assert (tracker.run_name, tracker.options["name"]) == ("sdlora", "mine")
    assert Path(tracker.options["dir"]) == Run(out).trackers
    rows = read_rows(Run(out).metrics)
    assert [step for step, _ in tracker.rows] == [1, 2, 3, 4]
    for row, (_, values) in zip(rows, tracker.rows, strict=True):
        assert {k: v for k, v in values.items() if k in NAMES} == {k: row[k] for k in NAMES if k in row}
        assert values["steps_per_s"] == pytest.approx(1 / row["seconds"])
    assert [("validation_loss" in values) for _, values in tracker.rows] == [False, True, False, True]
    told = tracker.settings
    assert (told["base"], told["rank"], told["trigger"], told["targets"]) == ("tiny", 2, "mio", "attention")
    assert told["alpha"] == "open"
    assert not told.keys() & {"merge", "continue_from", "tracker", "preview"}
    for value in told.values():
        assert type(value) in (bool, int, float, str)
        assert not any(x in str(value) for x in (str(tmp_path), str(folder), socket.gethostname()))
    assert tracker.finished == 1


def test_steps_of_an_init_word_and_skipped_ones_are_told_as_numbers(folder, tmp_path, noted, monkeypatch):
    found = iter(["", "loss", "", ""])
    monkeypatch.setattr(loop, "find_fault", lambda loss, norm: next(found))
    recipe = change("wandb", trigger="mio", init_word="cat", init_steps=2)
    train_adapter(folder, make_tiny_base(), recipe, tmp_path / "a.safetensors")
    rows = read_rows(tmp_path / "a.run" / "metrics.jsonl")
    assert [row.get("learnt") for row in rows] == ["init_word", "init_word", None, None]
    assert [row.get("skipped") for row in rows] == [None, "loss", None, None]
    assert all(type(v) in (int, float) for _, values in noted[0].rows for v in values.values())
    assert len(noted[0].rows) == 4


def test_a_tracker_is_closed_where_a_run_ends_early(folder, tmp_path, noted, monkeypatch):
    monkeypatch.setattr(loop, "find_fault", lambda loss, norm: "loss")
    recipe = dataclasses.replace(change("wandb"), max_skipped_steps=0)
    with pytest.raises(RunError, match="is not finite"):
        train_adapter(folder, make_tiny_base(), recipe, tmp_path / "out.safetensors")
    assert [tracker.finished for tracker in noted] == [1]


def test_a_tracker_decides_nothing(folder, tmp_path, noted):
    outs = [tmp_path / name / "out.safetensors" for name in ("with", "without")]
    for out, names in zip(outs, (("wandb",), ()), strict=True):
        train_adapter(folder, make_tiny_base(), change(*names), out)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert compare(change("wandb"), change()) == []
    assert [len(tracker.rows) for tracker in noted] == [4]  # the first run was tracked
    assert not Run(outs[1]).trackers.exists()


def test_tensorboard_holds_the_numbers_of_the_metrics_and_forgets_what_is_done_again(folder, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out.safetensors"
    saved, fail = loop.Record.save, [3]

    def stop(record, step):  # the run is killed with step 3 told and not saved
        if step == 4 and fail.pop(0):
            raise KeyboardInterrupt
        saved(record, step)

    monkeypatch.setattr(loop.Record, "save", stop)
    with pytest.raises(RunInterrupted):
        train_adapter(folder, make_tiny_base(), change("tensorboard"), out)
    monkeypatch.setattr(loop.Record, "save", saved)
    train_adapter(folder, make_tiny_base(), change("tensorboard"), out)

    rows = read_rows(Run(out).metrics)
    events = EventAccumulator(str(Run(out).trackers / "sdlora"))
    events.Reload()
    for name in NAMES:
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    assert [e.step for e in events.Scalars("steps_per_s")] == [1, 2, 3, 4]
    kept = yaml.safe_load(next(Run(out).trackers.rglob("hparams.yml")).read_text())
    assert (kept["base"], kept["steps"], kept["learning_rate"]) == ("tiny", 4, 0.01)
    text = b"".join(p.read_bytes() for p in Run(out).trackers.rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in text
    assert f"/{getpass.getuser()}/".encode() not in text

    train_adapter(folder, make_tiny_base(), change(), out, restart=True)
    assert not Run(out).trackers.exists()


def test_a_tracker_without_its_package_is_refused_before_anything(folder, tmp_path, monkeypatch, capsys):
    real = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else real(name))
    monkeypatch.setattr("sdlora.bases.family.load_base", lambda *a, **b: pytest.fail("a base was loaded"))
    out = tmp_path / "out.safetensors"
    assert main(["train", str(folder), "--tracker", "trackio", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said == 'error: tracker = "trackio" needs the package trackio; pip install trackio, or leave it out\n'
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="needs the package trackio"):
        train_adapter(folder, make_tiny_base(), change("trackio"), out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [("mlflow",), ("wandb", "wandb"), ("",)])
def test_an_unknown_or_doubled_tracker_is_refused(names):
    with pytest.raises(ConfigError, match="give tensorboard, wandb or trackio, each once"):
        Recipe(tracker=names)


def test_trackio_is_told_to_keep_its_files_in_the_run_folder(folder, tmp_path, noted, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Noted)
    monkeypatch.setattr(
        "accelerate.tracking._available_trackers", [*tracking._available_trackers, LoggerType("trackio")]
    )
    out = tmp_path / "out.safetensors"
    train_adapter(folder, make_tiny_base(), change("wandb", "trackio", steps=1, warmup_steps=0), out)
    assert len(noted) == 2
    assert Path(os.environ["TRACKIO_DIR"]) == Run(out).trackers / "trackio"

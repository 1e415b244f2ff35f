"""The presets of `configs/`: each parses, says what it will do, and trains on a tiny base of its family."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import tomllib
from pathlib import Path

import pytest

from sdlora.adapter.file import read_adapter
from sdlora.cli import main
from sdlora.config import DEFAULTS, recipe_from_toml, recipe_to_toml
from sdlora.training.loop import train_adapter
from tests.pictures import make_folder
from tests.tiny import make_tiny_base, save_tiny_pipeline

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = {
    "mini-ink": "mini",
    "mini-style": "mini",
    "mini-subject": "mini",
    "sd15-style": "sd1",
    "sd15-subject": "sd1",
    "sd15-6gb": "sd1",
    "sd21-style": "sd2",
    "sdxl-style": "sdxl",
    "sdxl-subject": "sdxl",
    "sdxl-12gb": "sdxl",
    "sdxl-8gb": "sdxl",
    "sdxl-vpred-style": "sdxl",
}
V = {"prediction_type": "v_prediction"}
SCHEDULES = {"sd21-style": V}
SMALL = {"resolution": 64, "steps": 2}
"""What makes a preset's run a matter of seconds."""
EFFECTS = {
    ("weighting", "debiased"): "debiased weighting",
    ("quantise", "nf4"): "linear layers in 4 bits",
    ("quantise", "int8"): "linear layers in 8 bits",
    ("recompute", "feed-forward"): "feed-forward layers computed again",
    ("recompute", "all"): "everything computed again",
}
"""By field and value, what a run says of it."""

each_preset = pytest.mark.parametrize("name", FAMILIES)


def path_of(name: str) -> Path:
    return CONFIGS / f"{name}.toml"


def replace_nf4(name: str) -> dict[str, str]:
    """The other kind of quantisation, which needs no package and goes the same way, where nf4's is not there."""
    missing = not importlib.util.find_spec("bitsandbytes")
    return {"quantise": "int8"} if missing and recipe_from_toml(path_of(name)).quantise == "nf4" else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By preset, the name of a base of its family."""
    places: dict[str, str] = {}
    for name, family in FAMILIES.items():
        place = tmp_path_factory.mktemp(name) / "base"
        places[name] = (
            "mini" if family == "mini" else str(save_tiny_pipeline(place, family=family, schedule=SCHEDULES.get(name)))
        )
    return places


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def test_every_preset_is_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(FAMILIES)


@each_preset
def test_a_preset_says_what_it_is_for_and_what_it_takes(name):
    text = path_of(name).read_text(encoding="utf-8")
    opening = re.match(r"(?:#.*\n)+", text)
    assert opening is not None
    assert f"--config configs/{name}.toml" in opening[0]
    if FAMILIES[name] != "mini":
        assert re.search(r"^# Memory and time: (not measured|measured)", opening[0], re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 130


@each_preset
def test_a_preset_says_nothing_twice_and_scales_nothing(name):
    recipe = recipe_from_toml(path_of(name))
    assert recipe.alpha is None
    assert recipe.scale_alpha == recipe.rank
    assert not recipe.rank_stabilised
    values = tomllib.loads(path_of(name).read_text(encoding="utf-8"))
    said = {key for key in values if values[key] == DEFAULTS[key]}
    assert said <= {"base", "batch_size", "caption_dropout", "learning_rate", "precision", "rank", "seed",
                    "text_encoder"}, "a default is worth a line only where its reason stands beside it"  # fmt: skip


@each_preset
def test_nothing_of_a_preset_takes_effect_that_the_plan_does_not_show(name, folder, bases, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    flags = ["--base", bases[name], "--resolution", "64", "--out", str(out)]
    other = replace_nf4(name)
    flags += [word for key, value in other.items() for word in (f"--{key}", value)]
    assert main(["train", str(folder), "--config", str(path_of(name)), *flags, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    recipe = recipe_from_toml(path_of(name), {"base": bases[name], "resolution": 64} | other)
    differing = [line for line in recipe_to_toml(recipe).splitlines() if not line.startswith("#")]
    shown = [line.removeprefix("  ") for line in plan.partition("\nrecipe\n")[2].splitlines()]
    for line in differing:
        assert line in shown
    values = tomllib.loads(path_of(name).read_text(encoding="utf-8"))
    for key in values.keys() - {"base", "resolution"}:
        assert any(line.startswith(f"{key} = ") for line in differing), key
    assert f"length       {recipe.steps} steps x {recipe.images_per_step} = " in plan
    assert list(tmp_path.iterdir()) == []


@each_preset
def test_a_preset_trains_two_steps_on_a_base_of_its_family(name, folder, bases, tmp_path, capsys):
    small: dict[str, object] = SMALL | replace_nf4(name)
    small |= {"init_steps": 1} if recipe_from_toml(path_of(name)).init_word else {}
    out = tmp_path / "out.safetensors"
    if FAMILIES[name] == "mini":
        recipe = recipe_from_toml(path_of(name), small | {"precision": "fp32"})
        train_adapter(folder, make_tiny_base(), recipe, out)
    else:
        flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
        flags += ["--base", bases[name], "--device", "cpu", "--precision", "fp32", "--out", str(out)]
        assert main(["train", str(folder), "--config", str(path_of(name)), *flags]) == 0
        recipe = recipe_from_toml(path_of(name), small)
    rows = [json.loads(line) for line in (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 100 for row in rows)
    adapter = read_adapter(out)
    assert adapter.card.family == FAMILIES[name]
    said = " ".join(capsys.readouterr().err.split())
    for value, words in EFFECTS.items():
        assert (words in said) == (getattr(recipe, value[0]) == value[1]), value
    settings = adapter.card.settings
    values = tomllib.loads(path_of(name).read_text(encoding="utf-8")) | small
    for key in values.keys() - {"base", "precision", "checkpoint_every", "recompute", "small_buckets"}:
        kept = list(settings[key]) if isinstance(settings[key], tuple) else settings[key]
        assert kept == values[key], key
    learnt = [path for path, delta in adapter.deltas.items() if float(delta.weight().abs().max()) > 0]
    parts = {path.partition(".")[0] for path in learnt}
    assert parts == ({"unet", "text_encoder"} if recipe.text_encoder else {"unet"})
    ranks = {delta.rank for delta in adapter.deltas.values()}
    assert ranks == {recipe.rank} or (recipe.block_ranks and recipe.rank in ranks)
    if "vpred" in name or name.startswith("sd21"):
        assert settings["prediction_type"] == "v_prediction"


def test_the_velocity_preset_trains_down_to_pure_noise(folder, bases, tmp_path, monkeypatch):
    from sdlora.training import loop

    seen = []
    original = loop.fit
    monkeypatch.setattr(
        loop, "fit", lambda base, *more: (seen.append(float(base.alphas_cumprod[-1])), original(base, *more))
    )
    flags = ["--steps", "1", "--resolution", "64", "--device", "cpu", "--precision", "fp32"]
    for name in ("sdxl-vpred-style", "sdxl-style"):
        out = tmp_path / f"{name}.safetensors"
        assert (
            main(
                ["train", str(folder), "--config", str(path_of(name)), "--base", bases[name], "--out", str(out), *flags]
            )
            == 0
        )
    assert seen[0] == 0
    assert seen[1] > 0


def test_the_published_figures_have_a_row_for_every_preset():
    from benchmarks.presets import COLUMNS, NOT_MEASURED, TABLE, list_presets, list_rows, render

    recipes = list_presets()
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(FAMILIES) == list(recipes)
    figures = {"steps_bytes": 3 * 2**30, "encoding_bytes": 2**29, "seconds": 0.25, "on": "a card"}
    table = list_rows(recipes, {"sdxl-8gb": figures})
    assert "| `sdxl-8gb` | 4 in 4 passes | 3.00 GiB | 0.50 GiB | 0.250 | a card |" in table
    assert f"| `sd15-style` | 4 |{f' {NOT_MEASURED} |' * 3} – |" in table
    assert all(line.count("|") == len(COLUMNS) + 1 for line in table)
    if "GiB |" not in TABLE.read_text(encoding="utf-8"):
        assert TABLE.read_text(encoding="utf-8") == render(recipes, {})


def test_a_measurement_trains_the_preset_as_it_stands(bases, tmp_path):
    from benchmarks.presets import STEPS, measure

    found = measure("sd15-style", bases["sd15-style"], tmp_path, "cpu", resolution=64, precision="fp32", batch_size=1)
    assert found.keys() == {"steps_bytes", "encoding_bytes", "seconds", "on"}
    assert found["seconds"] > 0
    recipe = recipe_from_toml(tmp_path / "out.run" / "recipe.toml")
    assert (recipe.rank, recipe.buckets, recipe.steps) == (16, True, STEPS)
    rows = (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == STEPS

"""`--memory`: the settings that it picks fit, cost least, and leave the steps what they were."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdlora.cli import main
from sdlora.config import Recipe
from sdlora.errors import ConfigError
from sdlora.training.fitting import RESERVE, describe_changes, fit_recipe, read_size
from sdlora.training.memory import estimate_memory
from tests.pictures import make_folder
from tests.tiny import save_tiny_pipeline

CPU = torch.device("cpu")
SIDE = (256, 256)
RECIPE = Recipe(steps=4, batch_size=4, rank=2, precision="fp32", resolution=256)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "sd1", family="sd1")


def need(source, **values) -> int:
    return estimate_memory(source, dataclasses.replace(RECIPE, **values), SIDE)["total"]


def budget(size_bytes: float) -> str:
    """The smallest memory that leaves the reserve beside this much."""
    return f"{size_bytes / (1 - RESERVE) / 1000 + 1:.0f}KB"


def test_sizes_are_read_as_people_write_them():
    assert read_size("8GB") == 8 * 10**9 == read_size("8") == read_size(" 8 gb ")
    assert read_size("7.5GiB") == 7.5 * 2**30
    assert read_size("6000MB") == 6 * 10**9 == read_size("6000m")
    assert read_size("1TiB") == 2**40
    for bad in ("", "0", "0.0GB", "-1GB", "8 pounds", "GB", "1e3GB", "8GBB", "1.2.3GB", "nan", "∞", "８GB"):
        with pytest.raises(ConfigError, match="no size; give one such as 8GB"):
            read_size(bad)


def test_what_fits_is_left_as_it_is(source):
    assert fit_recipe(source, RECIPE, SIDE, budget(need(source)), CPU) is RECIPE


def test_the_cheapest_that_fits_is_picked(source):
    half = {"batch_size": 2, "accumulation": 2}
    assert need(source, **half) < need(source)
    assert need(source, recompute="feed-forward") < need(source)
    just_less = fit_recipe(source, RECIPE, SIDE, budget(need(source) - 5000), CPU)
    assert just_less == dataclasses.replace(RECIPE, **half)  # costs less than to compute anything twice
    many = dataclasses.replace(RECIPE, batch_size=16)
    third = estimate_memory(source, dataclasses.replace(many, batch_size=4, accumulation=4), SIDE)["total"]
    found = fit_recipe(source, many, SIDE, budget(third), CPU)
    assert found == dataclasses.replace(many, batch_size=4, accumulation=4)


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 0.65, 0.8, 0.95])
def test_what_is_picked_fits_with_its_reserve_and_keeps_the_step(source, share):
    size = need(source) * share
    try:
        found = fit_recipe(source, RECIPE, SIDE, f"{size / 1000:.3f}KB", CPU)
    except ConfigError:
        assert need(source, batch_size=1, accumulation=4, recompute="all", quantise="int8") > size * (1 - RESERVE)
        return
    assert estimate_memory(source, found, SIDE)["total"] <= size * (1 - RESERVE)
    assert found.images_per_step == RECIPE.images_per_step
    changed = {f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(RECIPE, f.name)}
    assert changed <= {"batch_size", "accumulation", "recompute", "quantise"}


def test_what_saves_already_stays_and_batches_divide(source):
    recipe = dataclasses.replace(RECIPE, batch_size=15, accumulation=2, recompute="all", quantise="int8")
    size = estimate_memory(source, dataclasses.replace(recipe, batch_size=5, accumulation=6), SIDE)["total"]
    found = fit_recipe(source, recipe, SIDE, budget(size), CPU)
    assert (found.batch_size, found.accumulation, found.recompute, found.quantise) == (5, 6, "all", "int8")
    assert describe_changes(recipe, found) == "--batch-size 5 --accumulation 6"


def test_what_cannot_fit_says_what_the_leanest_needs(source):
    with pytest.raises(ConfigError) as raised:
        fit_recipe(source, RECIPE, SIDE, "10KB", CPU)
    assert "memory 10KB" in str(raised.value)
    assert "at 256 x 256 px needs" in str(raised.value)
    assert "--recompute all --quantise int8 --batch-size 1 --accumulation 4" in str(raised.value)


def test_the_verbs_say_and_do_it(source, tmp_path, capsys):
    data = make_folder(tmp_path / "data", 8, 256)
    flags = ["--base", str(source), "--resolution", "256", "--batch-size", "8", "--precision", "fp32", "--steps", "1"]
    recipe = dataclasses.replace(RECIPE, rank=16, alpha=16.0, batch_size=8)
    full = estimate_memory(source, recipe, SIDE)["total"]
    small = estimate_memory(source, dataclasses.replace(recipe, batch_size=4, accumulation=2), SIDE)["total"]
    assert small < full
    size = budget((small + full) / 2)
    assert main(["check", str(data), *flags, "--memory", size]) == 0
    said = capsys.readouterr()
    line = next(x for x in said.err.splitlines() if x.startswith(f"memory {size}: "))
    assert "--batch-size" in line
    assert main(["train", str(data), *flags, "--memory", size, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert line in said.err
    picked = int(line.split("--batch-size ")[1].split()[0])
    assert f"batch_size = {picked}\n" in said.out
    assert "1 steps x 8 = 8 images" in said.out
    out = tmp_path / "out.safetensors"
    assert main(["train", str(data), *flags, "--memory", size, "--out", str(out)]) == 0
    assert line in capsys.readouterr().err
    assert f"batch_size = {picked}\n" in (tmp_path / "out.run" / "recipe.toml").read_text()
    assert main(["train", str(data), *flags, "--memory", "1KB", "--out", str(tmp_path / "no.safetensors")]) == 2
    assert "error: memory 1KB" in capsys.readouterr().err
    assert not (tmp_path / "no.run").exists()

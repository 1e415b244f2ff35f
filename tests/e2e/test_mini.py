"""The built-in base and the demo, held to what a stranger would see; the judge does the looking."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import CAT, MOODS, draw, held_out_things, measure_names, named, share
from sdlora.adapter.file import read_adapter
from sdlora.bases.family import Base, load_base
from sdlora.bases.fast_layers import fast_layers
from sdlora.bases.mini.judge import Judge, load_judge
from sdlora.bases.sampling import make_noise, make_scheduler, sample
from sdlora.combining.plan import Plan, Stacked
from sdlora.config import recipe_from_toml
from sdlora.demo import LESSONS
from sdlora.training.adapting import attach_layers

ROOT = Path(__file__).parents[2]

# The goals; docs/quality.md has what the shipped weights reach.
NAMED_TOP5, INK, KEPT, STACKED = 75, 85, 0.8, 70
# The demo's limit, and what a step of it takes on the two cores that it is meant for when quiet: slower ones
# get more time, and what a step costs in passes of the UNet is a test of its own.
DEMO_S, STEP_S = 180, 0.22
WEIGHTS = ROOT / "sdlora" / "bases" / "mini" / "weights"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("mini", precision="bf16")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a user runs it."""
    out = tmp_path_factory.mktemp("demo")
    began_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "sdlora", "demo", "--out", str(out)], capture_output=True, text=True, check=False
    )
    (out / "seconds").write_text(str(time.perf_counter() - began_s))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{out / 'sheet.png'}\n" in done.stdout
    return out


def test_mini_is_small_and_loads_fast() -> None:
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) < 90e6
    load_base("mini")
    began_s = time.process_time()
    load_base("mini")
    assert time.process_time() - began_s < 2


def test_mini_latents_are_standardised(base: Base) -> None:
    pictures = [
        np.asarray(Image.open(p)) for d in ("ink", "clay", "cat") for p in sorted(Path(f"datasets/{d}").glob("*.png"))
    ]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, _ = base.encode_pictures(x)
    assert mean.mean().abs() < 0.25
    assert 0.7 < mean.std() < 1.4


def test_diffusers_opens_mini_and_draws_our_picture() -> None:
    from diffusers import StableDiffusionPipeline

    ours_base = load_base("mini")
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    pipe.scheduler = make_scheduler(ours_base)
    pipe.set_progress_bar_config(disable=True)
    latents = make_noise(5, 128, 128)[None]
    theirs = pipe("a penguin", latents=latents, num_inference_steps=6, guidance_scale=5.0).images[0]
    (ours,) = sample(ours_base, ["a penguin"], seeds=[5], steps=6, guidance=5.0)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2


def test_mini_names_its_things(base: Base, judge: Judge) -> None:
    figures = measure_names(base, judge)
    assert figures["top5 %"] >= NAMED_TOP5, figures


@pytest.mark.slow
def test_demo_takes_at_most_three_minutes(demo: Path) -> None:
    assert {p.name for p in demo.iterdir()} >= {"ink.safetensors", "cat.safetensors", "sheet.png"}
    busy = max(os.getloadavg()[:2]) >= 3  # now, or while it ran: such a machine says nothing about ours
    if (os.cpu_count() or 1) >= 2 and not busy:
        rows = [json.loads(row) for path in demo.glob("*.run/metrics.jsonl") for row in path.read_text().splitlines()]
        slower = max(1, statistics.mean(row["seconds"] for row in rows if "seconds" in row) / STEP_S)
        assert float((demo / "seconds").read_text()) < DEMO_S * slower


def test_a_step_costs_at_most_three_passes(base: Base) -> None:
    recipe = recipe_from_toml(LESSONS[0].preset, {"trigger": "ink style"})
    x, t = torch.randn(8, 4, 16, 16, dtype=base.dtype), torch.full((8,), 500)
    with torch.no_grad():
        text = base.encode_text(base.tokenize(["a cat"] * 8)[0])

    def step() -> None:
        base.predict(x, t, text).float().square().mean().backward()

    def only_pass() -> None:
        with torch.no_grad():
            base.predict(x, t, text)

    seconds: dict[Callable[[], None], list[float]] = {step: [], only_pass: []}
    with attach_layers(base, recipe), fast_layers(base.unet):
        for _ in range(6):  # in turns, so that both meet the same machine
            for work, own in seconds.items():
                began_s = time.perf_counter()
                work()
                own.append(time.perf_counter() - began_s)
    assert min(seconds[step]) <= 3 * min(seconds[only_pass])


@pytest.mark.slow
def test_demo_learns_the_style_and_keeps_some_of_the_things(demo: Path, base: Base, judge: Judge) -> None:
    style = read_adapter(demo / "ink.safetensors")
    things = held_out_things(LESSONS[0])
    seeds = [31] * len(things)
    plain = draw(base, [named(t) for t in things], seeds)
    inked = draw(base, [f"{named(t)}, ink style" for t in things], seeds, [(style, 1.0)])
    assert share([s == "ink" for s in judge.style_of(plain)]) <= 5
    assert share([s == "ink" for s in judge.style_of(inked)]) >= INK
    known = share([r < 5 for r in judge.rank_of(plain, things)])
    assert share([r < 5 for r in judge.rank_of(inked, things)]) >= KEPT * known


@pytest.mark.slow
def test_demo_stacks_style_and_subject(demo: Path, base: Base, judge: Judge) -> None:
    style, subject = (read_adapter(demo / f"{name}.safetensors") for name in ("ink", "cat"))
    prompts = [f"a {mood} mio cat, ink style" for mood in MOODS for _ in range(2)]
    seeds = list(range(41, 41 + len(prompts)))

    def look(stack: Stacked) -> tuple[float, float, float]:
        """Shares of pictures that show ink, the cat among the judge's first five, and both."""
        pictures = draw(base, prompts, seeds, stack)
        ink = [s == "ink" for s in judge.style_of(pictures)]
        cat = [r < 5 for r in judge.rank_of(pictures, [CAT] * len(pictures))]
        return share(ink), share(cat), share([i and c for i, c in zip(ink, cat, strict=True)])

    assert look([])[0] <= 5
    assert look([])[1] <= 10
    assert look([(subject, 1.0)])[1] >= 75
    assert look([(style, 1.0)])[2] <= 10
    assert look([(style, 1.0), (subject, 1.0)])[2] >= STACKED


@pytest.mark.slow
def test_diffusers_draws_our_picture_with_the_demo_lora(demo: Path) -> None:
    from diffusers import StableDiffusionPipeline

    ours_base = load_base("mini")
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    pipe.scheduler = make_scheduler(ours_base)
    pipe.set_progress_bar_config(disable=True)
    prompt, noise = "a penguin, ink style", {"latents": make_noise(5, 128, 128)[None], "num_inference_steps": 6}
    plain = pipe(prompt, **noise, guidance_scale=5.0).images[0]
    pipe.load_lora_weights(str(demo), weight_name="ink.safetensors")
    theirs = pipe(prompt, **noise, guidance_scale=5.0).images[0]
    with Plan.of([(read_adapter(demo / "ink.safetensors"), 1.0)]).applied(ours_base):
        (ours,) = sample(ours_base, [prompt], seeds=[5], steps=6, guidance=5.0)
    assert np.abs(np.asarray(plain, int) - np.asarray(theirs, int)).max() > 50
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2


@pytest.mark.slow
def test_demo_again_changes_nothing(demo: Path) -> None:
    before = {p.name: p.read_bytes() for p in demo.glob("*.safetensors")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sdlora", "train", str(LESSONS[0].data), "--config", str(LESSONS[0].preset)),
            *("--trigger", "ink style", "--out", str(demo / "ink.safetensors")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "finished already" in done.stderr
    assert {p.name: p.read_bytes() for p in demo.glob("*.safetensors")} == before


@pytest.mark.slow
def test_demo_files_say_what_they_are(demo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdlora", "inspect", "--json", str(demo / "ink.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    (told,) = json.loads(done.stdout)
    assert (told["format"], told["family"], told["base"], told["trigger"]) == ("kohya", "mini", "mini", "ink style")
    assert told["modules"]["unet"] == 40  # of 80: values and outputs
    text = (demo / "ink.safetensors").read_bytes()[:200_000].decode("latin-1")
    assert str(demo) not in text
    assert "datasets" not in text

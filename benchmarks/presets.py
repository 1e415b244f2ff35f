"""Memory and seconds a step of each preset on a GPU: `python -m benchmarks.presets`, which writes results/presets.md.

Bases are the real architectures under random weights, pictures are coloured noise: neither memory nor time hangs on
what is in them. Each preset runs in a process of its own. Without a GPU every row says "not measured".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sdlora.config import Recipe, recipe_from_toml

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "results" / "presets.md"
STEPS = 20
WARM_STEPS = 5
"""First steps that are not counted: memory is found and kernels are chosen in them."""
PICTURES = 8
GIB = 2**30
NOT_MEASURED = "not measured"
COLUMNS = ("preset", "pictures a step", "memory of the steps", "memory of encoding", "seconds a step", "on")


def list_presets() -> dict[str, Recipe]:
    """Every recipe of `configs/` by name."""
    return {path.stem: recipe_from_toml(path) for path in sorted((ROOT / "configs").glob("*.toml"))}


def family_of(preset: str) -> str:
    """The family of a preset's base, by the preset's name."""
    return {"mini": "mini", "sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[preset.partition("-")[0]]


def write_pictures(folder: Path, side_px: int) -> None:
    """Pictures of coloured noise in the three usual shapes, each with a caption."""
    from PIL import Image

    folder.mkdir()
    for i in range(PICTURES):
        wide, high = ((1, 1), (3, 2), (2, 3))[i % 3]
        size = (side_px * wide // min(wide, high), side_px * high // min(wide, high))
        noise = [Image.effect_noise(size, 40 + 5 * i) for _ in range(3)]
        Image.merge("RGB", noise).save(folder / f"{i}.png", compress_level=1)
        (folder / f"{i}.txt").write_text(f"noise, number {i}, in colour")


def write_base(family: str, place: Path, prediction: str) -> str:
    """The name of a full-size base of the family under random weights."""
    if family == "mini":
        return "mini"
    import torch

    from benchmarks.full_size import make_parts
    from sdlora.bases.checkpoint_writer import write_checkpoint

    path = place / f"{family}-{prediction}.safetensors"
    if not path.exists():
        write_checkpoint(make_parts(family, torch.float16), path, family, torch.float16, prediction=prediction)
    return str(path)


def measure(preset: str, base: str, place: Path, device: str = "cuda", **more: Any) -> dict[str, Any]:
    """Trains some steps as the preset says; memory in bytes that the allocator held at most, median seconds a step.

    `more` goes before the preset's values. On another device than a GPU memory counts as 0.
    """
    import torch

    from sdlora.bases.facts import read_base_facts
    from sdlora.training import loop

    values = {"base": base, "steps": STEPS, "checkpoint_every": 0, "warmup_steps": 0, **more}
    recipe = recipe_from_toml(ROOT / "configs" / f"{preset}.toml", values)
    before: list[int] = []
    fit, gpu = loop.fit, device == "cuda"

    def watch(*args: Any) -> None:
        before.append(torch.cuda.max_memory_reserved() if gpu else 0)
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        fit(*args)

    side_px = recipe.resolution or read_base_facts(base).resolution_px
    write_pictures(place / "data", side_px)
    out = place / "out.safetensors"
    loop.fit = watch
    try:
        loop.run_training(place / "data", recipe, out, device=device)
    finally:
        loop.fit = fit
    rows = [json.loads(line) for line in (place / "out.run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "steps_bytes": torch.cuda.max_memory_reserved() if gpu else 0,
        "encoding_bytes": before[0],
        "seconds": statistics.median(row["seconds"] for row in rows[WARM_STEPS:]),
        "on": f"{torch.cuda.get_device_name() if gpu else device}, torch {torch.__version__}",
    }


def list_rows(recipes: dict[str, Recipe], found: dict[str, dict[str, Any]]) -> list[str]:
    """The table, a row a preset; what was not found is not measured."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for name, recipe in recipes.items():
        passes = f" in {recipe.accumulation} passes" if recipe.accumulation > 1 else ""
        cells = [f"`{name}`", f"{recipe.images_per_step}{passes}"]
        if name in found:
            one = found[name]
            cells += [f"{one[key] / GIB:.2f} GiB" for key in ("steps_bytes", "encoding_bytes")]
            cells += [f"{one['seconds']:.3f}", one["on"]]
        else:
            cells += [NOT_MEASURED] * 3 + ["–"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def render(recipes: dict[str, Recipe], found: dict[str, dict[str, Any]]) -> str:
    """The page of results."""
    opening = [
        "# Memory and time of the presets",
        "",
        f"By `python -m benchmarks.presets`: the real architectures under random weights, {STEPS} steps of which the",
        f"first {WARM_STEPS} are not counted; memory is what torch's allocator held at most, to which the driver adds",
        "its own; a step is all of its passes. Rows without a figure were never run on a GPU.",
        "",
    ]
    return "\n".join([*opening, *list_rows(recipes, found)]) + "\n"


def run_all(names: list[str], place: Path) -> dict[str, dict[str, Any]]:
    """Each preset's figures, each from a process of its own; one that fails is said and left out."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        prediction = "v" if "vpred" in name or family_of(name) == "sd2" else "epsilon"
        base = write_base(family_of(name), place, prediction)
        with tempfile.TemporaryDirectory(dir=place) as own:
            command = [sys.executable, "-m", "benchmarks.presets", "--one", name, "--base", base, "--place", own]
            run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                print(f"{name}: failed with exit code {run.returncode}", file=sys.stderr)
            else:
                found[name] = json.loads(run.stdout.splitlines()[-1])
                print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", metavar="PRESET", nargs="*", help="presets to measure (default: all)")
    parser.add_argument("--one", metavar="PRESET", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.base, args.place)))
        return 0
    import torch

    recipes = list_presets()
    if unknown := set(args.names) - set(recipes):
        parser.error(f"no preset is called {', '.join(sorted(unknown))}; there are {', '.join(recipes)}")
    found: dict[str, dict[str, Any]] = {}
    if torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as place:
            found = run_all(args.names or list(recipes), Path(place))
    else:
        print("no GPU here: nothing is measured", file=sys.stderr)
    TABLE.write_text(render(recipes, found), encoding="utf-8")
    print(TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

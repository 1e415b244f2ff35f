"""How well the built-in base and its LoRAs do, as the shipped judge sees it: `python -m benchmarks.quality`.

names   the base draws what it is told: captions of 64 things, two seeds each
style   a style LoRA trained as the demo trains it, on 24 things that are not in its pictures
stack   style and subject together, 24 pictures for each pair of weights
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.adapter.delta import Adapter
from sdlora.bases.family import Base, load_base
from sdlora.bases.mini.judge import Judge, load_judge
from sdlora.bases.sampling import sample
from sdlora.combining.methods import METHODS
from sdlora.combining.plan import Plan, Stacked
from sdlora.config import recipe_from_toml
from sdlora.data.folder import scan_folder
from sdlora.demo import LESSONS, ROOT, TRIGGERS, Lesson, learn

THINGS = ROOT / "sdlora" / "bases" / "mini" / "weights" / "things.json"
CAT = "the cat"
STEPS = 20
STYLES = (
    LESSONS[0],
    Lesson("clay", ROOT / "datasets" / "clay", ROOT / "configs" / "mini-style.toml"),
)
MOODS = ("grinning", "crying", "kissing", "pouting", "weary", "smiling")
WEIGHTS = (0.8, 1.0, 1.2)


def named(label: str) -> str:
    return ("an " if label[0] in "aeiou" else "a ") + label


def draw(
    base: Base, prompts: list[str], seeds: list[int], stack: Stacked = (), method: str = "linear"
) -> list[Image.Image]:
    with Plan.of(stack, method=method).applied(base, STEPS) as stacked:
        return sample(stacked, prompts, seeds=seeds, steps=STEPS, batch_size=16)


def share(flags: list[bool]) -> float:
    return round(100 * sum(flags) / len(flags), 1)


def measure_names(base: Base, judge: Judge, captions: int = 64) -> dict[str, Any]:
    """Share of pictures of which the judge has the right thing first, and among its first five of all things."""
    things = random.Random(0).sample(json.loads(THINGS.read_text("utf-8")), captions)
    labels = [t for t in things for _ in range(2)]
    pictures = draw(base, [named(t) for t in labels], [1, 2] * captions)
    ranks = judge.rank_of(pictures, labels)
    missed = sorted({t for t, r in zip(labels, ranks, strict=True) if r >= 5})
    return {
        "captions": captions,
        "pictures": len(pictures),
        "judge's things": len(judge.labels),
        "top1 %": share([r < 1 for r in ranks]),
        "top5 %": share([r < 5 for r in ranks]),
        "missed": missed,
    }


def held_out_things(lesson: Lesson, count: int = 24) -> list[str]:
    """Things that the base knows and the style's pictures do not show."""
    shown = {e.caption.split(",")[0].removeprefix("an ").removeprefix("a ") for e in scan_folder(lesson.data)}
    known = [t for t in json.loads(THINGS.read_text("utf-8")) if t not in shown]
    return random.Random(1).sample(known, count)


def measure_style(base: Base, judge: Judge, lesson: Lesson, adapter: Adapter) -> dict[str, Any]:
    """Style and things with and without the LoRA, on things that it was not shown, two seeds each."""
    things = [t for t in held_out_things(lesson) for _ in range(2)]
    seeds = [11, 12] * (len(things) // 2)
    rows: dict[str, Any] = {"things": len(set(things)), "pictures": len(things)}
    said = f", {TRIGGERS_OF[lesson.name]}"
    for name, stack, words in (("base", (), ""), ("base, same words", (), said), ("LoRA", [(adapter, 1.0)], said)):
        pictures = draw(base, [named(t) + words for t in things], seeds, stack)
        styles, ranks = judge.style_of(pictures), judge.rank_of(pictures, things)
        rows[f"{name}: style %"] = share([s == lesson.name for s in styles])
        rows[f"{name}: thing in top5 %"] = share([r < 5 for r in ranks])
    kept = rows["LoRA: thing in top5 %"] / max(1e-9, rows["base: thing in top5 %"])
    rows["things kept %"] = round(100 * kept, 1)
    return rows


TRIGGERS_OF = {**TRIGGERS, "clay": "clay style"}


def measure_stack(base: Base, judge: Judge, style: Adapter, subject: Adapter) -> list[dict[str, Any]]:
    """For each method and pair of weights: pictures in which the judge sees ink, the cat, and both."""
    prompts = [f"a {mood} mio cat, ink style" for mood in MOODS for _ in range(4)]
    seeds = list(range(21, 21 + len(prompts)))
    grid = [(a, b) for a in WEIGHTS for b in WEIGHTS]
    pairs = [("linear", a, b) for a, b in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), *grid]]
    pairs += [("klora", a, 1.0) for a in WEIGHTS[1:]]
    pairs += [(method, 1.0, 1.0) for method in METHODS if method not in ("linear", "klora")]
    rows = []
    for method, a, b in pairs:
        pictures = draw(base, prompts, seeds, [(style, a), (subject, b)], method)
        ink = [s == "ink" for s in judge.style_of(pictures)]
        ranks = judge.rank_of(pictures, [CAT] * len(pictures))
        rows.append(
            {
                "method": method,
                "ink weight": a,
                "cat weight": b,
                "pictures": len(pictures),
                "ink %": share(ink),
                "cat first %": share([r == 0 for r in ranks]),
                "cat in top5 %": share([r < 5 for r in ranks]),
                "ink and cat in top5 %": share([i and r < 5 for i, r in zip(ink, ranks, strict=True)]),
                "ink and cat first %": share([i and r == 0 for i, r in zip(ink, ranks, strict=True)]),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], "names", "style", "stack"], help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="where the LoRAs are trained")
    args = parser.parse_args()
    parts = args.parts or ["names", "style", "stack"]
    judge = load_judge()
    base = load_base("mini", precision="bf16")
    results: dict[str, Any] = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    if "names" in parts:
        results["names"] = measure_names(base, judge)
    if "style" in parts:
        results["style"] = {}
        for lesson in STYLES:
            TRIGGERS.setdefault(lesson.name, TRIGGERS_OF[lesson.name])
            adapter = learn(lesson, args.work / f"{lesson.name}.safetensors")
            results["style"][lesson.name] = measure_style(base, judge, lesson, adapter)
    if "stack" in parts:
        style, subject = (learn(lesson, args.work / f"{lesson.name}.safetensors") for lesson in LESSONS)
        results["stack"] = measure_stack(base, judge, style, subject)
    results["recipe"] = {lesson.name: recipe_from_toml(lesson.preset).steps for lesson in (*STYLES, LESSONS[1])}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in results.items() if k in parts}, indent=1))


if __name__ == "__main__":
    main()

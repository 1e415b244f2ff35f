"""What a balance recommends: as a document, as lines, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..disk import write_atomic
from .balance import Balance, Scene, Trial
from .chart import draw_pareto
from .grid import labelled_sheet
from .png import write_png
from .stacking import Lora

SHEET_COLUMNS = 8
"""Pictures of each kind on the sheet, at most."""
CLOSE = 1.0
"""A separation, in standard deviations of single pictures, below which an axis hardly tells."""
_NAMES = ("style", "subject")


def note_axes(found: Balance) -> list[str]:
    """A line for each axis that hardly tells."""
    assert found.recovery is not None
    axes = (("style", found.recovery.style_axis), ("subject", found.recovery.subject_axis))
    return [
        f"the {name} alone is only {axis.separation:.1f} standard deviations from the bare base, so its figures are "
        f"rough; take more --seeds, or give --{name}-pictures"
        for name, axis in axes
        if axis.separation < CLOSE
    ]


def describe_balance(scene: Scene, used: Sequence[Lora], found: Balance, features: str) -> dict[str, Any]:
    """What was drawn, by what it was measured, and what came of it, as JSON can hold it."""
    assert found.recovery is not None
    loras = {
        name: {"file": str(lora.path), "sha256": lora.sha256, "full_weight": lora.weight}
        for name, lora in zip(_NAMES, used, strict=True)
    }
    axes = (found.recovery.style_axis, found.recovery.subject_axis)
    leaks = (found.recovery.style_leak, found.recovery.subject_leak)
    measures = {
        name: {"base": axis.floor, "alone": axis.ceiling, "separation": axis.separation, "leak": leak}
        for name, axis, leak in zip(_NAMES, axes, leaks, strict=True)
    }
    return {
        "prompts": list(scene.prompts),
        "seeds": {"search": [scene.seed, scene.pictures], "fresh": [scene.fresh.seed, scene.pictures]},
        "loras": loras,
        "features": features,
        "measures": measures,
        "trials": [asdict(trial) for trial in found.trials],
        "front": [asdict(trial) for trial in found.front],
        "recommended": asdict(found.recommended),
        "verdict": judge_gain(found),
        "fresh": {name: asdict(trial) for name, trial in found.fresh.items()},
    }


def write_balance(
    out: Path, scene: Scene, used: Sequence[Lora], found: Balance, document: dict[str, Any]
) -> dict[str, str]:
    """Writes `pareto.png`, `sheet.png` and `balance.json` to a folder that is there; gives their paths by name.

    Raises: DiskError where they cannot be written.
    """
    files = {"pareto": out / "pareto.png", "sheet": out / "sheet.png", "balance": out / "balance.json"}
    names = (used[0].path.stem, used[1].path.stem)
    prompts = ", ".join(f'"{prompt}"' for prompt in scene.prompts)
    title = (
        f"What {names[0]} (style) and {names[1]} (subject) recover together: {prompts}, {scene.pictures} pictures a dot"
    )
    write_png(draw_pareto(found.trials, found.recommended, title, names), out / "pareto.png")
    best, fresh = found.recommended, found.fresh
    by = "" if best.method == "linear" else f" by {best.method}"
    weights = {"plain": [lora.weight for lora in used], "recommended": [best.style_weight, best.subject_weight]}
    labels = {"bare": "no LoRA", "style": f"{names[0]} alone", "subject": f"{names[1]} alone"}
    for name, (a, b) in weights.items():
        what = "" if name == "plain" else "recommended: "
        how = by if name == "recommended" else ""
        labels[name] = f"{what}{names[0]} {a:g} + {names[1]} {b:g}{how}, score {fresh[name].score:.2f}"
    kept = ["bare", "style", "subject", *(["plain"] if _differ(fresh) else []), "recommended"]
    columns = _spread(scene.pictures, SHEET_COLUMNS)
    captions = [prompt for prompt in scene.prompts for _ in range(scene.seeds)]
    sheet = labelled_sheet(
        [[found.rows[name][i] for i in columns] for name in kept],
        [captions[i] for i in columns] if len(scene.prompts) > 1 else [f"seed {scene.fresh.seed + i}" for i in columns],
        [labels[name] for name in kept],
        title=f"{prompts}: the same noise in each column, none of it used in the search",
    )
    write_png(sheet, files["sheet"])
    paths = {name: str(path) for name, path in files.items()}
    text = json.dumps(document | {"files": paths}, indent=2, allow_nan=False) + "\n"
    write_atomic(files["balance"], text.encode())
    return paths


def _differ(fresh: dict[str, Trial]) -> bool:
    """Whether the recommended stack is another than the plain sum at full weights."""
    plain, best = fresh["plain"], fresh["recommended"]
    one, other = ((t.method, t.style_weight, t.subject_weight) for t in (plain, best))
    return one != other


def judge_gain(found: Balance) -> str:
    """One sentence on whether the recommended weights are worth it, by noise that they were not chosen by."""
    if not _differ(found.fresh):
        return "nothing that was tried does better than the plain sum at full weights"
    gain, error = found.gain
    by = f"{gain:+.2f} ± {error:.2f} on fresh noise"
    if gain > 2 * error:
        return f"better than the plain sum at full weights: {by}"
    if gain > -2 * error:
        return f"no clear gain over the plain sum at full weights: {by}; more --seeds would tell"
    return f"worse than the plain sum at full weights: {by}, so it won by luck; keep that sum, or take more --seeds"


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spread."""
    kept = min(count, most)
    return [i * count // kept for i in range(kept)]


def list_balance(document: dict[str, Any], found: Balance) -> list[str]:
    """What balance prints."""
    best, fresh = found.recommended, found.fresh
    lines = [f"{'method':14}{'style':>8}{'subject':>9}{'style got':>11}{'subject got':>13}{'score':>8}"]
    for trial in sorted(found.front, key=lambda t: -t.score):
        lines.append(
            f"{trial.method:14}{trial.style_weight:8g}{trial.subject_weight:9g}{trial.style:11.2f}"
            f"{trial.subject:13.2f}{trial.score:8.2f}"
        )
    lines += [
        "(the pairs that no other beats in both; 0 is the bare base, 1 either LoRA alone; score: the smaller of a",
        "picture's two, on average)",
        f"recommended   {best.method}, style {best.style_weight:g}, subject {best.subject_weight:g}: "
        f"score {best.score:.2f} ± {best.error:.2f}",
        f"fresh noise   score {fresh['recommended'].score:.2f} ± {fresh['recommended'].error:.2f}; "
        f"the plain sum at full weights {fresh['plain'].score:.2f} ± {fresh['plain'].error:.2f}",
        f"verdict       {document['verdict']}",
        f"draw with     {document['generate']}",
        *document["files"].values(),
    ]
    return lines

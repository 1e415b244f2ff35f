"""What `sdlora check` says of a data folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import Recipe
from .buckets import Cuts, plan_cuts, read_bucketing
from .drawn import FOLDER, list_drawn
from .folder import Problem, Survey
from .likeness import group_alike
from .material import Material, class_recipe, find_short_buckets
from .variants import list_wordings

PLACE = Path("the run folder") / FOLDER
"""Where class pictures will lie that are drawn by a run whose folder is not known yet."""
Counter = Callable[[list[str]], tuple[list[int], int]]
"""Captions -> each one's length in tokens, and how many tokens the base reads."""


def write_report(
    survey: Survey,
    cuts: Cuts | None,
    count_tokens: Counter | None,
    steps: int = 0,
    images_per_step: int = 1,
    wordings: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The document of `check --json`; what needs a base that is not there is None or empty.

    steps and images_per_step are the recipe's; wordings is what each caption is read as, if not as it stands.
    """
    truncated = None
    if count_tokens is not None:
        wordings = wordings or [[e.caption] for e in survey.examples]
        lengths, limit = count_tokens([wording for own in wordings for wording in own])
        rest = iter(lengths)
        longest = [max(islice(rest, len(own))) for own in wordings]
        truncated = [
            {"file": e.name, "tokens": n, "limit": limit}
            for e, n in zip(survey.examples, longest, strict=True)
            if n > limit
        ]
    buckets = {f"{w}x{h}": len(cuts.members((w, h))) for w, h in cuts.sizes} if cuts else {}
    shown = sum(cuts.repeats) if cuts else sum(e.repeats for e in survey.examples)
    return {
        "pictures": survey.pictures,
        "captions": survey.captions,
        "problems": [asdict(problem) for problem in survey.problems],
        "left_out": [asdict(problem) for problem in survey.left_out],
        "truncated": truncated,
        "duplicates": find_duplicates(survey),
        "near_duplicates": find_near_duplicates(survey),
        "buckets": buckets,
        "cut_away": {name: round(cut.lost, 4) for name, cut in zip(cuts.names, cuts.cuts, strict=True) if cut.lost}
        if cuts
        else {},
        "images_per_epoch": shown,
        "steps": steps,
        "epochs": round(steps * images_per_step / shown, 2) if shown else None,
        "memory": None,
    }


def find_duplicates(survey: Survey) -> list[list[str]]:
    """Groups of pictures that are the same pixel for pixel, by name."""
    groups: dict[str, list[str]] = {}
    for name, pixels in survey.pixels.items():
        groups.setdefault(pixels, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def find_near_duplicates(survey: Survey) -> list[list[str]]:
    """Groups of pictures that look alike but are not the same; of equal ones the first stands for all."""
    first = {pixels: name for name, pixels in reversed(survey.pixels.items())}
    return group_alike({name: look for name, look in survey.looks.items() if first[survey.pixels[name]] == name})


def note_masks(report: dict[str, Any], survey: Survey, source: str) -> None:
    """Adds what the masks come to: null where there are none; `kept` is the share of each picture that is learnt."""
    kept = {name: round(share, 4) for name, share in survey.masks.items()}
    report["masks"] = {"source": source, "kept": kept, "of_no_picture": survey.masks_unused} if source else None


def plan_classes(survey: Survey, recipe: Recipe, side_px: int | None) -> Material | None:
    """The class pictures, those that the base would draw among them; None without any."""
    given = survey.prior.examples if survey.prior else []
    drawn = list_drawn(recipe, given, side_px or 0, PLACE)
    folder = survey.prior.folder if survey.prior else PLACE
    return Material(folder, given + drawn, drawn=len(drawn)) if given or drawn or survey.prior else None


def report_classes(
    classes: Material | None, given: Survey | None, recipe: Recipe, side_px: int | None, count_tokens: Counter | None
) -> dict[str, Any] | None:
    """The same document as `write_report`'s for the class pictures, with their folder and how many are to be drawn.

    `given` is the survey of those that are there, whose pictures and problems it counts. None without any.
    """
    if classes is None:
        return None
    own = class_recipe(recipe)
    cuts = plan_cuts(classes.examples, read_bucketing(own, side_px)) if side_px else None
    wordings = list_wordings([e.caption for e in classes.examples], own)
    survey = replace(given or Survey(classes.folder), examples=classes.examples)
    report = write_report(survey, cuts, count_tokens, own.steps, own.images_per_step, wordings)
    return {"folder": str(classes.folder) if given else None, "drawn": classes.drawn, **report}


def list_report(
    report: dict[str, Any],
    different_captions: int,
    cut_lines: Sequence[str] = (),
    memory_lines: Sequence[str] = (),
    mask_lines: Sequence[str] = (),
    class_lines: Sequence[str] = (),
) -> list[str]:
    """The same document as lines for a person."""
    lines = [
        f"pictures          {report['pictures']}",
        f"captions          {report['captions']} ({different_captions} different)",
        f"images an epoch   {report['images_per_epoch']}",
    ]
    if report["epochs"] is not None:
        lines.append(f"steps             {report['steps']}, which are {report['epochs']:g} epochs")
    lines += [f"trained at        {size}: {n}" for size, n in report["buckets"].items()]
    lines += [f"cut               {line}" for line in cut_lines]
    lines += [f"memory            {line}" for line in memory_lines]
    lines += [f"masks             {line}" for line in mask_lines]
    lines += [f"class             {line}" for line in class_lines]
    prior = report.get("class_pictures") or {}
    long = [{**row, "file": f"{prior['folder'] or PLACE.parent}/{row['file']}"} for row in prior.get("truncated") or []]
    for row in (report["truncated"] or []) + long:
        lines.append(f"caption too long  {row['file']}: {row['tokens']} tokens, the base reads {row['limit']}")
    lines += [f"same picture      {', '.join(names)}" for names in report["duplicates"]]
    lines += [f"nearly the same   {', '.join(names)}" for names in report["near_duplicates"]]
    lines += [f"left out          {p['file']}: {p['problem']}" for p in report["left_out"]]
    lines += [f"problem           {p['file']}: {p['problem']}; {p['fix']}" for p in report["problems"]]
    if not report["problems"]:
        lines.append("ready to train")
    return lines


def note_short_buckets(survey: Survey, cuts: Cuts, classes: Material | None, recipe: Recipe) -> None:
    """Adds buckets that are too small for a step to the folder's problems, those of the class pictures too."""
    survey.problems += find_short_buckets(survey.folder, cuts, recipe)
    if classes:
        own = class_recipe(recipe)
        own_cuts = plan_cuts(classes.examples, read_bucketing(own, cuts.bucketing.resolution_px))
        survey.problems += find_short_buckets(classes.folder, own_cuts, own)


def note_base(survey: Survey, base: str, message: str) -> None:
    """Adds a base that cannot be used to the folder's problems: training would not start."""
    problem, _, fix = message.removeprefix(f"{base}: ").rpartition("; ")
    survey.problems.append(Problem(base, problem or message, fix if problem else "give another base"))

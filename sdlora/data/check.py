"""What `sdlora check` says of a data folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .folder import Problem, Survey

Counter = Callable[[list[str]], tuple[list[int], int]]
"""Captions -> each one's length in tokens, and how many tokens the base reads."""


def write_report(survey: Survey, resolution_px: int | None, count_tokens: Counter | None) -> dict[str, Any]:
    """The document of `check --json`; what needs a base that is not there is None or empty."""
    truncated = None
    if count_tokens is not None:
        lengths, limit = count_tokens([e.caption for e in survey.examples])
        truncated = [
            {"file": e.name, "tokens": n, "limit": limit}
            for e, n in zip(survey.examples, lengths, strict=True)
            if n > limit
        ]
    buckets = {f"{resolution_px}x{resolution_px}": len(survey.examples)} if resolution_px and survey.examples else {}
    return {
        "pictures": survey.pictures,
        "captions": survey.captions,
        "problems": [asdict(problem) for problem in survey.problems],
        "truncated": truncated,
        "duplicates": find_duplicates(survey),
        "buckets": buckets,
        "images_per_epoch": sum(e.repeats for e in survey.examples),
    }


def find_duplicates(survey: Survey) -> list[list[str]]:
    """Groups of pictures that are the same pixel for pixel, by name."""
    groups: dict[str, list[str]] = {}
    for name, pixels in survey.pixels.items():
        groups.setdefault(pixels, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def list_report(report: dict[str, Any], different_captions: int) -> list[str]:
    """The same document as lines for a person."""
    lines = [
        f"pictures          {report['pictures']}",
        f"captions          {report['captions']} ({different_captions} different)",
        f"images an epoch   {report['images_per_epoch']}",
    ]
    lines += [f"trained at        {size}: {n}" for size, n in report["buckets"].items()]
    for row in report["truncated"] or []:
        lines.append(f"caption too long  {row['file']}: {row['tokens']} tokens, the base reads {row['limit']}")
    lines += [f"same picture      {', '.join(names)}" for names in report["duplicates"]]
    lines += [f"problem           {p['file']}: {p['problem']}; {p['fix']}" for p in report["problems"]]
    if not report["problems"]:
        lines.append("ready to train")
    return lines


def note_base(survey: Survey, base: str, message: str) -> None:
    """Adds a base that cannot be used to the folder's problems: training would not start."""
    problem, _, fix = message.removeprefix(f"{base}: ").rpartition("; ")
    survey.problems.append(Problem(base, problem or message, fix if problem else "give another base"))

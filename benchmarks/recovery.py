"""How well style and subject recovery tell, on real drawings: `python -m benchmarks.recovery --art ART --loras DIR`.

For each pair of `benchmarks.combining`, groups of drawings that nobody generated, of which it is known what they show:
the style's set drawing the subject's kind of character (both are there, though the character is a cousin), the
subject's own drawings made black and white (both, for ink), the style's set drawing other things and characters, the
subject as drawn, its kind in the other styles, and drawings with neither. An axis tells well where the drawings
that have the thing read above those that have not: the share of such couples in the right order (AUC), 1 is all.

The references are every second of the pictures that the LoRAs were taught with, and no group holds any of them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.combining import (
    BARE,
    OUT,
    STYLE_ONLY,
    SUBJECT_ONLY,
    WORK,
    Pair,
    Studio,
    describe,
    load_features,
    mean,
    read_pairs,
)
from benchmarks.combining_art import GESTURES, MOODS, STYLES, THINGS, Style, folder_of, letters
from sdlora.bases.mini.build.art import read_icons, render_svg
from sdlora.bases.mini.build.glyphs import GLYPHS, draw_glyph
from sdlora.data.folder import scan_folder
from sdlora.errors import ConfigError
from sdlora.generating.recovery import Recovery

SAMPLE_SETS = {"ink": "fluent-emoji-high-contrast", "clay": "fluent-emoji"}
"""What the sample folders' styles are drawn from."""
KINDS = {
    "cat": (
        "cat-face", "grinning-cat", "grinning-cat-with-smiling-eyes", "cat-with-tears-of-joy", "crying-cat",
        "smiling-cat-with-heart-eyes", "cat-with-wry-smile", "kissing-cat", "weary-cat", "pouting-cat",
    ),
    "face": tuple(f"{mood}-face" for mood in MOODS),
    "woman": tuple(f"woman-{gesture}" for gesture in GESTURES),
}  # fmt: skip
"""The icons of each kind of character; `find_icons` knows what other sets call them."""
KIND_OF = {"cat": "cat", "greycat": "cat", "face": "face", "woman": "woman"}
THINGS_SHOWN = 40
HAS_STYLE = ("kind in the style", "subject in black and white", "style, other things", "style, another character")
HAS_SUBJECT = ("kind in the style", "subject in black and white", "subject as drawn", "kind in other styles")


def find_icons(icons: dict, names: Iterable[str]) -> list[str]:
    """The icons of these names that a set has, by its own: cats may be cat faces, a woman a person."""
    found = []
    for name in names:
        others = (name, name.replace("cat", "cat-face", 1), name.replace("woman-", "person-"))
        found += [other for other in others if other in icons["icons"]][:1]
    return found


def in_style(art: Path, style: Style, names: Iterable[str]) -> list[Image.Image]:
    """Drawings in a style."""
    icons = read_icons(art, style.art or SAMPLE_SETS[style.name])
    return [style.draw(icons, icon) for icon in find_icons(icons, names)]


def find_things(art: Path, set_name: str, left_out: set[str]) -> list[str]:
    """The icons of forty things that the base knows, without some."""
    names = {letters(icon): icon for icon in read_icons(art, set_name)["icons"]}
    known = [t for t in json.loads(THINGS.read_text("utf-8")) if letters(t) in names and letters(t) not in left_out]
    return [names[letters(t)] for t in random.Random(2).sample(known, THINGS_SHOWN)]


def gather_groups(art: Path, loras: Path, pair: Pair) -> dict[str, list[Image.Image]]:
    """The drawings of each group."""
    style, subject = pair.style, pair.subject
    kind, others = KIND_OF[subject.name], [name for name in KINDS if name != KIND_OF[subject.name]]
    captions = [example.caption for example in scan_folder(folder_of(loras, style))]
    learnt = {letters(c.split(",")[0].removeprefix("an ").removeprefix("a ")) for c in captions}
    things = find_things(art, style.art or SAMPLE_SETS[style.name], learnt)
    own = subject.art or "noto"
    groups = {
        "kind in the style": in_style(art, style, KINDS[kind]),
        "style, other things": in_style(art, style, things),
        "style, another character": [p for name in others for p in in_style(art, style, KINDS[name])],
        "subject as drawn": pair.pictures[1][1::2],
        "kind in other styles": [p for s in STYLES if s.name != style.name for p in in_style(art, s, KINDS[kind])],
        "another character as drawn": in_style(art, Style("", own), KINDS[others[0]]),
        "neither": in_style(art, Style("", "noto"), find_things(art, "noto", set())),
    }
    if style.name == "ink":
        found = read_icons(art, own)
        icons = [icon for icon, _ in subject.learnt] or KINDS["cat"]
        groups["subject in black and white"] = [
            draw_glyph(render_svg(found, icon, 2), glyph).convert("RGB") for icon in icons for glyph in GLYPHS
        ]
    return groups


def order(with_it: list[float], without: list[float]) -> float:
    """The share of couples of which the one that has it reads higher; equals count half."""
    couples = [(a > b) + 0.5 * (a == b) for a in with_it for b in without]
    return mean(couples)


def check_pair(studio: Studio, art: Path, loras: Path, pair: Pair) -> dict[str, Any]:
    """Means of each group, and how well the axes order them."""
    bare, style, subject = (studio.row(pair, "reporting", case)[0] for case in (BARE, STYLE_ONLY, SUBJECT_ONLY))
    recovery = Recovery.of(
        load_features(),
        bare=bare,
        style=style,
        subject=subject,
        style_pictures=pair.pictures[0][::2],
        subject_pictures=pair.pictures[1][::2],
    )
    seen = {name: recovery.measure(pictures) for name, pictures in gather_groups(art, loras, pair).items()}

    def values(axis: str, names: Iterable[str]) -> list[float]:
        return [x for name in names if name in seen for x in getattr(seen[name], axis).tolist()]

    both = [name for name in HAS_STYLE if name in HAS_SUBJECT]
    orders = {
        "style": order(values("style", HAS_STYLE), values("style", seen.keys() - set(HAS_STYLE))),
        "subject": order(values("subject", HAS_SUBJECT), values("subject", seen.keys() - set(HAS_SUBJECT))),
        "score": order(values("scores", both), values("scores", seen.keys() - set(both))),
    }
    groups = {
        name: {
            "pictures": len(one.style),
            "style": round(mean(one.style.tolist()), 3),
            "subject": round(mean(one.subject.tolist()), 3),
            "score": round(one.score, 3),
        }
        for name, one in seen.items()
    }
    return {"pair": pair.name, "tells": describe(recovery), "in order": rounded(orders), "groups": groups}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    lines = [
        "# How well style and subject recovery tell, on real drawings",
        "",
        "`python -m benchmarks.recovery`: no picture here was generated, but those that set 0 (the bare base) and 1",
        "(either LoRA alone). In order: the share of couples of a drawing that has the thing and one that has not, of",
        "which the first reads higher. Separation: how many standard deviations of a picture lie between 0 and 1.",
        "Leak: what the other LoRA alone reads, before it is taken off.",
        "",
        "| pair | style in order | subject in order | score in order | separation | leak to style | leak to subject |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        o, t = row["in order"], row["tells"]
        apart = f"{t['style separation']:.1f} and {t['subject separation']:.1f}"
        cells = [f"{o[name]:.3f}" for name in ("style", "subject", "score")]
        lines.append(f"| {row['pair']} | {' | '.join(cells)} | {apart} | {t['style leak']} | {t['subject leak']} |")
    lines += ["", "Means over the pairs, style / subject / score:", "", "| drawings | all pairs | worst pair's score |"]
    lines += ["| --- | ---: | ---: |"]
    for name in dict.fromkeys(name for row in rows for name in row["groups"]):
        found = [row["groups"][name] for row in rows if name in row["groups"]]
        means = " / ".join(f"{mean([group[axis] for group in found]):.2f}" for axis in ("style", "subject", "score"))
        both = name in HAS_STYLE and name in HAS_SUBJECT
        worst = (min if both else max)(group["score"] for group in found)
        lines.append(f"| {name} | {means} | {worst:.2f} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--art", type=Path, required=True, help="folder of node_modules/@iconify-json")
    parser.add_argument("--loras", type=Path, required=True, help="what benchmarks.combining_art wrote")
    parser.add_argument("--pairs", metavar="STYLE+SUBJECT", nargs="+", help="default: all sixteen")
    parser.add_argument("--work", type=Path, default=WORK, help="where benchmarks.combining keeps its pictures")
    parser.add_argument("--out", type=Path, default=OUT.with_name("recovery.json"))
    args = parser.parse_args()
    studio, rows = Studio(args.work), []
    for pair in read_pairs(args.loras, args.pairs):
        try:
            rows.append(check_pair(studio, args.art, args.loras, pair))
            print(json.dumps(rows[-1]["in order"] | {"pair": pair.name}), file=sys.stderr, flush=True)
        except ConfigError as error:
            print(f"{pair.name} left out: {error}", file=sys.stderr)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    write_table(rows, args.out.with_suffix(".md"))
    print(args.out.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    main()

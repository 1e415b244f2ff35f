"""Which method stacks a style and a subject best: `python -m benchmarks.combining --loras DIR`.

Four styles x four subjects on the built-in base (`benchmarks.combining_art` makes their LoRAs in DIR). For each pair
and method, weights are chosen on 3 prompts x 2 seeds and reported on 3 other prompts x 4 other seeds, always beside the
base, the style alone and the subject alone. A picture's score is the smaller of its style and subject recovery, seen by
the judge that ships with mini (`sdlora.generating.recovery`: 0 is the bare base, 1 what the single LoRA reaches).

Every row of pictures is kept in the work folder as one PNG, so a run that was stopped goes on where it was, and
measuring anew draws nothing. Writes results/combining.{json,md}. --quick is two pairs, two weights a method.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.combining_art import STYLES, SUBJECTS, WEAK_STYLES, Style, Subject, folder_of, lora_of
from sdlora.adapter.delta import Adapter
from sdlora.adapter.file import read_adapter
from sdlora.bases.family import Base, load_base
from sdlora.bases.sampling import sample
from sdlora.combining.plan import Member, Plan
from sdlora.combining.ziplora import zip_loras
from sdlora.data.folder import scan_folder
from sdlora.data.picture import read_picture
from sdlora.demo import ROOT
from sdlora.errors import ConfigError
from sdlora.generating.features import JudgeFeatures
from sdlora.generating.png import write_png
from sdlora.generating.recovery import Recoveries, Recovery

OUT = ROOT / "benchmarks" / "results" / "combining.json"
WORK = ROOT / "runs" / "combining"
STEPS = 20
BATCH_PICTURES = 24
SEEDS = {"selecting": (11, 12), "reporting": (101, 102, 103, 104)}
"""Of the first prompt; each further prompt's are 10 more, so that no two pictures start from the same noise."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Case:
    """One way of stacking a pair: a method with its options, and the two weights."""

    method: str
    style: float
    subject: float

    @property
    def file(self) -> str:
        return f"{self.method.replace(':', '_')} {self.style:g} {self.subject:g}.png"


BARE, STYLE_ONLY, SUBJECT_ONLY = Case("linear", 0, 0), Case("linear", 1, 0), Case("linear", 0, 1)
_USUAL = ((1, 1), (0.8, 1), (1, 0.8), (1.2, 1), (1, 1.2), (1.2, 1.2))
_AROUND: dict[str, Sequence[tuple[float, float]]] = {
    **dict.fromkeys(("linear", "np", "klora", "est", "switch", "dare"), _USUAL),
    "composite": ((1, 1), (1, 0.7), (0.7, 1), (1, 0.5), (0.5, 1), (1, 0.85)),  # only their ratio counts
    "ties": ((1, 1), (1.5, 1.5), (1.5, 1), (1, 1.5), (2, 2), (1.2, 1.2)),  # half of the entries are left out
}
TRIED = {method: [Case(method, a, b) for a, b in pairs] for method, pairs in _AROUND.items()}
"""Six pairs of weights for every method, 1 and 1 first."""
TRIED_OF_ZIP = [Case("zip", w, w) for w in (1, 0.8, 1.2)]


@dataclass(frozen=True)
class Pair:
    """A style and a subject, with their LoRAs and pictures."""

    style: Style
    subject: Subject
    adapters: tuple[Adapter, Adapter]
    pictures: tuple[list[Image.Image], list[Image.Image]]

    @property
    def name(self) -> str:
        return f"{self.style.name}+{self.subject.name}"

    def requests(self, part: str) -> tuple[list[str], list[int]]:
        """Prompts and seeds of the selecting or the reporting part."""
        texts = self.subject.selecting if part == "selecting" else self.subject.reporting
        rows = [(f"{t}, {self.style.words}", s + 10 * i) for i, t in enumerate(texts) for s in SEEDS[part]]
        return [row[0] for row in rows], [row[1] for row in rows]


class Studio:
    """Draws rows of pictures, or takes them from the work folder."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._base: Base | None = None

    @property
    def base(self) -> Base:
        self._base = self._base or load_base("mini", precision="bf16")
        return self._base

    def row(self, pair: Pair, part: str, case: Case) -> tuple[list[Image.Image], float]:
        """The pictures of one case, and how many seconds each took when it was drawn."""
        path = self._work / pair.name / part / case.file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            began_s = time.perf_counter()
            pictures = self._draw(pair, part, case)
            seconds = (time.perf_counter() - began_s) / len(pictures)
            strip = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
            for i, picture in enumerate(pictures):
                strip.paste(picture, (i * picture.width, 0))
            info = PngInfo()
            info.add_text("seconds", f"{seconds:.3f}")
            write_png(strip, path, info)
        with Image.open(path) as file:
            strip, seconds = file.convert("RGB"), float(file.info["seconds"])
        side_px = strip.height
        return [strip.crop((x, 0, x + side_px, side_px)) for x in range(0, strip.width, side_px)], seconds

    def _draw(self, pair: Pair, part: str, case: Case) -> list[Image.Image]:
        prompts, seeds = pair.requests(part)
        if case.method == "zip":
            plan = Plan.of([(self._zip(pair), case.style)])
        else:
            weights = (case.style, case.subject)
            plan = Plan.of(list(zip(pair.adapters, weights, strict=True)), method=case.method)
        with plan.applied(self.base, STEPS) as stacked:
            return sample(stacked, prompts, seeds=seeds, steps=STEPS, batch_size=BATCH_PICTURES)

    def _zip(self, pair: Pair) -> Adapter:
        """The pair's ZipLoRA, learnt once."""
        path = self._work / pair.name / "zip.safetensors"
        if not path.exists():
            members = [Member(adapter, name=n) for adapter, n in zip(pair.adapters, ("style", "subject"), strict=True)]
            words = f"a bear, {pair.style.words}"
            zip_loras(self.base, members[0], members[1], words, pair.subject.selecting[0]).save(str(path))
        return read_adapter(path)


def measure_pair(studio: Studio, pair: Pair, tried: dict[str, list[Case]], tell: Callable[[str], None]) -> dict:
    """Every method on one pair: the weights that did best while selecting, and what these and 1 and 1 give."""
    found: dict[str, Any] = {"pair": pair.name, "methods": {}}
    selecting = make_recovery(studio, pair, "selecting")
    reporting = make_recovery(studio, pair, "reporting")
    found["tells"] = describe(reporting)
    for name, case in (("base", BARE), ("style only", STYLE_ONLY), ("subject only", SUBJECT_ONLY)):
        found["methods"][name] = report(studio, pair, reporting, [case, case])
    for method, cases in tried.items():
        scores = {case: selecting.measure(studio.row(pair, "selecting", case)[0]).score for case in cases}
        best = max(cases, key=lambda case: scores[case])
        found["methods"][method] = report(studio, pair, reporting, [cases[0], best])
        found["methods"][method]["selecting"] = [
            {"weights": [case.style, case.subject], "score": round(score, 4)} for case, score in scores.items()
        ]
        row = found["methods"][method]
        scores_text = f"{mean(row['as is']['scores']):.3f} at 1 and 1, {mean(row['best']['scores']):.3f} at the best"
        tell(f"{pair.name} {method}: {scores_text}, {best.style:g} and {best.subject:g}")
    return found


def make_recovery(studio: Studio, pair: Pair, part: str) -> Recovery:
    bare, style, subject = (studio.row(pair, part, case)[0] for case in (BARE, STYLE_ONLY, SUBJECT_ONLY))
    pictures = {"style_pictures": pair.pictures[0], "subject_pictures": pair.pictures[1]}
    return Recovery.of(load_features(), bare=bare, style=style, subject=subject, **pictures)


@functools.cache
def load_features() -> JudgeFeatures:
    """The judge, loaded once."""
    return JudgeFeatures()


def describe(recovery: Recovery) -> dict[str, float]:
    """How well the two axes of a pair tell."""
    return {
        "style separation": round(recovery.style_axis.separation, 2),
        "subject separation": round(recovery.subject_axis.separation, 2),
        "style leak": round(recovery.style_leak, 3),
        "subject leak": round(recovery.subject_leak, 3),
    }


def report(studio: Studio, pair: Pair, recovery: Recovery, cases: Sequence[Case]) -> dict[str, Any]:
    """The pictures of a method `as is` and with its `best` weights, one by one."""
    rows = {}
    for name, case in zip(("as is", "best"), cases, strict=True):
        pictures, seconds = studio.row(pair, "reporting", case)
        seen: Recoveries = recovery.measure(pictures)
        rows[name] = {
            "weights": [case.style, case.subject],
            "style": [round(x, 4) for x in seen.style.tolist()],
            "subject": [round(x, 4) for x in seen.subject.tolist()],
            "scores": [round(x, 4) for x in seen.scores.tolist()],
            "seconds": seconds,
        }
    return rows


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def bootstrap(rows: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of values by pair: pairs are drawn anew, and within each its pictures.

    Source: Davison and Hinkley 1997, Bootstrap Methods, section 3.8 (hierarchical data, both stages drawn).
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    values = np.array(rows)  # [pairs, pictures]
    pairs, pictures = values.shape
    which = generator.integers(pairs, size=(resamples, pairs))
    inside = generator.integers(pictures, size=(resamples, pairs, pictures))
    means = np.take_along_axis(values[which], inside, 2).mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarize(pairs: Sequence[dict], key: str) -> dict[str, dict[str, Any]]:
    """Each method over all pairs, `as is` or `best`: means, and its difference to linear with its interval."""
    methods = list(pairs[0]["methods"])
    table = {}
    for method in methods:
        rows = [pair["methods"][method][key] for pair in pairs]
        against = [pair["methods"]["linear"][key]["scores"] for pair in pairs]
        gains = [[x - y for x, y in zip(r["scores"], a, strict=True)] for r, a in zip(rows, against, strict=True)]
        low, high = bootstrap(gains)
        table[method] = {
            "score": round(mean([x for r in rows for x in r["scores"]]), 4),
            "style": round(mean([x for r in rows for x in r["style"]]), 4),
            "subject": round(mean([x for r in rows for x in r["subject"]]), 4),
            "difference to linear": round(mean([x for row in gains for x in row]), 4),
            "interval": [round(low, 4), round(high, 4)],
            "pairs better than linear": sum(mean(row) > 0 for row in gains),
            "seconds a picture": round(statistics.median(r["seconds"] for r in rows), 3),
        }
    return table


def write_table(result: dict[str, Any], path: Path) -> None:
    lines = [
        "# How well each method stacks a style and a subject",
        "",
        f"`python -m benchmarks.combining`: {len(result['pairs'])} pairs on mini, {STEPS} steps, guidance 5, bf16; "
        f"{result['reporting pictures']} pictures a pair and method, {result['selecting pictures']} others to choose "
        "the weights by. Score, style and subject: 0 is the bare base, 1 the single LoRA alone (`docs/balance.md`). "
        "The interval is the 95 % bootstrap interval of the difference to linear, pairs and pictures drawn anew.",
    ]
    for key, title in (("best", "Weights chosen for each pair"), ("as is", "Both weights 1")):
        lines += [
            "",
            f"## {title}",
            "",
            "| method | score | style | subject | difference to linear | interval | better on | s a picture |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for method, row in sorted(result["summary"][key].items(), key=lambda item: -item[1]["score"]):
            low, high = row["interval"]
            alone = method in ("base", "style only", "subject only")
            against = ["–"] * 3
            if method != "linear" and not alone:
                better = f"{row['pairs better than linear']} of {len(result['pairs'])} pairs"
                against = [f"{row['difference to linear']:+.3f}", f"{low:+.3f} to {high:+.3f}", better]
            cells = [f"{row[name]:.3f}" for name in ("score", "style", "subject")]
            seconds = f"{row['seconds a picture']:.2f}"
            lines.append(f"| {' | '.join([method, *cells, *against, seconds])} |")
    lines += ["", "## By pair, chosen weights", ""]
    methods = [m for m in result["pairs"][0]["methods"] if m not in ("base", "style only", "subject only")]
    lines += [f"| pair | {' | '.join(methods)} |", f"| --- |{' ---: |' * len(methods)}"]
    for pair in result["pairs"]:
        cells = [f"{mean(pair['methods'][m]['best']['scores']):.2f}" for m in methods]
        lines.append(f"| {pair['pair']} | {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_pairs(loras: Path, names: Sequence[str] | None) -> list[Pair]:
    """The pairs of these names, STYLE+SUBJECT, or all of `STYLES`. Raises: ConfigError for a name that is none."""
    pairs = {f"{s.name}+{c.name}": (s, c) for s in (*STYLES, *WEAK_STYLES) for c in SUBJECTS}
    if unknown := set(names or ()) - set(pairs):
        raise ConfigError(f"no pair is called {', '.join(sorted(unknown))}; there are {', '.join(pairs)}")

    @functools.cache
    def read(one: Style | Subject) -> tuple[Adapter, list[Image.Image]]:
        pictures = [read_picture(example.path) for example in scan_folder(folder_of(loras, one))]
        return read_adapter(lora_of(loras, one)), pictures

    found = []
    for style, subject in (pairs[name] for name in names or list(pairs)[: len(STYLES) * len(SUBJECTS)]):
        adapters, pictures = zip(read(style), read(subject), strict=True)
        found.append(Pair(style, subject, adapters, pictures))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combining", description=__doc__)
    parser.add_argument("--loras", type=Path, required=True, help="what benchmarks.combining_art wrote")
    parser.add_argument("--pairs", metavar="STYLE+SUBJECT", nargs="+", help="default: all sixteen")
    parser.add_argument("--methods", nargs="+", default=list(TRIED), help=f"default: {' '.join(TRIED)}; also zip")
    parser.add_argument("--quick", action="store_true", help="two pairs, two weights a method")
    parser.add_argument("--work", type=Path, default=WORK, help="where the pictures are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    known = TRIED | {"zip": TRIED_OF_ZIP}
    tried = {method: known[method][: 2 if args.quick else None] for method in dict.fromkeys(["linear", *args.methods])}
    pairs = read_pairs(args.loras, args.pairs or (["ink+cat", "comic+face"] if args.quick else None))
    studio, began_s, found = Studio(args.work), time.perf_counter(), []
    for number, pair in enumerate(pairs):
        try:
            found.append(measure_pair(studio, pair, tried, lambda line: print(line, file=sys.stderr, flush=True)))
        except ConfigError as error:
            print(f"{pair.name} left out: {error}", file=sys.stderr)
        left_s = (time.perf_counter() - began_s) / (number + 1) * (len(pairs) - number - 1)
        print(f"pair {number + 1}/{len(pairs)} done, about {left_s / 60:.0f} min left", file=sys.stderr, flush=True)
    if not found:
        sys.exit("no pair could be measured")
    result = {
        "selecting pictures": 3 * len(SEEDS["selecting"]),
        "reporting pictures": 3 * len(SEEDS["reporting"]),
        "left out": sorted({p.name for p in pairs} - {row["pair"] for row in found}),
        "summary": {key: summarize(found, key) for key in ("best", "as is")},
        "pairs": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(result, args.out.with_suffix(".md"))
    print(args.out.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    main()

"""Which weights two LoRAs want: pairs are drawn, measured, and the best one drawn again from fresh noise."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from ..bases.family import Base
from ..bases.sampling import BATCH_PICTURES, sample
from ..combining.plan import Member, Plan
from ..errors import ConfigError
from .features import Features
from .recovery import Recoveries, Recovery

WEIGHTS = (0.6, 0.8, 1.0, 1.2)
METHODS = ("linear",)
PLAIN = "linear"

Report = Callable[[int, int, str], None]
"""Called after every row of pictures with the pictures done, those that there will be at most, and what was drawn."""


@dataclass(frozen=True)
class Scene:
    """What is drawn for every pair of weights: `seeds` pictures of each prompt, no two from the same noise."""

    prompts: tuple[str, ...]
    seeds: int = 4
    seed: int = 0
    """Of the first picture."""
    negative: str = ""
    steps: int = 20
    guidance: float = 5.0
    width: int | None = None
    """In px; None is the base's own, as for `height`."""
    height: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("a prompt is empty; write one that names the subject's trigger and the style's")
        if self.seeds < 1:
            raise ConfigError(f"seeds {self.seeds} is out of range; use 1 or more")

    @property
    def pictures(self) -> int:
        """How many pictures a pair of weights takes."""
        return len(self.prompts) * self.seeds

    @property
    def fresh(self) -> Scene:
        """The same with the seeds that follow."""
        return dataclasses.replace(self, seed=self.seed + self.pictures)

    def draw(self, base: Base, plan: Plan) -> list[Image.Image]:
        """The pictures that a plan gives, prompt by prompt. Raises: as `sample`."""
        with plan.applied(base, self.steps) as stacked:
            return sample(
                stacked,
                [prompt for prompt in self.prompts for _ in range(self.seeds)],
                seeds=[self.seed + i for i in range(self.pictures)],
                negative=self.negative,
                steps=self.steps,
                guidance=self.guidance,
                width_px=self.width,
                height_px=self.height,
                batch_size=BATCH_PICTURES,
            )


@dataclass(frozen=True)
class Trial:
    """One pair of weights, and what it recovers on average over the pictures."""

    method: str
    style_weight: float
    subject_weight: float
    style: float
    subject: float
    score: float
    """The mean of the pictures' scores (`Recoveries.scores`)."""
    error: float
    """The standard error of that mean; 0 of one picture."""
    scores: tuple[float, ...] = ()
    """Each picture's."""

    @classmethod
    def of(cls, method: str, weights: tuple[float, float], seen: Recoveries) -> Trial:
        scores = tuple(seen.scores.tolist())
        style, subject = float(seen.style.mean()), float(seen.subject.mean())
        return cls(method, *weights, style, subject, *_mean_and_error(scores), scores)

    def gain_over(self, other: Trial) -> tuple[float, float]:
        """By how much its score is above another's of the same noise, picture by picture: the mean and its error."""
        return _mean_and_error([a - b for a, b in zip(self.scores, other.scores, strict=True)])


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


@dataclass
class Balance:
    """What a search found."""

    trials: list[Trial] = field(default_factory=list)
    """In the order in which they were drawn."""
    recovery: Recovery | None = None
    """What measured them."""
    fresh: dict[str, Trial] = field(default_factory=dict)
    """`recommended`, and `plain` (the sum at full weights), from noise that no weights were chosen by."""
    rows: dict[str, list[Image.Image]] = field(default_factory=dict)
    """The fresh pictures: `bare`, `style`, `subject`, `plain` and `recommended`."""

    @property
    def recommended(self) -> Trial:
        """The trial of the best score; among equals the one of the smaller weights."""
        return max(self.trials, key=lambda t: (t.score, -t.style_weight - t.subject_weight))

    @property
    def gain(self) -> tuple[float, float]:
        """By how much the recommended stack's score is above the plain sum's on fresh noise, and the error of that."""
        return self.fresh["recommended"].gain_over(self.fresh["plain"])

    @property
    def front(self) -> list[Trial]:
        """The trials that no other beats in both recoveries, from the most subject to the most style."""
        return find_front(self.trials)


def find_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other equals or beats in style and subject both, by rising style."""
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (-t.style, -t.subject)):
        if not found or trial.subject > found[-1].subject:
            found.append(trial)
    return found[::-1]


def search_balance(
    base: Base,
    style: Member,
    subject: Member,
    scene: Scene,
    features: Features,
    *,
    methods: Sequence[str] = METHODS,
    weights: Sequence[float] = WEIGHTS,
    refine: int = 1,
    style_pictures: Sequence[Image.Image] | None = None,
    subject_pictures: Sequence[Image.Image] | None = None,
    report: Report | None = None,
) -> Balance:
    """Draws every pair of `weights` by every method, then `refine` times the eight around the best, at half the gap.

    Weights multiply the members' own, at which each LoRA alone counts as 1. In the end the recommended pair, and the
    plain sum at full weights, are drawn and measured anew from fresh noise, since the best of many is partly luck.

    Raises: ConfigError where nothing can be measured; AdapterFileError where a LoRA does not fit.
    """
    check_weights(weights)
    pairs = [(a, b) for a in dict.fromkeys(weights) for b in dict.fromkeys(weights)]
    search = _Search(base, style, subject, report)
    search.total = scene.pictures * (len(pairs) * len(methods) + 8 * refine + 3 + 5)
    found = Balance()
    rows = search.draw_alone(scene)
    pictures = {"style_pictures": style_pictures, "subject_pictures": subject_pictures}
    found.recovery = Recovery.of(features, **rows, **pictures)  # type: ignore[arg-type]
    for method in methods:
        for pair in pairs:
            found.trials.append(search.measure(found.recovery, scene, method, pair)[0])
    distance = _smallest_gap(weights) / 2
    for _ in range(refine):
        best = found.recommended
        tried = {(t.method, t.style_weight, t.subject_weight) for t in found.trials}
        for pair in list_around(search.factors(best), distance):
            if (best.method, *search.weigh(pair)) not in tried:
                found.trials.append(search.measure(found.recovery, scene, best.method, pair)[0])
        distance /= 2
    found.rows = search.draw_alone(scene.fresh)
    for name, method, pair in (
        ("plain", PLAIN, (1.0, 1.0)),
        ("recommended", found.recommended.method, search.factors(found.recommended)),
    ):
        found.fresh[name], found.rows[name] = search.measure(found.recovery.elsewhere, scene.fresh, method, pair)
    return found


@dataclass
class _Search:
    """What stays the same from pair to pair."""

    base: Base
    style: Member
    subject: Member
    report: Report | None
    done: int = 0
    total: int = 0

    def weigh(self, pair: tuple[float, float]) -> tuple[float, float]:
        """The weights of a pair of factors."""
        return round(self.style.weight * pair[0], 6), round(self.subject.weight * pair[1], 6)

    def factors(self, trial: Trial) -> tuple[float, float]:
        """The factors of a trial's weights."""
        style, subject = self.style.weight or 1.0, self.subject.weight or 1.0
        return trial.style_weight / style, trial.subject_weight / subject

    def draw(self, scene: Scene, method: str, pair: tuple[float, float], label: str = "") -> list[Image.Image]:
        members = [self.style.scaled(pair[0]), self.subject.scaled(pair[1])]
        pictures = scene.draw(self.base, Plan.of(members, method=method))
        self.done += len(pictures)
        if self.report is not None:
            a, b = self.weigh(pair)
            self.report(self.done, self.total, label or f"{method} {a:g} and {b:g}")
        return pictures

    def draw_alone(self, scene: Scene) -> dict[str, list[Image.Image]]:
        """The pictures of the bare base and of either LoRA alone."""
        kinds = (
            ("bare", (0.0, 0.0), "the bare base"),
            ("style", (1.0, 0.0), "the style alone"),
            ("subject", (0.0, 1.0), "the subject alone"),
        )
        return {name: self.draw(scene, PLAIN, pair, label) for name, pair, label in kinds}

    def measure(
        self, recovery: Recovery, scene: Scene, method: str, pair: tuple[float, float]
    ) -> tuple[Trial, list[Image.Image]]:
        pictures = self.draw(scene, method, pair)
        return Trial.of(method, self.weigh(pair), recovery.measure(pictures)), pictures


def check_weights(weights: Sequence[float]) -> None:
    """Raises: ConfigError for no weight, or one that is no finite number of 0 or more."""
    if not weights:
        raise ConfigError("the list of weights is empty; give at least one, such as 0.8,1,1.2")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weight {weight:g} is out of range; balance searches finite weights of 0 or more")


def list_around(pair: tuple[float, float], distance: float) -> list[tuple[float, float]]:
    """The eight pairs around one, at a distance in either weight or both, without those below 0."""
    steps = [step for step in itertools.product((-distance, 0.0, distance), repeat=2) if step != (0.0, 0.0)]
    around = [(round(pair[0] + a, 6), round(pair[1] + b, 6)) for a, b in steps]
    return [(a, b) for a, b in around if a >= 0 and b >= 0]


def _smallest_gap(weights: Sequence[float]) -> float:
    """The smallest distance between two weights; 0.2 of a single one."""
    ordered = sorted(set(weights))
    return min((b - a for a, b in itertools.pairwise(ordered)), default=0.2)

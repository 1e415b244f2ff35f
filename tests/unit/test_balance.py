"""The search for weights, on pictures whose recoveries are known, and what it draws, on the tiny base."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.adapter.delta import Adapter
from sdlora.combining.plan import Member
from sdlora.errors import ConfigError
from sdlora.generating.balance import Balance, Scene, Trial, find_front, list_around, search_balance
from sdlora.generating.chart import draw_pareto
from sdlora.generating.generate import generate
from sdlora.generating.recommendation import judge_gain
from sdlora.generating.recovery import Recoveries
from tests.stacks import random_adapter
from tests.tiny import make_tiny_base

FULL_PX = 2_000
"""A recovery of 1 as a side of a picture."""


class Sides:
    """Reads a picture's width as how much style it has and its height as how much subject, by the cosine."""

    name = "sides"

    def style(self, pictures):
        return self._vectors([p.width for p in pictures])

    def subject(self, pictures):
        return self._vectors([p.height for p in pictures])

    def _vectors(self, sides):
        x = (torch.tensor(sides, dtype=torch.float64) - 1) / FULL_PX / 2  # half of what the reference has is 1
        return torch.stack([x, (1 - x.square()).sqrt()], 1).float()

    reference = Image.new("1", (2 * FULL_PX + 1, 2 * FULL_PX + 1))


def drawn(style: float, subject: float) -> Image.Image:
    return Image.new("1", (round(style * FULL_PX) + 1, round(subject * FULL_PX) + 1))


def style_of(a: float, b: float) -> float:
    """What a made-up pair of LoRAs gives of the style: the most near 1.1, less where the subject is strong."""
    return a if 0 in (a, b) else max(0.0, a - 0.3 * b) if a < 1.05 else 0.75


def subject_of(a: float, b: float) -> float:
    return max(0.0, b - 0.5 * a) if a else b


@pytest.fixture
def calls(monkeypatch):
    """Replaces drawing: what would have been drawn, as (scene, method, style weight, subject weight)."""
    seen = []

    def draw(scene, base, plan):
        a, b = (plan.by_place[i].weight for i in (0, 1))
        seen.append((scene, plan.method.name, round(a, 6), round(b, 6)))
        return [drawn(style_of(a, b), subject_of(a, b))] * scene.pictures

    monkeypatch.setattr(Scene, "draw", draw)
    return seen


def search(**options) -> Balance:
    options = {"scene": Scene(("a cat",), 2), "style": 1.0, "subject": 1.0} | options
    return search_balance(
        None,
        Member(Adapter({}), options.pop("style"), name="s"),
        Member(Adapter({}), options.pop("subject"), name="c"),
        options.pop("scene"),
        Sides(),
        style_pictures=[Sides.reference],
        subject_pictures=[Sides.reference],
        **options,
    )


def test_search_draws_every_pair_by_every_method_and_then_around_the_best(calls):
    found = search(weights=(0.8, 1.2), methods=("linear", "np"), refine=1)
    grid = [(m, a, b) for m in ("linear", "np") for a in (0.8, 1.2) for b in (0.8, 1.2)]
    tried = [(t.method, t.style_weight, t.subject_weight) for t in found.trials]
    assert tried[:8] == grid
    scores = {key: t.score for key, t in zip(tried[:8], found.trials[:8], strict=True)}
    best = max(grid, key=lambda key: scores[key])
    around = {(best[0], round(best[1] + i, 6), round(best[2] + j, 6)) for i in (-0.2, 0, 0.2) for j in (-0.2, 0, 0.2)}
    assert set(tried[8:]) == around - {best}


def test_trials_are_what_the_pictures_recover(calls):
    found = search(weights=(0.6, 1.0), refine=0)
    for trial in found.trials:
        a, b = trial.style_weight, trial.subject_weight
        # the cosine with the reference is x, so a reading is what was drawn; the leaks of this pair are 0
        assert trial.style == pytest.approx(style_of(a, b), abs=1e-3)
        assert trial.subject == pytest.approx(subject_of(a, b), abs=1e-3)
        assert trial.score == pytest.approx(min(style_of(a, b), subject_of(a, b)), abs=1e-3)
        assert trial.error == pytest.approx(0, abs=1e-6)


def test_recommended_is_the_best_of_all_that_was_tried_and_drawn_anew_from_the_seeds_that_follow(calls):
    found = search(scene=Scene(("a cat", "a dog"), 3, seed=7), weights=(0.8, 1.0, 1.2))
    assert found.recommended.score == max(t.score for t in found.trials)
    assert (found.recommended.style_weight, found.recommended.subject_weight) == (1.1, 1.3)
    seeds = [scene.seed for scene, *_ in calls]
    assert set(seeds) == {7, 13}
    assert [call[1:] for call in calls if call[0].seed == 13] == [
        ("linear", 0, 0), ("linear", 1, 0), ("linear", 0, 1), ("linear", 1, 1), ("linear", 1.1, 1.3),
    ]  # fmt: skip
    assert found.fresh["plain"].score == pytest.approx(0.5, abs=1e-3)
    assert list(found.rows) == ["bare", "style", "subject", "plain", "recommended"]


def test_among_equals_the_smaller_weights_are_recommended():
    one = Trial("linear", 1.2, 1.2, 0.7, 0.6, 0.6, 0)
    two = Trial("linear", 0.8, 1.0, 0.7, 0.6, 0.6, 0)
    assert Balance([one, two]).recommended is Balance([two, one]).recommended is two


def test_searched_weights_multiply_a_loras_own(calls):
    found = search(style=0.5, subject=1.5, weights=(1.0,), refine=1)
    assert found.trials[0].style_weight == 0.5
    assert found.trials[0].subject_weight == 1.5
    assert {(t.style_weight, t.subject_weight) for t in found.trials} == {
        (a, b) for a in (0.45, 0.5, 0.55) for b in (1.35, 1.5, 1.65)
    }
    assert [call[2:] for call in calls[:3]] == [(0, 0), (0.5, 0), (0, 1.5)]


def test_progress_counts_pictures_up_to_the_total(calls):
    seen = []
    search(weights=(0.8, 1.0), refine=1, report=lambda *row: seen.append(row))
    assert [row[0] for row in seen] == [2 * (i + 1) for i in range(len(calls))]
    assert {row[1] for row in seen} == {2 * (4 + 8 + 3 + 5)}
    assert seen[0][2] == "the bare base"
    assert seen[3][2] == "linear 0.8 and 0.8"


@pytest.mark.parametrize(
    ("weights", "message"),
    [([], "the list of weights is empty"), ([math.nan], "weight nan is out of range"), ([-1.0], "weight -1")],
)
def test_weights_that_cannot_be_searched_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        search(weights=weights)


def test_scene_refuses_no_seed_and_no_prompt():
    with pytest.raises(ConfigError, match="seeds 0 is out of range"):
        Scene(("a",), 0)
    for prompts in ((), ("a", " ")):
        with pytest.raises(ConfigError, match="a prompt is empty"):
            Scene(prompts)


def test_neighbours_are_eight_and_none_below_zero():
    assert len(list_around((1, 1), 0.1)) == 8
    assert (1.1, 0.9) in list_around((1, 1), 0.1)
    assert (1, 1) not in list_around((1, 1), 0.1)
    assert list_around((0, 0), 0.1) == [(0, 0.1), (0.1, 0), (0.1, 0.1)]


def test_front_is_what_no_other_beats_in_both():
    def trial(style, subject):
        return Trial("linear", 1, 1, style, subject, 0, 0)

    twins = [trial(0.5, 0.5), trial(0.5, 0.5), trial(0.4, 0.5)]
    assert find_front(twins) == twins[:1]
    generator = np.random.default_rng(0)
    trials = [trial(*pair) for pair in generator.random((60, 2))] + [trial(0.5, 0.5), trial(0.5, 0.5)]

    def beaten(t):
        return any(
            o.style >= t.style and o.subject >= t.subject and (o.style, o.subject) != (t.style, t.subject)
            for o in trials
        )

    expected = sorted({(t.style, t.subject) for t in trials if not beaten(t)})
    assert [(t.style, t.subject) for t in find_front(trials)] == expected


def test_trial_s_error_and_gain_are_those_of_a_mean():
    one = Trial.of("linear", (1, 1), Recoveries(torch.tensor([0.5, 0.9]), torch.tensor([0.7, 0.4])))
    two = Trial.of("linear", (1, 1), Recoveries(torch.tensor([0.4, 0.1]), torch.tensor([1.0, 1.0])))
    assert one.scores == pytest.approx((0.5, 0.4))
    assert one.error == pytest.approx(0.05)
    assert one.gain_over(two) == pytest.approx((0.2, 0.1))


def test_verdict_says_what_fresh_noise_says():
    def verdict(*scores, weights=(1.2, 1)):
        found = Balance()
        for name, own, pair in (("plain", (0.5, 0.5, 0.5), (1, 1)), ("recommended", scores, weights)):
            rows = torch.tensor(own)
            found.fresh[name] = Trial.of("linear", pair, Recoveries(rows, rows))
        return judge_gain(found)

    assert verdict(0.6, 0.7, 0.65).startswith("better than the plain sum at full weights: +0.15 ± 0.03")
    assert verdict(0.4, 0.7, 0.5).startswith("no clear gain")
    assert verdict(0.3, 0.4, 0.35).startswith("worse than the plain sum")
    assert verdict(0.5, 0.5, 0.5, weights=(1, 1)).startswith("nothing that was tried does better")


def test_scene_draws_what_generate_draws():
    base = make_tiny_base()
    members = [Member(random_adapter(base, 1), 0.5), Member(random_adapter(base, 2), 0.7)]
    from sdlora.combining.plan import Plan

    scene = Scene(("a cat", "an app"), 2, seed=5, steps=2, negative="ink", guidance=3.0)
    pictures = scene.draw(base, Plan.of(members, method="np"))
    options = {"steps": 2, "negative": "ink", "guidance": 3.0, "method": "np", "adapters": members, "images": 2}
    expected = generate(base, "a cat", seed=5, **options) + generate(base, "an app", seed=7, **options)
    for one, two in zip(pictures, expected, strict=True):
        assert abs(np.asarray(one).astype(int) - np.asarray(two).astype(int)).max() <= 1


def test_chart_shows_a_dot_for_each_trial_where_its_recoveries_are():
    trials = [Trial("linear", 1, 1, 0.2, 0.8, 0.2, 0), Trial("klora", 1, 0.5, 0.6, 0.3, 0.3, 0)]
    pixels = np.asarray(draw_pareto(trials, trials[1], "Title", ("ink", "cat"))).astype(int)

    def centre(colour):
        rows, columns = np.nonzero((pixels == colour).all(-1) & (np.arange(len(pixels)) > 150)[:, None])
        return columns.mean(), rows.mean()

    first, second = centre((31, 119, 180)), centre((214, 97, 31))
    assert second[0] - first[0] > 200
    assert second[1] - first[1] > 200
    assert (second[0] - first[0]) / (second[1] - first[1]) == pytest.approx(0.4 / 0.5, abs=0.2)

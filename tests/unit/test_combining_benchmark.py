"""The benchmark of combining: its statistics, and that it draws nothing twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import combining, recovery
from benchmarks.combining_art import STYLES, SUBJECTS, WEAK_STYLES, Style, list_style
from sdlora.adapter.delta import Adapter


def test_interval_holds_the_mean_and_widens_with_what_pairs_differ_by():
    assert combining.bootstrap([[0.5, 0.5], [0.5, 0.5]], 100) == (0.5, 0.5)
    generator = np.random.default_rng(0)
    inside = generator.normal(0, 1, (16, 12))
    low, high = combining.bootstrap(inside - inside.mean(), 4000)
    # pictures alone: a standard error of 1 / sqrt(192), and both stages drawn make it about sqrt(2) of that
    assert low < 0 < high
    assert (high - low) / 2 / 1.96 == pytest.approx(2**0.5 / 192**0.5, rel=0.25)
    apart = inside + np.linspace(-3, 3, 16)[:, None]
    wide = combining.bootstrap(apart, 4000)
    assert (wide[1] - wide[0]) / 2 / 1.96 == pytest.approx(apart.mean(1).std() / 4, rel=0.15)


def test_share_in_order_counts_couples_and_halves_equals():
    assert recovery.order([0.9, 0.5], [0.5, 0.1]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_summary_is_the_means_over_pairs_and_the_gain_picture_by_picture():
    def row(*scores):
        one = {"weights": [1, 1], "style": [0.5] * 2, "subject": [0.25] * 2, "scores": list(scores), "seconds": 2.0}
        return {"as is": one, "best": one}

    pairs = [
        {"pair": "a", "methods": {"linear": row(0.2, 0.4), "np": row(0.4, 0.4)}},
        {"pair": "b", "methods": {"linear": row(0.6, 0.6), "np": row(0.5, 0.6)}},
    ]
    table = combining.summarize(pairs, "best")
    assert table["np"]["score"] == pytest.approx(0.475)
    assert table["np"]["difference to linear"] == pytest.approx(0.025)
    assert table["np"]["pairs better than linear"] == 1
    low, high = table["np"]["interval"]
    assert -0.1 <= low < 0.025 < high <= 0.2
    assert table["linear"]["interval"] == [0, 0]


def test_a_row_that_was_drawn_is_read_and_not_drawn_again(tmp_path, monkeypatch):
    pair = combining.Pair(STYLES[0], SUBJECTS[0], (Adapter({}), Adapter({})), ([], []))
    prompts, seeds = pair.requests("reporting")
    assert prompts[4:6] == ["a crying mio cat, ink style"] * 2
    assert len(set(seeds)) == 12
    assert not set(prompts) & set(pair.requests("selecting")[0])
    assert not set(seeds) & set(pair.requests("selecting")[1])
    drawn = []

    def draw(studio, pair, part, case):
        drawn.append(case)
        return [Image.new("RGB", (8, 8), (i * 20, 0, 0)) for i in range(12)]

    monkeypatch.setattr(combining.Studio, "_draw", draw)
    case = combining.Case("np:mu=2", 0.8, 1)
    for _ in range(2):
        pictures, seconds = combining.Studio(tmp_path).row(pair, "reporting", case)
        assert [p.getpixel((3, 3))[0] for p in pictures] == [i * 20 for i in range(12)]
        assert seconds >= 0
    assert drawn == [case]


def test_every_method_has_as_many_tries_and_the_full_weights_first():
    assert {len(cases) for cases in combining.TRIED.values()} == {6}
    assert all((cases[0].style, cases[0].subject) == (1, 1) for cases in combining.TRIED.values())
    assert all(len(set(cases)) == 6 for cases in combining.TRIED.values())


def test_a_style_shows_forty_things_under_the_names_that_its_set_has():
    things = json.loads(combining.ROOT.joinpath("sdlora/bases/mini/weights/things.json").read_text("utf-8"))
    icons = {"icons": {name.replace(" ", "-"): {} for name in things[:60]}, "aliases": {"x": {"parent": "anchor"}}}
    rows = list_style(icons, Style("comic", "openmoji"))
    assert len({icon for icon, _ in rows}) == 40
    assert all(icon in icons["icons"] for icon, _ in rows)
    assert all(caption.endswith(", comic style") and caption.split()[0] in ("a", "an") for _, caption in rows)
    assert len({s.name for s in (*STYLES, *WEAK_STYLES)}) == 6


def test_other_sets_names_of_a_character_are_found():
    icons = {"icons": {"cat-face-with-wry-smile": {}, "kissing-cat": {}, "person-bowing": {}}}
    names = ["cat-with-wry-smile", "kissing-cat", "woman-bowing", "woman-frowning"]
    assert recovery.find_icons(icons, names) == ["cat-face-with-wry-smile", "kissing-cat", "person-bowing"]

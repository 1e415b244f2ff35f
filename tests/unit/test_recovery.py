"""Style and subject recovery on vectors made by hand, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from sdlora.errors import ConfigError
from sdlora.generating.recovery import Axis, Recovery


def unit(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, [N, 2]."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def picture(style: float, subject: float) -> Image.Image:
    """A picture that stands for two angles, in degrees, which its size holds."""
    return Image.new("L", (round(style) + 1, round(subject) + 1))


class Angles:
    """Features that read the two angles of `picture`."""

    name = "angles"

    def style(self, pictures):
        return unit(*(p.width - 1 for p in pictures))

    def subject(self, pictures):
        return unit(*(p.height - 1 for p in pictures))


def cosine(a: float, b: float) -> float:
    return math.cos(math.radians(a - b))


def make_recovery(bare=(0, 0), style=(90, 10), subject=(20, 90)) -> Recovery:
    """Style reference at 90 degrees of style, subject reference at 90 of subject; two pictures of each kind."""
    return Recovery.of(
        Angles(),
        bare=[picture(*bare)] * 2,
        style=[picture(*style)] * 2,
        subject=[picture(*subject)] * 2,
        style_pictures=[picture(90, 45)],
        subject_pictures=[picture(45, 90)],
    )


def test_base_is_zero_and_each_lora_alone_is_one_of_its_own_and_nothing_of_the_other():
    recovery = make_recovery()
    seen = recovery.measure([picture(0, 0), picture(90, 10), picture(20, 90)])
    assert seen.style.tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert seen.subject.tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert seen.scores.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_recovery_is_the_formula_written_out():
    recovery = make_recovery(style=(80, 10), subject=(20, 70))
    style, subject = 60, 50
    u = (cosine(style, 90) - cosine(0, 90)) / (cosine(80, 90) - cosine(0, 90))
    v = (cosine(subject, 90) - cosine(0, 90)) / (cosine(70, 90) - cosine(0, 90))
    leak_u = (cosine(20, 90) - cosine(0, 90)) / (cosine(80, 90) - cosine(0, 90))
    leak_v = (cosine(10, 90) - cosine(0, 90)) / (cosine(70, 90) - cosine(0, 90))
    seen = recovery.measure([picture(style, subject)])
    assert recovery.style_leak == pytest.approx(leak_u)
    assert recovery.subject_leak == pytest.approx(leak_v)
    assert float(seen.style[0]) == pytest.approx((u - leak_u * v) / (1 - leak_u * v))
    assert float(seen.subject[0]) == pytest.approx((v - leak_v * u) / (1 - leak_v * u))
    assert float(seen.scores[0]) == pytest.approx(min(float(seen.style[0]), float(seen.subject[0])))


def test_a_style_that_hides_the_subject_counts_for_it():
    """Both references met in full is 1 and 1, though the style alone moves the subject's reading below the base's."""
    recovery = make_recovery(bare=(0, 30), style=(90, 0))
    assert recovery.subject_leak < -0.9
    seen = recovery.measure([picture(90, 90), picture(90, 30)])
    assert seen.subject[0] == pytest.approx(1, abs=1e-6)
    assert 0.3 < float(seen.subject[1]) < 0.6  # the base's own reading, under a style that takes it away


def test_a_floor_is_between_none_and_the_whole_leak():
    """A picture with less of the subject than the base has no floor below 0, one with more than all of it no higher."""
    recovery = make_recovery(style=(90, 30), subject=(20, 60))
    u = cosine(45, 90)
    seen = recovery.measure([picture(45, 200), picture(45, 90)])
    assert float(seen.style[0]) == pytest.approx(u, abs=1e-6)
    leak = cosine(20, 90)
    hidden = make_recovery(style=(60, 30), subject=(20, 90)).measure([picture(90, 45), picture(200, 45)])
    assert float(hidden.subject[0]) == pytest.approx((cosine(45, 90) - cosine(30, 90)) / (1 - cosine(30, 90)), abs=1e-6)
    assert float(hidden.subject[1]) == pytest.approx(cosine(45, 90), abs=1e-6)
    assert float(seen.style[1]) == pytest.approx((u - leak) / (1 - leak), abs=1e-6)


def test_scores_are_held_to_zero_and_one_and_recoveries_are_not():
    recovery = make_recovery(style=(60, 10), subject=(20, 60))
    seen = recovery.measure([picture(90, 90), picture(150, 200)])
    assert float(seen.style[0]) > 1
    assert float(seen.subject[1]) < 0
    assert seen.scores.tolist() == [1, 0]
    assert seen.score == 0.5


def test_without_references_a_lora_s_own_pictures_stand_in_and_those_of_the_same_noise_are_left_out():
    bare, alone, other = (0, 4, 8), (80, 90, 100), (40, 50, 70)
    axis = Axis.of("style", unit(*bare), unit(*alone), None)

    def reading(angles):
        rows = [[cosine(x, r) for j, r in enumerate(alone) if j != i] for i, x in enumerate(angles)]
        return [sum(row) / 2 for row in rows]

    assert axis.floor == pytest.approx(sum(reading(bare)) / 3)
    assert axis.ceiling == pytest.approx(sum(reading(alone)) / 3)
    scaled = [(r - axis.floor) / (axis.ceiling - axis.floor) for r in reading(other)]
    assert axis.read(unit(*other)).tolist() == pytest.approx(scaled, abs=1e-5)
    with pytest.raises(ValueError, match="2 pictures to compare with 3 of the same noise"):
        axis.read(unit(1, 2))


def test_pictures_of_other_noise_are_compared_with_all_of_a_lora_s_own():
    recovery = Recovery.of(
        Angles(),
        bare=[picture(0, 0), picture(6, 3)],
        style=[picture(80, 10), picture(90, 5)],
        subject=[picture(20, 90), picture(10, 70)],
    )
    seen = recovery.elsewhere.style_axis.read(unit(50))
    own = (cosine(50, 80) + cosine(50, 90)) / 2
    axis = recovery.style_axis
    assert seen.tolist() == pytest.approx([(own - axis.floor) / (axis.ceiling - axis.floor)], abs=1e-5)
    assert len(recovery.elsewhere.measure([picture(50, 50)] * 5).style) == 5


def test_separation_is_the_gap_in_pooled_standard_deviations():
    axis = Axis.of("style", unit(0, 20), unit(70, 80), unit(90))
    low, high = [cosine(0, 90), cosine(20, 90)], [cosine(70, 90), cosine(80, 90)]
    spread = math.sqrt((((low[1] - low[0]) / 2) ** 2 + ((high[1] - high[0]) / 2) ** 2) / 2)
    assert axis.separation == pytest.approx((sum(high) - sum(low)) / 2 / spread, rel=1e-5)


def test_a_lora_that_does_nothing_is_refused():
    with pytest.raises(ConfigError, match="the subject LoRA alone comes no nearer to its pictures"):
        make_recovery(subject=(20, 0))


def test_two_loras_of_the_same_are_refused():
    with pytest.raises(ConfigError, match=r"the subject LoRA alone shows 100% of the style already"):
        make_recovery(subject=(90, 90))


def test_one_picture_is_no_measure_of_itself():
    with pytest.raises(ConfigError, match="2 or more seeds, or --style-pictures"):
        Axis.of("style", unit(0), unit(90), None)

"""Buckets hold against their bounds, and every cut against the pixels that it keeps."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.config import Recipe
from sdlora.data.buckets import (
    Bucketing,
    draw_places,
    list_sizes,
    move_cut,
    plan_cut,
    plan_cuts,
    read_bucketing,
)
from sdlora.data.picture import cut_picture, fit_picture
from sdlora.errors import ConfigError

steps = st.sampled_from([8, 16, 32, 64])
aspects = st.floats(1, 4)
sides = st.integers(1, 4000)


@dataclass
class Picture:
    name: str
    size_px: tuple[int, int]
    repeats: int = 1


def test_the_sizes_of_sdxl_are_the_ones_in_use():
    sizes = list_sizes(1024, 64, 2)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (768, 1344)} < set(sizes)
    assert (1472, 704) not in sizes  # 2.09 : 1
    assert list_sizes(128, 32, 2) == [(128, 128), (160, 96), (96, 160)]
    assert list_sizes(512, 64, 1) == [(512, 512)]


@settings(deadline=None)
@given(st.integers(2, 32), steps, aspects)
def test_sizes_keep_to_area_aspect_and_step(multiple, step, aspect):
    resolution = multiple * step
    sizes = list_sizes(resolution, step, aspect)
    assert sizes[0] == (resolution, resolution)
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert max(width, height) <= aspect * min(width, height)
        assert resolution**2 - step * max(width, height) < width * height <= resolution**2
        assert (height, width) in sizes


@settings(deadline=None)
@given(sides, sides, st.integers(2, 16), steps, aspects, st.booleans())
def test_a_picture_gets_the_size_that_keeps_most_of_it_unscaled(width, height, multiple, step, aspect, upscale):
    bucketing = Bucketing(multiple * step, step, aspect, upscale)
    cut = bucketing.choose((width, height))
    left, top, right, bottom = cut.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left, bottom - top)[0] == width or bottom - top == height  # one side is kept whole
    assert abs(left - (width - right)) <= 1
    assert abs(top - (height - bottom)) <= 1
    best = min((plan_cut((width, height), size) for size in bucketing.sizes), key=lambda c: round(c.lost, 9))
    if cut.size in bucketing.sizes:
        assert cut.lost <= best.lost + 1e-8
    else:
        assert best.grows
        assert not upscale
        assert max(cut.size) <= aspect * min(cut.size)
        assert cut.size[0] * cut.size[1] <= (multiple * step) ** 2
    if cut.grows:
        assert upscale or min(width, height) < step


def test_small_pictures_go_to_smaller_buckets_and_are_named():
    cuts = plan_cuts(
        [Picture("big", (900, 600)), Picture("low", (300, 200)), Picture("dot", (20, 20))], Bucketing(512, 64)
    )
    assert [cut.size for cut in cuts.cuts] == [(640, 384), (256, 192), (64, 64)]
    lines = cuts.describe(1)
    assert lines[0] == "bucket 640 x 384 px: 1 picture, 10.0% cut away on average, 10.0% at most (big)"
    assert lines[-2].startswith("2 pictures too small for the resolution, put in smaller buckets: low, dot; upscale")
    assert lines[-1] == "1 picture scaled up: dot"
    up = plan_cuts([Picture("low", (300, 200))], Bucketing(512, 64, upscale=True))
    assert up.cuts[0].size in list_sizes(512, 64, 2)
    assert up.describe(1)[-1] == "1 picture scaled up: low"


def test_the_plan_says_what_the_square_cuts_away_and_what_a_short_bucket_does():
    pictures = [Picture("wide", (200, 100)), Picture("square", (100, 100))]
    assert plan_cuts(pictures, Bucketing(100)).describe(1) == [
        "squares: 25.0% cut away on average, 50.0% at most (wide); buckets = true (--buckets) keeps more"
    ]
    assert plan_cuts(pictures[1:], Bucketing(100)).describe(1) == []
    lines = plan_cuts([Picture("wide", (256, 128), 3), Picture("square", (128, 128), 8)], Bucketing(128, 32)).describe(
        8
    )
    assert lines[0] == "bucket 128 x 128 px: 1 picture, nothing cut away"
    assert lines[1].endswith(
        "its 3 images an epoch are fewer than the 8 of a step, which it fills by repeating them, once in about "
        "2.7 epochs"
    )


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (128, 128)])
def test_the_ids_say_where_the_pixels_came_from(size):
    """Every pixel of the picture holds its own place, so the cut's corner is read back from its pixels."""
    width, height = 330, 250
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    # the places in steps of a half, which 8 bits can hold
    pixels = np.stack([x // 2, y // 2, 0 * x], -1).astype(np.uint8)
    for mirrored in (False, True):
        cut = plan_cut((width, height), size)
        seen = np.asarray(cut_picture(Image.fromarray(pixels), cut)).astype(float)
        own_height, own_width, top, left, target_height, target_width = cut.ids(mirrored)
        assert (own_width, own_height) == (width, height)
        assert seen.shape == (target_height, target_width, 3)
        scale = (cut.box[2] - cut.box[0]) / size[0]
        column = seen[size[1] // 2, -1 if mirrored else 0, 0] * 2
        first = width - column if mirrored else column
        assert abs(first / scale - left) < 4 / scale + 1
        assert abs(seen[0, size[0] // 2, 1] * 2 / scale - top) < 4 / scale + 1


def test_the_square_is_the_bits_it_always_was():
    rng = np.random.default_rng(0)
    for width, height in ((40, 24), (24, 41), (33, 33), (1, 70)):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        expected = square if side == 24 else square.resize((24, 24), Image.Resampling.LANCZOS)
        assert fit_picture(image, 24).tobytes() == expected.tobytes()


def test_the_recipe_gives_a_step_that_fits_its_resolution():
    assert read_bucketing(Recipe(), 512) == Bucketing(512)
    recipe = Recipe(buckets=True, max_aspect=3, upscale=True)
    assert read_bucketing(recipe, 512) == Bucketing(512, 64, 3.0, True)
    assert read_bucketing(recipe, 128) == Bucketing(128, 32, 3.0, True)
    assert read_bucketing(Recipe(buckets=True, bucket_step_px=128), 512).step_px == 128
    with pytest.raises(ConfigError, match=r"bucket_step_px = 64 leaves no choice.*of 64; give 16"):
        read_bucketing(Recipe(buckets=True, bucket_step_px=64), 64)
    with pytest.raises(ConfigError, match=r"resolution = 520 is no multiple.*64 px; give resolution = 512"):
        read_bucketing(Recipe(buckets=True), 520)
    for field in ({"bucket_step_px": 32}, {"max_aspect": 3}, {"upscale": True}):
        with pytest.raises(ConfigError, match="has no use while buckets = false"):
            Recipe(**field)


def test_random_crops_take_every_place_and_keep_the_size():
    recipe = Recipe(crop="random", crops=50)
    places = draw_places(recipe, 20)
    assert draw_places(recipe, 20) == places
    assert draw_places(recipe, 3) == places[:3]
    assert draw_places(Recipe(crop="random", crops=50, seed=1), 3) != places[:3]
    assert draw_places(Recipe(), 3) is None
    centre = plan_cut((14, 10), (10, 10))
    cuts = [move_cut(centre, at) for own in places for at in own]
    assert {cut.box for cut in cuts} == {(left, 0, left + 10, 10) for left in range(5)}
    for left in range(5):
        assert abs(sum(cut.box[0] == left for cut in cuts) / 1000 - 0.2) < 0.05
    assert {cut.lost for cut in cuts} == {centre.lost}
    with pytest.raises(ConfigError, match='crops = 4 has no use while crop = "centre"'):
        Recipe(crops=4)

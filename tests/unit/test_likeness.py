"""Near-duplicates hold against pictures saved again, scaled and retouched, and against those of one layout."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdlora.data.check import find_near_duplicates
from sdlora.data.folder import survey_folder
from sdlora.data.likeness import group_alike, look_at


def paint(seed):
    """A smooth picture of random colours."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC)


def change(picture, how):
    if how == "jpeg":
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=60)
        return Image.open(data).convert("RGB")
    if how == "scaled":
        return picture.resize((83, 62), Image.Resampling.LANCZOS)
    if how == "brighter":
        return picture.point([min(255, v + 5) for v in range(256)] * 3)
    ImageDraw.Draw(picture).ellipse((20, 20, 32, 30), fill="black")
    return picture


@pytest.mark.parametrize("how", ["jpeg", "scaled", "brighter", "retouched"])
def test_a_changed_picture_is_found_among_others(how):
    looks = {str(i): look_at(paint(i)) for i in range(30)} | {"again": look_at(change(paint(7), how))}
    assert group_alike(looks) == [["7", "again"]]


def test_other_colours_are_another_picture():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    assert group_alike({"red": look_at(red), "blue": look_at(blue)}) == []


def test_symmetrical_and_dark_pictures_are_told_apart():
    def mirror(picture):
        half = picture.crop((0, 0, 80, 120))
        picture.paste(half.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (80, 0))
        return picture

    looks = {f"symmetrical {i}": look_at(mirror(paint(i))) for i in range(9)}
    looks |= {f"dark {i}": look_at(paint(i).point([v // 20 for v in range(256)] * 3)) for i in range(9)}
    assert group_alike(looks) == []
    again = mirror(paint(4))
    assert group_alike(looks | {"again": look_at(change(again, "scaled"))}) == [["symmetrical 4", "again"]]


def test_a_chain_is_one_group_and_equal_pictures_are_named_elsewhere(tmp_path):
    for name, picture in {"a": paint(1), "b": paint(1), "c": change(paint(1), "scaled"), "d": paint(2)}.items():
        picture.save(tmp_path / f"{name}.png")
    change(paint(1), "jpeg").save(tmp_path / "e.png")
    assert find_near_duplicates(survey_folder(tmp_path, "x")) == [["a.png", "c.png", "e.png"]]
    assert group_alike({}) == []

"""Masks hold against what a person may put in place of them, and against their pictures' own cuts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.config import Recipe, compare
from sdlora.data.buckets import Bucketing, draw_places, move_cut, plan_cut, plan_cuts
from sdlora.data.cache import encode_folder
from sdlora.data.folder import Example
from sdlora.data.masks import cut_mask, digest_masks, place_crops, read_mask
from sdlora.data.material import gather, survey_data
from sdlora.data.store import Store
from sdlora.errors import ConfigError, DataError
from sdlora.training.objective import mask_weight, weighted_error
from tests.tiny import make_tiny_base


def make_pictures(folder: Path, sizes=((64, 64), (96, 48), (40, 40))) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")
    return folder


def make_masks(folder: Path, sizes=((64, 64), (96, 48), (40, 40)), seed: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(seed + i).integers(0, 256, (size[1], size[0]), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def problems(data, masks) -> dict[str, str]:
    survey = survey_data(data, Recipe(masks=str(masks)))
    return {p.file: f"{p.problem}; {p.fix}" for p in survey.problems}


def test_a_mask_comes_down_by_area_through_its_pictures_cut():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8)
    mask = Image.fromarray(pixels)
    for at in ((0.0, 0.0), (0.5, 0.5), (0.99, 0.99)):
        cut = move_cut(plan_cut((96, 64), (64, 64)), at)
        left = cut.box[0]
        wanted = pixels[:, left : left + 64].astype(float).reshape(8, 8, 8, 8).mean((1, 3)) / 255
        np.testing.assert_allclose(cut_mask(mask, cut), wanted, atol=1e-6)
    half = cut_mask(mask, plan_cut((96, 64), (32, 32)))  # 64 px of the middle to 32, then to 4 cells of 16 own px
    wanted = pixels[:, 16:80].astype(float).reshape(4, 16, 4, 16).mean((1, 3)) / 255
    np.testing.assert_allclose(half, wanted, atol=1 / 255)  # 8-bit values, rounded twice


def test_the_edge_of_a_mask_stays_where_it_is_and_nothing_leaks():
    mask = Image.fromarray(np.repeat(np.arange(96)[None] < 48, 96, 0).astype(np.uint8) * 255)
    found = cut_mask(mask, plan_cut((96, 96), (64, 64)))
    assert (found[:, :4] == 1).all()
    assert (found[:, 4:] == 0).all()


def test_weights_have_a_mean_of_one_however_small_the_mask_and_keep_their_ratio():
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, 0, :, :4], masks[1, 0, 0, 0], masks[2] = 1, 0.25, 1
    for outside in (0.0, 0.1, 1.0):
        weight = mask_weight(masks, outside)
        torch.testing.assert_close(weight.mean((1, 2, 3)), torch.ones(3))
        assert torch.equal(weight[2], torch.ones(1, 8, 8))
        ratio = float(weight[0, 0, 0, 7] / weight[0, 0, 0, 0])
        assert ratio == pytest.approx(outside, abs=1e-6)
    assert float(mask_weight(masks, 0.0)[0].max()) == 2
    assert float(mask_weight(masks, 0.0)[1, 0, 0, 0]) == 64
    assert torch.equal(mask_weight(masks, 1.0), torch.ones(3, 1, 8, 8))


@pytest.mark.parametrize("width", [None, torch.tensor([0.3, 1.0])])
def test_a_masked_loss_is_the_mean_over_the_mask_and_a_white_one_the_loss_without(width):
    prediction, goal = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    weight = torch.tensor([0.5, 2.0])
    plain = weighted_error(prediction, goal, weight, width)
    white = mask_weight(torch.ones(2, 1, 8, 8), 0.3)
    assert torch.equal(weighted_error(prediction, goal, weight, width, white), plain)
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :, :4], masks[1, :, 2, 3] = 1, 1
    loss = weighted_error(prediction, goal, weight, width, mask_weight(masks, 0.0))
    own = [None, None] if width is None else width.split(1)
    first = weighted_error(prediction[:1, :, :, :4], goal[:1, :, :, :4], weight[:1], own[0])
    second = weighted_error(prediction[1:, :, 2:3, 3:4], goal[1:, :, 2:3, 3:4], weight[1:], own[1])
    torch.testing.assert_close(loss, (first + second) / 2)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient[0, :, :, :4].any()
    assert not gradient[0, :, :, 4:].any()
    assert int(gradient[1].count_nonzero()) == 4


def test_masks_are_cut_and_mirrored_with_their_pictures_in_every_bucket(tmp_path):
    data, masks = make_pictures(tmp_path / "data"), make_masks(tmp_path / "masks")
    recipe = Recipe(masks=str(masks), crop="random", crops=2)
    examples = gather(data, recipe).examples
    sizes = [(64, 64), (80, 48), (64, 64)]
    places = draw_places(recipe, 3)
    encoded = encode_folder(
        make_tiny_base(), examples, resolution_px=64, sizes=sizes, places=places, flip=True, text=False, progress=False
    )
    plain = encode_folder(
        make_tiny_base(), [replace(e, mask=None) for e in examples], resolution_px=64, sizes=sizes, places=places,
        flip=True, text=False, progress=False,
    )  # fmt: skip
    assert plain.mask(torch.tensor([0]), torch.tensor([0])) is None
    for mine, other in zip(encoded.latents, plain.latents, strict=True):
        assert torch.equal(mine.mean, other.mean)
    for n, (size, example) in enumerate(zip(sizes, examples, strict=True)):
        own = Image.open(masks / f"{n}.png")
        for view in range(4):
            cut = move_cut(plan_cut(example.size_px, size), places[n][view % 2])
            wanted = torch.from_numpy(cut_mask(own, cut))
            found = encoded.mask(torch.tensor([view]), torch.tensor([n]))
            assert found.shape == (1, 1, size[1] // 8, size[0] // 8)
            assert torch.equal(found[0, 0], wanted.flip(-1) if view >= 2 else wanted)


def test_alpha_is_the_mask_and_a_folder_of_the_same_gives_the_same(tmp_path):
    data, masks = make_pictures(tmp_path / "data"), make_masks(tmp_path / "masks")
    for i in range(3):
        picture = Image.open(data / f"{i}.png")
        picture.putalpha(Image.open(masks / f"{i}.png"))
        picture.save(data / f"{i}.png")
    for own, other in zip(
        gather(data, Recipe(masks="alpha")).examples, gather(data, Recipe(masks=str(masks))).examples, strict=True
    ):
        assert read_mask(own).tobytes() == read_mask(other).tobytes()
        assert own.mask == own.path != other.mask


def test_the_store_keeps_masks_and_its_key_tells_them_apart(tmp_path, monkeypatch):
    data, masks = make_pictures(tmp_path / "data"), make_masks(tmp_path / "masks")

    def encode(source: str) -> tuple[Store, object]:
        store = Store(tmp_path / "cache")
        encoded = encode_folder(
            make_tiny_base(), gather(data, Recipe(masks=source)).examples, resolution_px=64, flip=True, text=False,
            progress=False, store=store,
        )  # fmt: skip
        return store, encoded.latents[0]

    plain, _ = encode("")
    assert (plain.found, plain.made) == (0, 3)
    first, made = encode(str(masks))
    assert (first.found, first.made) == (0, 3)
    monkeypatch.setattr(type(make_tiny_base()), "encode_pictures", lambda *a: pytest.fail("encoded again"))
    again, kept = encode(str(masks))
    assert (again.found, again.made) == (3, 0)
    assert torch.equal(kept.mask, made.mask)
    assert torch.equal(kept.mean, made.mean)
    assert encode("")[0].found == 3
    monkeypatch.undo()
    make_masks(masks, seed=70)
    changed, other = encode(str(masks))
    assert changed.made == 3
    assert not torch.equal(other.mask, made.mask)


def test_a_mask_may_be_scaled_turned_grey_of_any_depth_or_lie_in_a_subfolder(tmp_path):
    data = make_pictures(tmp_path / "data", [(64, 48)] * 5)
    (data / "2_more").mkdir()
    for suffix in (".png", ".txt"):
        (data / f"4{suffix}").rename(data / "2_more" / f"4{suffix}")
    masks = tmp_path / "masks"
    (masks / "2_more").mkdir(parents=True)
    half = np.repeat(np.arange(64)[None] < 32, 48, 0)
    Image.fromarray(half.astype(np.uint8) * 255).resize((32, 24), 0).save(masks / "0.webp", lossless=True)
    turned = Image.fromarray(half.astype(np.uint8) * 255).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(masks / "1.jpg", exif=exif, quality=100)
    Image.fromarray(half.astype(np.uint16) * 65535).save(masks / "2.tif")
    Image.fromarray(half).save(masks / "3.PNG")
    Image.fromarray(half.astype(np.uint8) * 255).convert("P").save(masks / "2_more" / "4.gif")
    for example in gather(data, Recipe(masks=str(masks))).examples:
        found = np.asarray(read_mask(example)).astype(int)
        assert found.shape == (48, 64)
        np.testing.assert_allclose(found, half * 255, atol=3, err_msg=example.name)


def test_every_mask_that_cannot_be_used_is_named_with_its_fix(tmp_path):
    data = make_pictures(tmp_path / "data", [(64, 64)] * 8)
    masks = make_masks(tmp_path / "masks", [(64, 64)] * 8)
    (masks / "0.png").unlink()
    Image.new("L", (64, 60), 255).save(masks / "1.png")
    Image.new("L", (64, 64), 0).save(masks / "2.png")
    Image.new("RGB", (64, 64), "red").save(masks / "3.png")
    Image.new("LA", (64, 64), (255, 10)).save(masks / "4.png")
    (masks / "5.png").write_bytes(b"no picture")
    Image.new("L", (64, 64), 9).save(masks / "6.bmp")
    Image.new("L", (64, 64), 9).save(masks / "stray.png")
    found = problems(data, masks)
    assert found == {
        "0.png": f"has no mask in {masks} (1 of 8 pictures without); put a grey picture of its name there",
        str(masks / "1.png"): "with 64 x 60 px is of another shape than 1.png, 64 x 64 px; "
        "cut the mask as the picture is cut",
        str(masks / "2.png"): "is black everywhere, so nothing of the picture would be learnt; "
        "correct the mask or delete the picture",
        str(masks / "3.png"): "has colours, so is no mask; save it as a grey picture: white is learnt, black is not",
        str(masks / "4.png"): "has transparent parts, so is no mask; save it as a grey picture, black there",
        str(masks / "5.png"): "is not a picture, whatever its name says; replace it with a picture or delete it",
        str(masks / "6.bmp"): "is one of 2 masks of 6.png; keep one of them",
    }
    assert survey_data(data, Recipe(masks=str(masks))).masks_unused == [str(masks / "stray.png")]
    with pytest.raises(DataError) as error:
        gather(data, Recipe(masks=str(masks)))
    assert "\n" not in str(error.value)


def test_alpha_says_how_many_pictures_have_none_or_nothing(tmp_path):
    data = make_pictures(tmp_path / "data", [(64, 64)] * 4)
    Image.new("RGBA", (64, 64), (9, 9, 9, 200)).save(data / "0.png")
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(data / "1.png")
    found = problems(data, "alpha")
    missing = "has no alpha channel to be its mask (2 of 4 pictures without); save it with one, or leave out masks"
    assert found.pop("1.png").startswith("is transparent everywhere")
    assert found == {"2.png": missing, "3.png": missing}


def test_a_folder_of_masks_that_is_no_such_folder_is_one_problem(tmp_path):
    data = make_pictures(tmp_path / "data")
    assert problems(data, tmp_path / "gone") == {
        str(tmp_path / "gone"): "does not exist; check the path of the masks, or write alpha"
    }
    assert "is a file" in problems(data, data / "0.png")[str(data / "0.png")]
    assert "is the data folder itself" in problems(data, data)[str(data)]


def test_masks_inside_the_data_folder_do_not_count_as_pictures(tmp_path):
    data = make_pictures(tmp_path / "data")
    masks = make_masks(data / "masks")
    material = gather(data, Recipe(masks=str(masks)))
    assert [e.name for e in material.examples] == ["0.png", "1.png", "2.png"]
    assert "masks/0.png" in problems(data, "")


def test_a_random_crop_is_drawn_again_until_it_holds_some_of_the_mask(tmp_path):
    data, masks = make_pictures(tmp_path / "data", [(64 * 8, 64)]), tmp_path / "masks"
    masks.mkdir()
    pixels = np.zeros((64, 512), np.uint8)
    pixels[:, 300:340] = 255
    Image.fromarray(pixels).save(masks / "0.png")
    recipe = Recipe(masks=str(masks), crop="random", crops=20)
    examples = gather(data, recipe).examples
    cuts = plan_cuts(examples, Bucketing(64))
    places, found = place_crops(recipe, examples, cuts)
    assert found == []
    lefts = [move_cut(cuts.cuts[0], at).box[0] for at in places[0]]
    assert all(236 < left < 340 for left in lefts)
    assert len(set(lefts)) > 10
    first = draw_places(recipe, 1)[0]
    assert any(mine == drawn for mine, drawn in zip(places[0], first, strict=True))  # what held some stays as drawn
    assert place_crops(recipe, examples, cuts)[0] == places

    centre = replace(recipe, crop="centre", crops=1)
    assert place_crops(centre, examples, cuts)[0] is None
    (problem,) = place_crops(centre, examples, cuts)[1]
    assert (problem.file, problem.problem) == ("0.png", "nothing of its mask is in the part that is cut out")
    Image.fromarray(np.pad(np.full((1, 1), 1, np.uint8), ((0, 63), (0, 511)))).save(masks / "0.png")
    (problem,) = place_crops(recipe, examples, cuts)[1]
    assert problem.problem == "none of 100 random crops holds any of its mask"


def test_the_digest_is_of_the_masks_and_their_order_not_of_their_path(tmp_path):
    data, masks, other = make_pictures(tmp_path / "data"), make_masks(tmp_path / "a"), make_masks(tmp_path / "b")
    one, two = (gather(data, Recipe(masks=str(m))).examples for m in (masks, other))
    assert digest_masks(one) == digest_masks(two) != digest_masks(one[::-1])
    make_masks(other, seed=9)
    assert digest_masks(two) != digest_masks(one)
    assert digest_masks([Example(data / "0.png", "0.png", "", 1)]) is None
    assert compare(Recipe(masks=str(masks)), Recipe(masks=str(other))) == []


def test_a_weight_outside_needs_masks_and_is_a_share():
    with pytest.raises(ConfigError, match=r'mask_outside = 0\.5 has no use while masks = ""; set masks \(--masks\)'):
        Recipe(mask_outside=0.5)
    with pytest.raises(ConfigError, match="mask_outside = 2"):
        Recipe(masks="alpha", mask_outside=2)
    assert compare(Recipe(masks="alpha"), Recipe(masks="alpha", mask_outside=0.5)) == ["mask_outside 0.0 -> 0.5"]

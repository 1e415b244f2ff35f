"""What is encoded once holds against what the base says of each picture and caption by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.bases.text import Text
from sdlora.data.buckets import move_cut, plan_cut
from sdlora.data.cache import encode_folder
from sdlora.data.folder import Example, scan_folder
from sdlora.errors import DataError
from tests.tiny import make_tiny_base, make_tiny_sdxl_base


@pytest.fixture(scope="module")
def base():
    return make_tiny_base()


@pytest.fixture
def examples(tmp_path):
    rng = np.random.default_rng(0)
    captions = ["a cat", "ink cat", "a cat", "inc"]
    for i, caption in enumerate(captions):
        Image.fromarray(rng.integers(0, 255, (24, 40, 3), np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    return scan_folder(tmp_path)


def encode(base, examples, **options):
    options = {"resolution_px": 16, "flip": True, "text": True, "progress": False} | options
    return encode_folder(base, examples, **options)


def test_each_row_equals_its_own_picture_plain_and_mirrored(base, examples):
    encoded = encode(base, examples)
    assert encoded.mean.shape == encoded.std.shape == (2, 4, 4, 2, 2)
    for n, example in enumerate(examples):
        pixels = np.asarray(Image.open(example.path).convert("RGB").crop((8, 0, 32, 24)).resize((16, 16), 1))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        for view, picture in enumerate((x, x.flip(-1))):
            mean, std = base.encode_pictures(picture)
            torch.testing.assert_close(encoded.mean[view, n], mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(encoded.std[view, n], std[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encoded.mean[0], encoded.mean[1])


def test_text_rows_are_the_captions_and_the_last_the_empty_one(base, examples):
    encoded = encode(base, examples)
    ids, _ = base.tokenize([*(e.caption for e in examples), ""])
    assert torch.equal(encoded.ids, ids)
    assert encoded.ids.dtype == torch.int64
    assert encoded.ids.shape == (5, 1, 1, 77)
    assert encoded.text.pooled is None
    torch.testing.assert_close(encoded.text.states, base.encode_text(ids).states, rtol=1e-4, atol=1e-5)
    assert torch.equal(encoded.text.states[0], encoded.text.states[2])


def test_the_same_caption_is_encoded_once(base, examples, monkeypatch):
    rows = []
    monkeypatch.setattr(
        type(base), "encode_text", lambda self, ids, skip: rows.append(len(ids)) or Text(torch.zeros(len(ids), 77, 4))
    )
    assert encode(base, examples).text.states.shape == (5, 77, 4)
    assert sum(rows) == 4  # three different ones and the empty one


def test_without_flip_and_text_there_is_one_view_and_no_states(base, examples):
    encoded = encode(base, [replace(e, repeats=n) for n, e in enumerate(examples, 1)], flip=False, text=False)
    assert encoded.mean.shape[0] == 1
    assert encoded.text is None
    assert encoded.repeats == [1, 2, 3, 4]


def test_captions_that_lose_their_end_are_counted_and_named(base, examples, capsys):
    long = replace(examples[1], caption="x " * 80)
    encoded = encode(base, [examples[0], long, replace(examples[2], caption="y " * 75)])
    assert encoded.truncated == ["1.png"]
    assert capsys.readouterr().err == (
        "warning: 1 caption is longer than 77 tokens and loses its end: 1.png (82 tokens)\n"
    )


def test_progress_is_plain_lines_where_stderr_is_no_terminal(base, examples, capsys):
    encode(base, examples, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["encoding pictures: 1 of 1", "encoding captions: 1 of 1"]


def test_latents_that_are_not_finite_stop_the_run(base, examples, monkeypatch):
    bad = torch.full((4, 4, 2, 2), torch.nan)
    monkeypatch.setattr(type(base), "encode_pictures", lambda self, x: (bad, bad))
    with pytest.raises(DataError, match=r"0\.png.*no finite latents; use --precision bf16 or fp32"):
        encode(base, examples)


def test_a_picture_that_went_away_is_named(base, examples):
    gone = Example(examples[0].path.with_name("gone.png"), "gone.png", "x", 1)
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        encode(base, [gone])


def test_captions_fill_as_many_chunks_as_are_allowed(base, examples, capsys):
    long = replace(examples[1], caption="x " * 160)
    encoded = encode(base, [examples[0], long], chunks=2)
    assert encoded.ids.shape == (3, 1, 2, 77)
    assert encoded.text.states.shape[1] == 154
    assert encoded.truncated == ["1.png"]
    assert "longer than 152 tokens and loses its end: 1.png (162 tokens)" in capsys.readouterr().err
    whole = encode(base, [examples[0], long], chunks=3)
    assert (whole.ids.shape[2], whole.truncated, capsys.readouterr().err) == (3, [], "")
    assert torch.equal(whole.ids[:, :, :2], encoded.ids)


def test_clip_skip_reaches_the_cached_text(base, examples):
    ids, _ = base.tokenize(["a cat"])
    skipped = encode(base, examples[:1], clip_skip=1).text.states[0]
    torch.testing.assert_close(skipped, base.encode_text(ids, 1).states[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(skipped, base.encode_text(ids).states[0], atol=1e-2)


def test_sizes_say_how_each_picture_was_cut_mirrored_too(base, examples, tmp_path):
    # 40 x 24 px: the middle square of 24 px begins 8 px from the left, at 16 px a side that is 5 px
    encoded = encode(base, examples)
    assert encoded.sizes.dtype == torch.float32
    assert encoded.sizes.shape == (2, 4, 6)
    assert encoded.sizes[0, 0].tolist() == encoded.sizes[1, 3].tolist() == [24, 40, 0, 5, 16, 16]
    # an odd rest is cut unevenly, so that the mirrored picture's crop begins elsewhere
    assert plan_cut((64, 67), (128, 128)).ids(False) == (67, 64, 2, 0, 128, 128)
    assert plan_cut((67, 64), (128, 128)).ids(False) == (64, 67, 0, 2, 128, 128)
    assert plan_cut((67, 64), (128, 128)).ids(True) == (64, 67, 0, 4, 128, 128)


def test_sdxl_caches_both_encoders_pooled_text_and_zeros_for_no_caption(examples):
    base = make_tiny_sdxl_base()
    encoded = encode(base, examples)
    expected = base.encode_text(base.tokenize([e.caption for e in examples])[0])
    torch.testing.assert_close(encoded.text.states[:4], expected.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.text.pooled[:4], expected.pooled, rtol=1e-4, atol=1e-5)
    assert encoded.ids.shape == (5, 2, 1, 77)
    assert not encoded.text.states[4].any()
    assert not encoded.text.pooled[4].any()
    base.zero_blank = False
    assert encode(base, examples).text.states[4].any()


def test_buckets_hold_each_picture_at_its_own_size(base, tmp_path):
    rng = np.random.default_rng(0)
    own = [(40, 24), (24, 24), (24, 40), (41, 25)]
    for i, (width, height) in enumerate(own):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a cat")
    sizes = [(24, 16), (16, 16), (16, 24), (24, 16)]
    encoded = encode(base, scan_folder(tmp_path), sizes=sizes)
    assert encoded.shapes == ((4, 2, 2), (4, 3, 2), (4, 2, 3))
    assert encoded.bucket.tolist() == [2, 0, 1, 2]
    assert encoded.row.tolist() == [0, 0, 0, 1]
    for n, size in enumerate(sizes):
        cut = plan_cut(own[n], size)
        pixels = np.asarray(Image.open(tmp_path / f"{n}.png").crop(cut.box).resize(size, 1))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        for view, picture in enumerate((x, x.flip(-1))):
            mean, std = base.encode_pictures(picture)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(n))
            found = encoded.sample(torch.tensor([view]), torch.tensor([n]), noise)
            torch.testing.assert_close(found, mean + std * noise, rtol=1e-4, atol=1e-4)
            assert encoded.sizes[view, n].tolist() == list(cut.ids(view == 1))


def test_each_wording_has_its_row_and_the_longest_counts(base, examples, capsys):
    wordings = [["a cat", "inc"], ["x " * 80], ["a cat", "y", "inc"], ["z"]]
    encoded = encode(base, examples, wordings=wordings)
    flat = [wording for own in wordings for wording in own] + [""]
    assert encoded.wordings == (2, 1, 3, 1)
    assert torch.equal(encoded.ids, base.tokenize(flat)[0])
    torch.testing.assert_close(encoded.text.states, base.encode_text(encoded.ids).states, rtol=1e-4, atol=1e-5)
    assert encoded.truncated == ["1.png"]
    assert "1.png (82 tokens)" in capsys.readouterr().err


def test_every_crop_is_a_view_of_its_own_with_its_place(base, examples):
    places = [[(0.0, 0.0), (0.99, 0.5), (0.3, 0.0)]] * 4
    encoded = encode(base, examples, places=places)
    assert encoded.mean.shape == (6, 4, 4, 2, 2)
    cuts = [move_cut(plan_cut((40, 24), (16, 16)), at) for at in places[0]]
    assert [cut.box[0] for cut in cuts] == [0, 16, 5]
    for n, example in enumerate(examples):
        for crop, cut in enumerate(cuts):
            pixels = np.asarray(Image.open(example.path).crop(cut.box).resize((16, 16), 1))
            x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            for side, picture in enumerate((x, x.flip(-1))):
                mean, _ = base.encode_pictures(picture)
                torch.testing.assert_close(encoded.mean[3 * side + crop, n], mean[0], rtol=1e-4, atol=1e-5)
                assert encoded.sizes[3 * side + crop, n].tolist() == list(cut.ids(side == 1))

"""A data folder holds against what people put in one: every problem is found at once, and named."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from sdlora.data import folder as folder_module
from sdlora.data.buckets import Bucketing, plan_cuts
from sdlora.data.captions import add_trigger, clean_caption, decode_caption
from sdlora.data.check import write_report
from sdlora.data.folder import digest, scan_folder, survey_folder
from sdlora.errors import DataError


def put(path: Path, caption: str | bytes | None = "a red square", colour="red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    if caption is not None:
        data = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(data)
    return path


def problems_of(folder, trigger=""):
    return {(p.file, p.problem) for p in survey_folder(folder, trigger).problems}


def test_every_kind_of_picture_is_found_with_its_caption_sorted_by_name(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.JPEG", "d.webp", "sub/e.bmp", "f.tif", "g.TIFF", "h.gif"):
        put(tmp_path / name, f"caption of {Path(name).stem}")
    (tmp_path / "LICENSE.txt").write_text("not a caption")
    found = scan_folder(tmp_path)
    assert [e.name for e in found] == ["a.jpg", "b.PNG", "c.JPEG", "d.webp", "f.tif", "g.TIFF", "h.gif", "sub/e.bmp"]
    assert [e.caption for e in found] == [f"caption of {c}" for c in "abcdfghe"]
    assert {e.repeats for e in found} == {1}


def test_txt_goes_before_caption_and_caption_before_metadata(tmp_path):
    for name in ("a.png", "b.png", "c.png", "sub/d.png"):
        put(tmp_path / name, None)
    (tmp_path / "a.txt").write_text("txt")
    (tmp_path / "a.caption").write_text("caption")
    (tmp_path / "b.caption").write_text("caption")
    rows = [{"file_name": n, "text": f"row of {n}"} for n in ("a.png", "b.png", "c.png", "sub/d.png")]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\r\n")
    assert [e.caption for e in scan_folder(tmp_path)] == ["txt", "caption", "row of c.png", "row of sub/d.png"]


def test_a_subfolders_own_metadata_goes_before_its_parents(tmp_path):
    put(tmp_path / "sub/d.png", None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/d.png", "text": "outer"}')
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "./d.png", "text": "inner"}')
    assert scan_folder(tmp_path)[0].caption == "inner"


def test_a_numbered_subfolder_counts_so_many_times(tmp_path):
    for name in ("a.png", "3_cat/b.png", "3_cat/2_close/c.png", "5/d.png", "x_3/e.png"):
        put(tmp_path / name)
    assert {e.name: e.repeats for e in scan_folder(tmp_path)} == {
        "a.png": 1, "3_cat/b.png": 3, "3_cat/2_close/c.png": 6, "5/d.png": 1, "x_3/e.png": 1,
    }  # fmt: skip
    put(tmp_path / "0_none/f.png")
    put(tmp_path / "20240101_trip/g.png")
    assert problems_of(tmp_path) == {
        ("0_none", "would count its pictures 0 times"),
        ("20240101_trip", "would count its pictures 20240101 times"),
    }


def test_a_trigger_captions_what_has_none_and_goes_in_front_of_the_rest(tmp_path):
    put(tmp_path / "a.png", None)
    put(tmp_path / "b.png", "a pink fox")
    put(tmp_path / "c.png", "a fox, Ink")
    put(tmp_path / "d.png", "")
    assert [e.caption for e in scan_folder(tmp_path, " ink ")] == ["ink", "ink, a pink fox", "a fox, Ink", "ink"]
    assert add_trigger("a fox", "") == "a fox"
    assert add_trigger("a (x+y) fox", "(x+y)") == "a (x+y) fox"


def test_a_caption_loses_its_byte_order_mark_and_line_ends(tmp_path):
    put(tmp_path / "a.png", "\ufeffa  fox\r\nin the snow\r\n".encode())
    assert scan_folder(tmp_path)[0].caption == "a fox in the snow"
    assert clean_caption("\ufeff a\tb ") == "a b"


def test_a_caption_that_is_not_utf8_is_named_with_its_byte():
    with pytest.raises(ValueError, match=r"is not UTF-8 at byte 4$"):
        decode_caption(b"caf\x65\xe9")
    with pytest.raises(ValueError, match="at byte 0 but UTF-16"):
        decode_caption("a".encode("utf-16"))
    with pytest.raises(ValueError, match="zero byte at byte 1"):
        decode_caption("ab".encode("utf-16-le"))


def test_all_problems_of_a_folder_come_at_once(tmp_path):
    put(tmp_path / "good.png")
    for name in ("bare.png", "bare2.png"):
        put(tmp_path / name, None)
    put(tmp_path / "blank.png", " \n")
    put(tmp_path / "latin.png", b"caf\xe9")
    put(tmp_path / "zero.png").write_bytes(b"")
    put(tmp_path / "text.png").write_text("I am a text")
    cut = put(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-32])
    (tmp_path / "phone.heic").write_bytes(b"x")
    with pytest.raises(DataError) as error:
        scan_folder(tmp_path)
    text = str(error.value)
    for part in (
        "bare.png, bare2.png: has no caption (write each one's caption in a .txt file of its name, or give --trigger)",
        "blank.txt: is empty (",
        "latin.txt: is not UTF-8 at byte 3 (save it as UTF-8 text)",
        "zero.png: is empty (0 bytes) (",
        "text.png: is not a picture, whatever its name says (",
        "cut.png: cannot be decoded (",
        "phone.heic: is of a kind that is not read (save it as png or jpg, or delete it)",
    ):
        assert part in text
    assert "good" not in text
    assert "\n" not in text


def test_metadata_rows_are_checked_by_line(tmp_path):
    put(tmp_path / "a.png", None)
    rows = [
        '{"file_name": "a.png", "text": "a fox"}',
        "{not json",
        '["a.png"]',
        '{"text": "nothing named"}',
        '{"file_name": "a.png", "text": "again"}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "/etc/passwd", "text": "x"}',
        '{"file_name": "C:\\\\a.png", "text": "x"}',
        '{"file_name": "../a.png", "text": "x"}',
        '{"file_name": "a.png", "text": 3}',
        '{"file_name": "a.png", "text": "\\ud800"}',
        "[" * 100_000,
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found = {p.file.removeprefix("metadata.jsonl "): p.problem for p in survey_folder(tmp_path).problems}
    assert list(found) == [f"line {n}" for n in (2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 6)]
    assert found["line 3"] == "is not a JSON object"
    assert found["line 4"] == "has no file_name"
    assert found["line 5"] == "names a.png a second time"
    assert found["line 6"] == "names gone.png, which is no picture here"
    assert found["line 7"] == "names the absolute path /etc/passwd"
    assert found["line 9"] == "climbs out of the folder with ../a.png"
    assert all("JSON" in found[f"line {n}"] for n in (2, 12))


def test_a_folder_that_is_none_is_told_apart(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.md").write_text("x")
    file = put(tmp_path / "a.png")
    for path, says in (
        (tmp_path / "gone", "gone: does not exist; check"),
        (tmp_path / "empty", "empty: is empty; put pictures"),
        (tmp_path / "bare", "bare: has no pictures; put bmp, gif, jpeg, jpg, png"),
        (file, r"a\.png: is a file; give the folder"),
    ):
        with pytest.raises(DataError, match=says):
            scan_folder(path)


def test_hidden_files_are_left_out_and_links_add_nothing_twice(tmp_path):
    put(tmp_path / "a/x.png")
    put(tmp_path / ".hidden/y.png", None)
    put(tmp_path / "._x.png", None)
    os.symlink("..", tmp_path / "a/loop")
    os.symlink("a", tmp_path / "0link")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    put(outside / "z.png")
    os.symlink(outside, tmp_path / "2_more")
    assert [(e.name, e.repeats) for e in scan_folder(tmp_path)] == [("2_more/z.png", 2), ("a/x.png", 1)]


def test_links_to_nowhere_pipes_and_locked_files_are_problems_not_hangs(tmp_path, monkeypatch):
    os.symlink("nowhere", tmp_path / "broken.png")
    os.symlink("self.png", tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    put(tmp_path / "locked.png")
    put(tmp_path / "sealed/a.png")
    real_open, real_list = Image.open, os.listdir

    def refuse(path, **options):
        if Path(path).name == "locked.png":
            raise PermissionError(13, "Permission denied")
        return real_open(path, **options)

    def refuse_list(path):
        if Path(path).name == "sealed":
            raise PermissionError(13, "Permission denied")
        return real_list(path)

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(folder_module.os, "listdir", refuse_list)
    found = problems_of(tmp_path, "ink")
    assert ("locked.png", "cannot be read (Permission denied)") in found
    assert ("sealed", "cannot be read (Permission denied)") in found
    assert ("pipe.png", "is not a plain file") in found
    assert ("broken.png", "cannot be read (No such file or directory)") in found
    assert any(file == "self.png" for file, _ in found)
    assert len(found) == 5


def test_a_jpeg_called_png_is_read_as_what_it_is(tmp_path):
    put(tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert scan_folder(tmp_path)[0].name == "a.png"


def test_the_digest_follows_contents_and_not_places(tmp_path):
    for place in ("one", "two"):
        put(tmp_path / place / "a.png")
        put(tmp_path / place / "b.png", colour="blue")
    one, two = scan_folder(tmp_path / "one"), scan_folder(tmp_path / "two")
    before = digest(one)
    assert before == digest(two)
    assert before != digest(one, "512")
    assert before != digest(one[::-1])
    (tmp_path / "one/a.txt").write_text("a red circle")
    assert before != digest(scan_folder(tmp_path / "one"))
    put(tmp_path / "two/a.png", colour="green")
    assert before != digest(two)


def test_the_report_counts_repeats_duplicates_and_long_captions(tmp_path):
    put(tmp_path / "a.png", "short")
    put(tmp_path / "3_b/b.bmp", "long")
    put(tmp_path / "c.png", "short", colour="blue")
    put(tmp_path / "d.png", None)
    survey = survey_folder(tmp_path)
    cuts = plan_cuts(survey.examples, Bucketing(64))
    report = write_report(survey, cuts, lambda captions: ([9 * len(c) for c in captions], 40), 6, 2)
    assert report == {
        "pictures": 4,
        "captions": 3,
        "problems": [
            {
                "file": "d.png",
                "problem": "has no caption",
                "fix": "write each one's caption in a .txt file of its name, or give --trigger",
            }
        ],
        "truncated": [
            {"file": "a.png", "tokens": 45, "limit": 40},
            {"file": "c.png", "tokens": 45, "limit": 40},
        ],
        "left_out": [],
        "duplicates": [["3_b/b.bmp", "a.png"]],
        "near_duplicates": [],
        "buckets": {"64x64": 3},
        "cut_away": {},
        "images_per_epoch": 5,
        "steps": 6,
        "epochs": 2.4,
        "memory": None,
    }

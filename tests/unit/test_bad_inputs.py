"""Bad pictures, captions, rows, TOML and flags are one line that names thing and fix; odd but good ones hold."""

import contextlib
import json
import os
import time
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdlora.cli import main
from sdlora.config import FIELDS, recipe_from_toml
from sdlora.data.captions import decode_caption
from sdlora.data.folder import scan_folder, survey_folder
from sdlora.data.picture import read_picture
from sdlora.errors import ConfigError, DataError
from sdlora.screen import say
from tests.bad_inputs import (
    UTF8,
    bad_captions,
    bad_configs,
    bad_flags,
    bad_pictures,
    bad_rows,
    damage,
    good_captions,
    good_pictures,
    sound_pictures,
    write,
)

MOST_S = 1.0
PICTURES, CAPTIONS, ROWS = bad_pictures(), bad_captions(), bad_rows()
CONFIGS, FLAGS = bad_configs(), bad_flags()
GOOD_PICTURES, GOOD_CAPTIONS = good_pictures(), good_captions()
SOUND = list(sound_pictures())
again = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _nothing_is_said_behind_the_line(request, capfd):
    """No warning of Python, and no word of a decoder, reaches the terminal beside the one line."""
    asked = request.node._fixtureinfo.argnames
    yield
    if "capfd" not in asked:
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err == ""


def state(folder: Path) -> list[tuple[str, int, int]]:
    found = sorted(folder.rglob("*"))
    return [(str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in found]


def refuse(folder: Path) -> str:
    """What is said of a folder that must be refused: one line, within a second, with nothing written."""
    before, began_s = state(folder), time.perf_counter()
    with pytest.raises(DataError) as error:
        scan_folder(folder)
    assert time.perf_counter() - began_s < MOST_S
    assert state(folder) == before
    assert str(error.value).isprintable()
    return str(error.value)


def put_good(folder: Path, name: str = "a.png", caption: str | None = "a fox") -> None:
    Image.new("RGB", (8, 8), "red").save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def test_the_corpus_is_large_and_its_entries_differ():
    assert len(PICTURES) + len(CAPTIONS) + len(ROWS) >= 150
    assert min(len(PICTURES), len(GOOD_PICTURES), len(CONFIGS), len(FLAGS)) >= 55
    for entries in (PICTURES, CAPTIONS, GOOD_PICTURES, GOOD_CAPTIONS):
        assert len({entry.what for entry in entries}) == len(entries)
    contents = [bad.content for bad in PICTURES if isinstance(bad.content, bytes) and len(bad.content) > 1]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("bad", PICTURES, ids=lambda bad: bad.what)
def test_a_bad_picture_is_refused_in_a_line(tmp_path, bad):
    bad.put(tmp_path)
    put_good(tmp_path)
    (tmp_path / "x.txt").write_text("a fox")
    line = refuse(tmp_path)
    assert line.startswith(f"{tmp_path}: {bad.name}: {bad.problem}")
    assert line.endswith(f" ({bad.fix})")
    assert "a.png" not in line


@pytest.mark.parametrize("bad", CAPTIONS, ids=lambda bad: bad.what)
def test_a_bad_caption_is_refused_in_a_line(tmp_path, bad):
    put_good(tmp_path, caption=None)
    put_good(tmp_path, "b.png")
    bad.put(tmp_path)
    line = refuse(tmp_path)
    assert line.startswith(f"{tmp_path}: {bad.name}: {bad.problem}")
    assert line.endswith(f" ({bad.fix})")


@pytest.mark.parametrize(("what", "content", "place", "problem", "fix"), ROWS, ids=[row[0] for row in ROWS])
def test_a_bad_row_is_refused_by_its_line(tmp_path, what, content, place, problem, fix):
    put_good(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(content)
    line = refuse(tmp_path)
    file = f"metadata.jsonl {place}" if place else "metadata.jsonl"
    assert line.startswith(f"{tmp_path}: {file}: {problem}")
    assert line.endswith(f" ({fix})")


def test_metadata_that_is_no_plain_file_is_refused(tmp_path):
    put_good(tmp_path)
    file = tmp_path / "metadata.jsonl"
    for make, says in (
        (os.mkfifo, "is not a plain file (replace it with a text file or delete it)"),
        (lambda p: p.symlink_to("/dev/zero"), "is not a plain file (replace it with a text file or delete it)"),
        (lambda p: p.symlink_to("gone"), "cannot be read (No such file or directory) (mend the link or the rights"),
    ):
        make(file)
        assert f"metadata.jsonl: {says}" in refuse(tmp_path)
        file.unlink()


def test_files_that_may_not_be_read_are_refused(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        put_good(tmp_path, name)
    (tmp_path / "metadata.jsonl").write_text("")
    locked = {tmp_path / name for name in ("a.png", "b.txt", "metadata.jsonl")}
    real_open, real_read = Image.open, Path.read_bytes

    def deny(real):  # rights do not hold root back, whom tests may run as
        def call(path, *args, **options):
            if path in locked:
                raise PermissionError(13, "Permission denied")
            return real(path, *args, **options)

        return call

    monkeypatch.setattr(Image, "open", deny(real_open))
    monkeypatch.setattr(Path, "read_bytes", deny(real_read))
    line = refuse(tmp_path)
    denied = "cannot be read (Permission denied)"
    assert f"a.png: {denied} (give yourself the right to read it)" in line
    assert f"metadata.jsonl, b.txt: {denied} (mend the link or the rights, or delete it)" in line
    assert "c.png" not in line


def test_a_folder_called_as_a_picture_is_none(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(DataError, match=r"x\.png: is not a plain file; replace it with a picture or delete it"):
        read_picture(tmp_path / "x.png")
    put_good(tmp_path / "x.png")
    assert [e.name for e in scan_folder(tmp_path)] == ["x.png/a.png"]


def test_memory_that_does_not_suffice_is_said(tmp_path, monkeypatch):
    put_good(tmp_path)

    def fail(image):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert refuse(tmp_path).endswith("a.png: does not fit in memory (scale it down)")


def test_all_bad_files_of_a_folder_come_in_one_line(tmp_path):
    for n, bad in enumerate(PICTURES):
        folder = tmp_path / f"x{n}"
        folder.mkdir()
        bad.put(folder)
        (folder / "x.txt").write_text("a fox")
    began_s = time.perf_counter()
    with pytest.raises(DataError) as error:
        scan_folder(tmp_path)
    assert time.perf_counter() - began_s < 5 * MOST_S
    assert all(f"x{n}/{bad.name}" in str(error.value) for n, bad in enumerate(PICTURES))
    assert str(error.value).isprintable()


@pytest.mark.slow
def test_verbs_say_it_in_a_line_and_write_nothing(tmp_path, capfd):
    data, out = tmp_path / "data", tmp_path / "out.safetensors"
    for bad in (*PICTURES[::15], *CAPTIONS[::7]):
        data.mkdir()
        put_good(data, caption=None if bad in CAPTIONS else "a fox")
        (data / "x.txt").write_text("a fox")
        path = bad.put(data)
        before = state(data)
        commands = [["train", str(data), "--out", str(out)], ["check", str(data)]]
        for command in commands if bad in (PICTURES[0], CAPTIONS[0]) else commands[:1]:
            code, said = main(command), capfd.readouterr()
            assert code == 2, bad.what
            assert said.err.startswith(f"error: {data}: {bad.name}: {bad.problem}"), bad.what
            told = said.err.removesuffix("; or go on without them with skip_bad = true (--skip-bad)\n").rstrip("\n")
            assert told.endswith(f"({bad.fix})"), bad.what
            assert said.err.count("\n") == 1, bad.what
            assert bool(said.out) == (command[0] == "check"), bad.what
        assert state(data) == before
        assert list(tmp_path.iterdir()) == [data]
        for file in data.iterdir():
            file.unlink()
        data.rmdir()
        assert not path.exists()


def test_a_name_with_line_ends_is_said_in_one_line(tmp_path, capfd):
    (tmp_path / "a\nb\x1b[31m.png").write_bytes(b"")
    (tmp_path / "a\nb\x1b[31m.txt").write_text("a fox")
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "o.safetensors")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "a b\\x1b[31m.png: is empty" in said


# --- what is odd but good -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", GOOD_PICTURES, ids=lambda good: good.what)
def test_an_odd_picture_has_the_pixels_that_were_meant(tmp_path, good):
    path = tmp_path / good.name
    write(path, good.content)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        image = read_picture(path)
    assert not told
    expected = np.array(good.expected, dtype=np.int64)
    assert image.mode == "RGB"
    assert image.size == (expected.shape[1], expected.shape[0])
    assert int(np.abs(np.asarray(image).astype(np.int64) - expected).max()) <= good.most_off
    path.with_suffix(".txt").write_text("a fox")
    assert [e.size_px for e in scan_folder(tmp_path)] == [image.size]


@pytest.mark.parametrize("good", GOOD_CAPTIONS, ids=lambda good: good.what)
def test_an_odd_caption_is_the_text_that_was_meant(tmp_path, good):
    put_good(tmp_path, caption=None)
    write(tmp_path / good.name, good.content)
    assert [e.caption for e in scan_folder(tmp_path)] == [good.expected]


def test_metadata_may_have_a_byte_order_mark_and_other_line_ends(tmp_path):
    put_good(tmp_path, caption=None)
    (tmp_path / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf{"file_name": "a.png", "text": "a fox", "score": NaN}\r\n\r\n'
    )
    assert [e.caption for e in scan_folder(tmp_path)] == ["a fox"]


def test_a_link_to_a_good_picture_is_one(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    put_good(tmp_path)
    (data / "b.png").symlink_to("../a.png")
    (data / "b.txt").symlink_to("../a.txt")
    assert [(e.name, e.caption) for e in scan_folder(data)] == [("b.png", "a fox")]


# --- TOML and flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "parts"), CONFIGS, ids=[repr(c[:40]) for c, _ in CONFIGS])
def test_a_bad_config_is_refused_in_a_line(tmp_path, capfd, content, parts):
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    began_s = time.perf_counter()
    assert main(["train", str(tmp_path / "data"), "--config", str(file), "--out", str(tmp_path / "o.safetensors")]) == 2
    assert time.perf_counter() - began_s < MOST_S
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert len(said.err) < 2500
    assert all(part in said.err for part in parts), said.err
    assert list(tmp_path.iterdir()) == [file]


def test_a_bad_config_is_named(tmp_path):
    file = tmp_path / "r.toml"
    for content, parts in CONFIGS:
        file.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            recipe_from_toml(file)
        together = ("targets", "block_ranks", "preview_every")  # these are held against each other, with the flags
        assert str(error.value).startswith(f"{file}: ") or parts[0].startswith(together)


@pytest.mark.parametrize(("flags", "parts"), FLAGS, ids=[repr(" ".join(f))[:40] for f, _ in FLAGS])
def test_bad_flags_are_refused_in_a_line(tmp_path, capfd, monkeypatch, flags, parts):
    monkeypatch.chdir(tmp_path)
    began_s = time.perf_counter()
    assert main(["train", "data", "--out", "o.safetensors", *flags]) == 2
    assert time.perf_counter() - began_s < MOST_S
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert all(part in said.err for part in parts), said.err
    assert list(tmp_path.iterdir()) == []


# --- at random ------------------------------------------------------------------------------------------------------


@settings(again, max_examples=300)
@given(st.binary(max_size=64) | st.text(max_size=32).map(lambda t: t.encode("utf-8", "surrogatepass")))
@example(b"\xef\xbb\xbf\xef\xbb\xbf")
@example("\ufeff\x1c\x85".encode())
def test_any_bytes_are_a_caption_or_refused(tmp_path, data):
    put_good(tmp_path, caption=None)
    (tmp_path / "a.txt").write_bytes(data)
    survey = survey_folder(tmp_path)
    if survey.problems:
        (problem,) = survey.problems
        assert problem.file == "a.txt"
        assert f"{problem.problem} ({problem.fix})".isprintable()
        bare = " ".join(data.decode("utf-8-sig", "replace").removeprefix("\ufeff").split())
        broken = problem.problem.startswith("is not UTF-8 at byte ")
        assert broken == (data.decode(errors="ignore").encode() != data)
        assert not broken or problem.fix == UTF8
        assert broken or not bare or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in bare)
    else:
        (found,) = survey.examples
        assert found.caption == " ".join(found.caption.split()) != ""
        assert decode_caption(found.caption.encode()) == found.caption or found.caption.startswith("\ufeff")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["a.png", "./a.png", "../a.png", "/a.png", "b.png", "a.png ", "", "."]) | st.text(max_size=8)
rows = st.fixed_dictionaries({}, optional={"file_name": names | json_values, "text": st.text(max_size=8) | json_values})
lines = (
    rows.map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=32)
    | st.text(max_size=32).map(lambda t: t.encode("utf-8", "surrogatepass"))
)


@settings(again, max_examples=200)
@given(st.lists(lines, max_size=3))
def test_any_metadata_is_read_or_refused_by_line(tmp_path, content):
    put_good(tmp_path, caption=None)
    put_good(tmp_path, "own.png", "an owl")
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(content))
    survey = survey_folder(tmp_path)
    for problem in survey.problems:
        assert problem.file.startswith(("metadata.jsonl", "a.png"))
        assert problem.fix
    found = {e.name: e.caption for e in survey.examples}
    assert found["own.png"] == "an owl"
    assert ("a.png" in found) or survey.problems
    assert found.get("a.png", "x").strip()


tables = st.dictionaries(st.sampled_from(list(FIELDS)) | st.text(max_size=6), json_values, max_size=2)


def to_text(value):
    """A value as TOML may spell it, or nearly."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_text(k)} = {to_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_text, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower()


toml_texts = (
    st.text(max_size=40)
    | tables.map(lambda t: "\n".join(f"{k} = {to_text(v)}" for k, v in t.items()))
    | st.lists(st.sampled_from(["steps", "=", "3", '"', "'", "[", "]", "{", "}", "\n", ".", "#", "1e9", "nan", "flip"]))
    .map(" ".join)
)  # fmt: skip


@settings(again, max_examples=500)
@given(toml_texts.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=40))
def test_any_toml_is_a_recipe_or_refused_in_a_line(tmp_path, capfd, content):
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    try:
        recipe = recipe_from_toml(file)
    except ConfigError as error:
        say(f"error: {error}")
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert len(said) > len("error: x: ")
    else:
        given = tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n"))
        assert all(getattr(recipe, key) is not None for key in given)


@settings(again, max_examples=600)
@given(st.sampled_from(SOUND), st.integers(0, 2**32))
def test_a_damaged_picture_is_refused_in_a_line_or_read(tmp_path, sound, seed):
    kind, content = sound
    path = tmp_path / f"a.{'tif' if 'TIFF' in kind else 'png'}"
    path.write_bytes(damage(content, seed))
    began_s, said, image = time.perf_counter(), "", None
    try:
        image = read_picture(path)
    except DataError as error:
        said = str(error)
    if image is None:
        assert said.startswith(f"{path}: ")
        assert said.isprintable()
        assert "; " in said
    else:
        assert image.mode == "RGB"
        image.tobytes()
    assert time.perf_counter() - began_s < 2 * MOST_S


def test_libtiff_says_nothing_of_a_damaged_tiff(tmp_path, capfd):
    """It writes to stderr past Python, which the word after it must still reach."""
    content = dict(SOUND)["LZW TIFF"]
    for seed in range(200):
        path = tmp_path / f"{seed}.tif"
        path.write_bytes(damage(content, seed))
        path.with_suffix(".txt").write_text("a fox")
        with contextlib.suppress(DataError):
            read_picture(path)
    problems = survey_folder(tmp_path).problems
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
    assert len(problems) > 50


def test_a_changed_bit_of_a_png_is_never_read_as_other_pixels(tmp_path):
    content = dict(SOUND)["PNG"]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    whole, refused = np.asarray(read_picture(path)), 0
    for at in range(8, len(content), 23):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            assert np.array_equal(np.asarray(read_picture(path)), whole)
        except DataError:
            refused += 1
    assert refused > 100

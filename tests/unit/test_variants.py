"""Wordings hold against what a caption may lose, and hang on their address alone."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.config import Recipe
from sdlora.data.folder import scan_folder
from sdlora.data.variants import choose_wildcards, describe_wordings, list_wordings, say_init_word, vary_caption
from sdlora.errors import ConfigError
from tests.pictures import make_folder

SHUFFLE = Recipe(caption_variants=50, shuffle_tags=True, keep_tags=2)
words = st.lists(st.text("abcdef ", min_size=1).filter(str.strip).map(str.strip), min_size=1, max_size=9)


def test_captions_stay_as_they_are_without_a_tool():
    captions = ["a {b|c}, d,e", "", "x,  y"]
    assert list_wordings(captions, Recipe()) == [[caption] for caption in captions]
    assert describe_wordings(list_wordings(captions, Recipe()), Recipe()) == []


def test_kept_tags_stay_in_front_and_the_others_take_every_place():
    (wordings,) = list_wordings(["ink, fox, snow, dusk, tree"], SHUFFLE)
    assert len(wordings) == 50
    tags = [wording.split(", ") for wording in wordings]
    assert {tuple(own[:2]) for own in tags} == {("ink", "fox")}
    assert {tuple(sorted(own[2:])) for own in tags} == {("dusk", "snow", "tree")}
    assert {own[2] for own in tags} == {own[4] for own in tags} == {"snow", "dusk", "tree"}
    assert describe_wordings([wordings], SHUFFLE) == [
        "50 wordings of 1 captions, 6 different: 50 variants of each line, tags shuffled, the first 2 kept"
    ]


def test_a_trigger_in_front_is_kept_beyond_the_kept_tags():
    recipe = replace(SHUFFLE, keep_tags=1, trigger="Ink")
    (wordings,) = list_wordings(["ink, fox, snow, dusk"], recipe)
    assert {tuple(wording.split(", ")[:2]) for wording in wordings} == {("ink", "fox")}
    (plain,) = list_wordings(["fox, ink, snow, dusk"], recipe)
    assert {wording.split(", ")[0] for wording in plain} == {"fox"}
    assert {wording.split(", ")[1] for wording in plain} == {"ink", "snow", "dusk"}


def test_tags_are_left_out_at_their_rate_and_never_all():
    recipe = Recipe(caption_variants=1000, tag_dropout=0.25, keep_tags=1)
    (wordings,) = list_wordings(["a, b, c, d, e"], recipe)
    assert all(wording.startswith("a") for wording in wordings)
    kept = sum(len(wording.split(", ")) - 1 for wording in wordings) / (1000 * 4)
    assert abs(kept - 0.75) < 0.03
    assert sorted(wordings[0].split(", ")) == wordings[0].split(", ")  # without shuffling the order stays
    assert set(list_wordings(["a, b"], Recipe(caption_variants=20, tag_dropout=1.0))[0]) == {"a"}


@settings(deadline=None)
@given(words, st.integers(0, 99), st.integers(0, 3), st.floats(0, 1))
def test_no_tag_is_made_up_or_doubled(tags, seed, keep, dropout):
    recipe = Recipe(caption_variants=2, shuffle_tags=True, keep_tags=keep, tag_dropout=dropout)
    found = vary_caption(", ".join(tags), recipe, random.Random(seed)).split(", ")
    assert found[:keep] == tags[:keep][: len(found)]
    left = list(tags)
    for tag in found:
        left.remove(tag)
    assert dropout > 0 or not left


def test_wildcards_take_every_option_and_leave_other_braces():
    seen = {choose_wildcards("a {red|blue|{pale|dark} green} {fox} |", random.Random(i)) for i in range(60)}
    assert seen == {f"a {colour} {{fox}} |" for colour in ("red", "blue", "pale green", "dark green")}
    assert {choose_wildcards("a {|big} fox", random.Random(i)) for i in range(20)} == {"a fox", "a big fox"}


def test_wordings_hang_on_seed_picture_line_and_number():
    captions = ["a, b, c, d, e, f\ng, h, i, j, k, l", "a, b, c, d, e, f"]
    recipe = replace(SHUFFLE, caption_variants=4, keep_tags=0)
    wordings = list_wordings(captions, recipe)
    assert [len(own) for own in wordings] == [8, 4]
    assert list_wordings(captions, recipe) == wordings
    assert list_wordings(captions[:1], recipe) == wordings[:1]
    assert [own[:4] for own in list_wordings(captions[:1], replace(recipe, caption_variants=6))] == [wordings[0][:4]]
    assert wordings[1] != wordings[0][:4]
    assert list_wordings(captions, replace(recipe, seed=1)) != wordings


def test_caption_lines_are_read_from_files_and_rows_with_the_trigger_in_each(tmp_path):
    make_folder(tmp_path, 2)
    (tmp_path / "0.txt").write_text("\ufeffa red  square\r\n\n an ink box \n")
    (tmp_path / "1.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one\\ntwo"}\n')
    assert [e.caption for e in scan_folder(tmp_path, "ink")] == ["a red square an ink box", "ink, one two"]
    lines = [e.caption for e in scan_folder(tmp_path, "ink", caption_lines=True)]
    assert lines == ["ink, a red square\nan ink box", "ink, one\nink, two"]
    assert list_wordings(lines, Recipe(caption_lines=True)) == [
        ["ink, a red square", "an ink box"], ["ink, one", "ink, two"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"shuffle_tags": True}, "shuffle_tags = true has one variant of each caption.*set caption_variants = 8"),
        ({"tag_dropout": 0.1}, r"tag_dropout = 0\.1 has one variant"),
        ({"wildcards": True}, "wildcards = true has one variant"),
        ({"caption_variants": 4}, "caption_variants = 4 makes 4 times the same"),
        ({"keep_tags": 1}, "keep_tags = 1 has no use"),
        ({"caption_variants": 4, "wildcards": True, "keep_tags": 1}, "keep_tags = 1 has no use"),
        ({"caption_variants": 0}, "caption_variants = 0 is out of range"),
        ({"tag_dropout": 1.5}, "tag_dropout = 1.5 is out of range"),
    ],
)
def test_tools_that_would_do_nothing_are_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        Recipe(**values)


@pytest.mark.parametrize(
    ("wording", "said"),
    [
        ("ink style, a fox", "woodcut, a fox"),
        ("a fox, Ink Style", "a fox, woodcut"),
        ("a pink style of fox", "a pink style of fox, woodcut"),  # within a word it is no trigger
        ("a fox", "a fox, woodcut"),
        ("", "woodcut"),
    ],
)
def test_init_word_takes_the_triggers_place(wording, said):
    assert say_init_word(wording, Recipe(trigger="ink style", init_word="woodcut")) == said
    assert say_init_word(wording, Recipe(trigger="ink style", init_word=r"\1")) == said.replace("woodcut", r"\1")

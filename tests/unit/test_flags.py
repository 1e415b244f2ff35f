"""Flags hold against what a person may type."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.config import FIELDS
from sdlora.errors import ConfigError
from sdlora.flags import RECIPE_GROUPS, Parser, add_recipe_flags
from sdlora.values import LoraSpec, parse_lora


def read(*argv):
    parser = Parser("sdlora train", "x")
    parser.add_argument("data")
    parser.add_argument("--negative", default="")
    add_recipe_flags(parser)
    return vars(parser.parse(["DATA", *argv]))


def test_every_field_of_the_recipe_is_a_flag_once():
    names = [name for group in RECIPE_GROUPS.values() for name in group]
    assert sorted(names) == sorted(FIELDS)


def test_flags_keep_their_types_and_what_is_not_given_is_not_there():
    found = read(
        "--steps", "5", "--learning-rate=2e-4", "--no-flip", "--text-encoder", "--preview", "a", "--preview", "b"
    )
    assert found == {
        "data": "DATA", "negative": "", "steps": 5, "learning_rate": 2e-4, "flip": False, "text_encoder": True,
        "preview": ["a", "b"],
    }  # fmt: skip


@pytest.mark.parametrize("value", ["-1e-3", "-x- blurry", "-", "-0.5"])
def test_a_value_may_begin_with_a_dash(value):
    assert read("--negative", value)["negative"] == value


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lerning-rate", "3"], "unknown flag --lerning-rate; did you mean --learning-rate?"),
        (["--lerning-rate=3"], "unknown flag --lerning-rate; did you mean --learning-rate?"),
        (["--learning", "3"], "unknown flag --learning"),
        (["--lr", "3"], "unknown flag --lr; did you mean --learning-rate?"),
        (["-z"], "unknown flag -z; see sdlora train --help"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--rank", "3"], "--steps needs a value"),
        (["--steps", "many"], "--steps: 'many' is not a whole number"),
        (["--steps", "1_0"], "--steps: '1_0' is not a whole number"),
        (["--alpha", "nan"], "--alpha: 'nan' is not a finite number"),
        (["--alpha", "1e999"], "--alpha: '1e999' is not a finite number"),
        (["more"], "more is one argument too many"),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_fix(argv, says):
    with pytest.raises(ConfigError) as error:
        read(*argv)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "file", "weight", "te_weight"),
    [
        ("ink.safetensors", "ink.safetensors", 1, 1),
        ("ink.safetensors:0.8", "ink.safetensors", 0.8, 0.8),
        ("ink.safetensors:-1:0", "ink.safetensors", -1, 0),
        ("ink.safetensors:+.5e1:2", "ink.safetensors", 5, 2),
        ("C:\\loras\\ink.safetensors:0.5", "C:\\loras\\ink.safetensors", 0.5, 0.5),
        ("a:1:b.safetensors", "a:1:b.safetensors", 1, 1),
        ("a.safetensors:x/b.SAFETENSORS:2", "a.safetensors:x/b.SAFETENSORS", 2, 2),
        ("C:\\loras\\ink:0.5", "C:\\loras\\ink", 0.5, 0.5),
        ("ink:0.5:0.25", "ink", 0.5, 0.25),
    ],
)
def test_a_lora_is_its_file_and_weights(text, file, weight, te_weight):
    spec = parse_lora(text)
    assert (str(spec.file), spec.weight, spec.te_weight) == (file, weight, te_weight)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_weights_come_through_exactly(weight, te_weight):
    spec = parse_lora(f"a.safetensors:{weight!r}:{te_weight!r}")
    assert spec == LoraSpec(spec.file, weight, te_weight)


@pytest.mark.parametrize(
    "text",
    ["", ":0.5", "a.safetensors:", "a.safetensors:nan", "a.safetensors:inf", "a.safetensors:1:2:3",
     "a.safetensors:half", "a.safetensors::1", "a.safetensors:1e999", "a.safetensors: 1"],
)  # fmt: skip
def test_a_lora_with_unusable_weights_is_refused(text):
    with pytest.raises(ConfigError, match="write FILE:WEIGHT"):
        parse_lora(text)


def test_lists_take_commas_or_several_flags_and_continue_is_called_so():
    found = read(
        "--targets", "attention, feed-forward", "--targets=time", "--blocks", "up.0,mid", "--block-ranks", "up=4:2",
        "--continue", "a.safetensors", "--merge", "b,c.safetensors:0.5", "--merge", "d.safetensors", "--dora",
    )  # fmt: skip
    assert found["targets"] == ["attention", "feed-forward", "time"]
    assert (found["blocks"], found["block_ranks"]) == (["up.0", "mid"], ["up=4:2"])
    assert found["continue_from"] == "a.safetensors"
    assert found["merge"] == ["b,c.safetensors:0.5", "d.safetensors"]
    assert found["dora"] is True

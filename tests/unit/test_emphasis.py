"""Emphasis holds against A1111's grammar, by hand, and against plain text, which must stay as it is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdlora.bases.emphasis import parse_emphasis, weigh
from sdlora.errors import ConfigError


def close(found, expected):
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("a (cat:1.3) here", [("a ", 1), ("cat", 1.3), (" here", 1)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("[[cat]] (dog)", [("cat", 1 / 1.21), (" ", 1), ("dog", 1.1)]),
        ("(a (b:1.5) c:0.5)", [("a ", 0.5), ("b", 0.75), (" c", 0.5)]),
        ("([a])", [("a", 1)]),
        ("(a: 1.2 )", [("a", 1.2)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:2.)", [("a", 2)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:+1.5)", [("a", 1.5)]),
        ("(a:0)", [("a", 0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("[a:1.2]", [("a:1.2", 1 / 1.1)]),
        (r"a \(cat\)", [("a (cat)", 1)]),
        (r"(\(cat\):1.2)", [("(cat)", 1.2)]),
        (r"\[a\] \\ (b)", [("[a] \\ ", 1), ("b", 1.1)]),
        ("a_(house:1.3) [on] a (hill:0.5), sun, (((sky)))",
         [("a_", 1), ("house", 1.3), (" ", 1), ("on", 1 / 1.1), (" a ", 1), ("hill", 0.5), (", sun, ", 1),
          ("sky", 1.331)]),
    ],
)  # fmt: skip
def test_weights_are_a1111s(prompt, expected):
    close(parse_emphasis(prompt), expected)


@pytest.mark.parametrize(
    "prompt",
    [
        "a (cat",
        "cat)",
        "a [cat",
        "]cat[",
        ")(",
        ":)",
        "16:9)",
        "a :1.2)",
        r"C:\pictures",
        "\\",
        "(a]",
        "half :] (",
        "[a)",
    ],
)
def test_unbalanced_brackets_are_text(prompt):
    assert parse_emphasis(prompt) == [(prompt, 1.0)]


def test_a_bracket_without_its_half_leaves_the_others_in_force():
    close(parse_emphasis(":) a (cat:1.2) ("), [(":) a ", 1), ("cat", 1.2), (" (", 1)])
    close(parse_emphasis("(a [b)"), [("a [b", 1.1)])


def test_round_and_square_brackets_may_cross():
    close(parse_emphasis("(a [b) c]"), [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)])


def test_a_weight_that_is_not_finite_is_one_line():
    with pytest.raises(ConfigError, match=r"the weight of 'cat' in the prompt is not finite; use one such as 1\.2"):
        parse_emphasis("(cat:" + "9" * 400 + ")")


@given(st.text(alphabet="ab ()[]:\\1.", max_size=30))
def test_any_prompt_parses_and_loses_only_its_brackets_weights_and_backslashes(prompt):
    found = parse_emphasis(prompt)
    assert all(math.isfinite(weight) for _, weight in found)
    assert found
    for kept in "ab":
        assert "".join(text for text, _ in found).count(kept) == prompt.count(kept)


@given(st.text(alphabet="ab ,-.é", max_size=30))
def test_plain_prompts_are_one_piece(prompt):
    assert parse_emphasis(prompt) == [(prompt, 1.0)]


def test_states_are_scaled_by_token_and_the_chunks_mean_is_kept():
    states = torch.randn(3, 2, 77, 8, generator=torch.Generator().manual_seed(0)) + 0.2
    weights = torch.ones(3, 2, 77)
    weights[0, 1, 1:4] = 1.5
    weights[2, 0, 5] = 0
    y = weigh(states, weights)
    for row, chunk in ((0, 0), (1, 0), (1, 1), (2, 1)):
        assert torch.equal(y[row, chunk], states[row, chunk])
    for row, chunk in ((0, 1), (2, 0)):
        scaled = states[row, chunk] * weights[row, chunk, :, None]
        torch.testing.assert_close(y[row, chunk], scaled * (states[row, chunk].mean() / scaled.mean()))
        torch.testing.assert_close(y[row, chunk].mean(), states[row, chunk].mean())
    assert not y[2, 0, 5].any()


def test_a_mean_of_zero_is_left_alone():
    states = torch.zeros(1, 1, 77, 4)
    assert torch.equal(weigh(states, torch.full((1, 1, 77), 2.0)), states)

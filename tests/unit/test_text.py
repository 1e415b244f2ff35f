"""Chunks of tokens hold against the tokenizer's own, and encoded text against its rows."""

import pytest
import torch

from sdlora.bases.prompts import encode_prompts
from sdlora.bases.text import Text, count_chunks, tokenize
from sdlora.errors import ConfigError
from tests.tiny import make_tiny_base, make_tiny_sdxl_base, make_tiny_tokenizer, make_tiny_tokenizers


def plain(*prompts):
    return [[(prompt, 1.0)] for prompt in prompts]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_one_chunk_is_the_tokenizers_own_truncation_and_padding(pad):
    tokenizer = make_tiny_tokenizer(pad)
    prompts = ["", "a cat", "x " * 75, "x " * 76, "ink, a (cat! y", "  c a t  "]
    own = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    tokens = tokenize((tokenizer,), plain(*prompts))
    assert torch.equal(tokens.ids[:, 0, 0], own)
    assert tokens.lengths == [len(row) for row in tokenizer(prompts).input_ids]
    assert torch.equal(tokens.weights, torch.ones(6, 1, 1, 77))


def test_second_tokenizer_pads_with_id_0_and_the_first_with_the_end():
    first, second = make_tiny_tokenizers("sdxl")
    ids = tokenize((first, second), plain("cat")).ids[0, :, 0]
    start, cat, end = first.bos_token_id, first.convert_tokens_to_ids("cat</w>"), first.eos_token_id
    assert ids[0].tolist() == [start, cat, end, *[end] * 74]
    assert ids[1].tolist() == [start, cat, end, *[0] * 74]


def test_further_chunks_have_a_start_and_an_end_of_their_own():
    tokenizer = make_tiny_tokenizer("!")
    x, y = tokenizer.convert_tokens_to_ids(["x</w>", "y</w>"])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens = tokenize((tokenizer,), plain("x " * 75 + "y " * 10, "y"), None)
    assert tokens.ids.shape == (2, 1, 2, 77)
    assert tokens.ids[0, 0].tolist() == [[start, *[x] * 75, end], [start, *[y] * 10, end, *[0] * 65]]
    assert tokens.ids[1, 0].tolist() == [[start, y, end, *[0] * 74], [start, end, *[0] * 75]]
    assert tokens.lengths == [87, 3]


def test_no_more_chunks_than_allowed_and_no_more_than_needed():
    prompts = plain("x " * 200, "y")
    sizes = [tokenize((make_tiny_tokenizer(),), prompts, chunks).ids.shape[2] for chunks in (1, 2, 3, 9, None)]
    assert sizes == [1, 2, 3, 3, 3]
    assert [count_chunks(n) for n in (2, 77, 78, 152, 153)] == [1, 1, 2, 2, 3]


def test_weights_follow_their_tokens_across_chunks():
    tokens = tokenize((make_tiny_tokenizer(),), [[("x " * 74, 1.0), ("cat y", 1.5), (" z", 0.5)]], None)
    assert tokens.weights[0, 0, 0].tolist() == [1.0, *[1.0] * 74, 1.5, 1.0]
    assert tokens.weights[0, 0, 1].tolist() == [1.0, 1.5, 0.5, *[1.0] * 74]


def test_text_gives_and_joins_rows():
    text = Text(torch.arange(24.0).view(3, 4, 2), torch.arange(6.0).view(3, 2))
    assert len(text) == 3
    for rows in ([2, 0], torch.tensor([2, 0])):
        assert torch.equal(text[rows].states, text.states[[2, 0]])
        assert torch.equal(text[rows].pooled, text.pooled[[2, 0]])
    assert torch.equal(text[1].states, text.states[1:2])
    both = Text.cat([text[:1], text[1:]])
    assert torch.equal(both.states, text.states)
    assert torch.equal(both.pooled, text.pooled)
    assert text.to(dtype=torch.bfloat16).pooled.dtype == torch.bfloat16
    assert torch.equal(text[2].expand(2).pooled, text.pooled[[2, 2]])
    blank = text.blank(torch.tensor([False, True, False]))
    assert torch.equal(blank.states[[0, 2]], text.states[[0, 2]])
    assert not blank.states[1].any()
    assert not blank.pooled[1].any()
    assert Text.cat([Text(text.states), Text(text.states)]).pooled is None
    assert Text(text.states).blank(torch.tensor([True] * 3)).pooled is None


def test_a_prompt_and_the_negative_have_the_same_chunks_and_no_others():
    base = make_tiny_base()
    wordings = encode_prompts(base, ["a cat", "x " * 80, "ink", "y " * 160], "x " * 76)
    assert [w.rows for w in wordings] == [[0, 1, 2], [3]]
    assert [(w.text.states.shape[1], w.negative.states.shape[:2]) for w in wordings] == [
        (154, (1, 154)),
        (231, (1, 231)),
    ]
    alone = encode_prompts(base, ["ink"], "x " * 76)[0]
    torch.testing.assert_close(wordings[0].text.states[2], alone.text.states[0])
    torch.testing.assert_close(wordings[0].negative.states, alone.negative.states)


def test_an_empty_negative_is_zeros_where_the_base_learnt_so():
    base = make_tiny_sdxl_base()
    wording = encode_prompts(base, ["", "a cat"], " ")[0]
    assert not wording.negative.states.any()
    assert not wording.negative.pooled.any()
    assert wording.text.states[0].any()  # an empty prompt is a prompt
    assert encode_prompts(base, ["a cat"], "ink")[0].negative.pooled.any()
    base.zero_blank = False
    assert encode_prompts(base, ["a cat"])[0].negative.states.any()
    assert encode_prompts(make_tiny_base(), ["a cat"])[0].negative.states.any()


@pytest.mark.parametrize(("family", "most"), [("mini", 1), ("sd2", 2), ("sdxl", 1)])
def test_clip_skip_leaves_every_text_encoder_a_layer(family, most):
    base = make_tiny_base(family=family)
    base.check_clip_skip(most)
    for wrong in (most + 1, -1):
        with pytest.raises(ConfigError, match=f"clip_skip = {wrong} is out of range for tiny; give 0 to {most}"):
            base.check_clip_skip(wrong)

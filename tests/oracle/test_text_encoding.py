"""Text of SD 1.x, 2.x and SDXL holds against diffusers' pipelines on the same weights."""

from __future__ import annotations

import logging

import pytest
import torch

from sdlora.bases.family import load_base
from tests.tiny import make_tiny_base, make_tiny_pipeline, save_tiny_pipeline

PROMPTS = ["a cat", "ink apple, x! y", "", "x " * 90]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def encode_with(pipe, prompts, clip_skip=None):
    """The pipeline's states and pooled text; SD's pipelines have no pooled text."""
    encoder = pipe.text_encoder
    if not hasattr(encoder, "text_model"):
        # transformers 5 flattened the model; diffusers still reads the final norm at its old place
        encoder.__dict__["text_model"] = encoder
    with torch.no_grad():
        found = pipe.encode_prompt(prompts, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False,
                                   clip_skip=clip_skip)  # fmt: skip
    return found[0], (found[2] if len(found) == 4 else None)


def close(text, states, pooled):
    torch.testing.assert_close(text.states, states, rtol=0, atol=1e-6)
    assert (text.pooled is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_text_equals_the_pipelines_by_clip_skip(family):
    base, pipe = make_tiny_base(3, family=family), make_tiny_pipeline(3, family=family)
    ids = base.tokenize(PROMPTS)[0]
    seen = []
    for clip_skip in (None, 0, 1):
        with torch.no_grad():
            text = base.encode_text(ids, clip_skip or 0)
        close(text, *encode_with(pipe, PROMPTS, clip_skip))
        seen.append(text.states)
    assert torch.equal(seen[0], seen[1])
    assert float((seen[0] - seen[2]).abs().max()) > 0.05


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_long_prompts_equal_the_pipelines_chunk_by_chunk(family):
    base, pipe = make_tiny_base(3, family=family), make_tiny_pipeline(3, family=family)
    ids, lengths = base.tokenize(["x " * 75 + "cat " * 75 + "y", "ink"], None)
    assert ids.shape == (2, len(base.tokenizers), 3, 77)
    assert lengths == [153, 3]
    with torch.no_grad():
        text = base.encode_text(ids)
    parts = [encode_with(pipe, pair) for pair in (["x " * 75, "ink"], ["cat " * 75, ""], ["y", ""])]
    close(text, torch.cat([states for states, _ in parts], 1), parts[0][1])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradients_reach_every_text_encoder(family):
    base = make_tiny_base(family=family)
    for part in base.family.text_parts:
        base.modules[part].requires_grad_(True)
    text = base.encode_text(base.tokenize(["a cat"])[0])
    (text.states.square().mean() + (0 if text.pooled is None else text.pooled.square().mean())).backward()
    for part in base.family.text_parts:
        first = next(m for n, m in base.modules[part].named_modules() if n.endswith("layers.0.self_attn.q_proj"))
        assert float(first.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_folder_gives_the_text_of_its_parts(family, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "base", 3, family=family)
    base = load_base(str(folder), device="cpu")
    assert base.family.name == family
    with torch.no_grad():
        text = base.encode_text(base.tokenize(PROMPTS)[0])
    close(text, *encode_with(make_tiny_pipeline(3, family=family), PROMPTS))

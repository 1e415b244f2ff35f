"""Plain-matrix attention holds against diffusers' AttnProcessor2_0, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from sdlora.bases.attention import PlainAttnProcessor, attend


def run(processor, attn, x, context, mask=None):
    attn.set_processor(processor)
    attn.zero_grad()
    x = x.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    y = attn(x, encoder_hidden_states=context, attention_mask=mask)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    inputs = [x] if context is None else [x, context]
    return [y.detach(), *(t.grad for t in inputs), *(p.grad.clone() for p in attn.parameters())]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_equals_diffusers_processor(cross, masked):
    torch.manual_seed(0)
    width = 24 if cross else None
    attn = Attention(32, cross_attention_dim=width, heads=4, dim_head=8)
    x = torch.randn(3, 20, 32)
    context = torch.randn(3, 77, 24) if cross else None
    keys = 77 if cross else 20
    mask = torch.where(torch.rand(3, 1, keys) < 0.3, -1e4, 0.0) if masked else None
    pairs = zip(
        run(PlainAttnProcessor(), attn, x, context, mask), run(AttnProcessor2_0(), attn, x, context, mask), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_residual_and_rescaling_are_kept():
    torch.manual_seed(0)
    attn = Attention(32, heads=2, dim_head=16, residual_connection=True, rescale_output_factor=1.7)
    x = torch.randn(2, 9, 32)
    for ours, theirs in zip(
        run(PlainAttnProcessor(), attn, x, None), run(AttnProcessor2_0(), attn, x, None), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attend_equals_scaled_dot_product_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 32, generator=generator) for n in (5, 7, 7))

    def split(x):
        return x.view(2, -1, 4, 8).transpose(1, 2)

    expected = torch.nn.functional.scaled_dot_product_attention(split(q), split(k), split(v))
    expected = expected.transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(attend(q, k, v, 4, 8**-0.5), expected, rtol=1e-5, atol=1e-5)

"""The fast CPU operators, held against PyTorch's and diffusers' own in float64 and float32, outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sdlora.bases.mini.build.fast import speed_up
from sdlora.bases.mini.build.layout import FIRST_TOKEN, Lookup, cells_of, watch_lookup
from sdlora.bases.norm import use_fast_group_norm


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, input gradient and parameter gradients."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.parametrize(("channels", "side"), [(96, 8), (64, 3)])
def test_group_norm_equals_pytorchs(channels: int, side: int) -> None:
    rng = torch.Generator().manual_seed(1)
    theirs = nn.GroupNorm(32, channels)
    for p in theirs.parameters():
        nn.init.normal_(p, 0.5, generator=rng)
    ours = copy.deepcopy(theirs)
    use_fast_group_norm(ours)
    x = (torch.randn(3, channels, side, side, generator=rng) * 2 + 1).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(x.shape, generator=rng)
    for a, b in zip(run(ours, x, dy), run(theirs, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_group_norm_in_half_is_as_near_to_the_truth_as_pytorchs() -> None:
    rng = torch.Generator().manual_seed(4)
    theirs = nn.GroupNorm(32, 64).bfloat16()
    for p in theirs.parameters():
        nn.init.normal_(p, 0.5, generator=rng)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    use_fast_group_norm(ours)
    x = (torch.randn(3, 64, 8, 8, generator=rng) * 2 + 1).bfloat16().contiguous(memory_format=torch.channels_last)
    dy = torch.randn(x.shape, generator=rng).bfloat16()
    truth = run(exact, x.double(), dy.double())
    for a, b, true in zip(run(ours, x, dy), run(theirs, x, dy), truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - true).norm() <= 1.3 * (b.double() - true).norm() + 1e-6


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=(1, 2),
        norm_num_groups=8,
    )
    return unet.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [16, 4])  # 4: every 3 x 3 convolution is the matrix product
def test_sped_up_unet_equals_the_plain_one(side: int) -> None:
    plain = tiny_unet()
    fast = copy.deepcopy(plain)
    speed_up(fast)
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, side, side, generator=rng).contiguous(memory_format=torch.channels_last)
    text, t = torch.randn(2, 77, 16, generator=rng), torch.tensor([10, 900])
    results = []
    for unet in (fast, plain):
        y = unet(x, t, text).sample
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(unet.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1))


def test_cells_are_the_latents_in_reading_order() -> None:
    x0 = torch.arange(4 * 256.0).view(1, 4, 16, 16)
    cells = cells_of(x0)
    assert cells.shape == (1, 64, 16)
    for cell in (0, 9, 63):
        y, x = divmod(cell, 8)
        expected = x0[0, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1)
        assert torch.equal(cells[0, cell], expected)


@pytest.mark.parametrize("side", [16, 8, 4])
def test_lookup_misses_nothing_when_each_query_sees_its_own_cell(side: int) -> None:
    own, other = torch.zeros(1, side * side, 77), torch.zeros(1, side * side, 77)
    for query in range(side * side):
        y, x = divmod(query, side)
        cell = (y * 8 // side) * 8 + x * 8 // side
        own[0, query, FIRST_TOKEN + cell] = 1
        other[0, query, FIRST_TOKEN + 63 - cell] = 1
    lookup = Lookup()
    lookup.note(own)
    assert lookup.take_loss() < 1e-3
    lookup.note(other)
    assert lookup.take_loss() > 5


def test_lookup_watches_cross_attention_below_the_first_level() -> None:
    unet, lookup = tiny_unet(), Lookup()
    watch_lookup(unet, lookup)
    unet(torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 77, 16))
    assert len(lookup.misses) == 6  # one in the second down block, one in the middle, two in each up block

"""The ways in which a picture is changed while the judge learns, so that it also knows imperfect drawings.

Every function takes pictures as float32 [B, 3, H, W] in 0..1 and draws only from the generator it is given.
`degrade` and `move` keep the style; `change_look` keeps only the thing that is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

KEEP, HIDE, SPOIL = 0, 1, 2
"""What a look does to the style's label: leaves it, leaves it untold, or makes it `OTHER`."""


def _uniform(n: int, low: float, high: float, rng: Generator) -> Tensor:
    return (torch.rand(n, generator=rng) * (high - low) + low)[:, None, None, None]


def _chance(n: int, p: float, rng: Generator) -> Tensor:
    return (torch.rand(n, generator=rng) < p)[:, None, None, None]


def to_grey(x: Tensor) -> Tensor:
    """Luma in all three channels."""
    luma = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    return luma.expand_as(x)


def _edges(x: Tensor) -> Tensor:
    """Strength of the strongest channel's edges, about 0..1, [B, 1, H, W]."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs()
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs()
    return torch.maximum(across, down).amax(1, keepdim=True)


def _grey(x: Tensor, rng: Generator) -> Tensor:
    return to_grey(x)


def _outline(x: Tensor, rng: Generator) -> Tensor:
    return (1 - _edges(x) * _uniform(len(x), 1.5, 5, rng)).clamp(0, 1).expand_as(x)


def _outlined(x: Tensor, rng: Generator) -> Tensor:
    edges = F.max_pool2d(_edges(x), 3, 1, 1)
    return x * (1 - edges * _uniform(len(x), 1, 3, rng)).clamp(0, 1)


def _posterise(x: Tensor, rng: Generator) -> Tensor:
    steps = torch.randint(1, 4, (len(x), 1, 1, 1), generator=rng)
    return (x * steps).round() / steps


def _grey_steps(x: Tensor, rng: Generator) -> Tensor:
    steps = torch.randint(2, 5, (len(x), 1, 1, 1), generator=rng)
    return (to_grey(x) * steps).round() / steps


def threshold(x: Tensor, rng: Generator) -> Tensor:
    """Pure black and white, parted somewhere between 0.35 and 0.85."""
    return ((to_grey(x) - _uniform(len(x), 0.35, 0.85, rng)) * 12).sigmoid()


def _swap(x: Tensor, rng: Generator) -> Tensor:
    return x[:, torch.randperm(3, generator=rng)]


def _invert(x: Tensor, rng: Generator) -> Tensor:
    return 1 - x


def _tint(x: Tensor, rng: Generator) -> Tensor:
    return x * (torch.rand(len(x), 3, 1, 1, generator=rng) * 0.7 + 0.3)


def _ground(x: Tensor, rng: Generator) -> Tensor:
    white = ((x.amin(1, keepdim=True) - 0.85) / 0.15).clamp(0, 1)
    colour = torch.rand(len(x), 3, 1, 1, generator=rng)
    return x + white * (colour - 1)


def _hue(x: Tensor, rng: Generator) -> Tensor:
    """Turns the colours about the grey axis by any angle."""
    angle = torch.rand(len(x), generator=rng) * 2 * math.pi
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None] / math.sqrt(3)
    third = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    turn = c * torch.eye(3) + (1 - c) * third + s * cross
    return torch.einsum("bij,bjhw->bihw", turn, x).clamp(0, 1)


def _contrast(x: Tensor, rng: Generator) -> Tensor:
    n = len(x)
    return ((x - 0.5) * _uniform(n, 0.4, 1.6, rng) + 0.5 + _uniform(n, -0.2, 0.2, rng)).clamp(0, 1)


def _shade(x: Tensor, rng: Generator) -> Tensor:
    h, w = x.shape[2:]
    across = torch.linspace(-1, 1, w)[None, None, None] * _uniform(len(x), -0.35, 0.35, rng)
    down = torch.linspace(-1, 1, h)[None, None, :, None] * _uniform(len(x), -0.35, 0.35, rng)
    return (x * (0.75 + across + down)).clamp(0, 1)


LOOKS: dict[str, tuple[Callable[[Tensor, Generator], Tensor], int]] = {
    "grey": (_grey, SPOIL),
    "outline": (_outline, SPOIL),
    "outlined": (_outlined, SPOIL),
    "posterised": (_posterise, SPOIL),
    "grey steps": (_grey_steps, SPOIL),
    "two-tone": (threshold, HIDE),  # too near to ink for the judge to be taught that it is not
    "swapped": (_swap, HIDE),
    "inverted": (_invert, SPOIL),
    "tinted": (_tint, HIDE),
    "ground": (_ground, HIDE),
    "hue": (_hue, HIDE),
    "contrast": (_contrast, HIDE),
    "shaded": (_shade, HIDE),
}


def change_look(x: Tensor, share: float, rng: Generator) -> tuple[Tensor, Tensor]:
    """Gives `share` of the pictures a look each; also what that does to their style labels, int64 [B].

    A look that hardly changes a picture (a grey drawing made grey) leaves its label.
    """
    b = len(x)
    out, effect = x.clone(), torch.full((b,), KEEP)
    pick = torch.randint(0, len(LOOKS), (b,), generator=rng)
    pick[torch.rand(b, generator=rng) >= share] = -1
    for number, (look, result) in enumerate(LOOKS.values()):
        rows = (pick == number).nonzero().flatten()
        if len(rows):
            out[rows] = look(x[rows], rng)
            effect[rows] = result
    changed = (out - x).abs().mean((1, 2, 3)) > 0.02
    return out, torch.where(changed, effect, torch.full_like(effect, KEEP))


def move(x: Tensor, rng: Generator) -> Tensor:
    """Mirrors, scales, turns by up to 12 degrees and shifts by up to a tenth, on white; one in five only mirrors."""
    b = len(x)
    still = torch.rand(b, generator=rng) < 0.2
    scale = torch.rand(b, generator=rng) * 0.37 + 0.75
    angle = (torch.rand(b, generator=rng) - 0.5) * (24 / 180 * math.pi)
    shift = (torch.rand(b, 2, generator=rng) - 0.5) * 0.4
    scale[still], angle[still], shift[still] = 1.0, 0.0, 0.0
    mirror = torch.where(torch.rand(b, generator=rng) < 0.5, -1.0, 1.0)
    c, s = angle.cos() / scale, angle.sin() / scale
    across = torch.stack([c * mirror, -s, shift[:, 0]], 1)
    down = torch.stack([s * mirror, c, shift[:, 1]], 1)
    theta = torch.stack([across, down], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, grid, align_corners=False)


def degrade(x: Tensor, rng: Generator) -> Tensor:
    """Blur, coarse pixels, noise, small errors of colour and contrast, a covered patch: the style stays the same."""
    b, _, h, w = x.shape
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(_chance(b, 0.35, rng), x + (soft - x) * _uniform(b, 0.2, 1, rng), x)
    side = int(torch.randint(28, 49, (1,), generator=rng))
    coarse = F.interpolate(F.interpolate(x, (side, side), mode="area"), (h, w), mode="bilinear", align_corners=False)
    x = torch.where(_chance(b, 0.15, rng), coarse, x)
    gain = 1 - torch.rand(b, 3, 1, 1, generator=rng) * 0.1
    lift = torch.rand(b, 3, 1, 1, generator=rng) * 0.12
    x = torch.where(_chance(b, 0.4, rng), x * (gain - lift) + lift, x)
    noise = torch.randn(x.shape, generator=rng)
    patchy = F.interpolate(torch.randn(b, 3, h // 8, w // 8, generator=rng), (h, w), mode="bilinear")
    x = torch.where(_chance(b, 0.25, rng), x + noise * _uniform(b, 0, 0.06, rng), x)
    x = torch.where(_chance(b, 0.25, rng), x + patchy * _uniform(b, 0, 0.08, rng), x)
    rows, columns = torch.arange(h)[None, None, :, None], torch.arange(w)[None, None, None]
    top, left = _uniform(b, -8, 56, rng), _uniform(b, -8, 56, rng)
    tall, wide = _uniform(b, 8, 24, rng), _uniform(b, 8, 24, rng)
    patch = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide) & _chance(b, 0.2, rng)
    return torch.where(patch, torch.ones(()), x).clamp(0, 1)


def nothings(n: int, size_px: int, rng: Generator) -> Tensor:
    """Pictures of nothing: one colour, white, noise, soft blotches in colour or in black and white."""
    plain = torch.rand(n, 3, 1, 1, generator=rng).expand(n, 3, size_px, size_px)
    white = torch.where(_chance(n, 0.5, rng), plain, torch.ones(()))
    noise = torch.rand(n, 3, size_px, size_px, generator=rng)
    noise = torch.where(_chance(n, 0.5, rng), noise, noise[:, :1].expand_as(noise))
    cells = int(torch.randint(2, 13, (1,), generator=rng))
    blotches = F.interpolate(torch.randn(n, 3, cells, cells, generator=rng), size_px, mode="bilinear") * 0.5 + 0.5
    hard = (to_grey(blotches) * 20 - 10).sigmoid()
    kind = torch.randint(0, 4, (n,), generator=rng)
    stack = torch.stack([white, noise, blotches, hard])  # [4, n, 3, H, W]
    return stack[kind, torch.arange(n)].clamp(0, 1)

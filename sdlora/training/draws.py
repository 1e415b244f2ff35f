"""The random draws of training: addressed by (seed, step, purpose, index), never consumed from a stream.

A resumed run, or one that cuts its steps into other micro-batches, therefore makes the same draws, whatever the device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(seed: int, step: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator that depends on its four arguments alone.

    They are hashed because torch's CPU engine keeps only 32 bits of a seed: sums or shifts of them would collide.
    """
    address = hashlib.sha256(f"{seed}/{step}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(address[:4], "big"))


class Order:
    """Which picture is the n-th sample of a run: epochs that each show every picture `repeats` times, shuffled anew."""

    def __init__(self, seed: int, repeats: list[int]) -> None:
        self.seed = seed
        self.pictures = torch.arange(len(repeats)).repeat_interleave(torch.tensor(repeats))  # [samples of an epoch]
        self.count = len(repeats)
        self._epoch = -1
        self._shuffled = self.pictures

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.pictures)

    def picture(self, sample: int) -> int:
        """The picture of a run's sample, counted from 0 over all epochs."""
        epoch, place = divmod(sample, len(self))
        if epoch != self._epoch:
            self._shuffled = self.pictures[torch.randperm(len(self), generator=generator(self.seed, epoch, "order"))]
            self._epoch = epoch
        return int(self._shuffled[place])


@dataclass(frozen=True)
class Draws:
    """What chance decides for one micro-batch of B samples; all on the CPU."""

    picture: Tensor  # int64 [B]
    mirror: Tensor  # int64 [B]: 0 plain, 1 mirrored
    caption: Tensor  # int64 [B]: the picture's row, or the empty caption's
    posterior: Tensor  # float32 [B, *latent]: standard normal
    noise: Tensor  # float32 [B, *latent]: standard normal
    t: Tensor  # int64 [B]


@dataclass(frozen=True)
class Chances:
    """The distributions that a run draws from."""

    order: Order
    latent: tuple[int, ...]
    """The shape of one latent, (4, H/8, W/8)."""
    timesteps: int
    """t is uniform in 0 .. timesteps - 1."""
    caption_dropout: float
    """The share of samples that train without a caption, for guidance."""
    flip: bool

    def draw(self, step: int, batch_size: int, micro: int = 0, accumulation: int = 1) -> Draws:
        """The draws of one micro-batch; they hang on a sample's place in its step, not on how the step is cut."""
        seed, empty = self.order.seed, self.order.count  # the row after the last picture's is the empty caption's
        rows: list[tuple[int, int, int, int]] = []
        posterior, noise = (torch.empty(batch_size, *self.latent) for _ in range(2))
        for i in range(batch_size):
            place = micro * batch_size + i
            picture = self.order.picture(step * batch_size * accumulation + place)
            mirror = self.flip and _uniform(seed, step, "flip", place) < 0.5
            dropped = _uniform(seed, step, "caption", place) < self.caption_dropout
            t = torch.randint(self.timesteps, (), generator=generator(seed, step, "timestep", place))
            rows.append((picture, int(mirror), empty if dropped else picture, int(t)))
            posterior[i].normal_(generator=generator(seed, step, "posterior", place))
            noise[i].normal_(generator=generator(seed, step, "noise", place))
        picture_, mirror_, caption, t_ = torch.tensor(rows).unbind(1)
        return Draws(picture_, mirror_, caption, posterior, noise, t_)


def _uniform(seed: int, step: int, purpose: str, index: int) -> float:
    return float(torch.rand((), generator=generator(seed, step, purpose, index)))

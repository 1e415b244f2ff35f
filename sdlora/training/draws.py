"""The random draws of training: addressed by (seed, step, purpose, index), never consumed from a stream.

A resumed run, or one that cuts its steps into other micro-batches, therefore makes the same draws, whatever the device.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .noise import NoiseShape, Times


def generator(seed: int, step: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator that depends on its four arguments alone.

    They are hashed because torch's CPU engine keeps only 32 bits of a seed: sums or shifts of them would collide.
    """
    address = hashlib.sha256(f"{seed}/{step}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(address[:4], "big"))


class Order:
    """Which picture is the n-th sample of a run: epochs that each show every picture `repeats` times, shuffled anew.

    Pictures of different buckets never share a step, which has `together` samples. So each bucket has its own epochs:
    what is left of one at the end of a step opens the bucket's next step, and nothing is dropped or shown for another.
    How many steps each bucket has had after an epoch of the whole folder is its due, to the nearest step.
    """

    def __init__(self, seed: int, repeats: list[int], buckets: Sequence[int] | None = None, together: int = 1) -> None:
        """`buckets` is each picture's bucket, 0 … without a gap; None puts all in one."""
        self.seed, self.together = seed, together
        self.count = len(repeats)
        pictures = torch.arange(self.count).repeat_interleave(torch.tensor(repeats))
        bucket = torch.zeros(self.count, dtype=torch.int64) if buckets is None else torch.tensor(buckets)
        last = int(bucket.max()) if self.count else 0
        self.pictures = [pictures[bucket[pictures] == b] for b in range(last + 1)]  # by bucket: its epoch's samples
        self._shuffled: dict[int, tuple[int, Tensor]] = {}
        self._turns: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __len__(self) -> int:
        """Samples in an epoch."""
        return sum(map(len, self.pictures))

    def picture(self, sample: int) -> int:
        """The picture of a run's sample, counted from 0 over all epochs."""
        step, place = divmod(sample, self.together)
        bucket, turn = self._find_turn(step)
        epoch, place = divmod(turn * self.together + place, len(self.pictures[bucket]))
        if self._shuffled.get(bucket, (-1,))[0] != epoch:
            drawn = generator(self.seed, epoch, "order", bucket)
            pictures = self.pictures[bucket]
            self._shuffled[bucket] = epoch, pictures[torch.randperm(len(pictures), generator=drawn)]
        return int(self._shuffled[bucket][1][place])

    def bucket(self, sample: int) -> int:
        """The bucket that a run's sample, and all of its step, is from."""
        return self._find_turn(sample // self.together)[0]

    def _find_turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps the bucket had before."""
        if len(self.pictures) == 1:
            return 0, step
        high = 1
        while self._steps_until(high) <= step:
            high *= 2
        low = 0
        while high - low > 1:  # the epoch is the last one that begins at or before the step
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_until(middle) <= step else (low, middle)
        if self._turns[0] != low:
            had = [self._due(b, low) for b in range(len(self.pictures))]
            due = [b for b, before in enumerate(had) for _ in range(self._due(b, low + 1) - before)]
            turns = []
            for i in torch.randperm(len(due), generator=generator(self.seed, low, "buckets")).tolist():
                turns.append((due[i], had[due[i]]))
                had[due[i]] += 1
            self._turns = low, turns
        return self._turns[1][step - self._steps_until(low)]

    def _steps_until(self, epoch: int) -> int:
        return sum(self._due(bucket, epoch) for bucket in range(len(self.pictures)))

    def _due(self, bucket: int, epoch: int) -> int:
        """The bucket's steps in all epochs before this one, to the nearest, halves up."""
        return (2 * epoch * len(self.pictures[bucket]) + self.together) // (2 * self.together)


@dataclass(frozen=True)
class Draws:
    """What chance decides for one micro-batch of B samples; all on the CPU."""

    picture: Tensor  # int64 [B]
    mirror: Tensor  # int64 [B]: the view, which is the crop, and as many more as there are crops where it is mirrored
    caption: Tensor  # int64 [B]: the picture's row, or the empty caption's
    posterior: Tensor  # float32 [B, *latent]: standard normal
    noise: Tensor  # float32 [B, *latent]: standard normal, where the recipe shapes it no other way
    t: Tensor  # int64 [B]
    added: Tensor  # float32 [B, *latent]: the noise in the picture; `noise`, but with input perturbation more


@dataclass(frozen=True)
class Chances:
    """The distributions that a run draws from."""

    order: Order
    latent: tuple[int, ...]
    """The shape of one latent, (4, H/8, W/8)."""
    timesteps: int
    """t is in 0 .. timesteps - 1, uniform where `times` says nothing else."""
    caption_dropout: float
    """The share of samples that train without a caption, for guidance."""
    flip: bool
    times: Times = field(default_factory=Times)
    shape: NoiseShape = field(default_factory=NoiseShape)
    shapes: tuple[tuple[int, ...], ...] = ()
    """The shape of one latent of each bucket, where there are several."""
    wordings: tuple[int, ...] = ()
    """How many wordings of its caption each picture has, their rows one after the other; () is one each."""
    crops: int = 1
    """Crops of each picture; all are as likely."""

    def draw(self, step: int, batch_size: int, micro: int = 0, accumulation: int = 1) -> Draws:
        """The draws of one micro-batch; they hang on a sample's place in its step, not on how the step is cut."""
        seed, counts = self.order.seed, self.wordings or (1,) * self.order.count
        first = [0, *itertools.accumulate(counts)]  # each picture's first row; the one after all is the empty caption
        rows: list[tuple[int, int, int, int]] = []
        latent = self.shapes[self.order.bucket(step * batch_size * accumulation)] if self.shapes else self.latent
        posterior, noise, added = (torch.empty(batch_size, *latent) for _ in range(3))
        for i in range(batch_size):
            place = micro * batch_size + i
            picture = self.order.picture(step * batch_size * accumulation + place)
            mirror = self.flip and _uniform(seed, step, "flip", place) < 0.5
            dropped = _uniform(seed, step, "caption", place) < self.caption_dropout
            wording = int(_uniform(seed, step, "wording", place) * counts[picture]) if counts[picture] > 1 else 0
            caption = first[-1] if dropped else first[picture] + wording
            t = self.times.draw(self.timesteps, generator(seed, step, "timestep", place))
            crop = int(_uniform(seed, step, "crop", place) * self.crops) if self.crops > 1 else 0
            rows.append((picture, int(mirror) * self.crops + crop, caption, t))
            posterior[i].normal_(generator=generator(seed, step, "posterior", place))
            noise[i].normal_(generator=generator(seed, step, "noise", place))
            address = partial(generator, seed, step, index=place)
            self.shape.shape(noise[i], address)
            added[i] = self.shape.perturb(noise[i], address)
        picture_, mirror_, caption_, t_ = torch.tensor(rows).unbind(1)
        return Draws(picture_, mirror_, caption_, posterior, noise, t_, added)


def _uniform(seed: int, step: int, purpose: str, index: int) -> float:
    return float(torch.rand((), generator=generator(seed, step, purpose, index)))

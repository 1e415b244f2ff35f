"""How much of a style and of a subject a picture shows, where the bare base is 0 and either LoRA alone is 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from .features import Features

MOST_LEAK = 0.9
"""How much of one recovery the other LoRA may reach alone; nearer to 1 there is nothing left to measure it by."""


@dataclass(frozen=True)
class Axis:
    """One reading of a picture as a number: its mean cosine with reference pictures, scaled so that the bare base's
    pictures have a mean of 0 and those of the LoRA alone a mean of 1."""

    references: Tensor
    """Unit vectors, float32 [R, D]."""
    paired: bool
    """Whether the references are drawn, each from the noise of the picture in its place: that one is left out, since
    pictures of the same noise are alike whatever acts."""
    floor: float
    """The mean cosine of the base's pictures."""
    ceiling: float
    """The mean cosine of the LoRA's pictures."""
    separation: float
    """(ceiling - floor) / the two kinds' pooled standard deviation: how far above a picture's noise the LoRA is."""

    @classmethod
    def of(cls, what: str, bare: Tensor, alone: Tensor, references: Tensor | None) -> Axis:
        """From vectors of the base's pictures, the LoRA's of the same noise, and the references; without these the
        LoRA's own pictures stand in.

        Raises: ConfigError where the LoRA alone comes no nearer to the references than the base.
        """
        paired = references is None
        if references is None:
            if len(alone) < 2:
                raise ConfigError(f"one picture cannot be its own measure; give 2 or more seeds, or --{what}-pictures")
            references = alone
        low, high = (_mean_cosines(vectors, references, paired) for vectors in (bare, alone))  # [N] each
        floor, ceiling = float(low.mean()), float(high.mean())
        if not ceiling > floor:
            raise ConfigError(
                f"the {what} LoRA alone comes no nearer to its pictures ({ceiling:.3f}) than the bare base "
                f"({floor:.3f}), so nothing can be measured; name its trigger in the prompt, or give other "
                f"--{what}-pictures"
            )
        spread = math.sqrt(float(low.var(correction=0) + high.var(correction=0)) / 2)
        return cls(references, paired, floor, ceiling, (ceiling - floor) / max(spread, 1e-6))

    def read(self, vectors: Tensor) -> Tensor:
        """0 as the base, 1 as the LoRA alone: float32 [B] of unit vectors [B, D]; not bounded."""
        return (_mean_cosines(vectors, self.references, self.paired) - self.floor) / (self.ceiling - self.floor)


def _mean_cosines(vectors: Tensor, references: Tensor, paired: bool) -> Tensor:
    """Each vector's mean cosine with the references, float32 [B]; `paired` leaves out the one in its place."""
    cosines = vectors @ references.T
    if not paired:
        return cosines.mean(1)
    if len(vectors) != len(references):
        raise ValueError(f"{len(vectors)} pictures to compare with {len(references)} of the same noise")
    return (cosines.sum(1) - cosines.diagonal()) / (len(references) - 1)


@dataclass(frozen=True)
class Recoveries:
    """Style and subject recovery of some pictures, float32 [B] each; neither is bounded."""

    style: Tensor
    subject: Tensor

    @property
    def scores(self) -> Tensor:
        """The smaller of the two, within 0..1, float32 [B]: a stack that drops either one has failed.

        A geometric mean would forgive half a subject for a full style; the smaller one does not.
        """
        return torch.minimum(self.style, self.subject).clamp(0, 1)

    @property
    def score(self) -> float:
        """The mean score."""
        return float(self.scores.mean())


@dataclass(frozen=True)
class Recovery:
    """Measures pictures of a style and a subject against the base's own, and those of either LoRA alone.

    Each axis reads 0 on the base and 1 on its own LoRA. The other LoRA moves it too (a subject's colours are a part of
    how a picture looks; without colour a face is less itself): what it reads on the other LoRA's pictures alone, its
    leak, becomes its floor, in proportion to how much of the other there is. With u and v the readings of style and
    subject, held to 0..1 where they weigh a floor,

        style = (u - leak_u v) / (1 - leak_u v),    subject = (v - leak_v u) / (1 - leak_v u),

    so that the base is at (0, 0), the style alone at (1, 0) and the subject alone at (0, 1), as far as single pictures
    agree with their mean.
    """

    features: Features
    style_axis: Axis
    subject_axis: Axis
    style_leak: float
    """The style axis on the subject LoRA's pictures."""
    subject_leak: float
    """The subject axis on the style LoRA's pictures."""

    @classmethod
    def of(
        cls,
        features: Features,
        *,
        bare: Sequence[Image.Image],
        style: Sequence[Image.Image],
        subject: Sequence[Image.Image],
        style_pictures: Sequence[Image.Image] | None = None,
        subject_pictures: Sequence[Image.Image] | None = None,
    ) -> Recovery:
        """From pictures by the bare base, by the style LoRA alone and by the subject LoRA alone, of the same prompts.

        `style_pictures` and `subject_pictures` are what each LoRA was taught with; without them each LoRA's own
        pictures stand in. Raises: ConfigError where a LoRA does nothing that can be measured, or both do the same.
        """
        in_style = [features.style(pictures) for pictures in (bare, style, subject)]
        in_subject = [features.subject(pictures) for pictures in (bare, style, subject)]
        style_axis = Axis.of(
            "style", in_style[0], in_style[1], None if style_pictures is None else features.style(style_pictures)
        )
        subject_axis = Axis.of(
            "subject",
            in_subject[0],
            in_subject[2],
            None if subject_pictures is None else features.subject(subject_pictures),
        )
        leaks = float(style_axis.read(in_style[2]).mean()), float(subject_axis.read(in_subject[1]).mean())
        for what, other, leak in (("style", "subject", leaks[0]), ("subject", "style", leaks[1])):
            if leak > MOST_LEAK:
                raise ConfigError(
                    f"the {other} LoRA alone shows {leak:.0%} of the {what} already, so the two cannot be told apart; "
                    f"give --{what}-pictures that show the {what} without the {other}"
                )
        return cls(features, style_axis, subject_axis, *leaks)

    @property
    def elsewhere(self) -> Recovery:
        """It for pictures of other noise than those that it was made from, however many."""
        axes = [replace(axis, paired=False) for axis in (self.style_axis, self.subject_axis)]
        return replace(self, style_axis=axes[0], subject_axis=axes[1])

    def measure(self, pictures: Sequence[Image.Image]) -> Recoveries:
        """The style and subject recovery of each picture.

        Where no pictures of the style or the subject were given, they are those of the same prompts and noise as the
        pictures that it was made from, in the same order; for others take `elsewhere`.
        """
        u = self.style_axis.read(self.features.style(pictures))
        v = self.subject_axis.read(self.features.subject(pictures))
        return self.untangle(u, v)

    def untangle(self, u: Tensor, v: Tensor) -> Recoveries:
        """The recoveries of the two axes' readings, float32 [B] each."""
        style_floor = self.style_leak * v.clamp(0, 1)
        subject_floor = self.subject_leak * u.clamp(0, 1)
        return Recoveries((u - style_floor) / (1 - style_floor), (v - subject_floor) / (1 - subject_floor))

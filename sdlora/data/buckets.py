"""Buckets: the few sizes that pictures of any shape are cut to, so that little of each is lost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..config import Recipe
from ..errors import ConfigError

Size = tuple[int, int]
"""Width and height in px."""
STEP_PX = 64


@dataclass(frozen=True)
class Cut:
    """How one picture becomes one of a bucket's size: `box` is cut out of it and scaled to `size`."""

    own: Size
    """The whole picture's width and height in px."""
    size: Size
    box: tuple[int, int, int, int]
    """Left, top, right and bottom in the picture's own px."""

    @property
    def lost(self) -> float:
        """The share of the picture's area that is cut away, 0 to 1."""
        left, top, right, bottom = self.box
        return 1 - (right - left) * (bottom - top) / (self.own[0] * self.own[1])

    @property
    def grows(self) -> bool:
        """Whether the picture is scaled up."""
        left, top, right, bottom = self.box
        return right - left < self.size[0] or bottom - top < self.size[1]

    def ids(self, mirrored: bool) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told, in px: the picture's height and width; of the scaled picture, the top and left of the
        crop, and the height and width of the crop.

        Source: Podell et al. 2023, SDXL, section 2.2.
        """
        (width, height), (left, top, right, bottom) = self.own, self.box
        begin = width - right if mirrored else left
        scaled_top = round(top * self.size[1] / (bottom - top))
        scaled_left = round(begin * self.size[0] / (right - left))
        return height, width, scaled_top, scaled_left, self.size[1], self.size[0]


def plan_cut(own: Size, size: Size) -> Cut:
    """The largest centred part of a picture of `own` px that has the shape of `size`, to the nearest px."""
    width, height = own
    if width * size[1] >= height * size[0]:
        width = min(width, max(1, round(height * size[0] / size[1])))
    else:
        height = min(height, max(1, round(width * size[1] / size[0])))
    left, top = (own[0] - width) // 2, (own[1] - height) // 2
    return Cut(own, size, (left, top, left + width, top + height))


def move_cut(cut: Cut, at: tuple[float, float]) -> Cut:
    """The same cut at another place of the picture; `at`, 0 to below 1 across and down, takes every place as often."""
    left, top, right, bottom = cut.box
    width, height = right - left, bottom - top
    left, top = int(at[0] * (cut.own[0] - width + 1)), int(at[1] * (cut.own[1] - height + 1))
    return Cut(cut.own, cut.size, (left, top, left + width, top + height))


def draw_places(recipe: Recipe, pictures: int) -> list[list[tuple[float, float]]] | None:
    """Where each picture's random crops lie, as `move_cut` takes it, by the recipe's seed; None for the centre."""
    if recipe.crop == "centre":
        return None
    return [[draw_place(f"{recipe.seed}/{i}/{n}/crop") for n in range(recipe.crops)] for i in range(pictures)]


def draw_place(address: str) -> tuple[float, float]:
    """A place, as `move_cut` takes it, that hangs on the address alone."""
    data = hashlib.sha256(address.encode()).digest()
    across, down = (int.from_bytes(data[i : i + 6], "big") / 2**48 for i in (0, 6))
    return across, down


def list_sizes(resolution_px: int, step_px: int, max_aspect: float) -> list[Size]:
    """The square of resolution_px, then ever longer sizes with multiples of step_px as sides and at most its area.

    The square must be a multiple too. Each size comes in both directions and is less than a row of step_px short of
    the square's area; no size is longer than max_aspect times its other side.
    """
    area = resolution_px**2
    sizes: list[Size] = [(resolution_px, resolution_px)]
    for long in range(resolution_px + step_px, int(resolution_px * max_aspect) + 1, step_px):
        short = area // long // step_px * step_px
        if short and long <= max_aspect * short:
            sizes += [(long, short), (short, long)]
    return sizes


@dataclass(frozen=True)
class Bucketing:
    """What sizes a run's pictures are cut to; with step_px = 0 all to the one square, whatever it cuts or scales up."""

    resolution_px: int
    step_px: int = 0
    max_aspect: float = 2.0
    upscale: bool = False

    @cached_property
    def sizes(self) -> list[Size]:
        """The sizes to choose from for pictures that are large enough."""
        if not self.step_px:
            return [(self.resolution_px, self.resolution_px)]
        return list_sizes(self.resolution_px, self.step_px, self.max_aspect)

    def choose(self, own: Size) -> Cut:
        """The cut that keeps most of a picture of `own` px.

        Where that would scale it up, and nothing asks for it, the largest size within the picture; where there is none,
        the smallest of all, scaled up after all.
        """
        cuts = [plan_cut(own, size) for size in self.sizes]
        best = min(cuts, key=lambda cut: (round(cut.lost, 9), -cut.size[0] * cut.size[1]))
        if not best.grows or self.upscale or not self.step_px:
            return best
        within = [plan_cut(own, size) for size in self._sizes_within(own)]
        largest = max(within, key=lambda cut: (cut.size[0] * cut.size[1], -cut.lost), default=None)
        return largest or plan_cut(own, (self.step_px, self.step_px))

    def _sizes_within(self, own: Size) -> list[Size]:
        most_px = int(self.resolution_px * self.max_aspect)
        widths, heights = (range(self.step_px, min(side, most_px) + 1, self.step_px) for side in own)
        return [
            (width, height)
            for width in widths
            for height in heights
            if width * height <= self.resolution_px**2 and max(width, height) <= self.max_aspect * min(width, height)
        ]


def read_bucketing(recipe: Recipe, resolution_px: int) -> Bucketing:
    """How a recipe cuts its pictures, at the resolution in force.

    Raises: ConfigError where the buckets' step does not fit the resolution.
    """
    if not recipe.buckets:
        return Bucketing(resolution_px)
    step = recipe.bucket_step_px or max(8, min(STEP_PX, resolution_px // 4 // 8 * 8))
    if step > resolution_px // 2:
        raise ConfigError(
            f"bucket_step_px = {step} leaves no choice of sizes at a resolution of {resolution_px}; "
            f"give {max(8, resolution_px // 4 // 8 * 8)} (--bucket-step-px)"
        )
    if resolution_px % step:
        near = max(1, round(resolution_px / step)) * step
        raise ConfigError(
            f"resolution = {resolution_px} is no multiple of the buckets' step of {step} px; "
            f"give resolution = {near}, or another bucket_step_px (--bucket-step-px)"
        )
    return Bucketing(resolution_px, step, recipe.max_aspect, recipe.upscale)


class Picture(Protocol):
    """What a cut is planned from."""

    @property
    def name(self) -> str: ...

    @property
    def repeats(self) -> int: ...

    @property
    def size_px(self) -> Size: ...


def plan_cuts(pictures: Sequence[Picture], bucketing: Bucketing) -> Cuts:
    """The cut of every picture."""
    return Cuts(
        bucketing,
        tuple(p.name for p in pictures),
        tuple(p.repeats for p in pictures),
        tuple(bucketing.choose(p.size_px) for p in pictures),
    )


@dataclass(frozen=True)
class Cuts:
    """Every picture of a folder with its cut, in the folder's order."""

    bucketing: Bucketing
    names: tuple[str, ...]
    repeats: tuple[int, ...]
    cuts: tuple[Cut, ...]

    @property
    def sizes(self) -> list[Size]:
        """The buckets that hold a picture, the square and the nearly square ones of the most area first."""
        return sorted({cut.size for cut in self.cuts}, key=lambda s: (-s[0] * s[1], max(s) / min(s), s))

    def members(self, size: Size) -> list[int]:
        """The pictures of a bucket, by their place."""
        return [i for i, cut in enumerate(self.cuts) if cut.size == size]

    def images(self, size: Size) -> int:
        """A bucket's images in an epoch, repeats counted; 0 where all are held out."""
        return sum(self.repeats[i] for i in self.members(size))

    def list_short(self, together: int) -> list[Size]:
        """The buckets, of several that are learnt, which have too few images to fill a step of `together` once."""
        learnt = [size for size in self.sizes if self.images(size)]
        return [size for size in learnt if self.images(size) < together] if len(learnt) > 1 else []

    def describe(self, together: int) -> list[str]:
        """Lines for a person: each bucket, what it cuts away, what is scaled up, and which are short of a step."""
        if not self.bucketing.step_px:
            return self._describe_square()
        lines, short = [], self.list_short(together)
        for size in self.sizes:
            places = self.members(size)
            line = f"bucket {size[0]} x {size[1]} px: {count(len(places), 'picture')}, {self._describe_loss(places)}"
            images = self.images(size)
            if not images:
                line += "; all held out"
            elif size in short:
                are = "is" if images == 1 else "are"
                line += (
                    f"; its {count(images, 'image')} an epoch {are} fewer than the {together} of a step, which it "
                    f"fills by repeating them, once in about {together / images:.2g} epochs"
                )
            lines.append(line)
        regular = set(self.bucketing.sizes)
        small = [name for name, cut in zip(self.names, self.cuts, strict=True) if cut.size not in regular]
        if small:
            lines.append(
                f"{count(len(small), 'picture')} too small for the resolution, put in smaller buckets: "
                f"{name_few(small)}; upscale = true (--upscale) scales up instead"
            )
        return lines + self._describe_growth()

    def _describe_square(self) -> list[str]:
        lines = []
        if any(cut.lost > 0 for cut in self.cuts):
            loss = self._describe_loss(range(len(self.cuts)))
            lines.append(f"squares: {loss}; buckets = true (--buckets) keeps more")
        return lines + self._describe_growth()

    def _describe_growth(self) -> list[str]:
        grown = [name for name, cut in zip(self.names, self.cuts, strict=True) if cut.grows]
        return [f"{count(len(grown), 'picture')} scaled up: {name_few(grown)}"] if grown else []

    def _describe_loss(self, places: Sequence[int]) -> str:
        lost = [self.cuts[i].lost for i in places]
        most = max(lost)
        if most == 0:
            return "nothing cut away"
        worst = self.names[places[lost.index(most)]]
        return f"{sum(lost) / len(lost):.1%} cut away on average, {most:.1%} at most ({worst})"


def describe_crops(recipe: Recipe) -> list[str]:
    """A line on the random crops, where there are any."""
    return (
        [] if recipe.crop == "centre" else [f"{count(recipe.crops, 'random crop')} of each picture, drawn by the seed"]
    )


def count(n: int, what: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def name_few(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""Masks: which part of each picture is learnt, from its alpha channel or a folder of grey pictures.

A mask goes through what its picture goes through: the same cut, the same scaling, the same mirroring.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import Recipe
from ..errors import DataError
from .buckets import Cut, Cuts, count, draw_place, draw_places, move_cut, name_few
from .folder import SUFFIXES, Example, Problem, Survey
from .picture import decode_alpha, decode_grey, strict_warnings

ALPHA = "alpha"
"""What a recipe calls masks that are the pictures' own alpha channels."""
_CELL_PX = 8
_TRIES = 100
"""How often a random crop is drawn before a mask counts as out of its reach."""
Places = list[list[tuple[float, float]]]


def add_masks(survey: Survey, source: str) -> None:
    """Gives each example of a survey its mask; what is missing or cannot be one is noted among the problems.

    `source` is the recipe's: alpha, a folder, or nothing, which leaves all as it is.
    """
    if not source:
        return
    root = Path(source)
    found: dict[str, list[Path]] = {}
    if source != ALPHA:
        problem = _check_root(root, survey.folder)
        if problem:
            survey.problems.append(problem)
            return
        found = _find_masks(root)
        names = {_stem(e.name) for e in survey.examples}
        survey.masks_unused = [str(p) for stem, paths in found.items() if stem not in names for p in paths]
    paths = [e.path for e in survey.examples] + [path for own in found.values() for path in own]
    with strict_warnings(paths), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        looks = list(pool.map(lambda e: _look_at(e, source, found), survey.examples))
    without = sum(look.problem is None and look.path is None for look in looks)
    for i, (example, look) in enumerate(zip(survey.examples, looks, strict=True)):
        if look.problem:
            survey.problems.append(look.problem)
        elif look.path is None:
            how_many = f"({without} of {count(len(looks), 'picture')} without)"
            what = "alpha channel to be its mask" if source == ALPHA else f"mask in {root}"
            fix = "save it with one, or leave out masks" if source == ALPHA else "put a grey picture of its name there"
            survey.problems.append(Problem(example.name, f"has no {what} {how_many}", fix))
        else:
            survey.masks[example.name] = look.share
            survey.examples[i] = replace(example, mask=look.path)


def read_mask(example: Example) -> Image.Image:
    """The mask of an example that has one, 8-bit grey at the picture's own size.

    Raises: DataError, naming the file and the fix, where it can no longer be read.
    """
    assert example.mask is not None
    with strict_warnings([example.mask]):
        try:
            mask = _decode(example.mask, own=example.mask == example.path)
        except ValueError as error:
            problem, fix = error.args
            raise DataError(f"{example.mask}: {problem}; {fix}") from None
    if mask is None:
        raise DataError(f"{example.mask}: has lost its alpha channel; run the command again")
    return mask if mask.size == example.size_px else mask.resize(example.size_px, Image.Resampling.BOX)


def cut_mask(mask: Image.Image, cut: Cut, factor: int = _CELL_PX) -> NDArray[np.float32]:
    """What a cut leaves of a mask of the picture's size, float32 [H/8, W/8] in 0..1: the mean over each latent pixel.

    It is scaled by area too, not with the picture's Lanczos filter, which would swing beyond the mask's edges.
    """
    part = mask.crop(cut.box)
    part = part if part.size == cut.size else part.resize(cut.size, Image.Resampling.BOX)
    values = np.asarray(part, dtype=np.float32) / 255
    height, width = values.shape
    return values.reshape(height // factor, factor, width // factor, factor).mean((1, 3))


def place_crops(recipe: Recipe, examples: Sequence[Example], cuts: Cuts) -> tuple[Places | None, list[Problem]]:
    """Where each picture's random crops lie, as `draw_places` says, and the pictures of whose mask no cut leaves any.

    A random crop that holds nothing of its picture's mask is drawn again, by its seed and the number of the try.
    """
    places = draw_places(recipe, len(examples))
    problems = []
    for i, (example, cut) in enumerate(zip(examples, cuts.cuts, strict=True)):
        if example.mask is None:
            continue
        mask = read_mask(example)
        fix = "enlarge the white part, or leave the picture out"
        if places is None:
            if not cut_mask(mask, cut).any():
                problem = "nothing of its mask is in the part that is cut out"
                problems.append(Problem(example.name, problem, f"{fix}, or try buckets = true (--buckets)"))
            continue
        for n, at in enumerate(places[i]):
            tries = [at, *(draw_place(f"{recipe.seed}/{i}/{n}/crop/{t}") for t in range(1, _TRIES))]
            seen = next((at for at in tries if cut_mask(mask, move_cut(cut, at)).any()), None)
            if seen is None:
                problems.append(Problem(example.name, f"none of {_TRIES} random crops holds any of its mask", fix))
                break
            places[i][n] = seen
    return places, problems


def digest_masks(examples: Iterable[Example]) -> str | None:
    """SHA-256 over the examples' masks in their order; None where no example has one."""
    total, any_mask = hashlib.sha256(), False
    for example in examples:
        any_mask |= example.mask is not None
        total.update((describe_mask(example) + "\n").encode())
    return total.hexdigest() if any_mask else None


def describe_mask(example: Example) -> str:
    """What a mask is by content: `alpha`, which is in the picture, a SHA-256, or nothing. Raises: OSError."""
    if example.mask is None:
        return ""
    if example.mask == example.path:
        return ALPHA
    with example.mask.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_masks(recipe: Recipe, shares: Sequence[float], unused: Sequence[str] = ()) -> list[str]:
    """Lines on the masks, where there are any: what they leave, what the rest weighs, and which belong to nothing."""
    if not recipe.masks or not shares:
        return []
    source = "the alpha channels" if recipe.masks == ALPHA else recipe.masks
    rest = f"the rest weighs {recipe.mask_outside:g}" if recipe.mask_outside else "the rest is not learnt"
    lines = [
        f"{source}: {sum(shares) / len(shares):.1%} of the pictures on average, {min(shares):.1%} at least; {rest}"
    ]
    return lines + ([f"{count(len(unused), 'mask')} of no picture: {name_few(unused)}"] if unused else [])


@dataclass(frozen=True)
class _Look:
    """A picture's mask and how much it keeps, or why it cannot be used; nothing where there is none."""

    path: Path | None = None
    share: float = 0.0
    problem: Problem | None = None


def _look_at(example: Example, source: str, found: dict[str, list[Path]]) -> _Look:
    own = source == ALPHA
    paths = [example.path] if own else found.get(_stem(example.name), [])
    if not paths:
        return _Look()
    path, name = paths[0], example.name if own else str(paths[0])

    def refuse(problem: str, fix: str) -> _Look:
        return _Look(problem=Problem(name, problem, fix))

    if len(paths) > 1:
        return refuse(f"is one of {len(paths)} masks of {example.name}", "keep one of them")
    try:
        mask = _decode(path, own)
    except ValueError as error:
        return refuse(*error.args)
    if mask is None:
        return _Look()
    if not _same_aspect(mask.size, example.size_px):
        sizes = "{} x {} px is of another shape than {}, {} x {} px".format(*mask.size, example.name, *example.size_px)
        return refuse(f"with {sizes}", "cut the mask as the picture is cut")
    share = float(np.asarray(mask, dtype=np.float64).mean()) / 255
    if not share:
        problem = "is transparent everywhere" if own else "is black everywhere"
        return refuse(f"{problem}, so nothing of the picture would be learnt", "correct the mask or delete the picture")
    return _Look(path, share)


def _decode(path: Path, own: bool) -> Image.Image | None:
    return decode_alpha(path) if own else decode_grey(path)


def _same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one is the other scaled, each side to the nearest px."""
    (width, height), (w, h) = size, other
    return abs(width - w * height / h) <= 0.5 or abs(height - h * width / w) <= 0.5


def _check_root(root: Path, data: Path) -> Problem | None:
    try:
        if not root.exists():
            return Problem(str(root), "does not exist", "check the path of the masks, or write alpha")
        if not root.is_dir():
            return Problem(str(root), "is a file", "give the folder that holds the masks, or write alpha")
        os.listdir(root)
        if data.exists() and root.samefile(data):
            return Problem(str(root), "is the data folder itself", "put the masks in a folder of their own")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return Problem(str(root), f"cannot be read ({reason})", "check the path and the rights of the masks")
    return None


def _find_masks(root: Path) -> dict[str, list[Path]]:
    """The pictures below a folder, by their place in it without the suffix."""
    found: dict[str, list[Path]] = {}
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                found.setdefault(_stem(path.relative_to(root).as_posix()), []).append(path)
    return found


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))

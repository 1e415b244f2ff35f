"""Latents: pictures as the base's VAE sees them, each crop and its mirror image, with their masks."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .buckets import Cut, Size, move_cut, plan_cut
from .folder import Example, read_picture
from .masks import cut_mask, describe_mask, read_mask
from .picture import cut_picture
from .store import Store, fingerprint, make_key, name_machine

if TYPE_CHECKING:
    from ..bases.family import Base

_Item = TypeVar("_Item")
_View = tuple[Tensor, ...]
"""Mean, std and, where there are masks, mask of one view."""
BATCH_PX = 16 * 128 * 128  # what one pass through the VAE may hold: 16 pictures of 128 px, one of 512
_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Latents:
    """The n pictures of one bucket, in the folder's order."""

    mean: Tensor
    """Posterior means, float32 [V, n, 4, H/8, W/8], scaled to unit variance."""
    std: Tensor
    """Posterior standard deviations, the same shape and scale."""
    mask: Tensor | None = None
    """How much of each latent pixel is learnt, float32 [V, n, 1, H/8, W/8] in 0..1; None where there are no masks."""


@dataclass(frozen=True)
class Wanted:
    """A picture to encode, the size to cut it to, and the places of its crops, None for its centre."""

    example: Example
    size: Size
    places: list[tuple[float, float]] | None
    masked: bool = False
    """Whether the run has masks; of a picture without one all is learnt."""

    def cuts(self, own: Size) -> list[Cut]:
        centre = plan_cut(own, self.size)
        return [centre] if self.places is None else [move_cut(centre, at) for at in self.places]

    def masks(self, cuts: list[Cut], factor: int) -> list[Tensor]:
        """What each cut leaves of the picture's mask, float32 [1, H/8, W/8]."""
        if self.example.mask is None:
            return [torch.ones(1, cut.size[1] // factor, cut.size[0] // factor) for cut in cuts]
        mask = read_mask(self.example)
        return [torch.from_numpy(cut_mask(mask, cut, factor))[None] for cut in cuts]


def encode_pictures(
    base: Base, wanted: list[Wanted], sides: int, progress: bool, store: Store | None
) -> tuple[tuple[Latents, ...], Tensor]:
    """The latents by bucket, and what the model is told of each picture's size, float32 [V, N, 6].

    sides is 2 where mirrored pictures are wanted too.
    """
    buckets = sorted({one.size for one in wanted})
    batches = []
    for size in buckets:
        members = [i for i, one in enumerate(wanted) if one.size == size]
        most = 1 if store else max(1, BATCH_PX // (size[0] * size[1]))
        batches += [members[i : i + most] for i in range(0, len(members), most)]
    maker = (fingerprint([base.modules["vae"]]), base.dtype, name_machine(base.device)) if store else ()
    found: dict[Size, list[list[_View]]] = {size: [] for size in buckets}
    told: list[list[tuple[int, ...]]] = [[] for _ in wanted]
    for k in count_batches(len(batches), 1, "encoding pictures", progress):
        chosen = [wanted[i] for i in batches[k]]
        if store is None:
            encoded, cuts = _encode_batch(base, chosen, sides)
        else:
            encoded, cuts = _keep_picture(store, maker, base, chosen[0], sides)
        found[chosen[0].size].append(encoded)
        for i, own in zip(batches[k], cuts, strict=True):
            told[i] = [cut.ids(mirrored) for mirrored in (False, True)[:sides] for cut in own]
    return tuple(_join(found[size]) for size in buckets), torch.tensor(told, dtype=torch.float32).transpose(0, 1)


def _encode_batch(base: Base, wanted: list[Wanted], sides: int) -> tuple[list[_View], list[list[Cut]]]:
    """Mean, std and mask by view of pictures of one bucket, and each picture's cuts."""
    loaded = [_load(one) for one in wanted]
    masks = [
        one.masks(cuts, base.latent_factor) if one.masked else [] for one, (_, cuts) in zip(wanted, loaded, strict=True)
    ]
    encoded: list[_View] = []
    for side in range(sides):
        for crop in range(len(loaded[0][1])):
            batch = torch.stack([pixels[crop] for pixels, _ in loaded])
            x = batch.flip(-1) if side else batch  # [B, 3, H, W]
            mean, std = base.encode_pictures(x.to(base.device))
            if not (mean.isfinite().all() and std.isfinite().all()):
                names = ", ".join(one.example.name for one in wanted)
                raise DataError(f"{names}: the base's VAE gives no finite latents; use --precision bf16 or fp32")
            view: _View = (mean.float().cpu(), std.float().cpu())
            if masks[0]:
                mask = torch.stack([own[crop] for own in masks])  # [B, 1, H/8, W/8]
                view += (mask.flip(-1) if side else mask,)
            encoded.append(view)
    return encoded, [cuts for _, cuts in loaded]


def _keep_picture(
    store: Store, maker: tuple[object, ...], base: Base, wanted: Wanted, sides: int
) -> tuple[list[_View], list[list[Cut]]]:
    """As `_encode_batch` for one picture, from the store where it is there; maker is what encodes it."""
    try:
        with wanted.example.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        mask = ("mask", describe_mask(wanted.example)) if wanted.masked else ()
    except OSError:
        return _encode_batch(base, [wanted], sides)  # which says what is wrong with it
    cuts = wanted.cuts(wanted.example.size_px)
    key = make_key("latents", content, cuts, sides, *maker, *mask)
    cells = (wanted.size[1] // base.latent_factor, wanted.size[0] // base.latent_factor)
    shapes = {"mean": (1, 4, *cells), "std": (1, 4, *cells)} | ({"mask": (1, 1, *cells)} if mask else {})
    names = [{f"{part}.{view}": shape for part, shape in shapes.items()} for view in range(len(cuts) * sides)]
    kept = store.read(key, {name: shape for own in names for name, shape in own.items()})
    if kept is not None:
        return [tuple(kept[name] for name in own) for own in names], [cuts]
    encoded, found = _encode_batch(base, [wanted], sides)
    if found == [cuts]:  # else the file changed since it was looked at
        named = zip(names, encoded, strict=True)
        store.write(key, {name: x for own, view in named for name, x in zip(own, view, strict=True)})
    return encoded, found


def _join(batches: list[list[_View]]) -> Latents:
    """The batches of one bucket, each by view, as one tensor."""
    views = list(zip(*batches, strict=True))
    parts = range(len(views[0][0]))
    return Latents(*(torch.stack([torch.cat([batch[i] for batch in view]) for view in views]) for i in parts))


def count_batches(n: int, size: int, what: str, progress: bool) -> Iterator[int]:
    """Where each of the batches of n things begins, with progress as `track` shows it."""
    starts = range(0, n, size)
    return track(starts, len(starts), what, progress) if n else iter(())


def _load(wanted: Wanted) -> tuple[list[Tensor], list[Cut]]:
    """The picture's crops as they are learnt, [3, H, W] in -1..1, and how each was cut."""
    picture = read_picture(wanted.example.path)
    cuts = wanted.cuts(picture.size)
    pixels = [torch.from_numpy(np.array(cut_picture(picture, cut))) for cut in cuts]  # [H, W, 3], 0..255
    return [x.permute(2, 0, 1).float() / 127.5 - 1 for x in pixels], cuts


def track(items: Iterable[_Item], total: int, what: str, show: bool = True) -> Iterator[_Item]:
    """Passes the items on, with a progress bar on stderr where that is a terminal, else plain lines."""
    if show and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, file=sys.stderr, leave=False)
        return
    said_s = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if show and (done == total or time.monotonic() - said_s >= _LINE_EVERY_S):
            said_s = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr)

"""What of a data folder never changes while it is learnt, computed once: latents and text states."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .folder import Example, fit_picture, read_picture

if TYPE_CHECKING:
    from ..bases.family import Base
    from ..bases.text import Text

_Item = TypeVar("_Item")
_BATCH_PX = 16 * 128 * 128  # what one pass through the VAE may hold: 16 pictures of 128 px, one of 512
_BATCH_CAPTIONS = 32
_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Encoded:
    """A folder as the model sees it; V is 1, or 2 with the mirrored pictures, N the number of pictures."""

    mean: Tensor
    """Posterior means, float32 [V, N, 4, H/8, W/8], scaled to unit variance."""
    std: Tensor
    """Posterior standard deviations, the same shape and scale."""
    sizes: Tensor
    """Each picture as it was cut, float32 [V, N, 6] in px: its own height and width, then, of the picture scaled to be
    cut, the crop's top and left, and the height and width of the crop."""
    ids: Tensor
    """Token ids, int64 [N+1, E, C, 77] of E text encoders and C chunks; row N is the empty caption."""
    text: Text | None
    """Text states [N+1, 77·C, D] (and pooled) in the base's dtype, or None where the text encoder is trained too."""
    repeats: list[int]
    """How often each picture counts in an epoch."""
    truncated: list[str]
    """Names of the pictures whose captions lose their end."""


def encode_folder(
    base: Base,
    examples: list[Example],
    *,
    resolution_px: int,
    flip: bool,
    text: bool,
    chunks: int = 1,
    clip_skip: int = 0,
    progress: bool = True,
) -> Encoded:
    """Encodes every picture once (mirrored too with flip) and, with `text`, every different caption once.

    Captions may fill `chunks` chunks of 75 tokens. All tensors are on the CPU. Names the captions that are too long on
    stderr; `progress` shows how far it is there.

    Raises: DataError where a picture can no longer be read.
    """
    mean, std, sizes = _encode_pictures(base, examples, resolution_px, flip, progress)
    captions = [*(e.caption for e in examples), ""]
    ids, lengths = base.tokenize(captions, chunks)  # [N+1, E, C, 77]
    limit = ids.shape[2] * (ids.shape[3] - 2) + 2
    truncated = {e.name: n for e, n in zip(examples, lengths, strict=False) if n > limit}
    warn_truncated(truncated, limit)
    states = _encode_captions(base, captions, ids, clip_skip, progress) if text else None
    return Encoded(mean, std, sizes, ids, states, [e.repeats for e in examples], list(truncated))


def measure_cut(width_px: int, height_px: int, resolution_px: int, mirrored: bool) -> tuple[int, ...]:
    """What SDXL is told of a picture whose centre square was scaled to resolution_px, as `Encoded.sizes` has it.

    Source: Podell et al. 2023, SDXL, section 2.2.
    """
    side_px = min(width_px, height_px)
    top_px, left_px = (height_px - side_px) // 2, (width_px - side_px) // 2
    if mirrored:
        left_px = width_px - side_px - left_px
    top_px, left_px = (round(x * resolution_px / side_px) for x in (top_px, left_px))
    return height_px, width_px, top_px, left_px, resolution_px, resolution_px


def warn_truncated(truncated: dict[str, int], limit: int) -> None:
    """Says on stderr which captions lose their end; the numbers are tokens, start and end counted."""
    if truncated:
        names = ", ".join(f"{name} ({n} tokens)" for name, n in truncated.items())
        are, lose = ("s are", "lose their end") if len(truncated) > 1 else (" is", "loses its end")
        line = f"warning: {len(truncated)} caption{are} longer than {limit} tokens and {lose}: {names}"
        print(line, file=sys.stderr)


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


def _encode_pictures(
    base: Base, examples: list[Example], resolution_px: int, flip: bool, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = max(1, _BATCH_PX // resolution_px**2)
    views = 2 if flip else 1
    means: list[list[Tensor]] = [[] for _ in range(views)]
    stds: list[list[Tensor]] = [[] for _ in range(views)]
    sizes: list[list[tuple[int, ...]]] = [[] for _ in range(views)]
    for i in _chunks(len(examples), size, "encoding pictures", progress):
        loaded = [_load(example, resolution_px) for example in examples[i : i + size]]
        batch = torch.stack([pixels for pixels, _ in loaded])
        for view in range(views):
            x = batch.flip(-1) if view else batch  # [B, 3, H, W]
            mean, std = base.encode_pictures(x.to(base.device))
            if not (mean.isfinite().all() and std.isfinite().all()):
                names = ", ".join(example.name for example in examples[i : i + size])
                raise DataError(f"{names}: the base's VAE gives no finite latents; use --precision bf16 or fp32")
            means[view].append(mean.float().cpu())
            stds[view].append(std.float().cpu())
            sizes[view] += [measure_cut(*own, resolution_px, mirrored=view == 1) for _, own in loaded]
    mean, std = (torch.stack([torch.cat(part) for part in parts]) for parts in (means, stds))
    return mean, std, torch.tensor(sizes, dtype=torch.float32)


def _chunks(n: int, size: int, what: str, progress: bool) -> Iterator[int]:
    starts = range(0, n, size)
    return track(starts, len(starts), what, progress) if n else iter(())


def _load(example: Example, resolution_px: int) -> tuple[Tensor, tuple[int, int]]:
    """The picture as it is learnt, [3, H, W] in -1..1, and its own width and height in px."""
    picture = read_picture(example.path)
    pixels = np.array(fit_picture(picture, resolution_px))  # [H, W, 3], 0..255
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1, picture.size


@torch.no_grad()
def _encode_captions(base: Base, captions: list[str], ids: Tensor, clip_skip: int, progress: bool) -> Text:
    different = list(dict.fromkeys(captions))
    place = {caption: j for j, caption in enumerate(different)}
    wanted = ids[[captions.index(caption) for caption in different]]  # [U, E, C, 77]
    parts = [
        base.encode_text(wanted[i : i + _BATCH_CAPTIONS].to(base.device), clip_skip).to(torch.device("cpu"))
        for i in _chunks(len(wanted), _BATCH_CAPTIONS, "encoding captions", progress)
    ]
    text = parts[0].cat(parts)[[place[caption] for caption in captions]]  # [N+1, 77·C, D]
    if base.zero_blank:
        text = text.blank(torch.arange(len(captions)) == len(captions) - 1)
    return text

"""What of a data folder never changes while it is learnt, computed once: latents and text states."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .buckets import Size
from .folder import Example
from .latents import Latents, Wanted, count_batches, encode_pictures
from .store import Store, fingerprint, make_key, name_machine

if TYPE_CHECKING:
    from ..bases.family import Base
    from ..bases.text import Text

_BATCH_CAPTIONS = 32


@dataclass(frozen=True)
class Encoded:
    """A folder as the model sees it, N pictures in V views: each crop, then, with mirrored pictures, each mirrored."""

    latents: tuple[Latents, ...]
    """By bucket."""
    bucket: Tensor
    """Each picture's bucket, int64 [N]."""
    row: Tensor
    """Each picture's place in its bucket, int64 [N]."""
    sizes: Tensor
    """Each picture as it was cut, float32 [V, N, 6] in px: its own height and width, then, of the picture scaled to be
    cut, the crop's top and left, and the height and width of the crop."""
    wordings: tuple[int, ...]
    """How many wordings of its caption each picture has; their rows follow each other in the pictures' order."""
    ids: Tensor
    """Token ids, int64 [R+1, E, C, 77] of R wordings, E text encoders and C chunks; row R is the empty caption."""
    text: Text | None
    """Text states [R+1, 77·C, D] (and pooled) in the base's dtype, or None where the text encoder is trained too."""
    repeats: list[int]
    """How often each picture counts in an epoch."""
    truncated: list[str]
    """Names of the pictures whose captions lose their end."""

    @property
    def mean(self) -> Tensor:
        """All posterior means, float32 [V, N, 4, H/8, W/8], of a folder with one bucket."""
        return self._only.mean

    @property
    def std(self) -> Tensor:
        """All posterior standard deviations of a folder with one bucket."""
        return self._only.std

    @property
    def _only(self) -> Latents:
        (only,) = self.latents
        return only

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of one latent of each bucket, (4, H/8, W/8)."""
        return tuple(tuple(latents.mean.shape[2:]) for latents in self.latents)

    def sample(self, view: Tensor, picture: Tensor, posterior: Tensor) -> Tensor:
        """Latents float32 [B, 4, H/8, W/8] of pictures int64 [B] of one bucket, mirrored where view int64 [B] is 1.

        posterior is their standard normal noise, of the same shape.
        """
        latents = self.latents[int(self.bucket[picture[0]])]
        place = (view, self.row[picture])
        return latents.mean[place] + latents.std[place] * posterior

    def mask(self, view: Tensor, picture: Tensor) -> Tensor | None:
        """Their masks, float32 [B, 1, H/8, W/8] in 0..1, or None where there are none."""
        mask = self.latents[int(self.bucket[picture[0]])].mask
        return None if mask is None else mask[view, self.row[picture]]


def encode_folder(
    base: Base,
    examples: list[Example],
    *,
    resolution_px: int,
    sizes: list[Size] | None = None,
    wordings: list[list[str]] | None = None,
    places: list[list[tuple[float, float]]] | None = None,
    flip: bool,
    text: bool,
    chunks: int = 1,
    clip_skip: int = 0,
    progress: bool = True,
    store: Store | None = None,
) -> Encoded:
    """Encodes every picture once (mirrored too with flip) and, with `text`, every different caption once.

    `sizes` is what each picture is cut to, width and height in px; without it all to the square of resolution_px.
    `places` is where each picture's crops lie, as many for each; without it the one centre is cut out.
    `wordings` is what each picture's caption is read as; without it as it stands. What `store` holds is read from it,
    and the rest is put there; pictures and captions are then encoded one by one, so that what is found decides no bit.

    Where any example has a mask, each is scaled, cut and mirrored as its picture is.

    Captions may fill `chunks` chunks of 75 tokens. All tensors are on the CPU. Names the captions that are too long on
    stderr; `progress` shows how far it is there.

    Raises: DataError where a picture can no longer be read.
    """
    sizes = sizes or [(resolution_px, resolution_px)] * len(examples)
    buckets = sorted(set(sizes))
    bucket = torch.tensor([buckets.index(size) for size in sizes])
    rows = {size: itertools.count() for size in buckets}
    row = torch.tensor([next(rows[size]) for size in sizes])
    masked = any(e.mask for e in examples)
    wanted = [
        Wanted(e, size, own, masked)
        for e, size, own in zip(examples, sizes, places or itertools.repeat(None), strict=False)
    ]
    latents, told = encode_pictures(base, wanted, 2 if flip else 1, progress, store)
    wordings = wordings or [[e.caption] for e in examples]
    captions = [*itertools.chain(*wordings), ""]
    ids, lengths = base.tokenize(captions, chunks)  # [R+1, E, C, 77]
    limit = ids.shape[2] * (ids.shape[3] - 2) + 2
    rest = iter(lengths)
    longest = [max(itertools.islice(rest, len(own))) for own in wordings]
    truncated = {e.name: n for e, n in zip(examples, longest, strict=True) if n > limit}
    warn_truncated(truncated, limit)
    states = encode_captions(base, captions, ids, clip_skip, progress=progress, store=store) if text else None
    if store is not None:
        print(f"cache {store.folder}: {store.found} found, {store.made} made", file=sys.stderr)
    counts, repeats = tuple(map(len, wordings)), [e.repeats for e in examples]
    return Encoded(latents, bucket, row, told, counts, ids, states, repeats, list(truncated))


def warn_truncated(truncated: dict[str, int], limit: int) -> None:
    """Says on stderr which captions lose their end; the numbers are tokens, start and end counted."""
    if truncated:
        names = ", ".join(f"{name} ({n} tokens)" for name, n in truncated.items())
        are, lose = ("s are", "lose their end") if len(truncated) > 1 else (" is", "loses its end")
        line = f"warning: {len(truncated)} caption{are} longer than {limit} tokens and {lose}: {names}"
        print(line, file=sys.stderr)


@torch.no_grad()
def encode_captions(
    base: Base,
    captions: list[str],
    ids: Tensor,
    clip_skip: int,
    *,
    progress: bool = True,
    store: Store | None = None,
) -> Text:
    """Text states of the captions, tokenized as ids int64 [R, E, C, 77], the last of them empty; each different one is
    encoded once, or read from `store`. On the CPU."""
    different = list(dict.fromkeys(captions))
    place = {caption: j for j, caption in enumerate(different)}
    first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    wanted = ids[[first[caption] for caption in different]]  # [U, E, C, 77]
    size = 1 if store else _BATCH_CAPTIONS
    encoders = [base.modules[part] for part in sorted(base.modules) if part.startswith("text_encoder")]
    maker = (fingerprint(encoders), clip_skip, base.dtype, name_machine(base.device)) if store else ()
    parts = []
    for i in count_batches(len(wanted), size, "encoding captions", progress):
        rows = wanted[i : i + size]
        key = make_key("text", rows.tolist(), *maker) if store else ""
        kept = store.read(key) if store else None
        text = (
            base.take_text(**kept)
            if kept
            else base.encode_text(rows.to(base.device), clip_skip).to(torch.device("cpu"))
        )
        if store and not kept:
            pooled = {} if text.pooled is None else {"pooled": text.pooled}
            store.write(key, {"states": text.states, **pooled})
        parts.append(text)
    text = parts[0].cat(parts)[[place[caption] for caption in captions]]  # [N+1, 77·C, D]
    if base.zero_blank:
        text = text.blank(torch.arange(len(captions)) == len(captions) - 1)
    return text

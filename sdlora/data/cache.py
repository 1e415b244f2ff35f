"""What of a data folder never changes while it is learnt, computed once: latents and text states."""

from __future__ import annotations

import hashlib
import itertools
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
from .picture import cut_picture
from .store import Store, fingerprint, make_key, name_machine

if TYPE_CHECKING:
    from ..bases.family import Base
    from ..bases.text import Text

_Item = TypeVar("_Item")
BATCH_PX = 16 * 128 * 128  # what one pass through the VAE may hold: 16 pictures of 128 px, one of 512
_BATCH_CAPTIONS = 32
_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Latents:
    """The n pictures of one bucket, in the folder's order."""

    mean: Tensor
    """Posterior means, float32 [V, n, 4, H/8, W/8], scaled to unit variance."""
    std: Tensor
    """Posterior standard deviations, the same shape and scale."""


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

    Captions may fill `chunks` chunks of 75 tokens. All tensors are on the CPU. Names the captions that are too long on
    stderr; `progress` shows how far it is there.

    Raises: DataError where a picture can no longer be read.
    """
    sizes = sizes or [(resolution_px, resolution_px)] * len(examples)
    buckets = sorted(set(sizes))
    bucket = torch.tensor([buckets.index(size) for size in sizes])
    rows = {size: itertools.count() for size in buckets}
    row = torch.tensor([next(rows[size]) for size in sizes])
    wanted = [
        _Wanted(e, size, own) for e, size, own in zip(examples, sizes, places or itertools.repeat(None), strict=False)
    ]
    latents, told = _encode_pictures(base, wanted, 2 if flip else 1, progress, store)
    wordings = wordings or [[e.caption] for e in examples]
    captions = [*itertools.chain(*wordings), ""]
    ids, lengths = base.tokenize(captions, chunks)  # [R+1, E, C, 77]
    limit = ids.shape[2] * (ids.shape[3] - 2) + 2
    rest = iter(lengths)
    longest = [max(itertools.islice(rest, len(own))) for own in wordings]
    truncated = {e.name: n for e, n in zip(examples, longest, strict=True) if n > limit}
    warn_truncated(truncated, limit)
    states = _encode_captions(base, captions, ids, clip_skip, progress, store) if text else None
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


@dataclass(frozen=True)
class _Wanted:
    """A picture to encode, the size to cut it to, and the places of its crops, None for its centre."""

    example: Example
    size: Size
    places: list[tuple[float, float]] | None

    def cuts(self, own: Size) -> list[Cut]:
        centre = plan_cut(own, self.size)
        return [centre] if self.places is None else [move_cut(centre, at) for at in self.places]


def _encode_pictures(
    base: Base, wanted: list[_Wanted], sides: int, progress: bool, store: Store | None
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
    found: dict[Size, list[list[tuple[Tensor, Tensor]]]] = {size: [] for size in buckets}
    told: list[list[tuple[int, ...]]] = [[] for _ in wanted]
    for k in _chunks(len(batches), 1, "encoding pictures", progress):
        chosen = [wanted[i] for i in batches[k]]
        if store is None:
            encoded, cuts = _encode_batch(base, chosen, sides)
        else:
            encoded, cuts = _keep_picture(store, maker, base, chosen[0], sides)
        found[chosen[0].size].append(encoded)
        for i, own in zip(batches[k], cuts, strict=True):
            told[i] = [cut.ids(mirrored) for mirrored in (False, True)[:sides] for cut in own]
    return tuple(_join(found[size]) for size in buckets), torch.tensor(told, dtype=torch.float32).transpose(0, 1)


def _encode_batch(base: Base, wanted: list[_Wanted], sides: int) -> tuple[list[tuple[Tensor, Tensor]], list[list[Cut]]]:
    """Mean and std by view of pictures of one bucket, and each picture's cuts."""
    loaded = [_load(one) for one in wanted]
    encoded = []
    for side in range(sides):
        for crop in range(len(loaded[0][1])):
            batch = torch.stack([pixels[crop] for pixels, _ in loaded])
            x = batch.flip(-1) if side else batch  # [B, 3, H, W]
            mean, std = base.encode_pictures(x.to(base.device))
            if not (mean.isfinite().all() and std.isfinite().all()):
                names = ", ".join(one.example.name for one in wanted)
                raise DataError(f"{names}: the base's VAE gives no finite latents; use --precision bf16 or fp32")
            encoded.append((mean.float().cpu(), std.float().cpu()))
    return encoded, [cuts for _, cuts in loaded]


def _keep_picture(
    store: Store, maker: tuple[object, ...], base: Base, wanted: _Wanted, sides: int
) -> tuple[list[tuple[Tensor, Tensor]], list[list[Cut]]]:
    """As `_encode_batch` for one picture, from the store where it is there; maker is what encodes it."""
    try:
        with wanted.example.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return _encode_batch(base, [wanted], sides)  # which says what is wrong with it
    cuts = wanted.cuts(wanted.example.size_px)
    key = make_key("latents", content, cuts, sides, *maker)
    shape = (1, 4, wanted.size[1] // base.latent_factor, wanted.size[0] // base.latent_factor)
    names = [(f"mean.{view}", f"std.{view}") for view in range(len(cuts) * sides)]
    kept = store.read(key, {name: shape for pair in names for name in pair})
    if kept is not None:
        return [(kept[mean], kept[std]) for mean, std in names], [cuts]
    encoded, found = _encode_batch(base, [wanted], sides)
    if found == [cuts]:  # else the file changed since it was looked at
        named = zip(names, encoded, strict=True)
        store.write(key, {name: x for pair, own in named for name, x in zip(pair, own, strict=True)})
    return encoded, found


def _join(batches: list[list[tuple[Tensor, Tensor]]]) -> Latents:
    """The batches of one bucket, each by view, as one tensor."""
    views = list(zip(*batches, strict=True))
    mean, std = (torch.stack([torch.cat([part[i] for part in view]) for view in views]) for i in range(2))
    return Latents(mean, std)


def _chunks(n: int, size: int, what: str, progress: bool) -> Iterator[int]:
    starts = range(0, n, size)
    return track(starts, len(starts), what, progress) if n else iter(())


def _load(wanted: _Wanted) -> tuple[list[Tensor], list[Cut]]:
    """The picture's crops as they are learnt, [3, H, W] in -1..1, and how each was cut."""
    picture = read_picture(wanted.example.path)
    cuts = wanted.cuts(picture.size)
    pixels = [torch.from_numpy(np.array(cut_picture(picture, cut))) for cut in cuts]  # [H, W, 3], 0..255
    return [x.permute(2, 0, 1).float() / 127.5 - 1 for x in pixels], cuts


@torch.no_grad()
def _encode_captions(
    base: Base, captions: list[str], ids: Tensor, clip_skip: int, progress: bool, store: Store | None
) -> Text:
    different = list(dict.fromkeys(captions))
    place = {caption: j for j, caption in enumerate(different)}
    first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    wanted = ids[[first[caption] for caption in different]]  # [U, E, C, 77]
    size = 1 if store else _BATCH_CAPTIONS
    encoders = [base.modules[part] for part in sorted(base.modules) if part.startswith("text_encoder")]
    maker = (fingerprint(encoders), clip_skip, base.dtype, name_machine(base.device)) if store else ()
    parts = []
    for i in _chunks(len(wanted), size, "encoding captions", progress):
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

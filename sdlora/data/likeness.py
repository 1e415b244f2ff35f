"""Pictures that look alike: saved again, scaled, or a little retouched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE_PX = 16
_MOST_SHIFT = 8.0
"""How far the mean colours may lie apart, of 255."""
_MOST_CHANGE = 0.1
"""How far the rest of the thumbnails may differ, as a share of their contrast; by 1 of 255 where they have little."""


@dataclass(frozen=True, eq=False)
class Look:
    """What stays nearly the same when a picture is saved again or scaled."""

    thumbnail: NDArray[np.uint8]
    """[16, 16, 3]; a hash of it would be noise where a picture is flat or symmetrical."""


def look_at(image: Image.Image) -> Look:
    """The look of an RGB picture."""
    small = image.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX)  # one pass over what may be many megapixels
    return Look(np.asarray(small, dtype=np.uint8))


def group_alike(looks: dict[str, Look]) -> list[list[str]]:
    """Groups of names whose pictures look alike, each name in one group at most, in the order they came in."""
    names = list(looks)
    thumbnails = np.array([look.thumbnail for look in looks.values()], dtype=np.float32)
    thumbnails = thumbnails.reshape(len(names), _SIDE_PX**2, 3)
    colours = thumbnails.mean(axis=1)  # [N, 3]
    shapes = (thumbnails - colours[:, None]).reshape(len(names), 3 * _SIDE_PX**2)
    contrasts = np.abs(shapes).mean(axis=1)
    limits = np.maximum(1.0, _MOST_CHANGE * contrasts)
    leader = list(range(len(names)))

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    for i in range(len(names)):
        # Contrasts lie no further apart than the shapes do: the cheap comparisons leave few for the dear one.
        near = (np.abs(colours[i + 1 :] - colours[i]) <= _MOST_SHIFT).all(axis=1)
        near &= np.abs(contrasts[i + 1 :] - contrasts[i]) <= limits[i]
        places = np.flatnonzero(near) + i + 1
        places = places[np.abs(shapes[places] - shapes[i]).mean(axis=1) <= limits[i]]
        for j in places.tolist():
            low, high = sorted((find(i), find(j)))
            leader[high] = low
    groups: dict[int, list[str]] = {}
    for i, name in enumerate(names):
        groups.setdefault(find(i), []).append(name)
    return [group for group in groups.values() if len(group) > 1]

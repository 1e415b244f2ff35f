"""How one LoRA's weight varies, by block and over the steps, and how people write that; no torch.

`FILE:0.8:blocks=down.1=0,mid=0.5:schedule=0@0,1@0.5:start=0.1:stop=0.9:mask=left.png` on the command line, and
`<lora:name:0.8:lbw=…:start=…:stop=…>` in a prompt.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .targets import BLOCK_SETS, BLOCK_SETS_FAMILY, lies_in, prefix_of
from .values import NUMBER, LoraSpec, parse_lora, suggest

KEYS = ("blocks", "lbw", "schedule", "start", "stop", "mask")
"""What may follow a LoRA's weights; `lbw` is the community's word for `blocks`."""
TEXT = "text_encoder"


def _sides(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[str, ...]:
    return ("BASE", *(f"IN{i:02}" for i in inputs), "M00", *(f"OUT{i:02}" for i in outputs))


SCHEMES: dict[str, tuple[str, ...]] = {
    "sd1-17": _sides((1, 2, 4, 5, 7, 8), range(3, 12)),
    "sd1-26": _sides(range(12), range(12)),
    "sdxl-12": _sides((4, 5, 7, 8), range(6)),
    "sdxl-20": _sides(range(9), range(9)),
}
"""What each value of a vector is for: BASE is the text encoder, IN, M and OUT the UNet's blocks in the numbering of the
first Stable Diffusion. What a scheme does not number keeps its weight. Source: sd-webui-lora-block-weight's README."""
SCHEME_FAMILIES = {"sd1": ("sd1", "sd2"), "sdxl": ("sdxl",)}
_LEVELS = {"sd1": 4, "sdxl": 3}


def _number_blocks(kind: str) -> dict[str, str]:
    """Module-path prefix -> position, for a UNet of two layers a level down and three up."""
    found = {"unet.conv_in": "IN00", "unet.mid_block": "M00"}
    for level in range(_LEVELS[kind]):
        for layer in range(2):
            for part in ("resnets", "attentions"):
                found[f"unet.down_blocks.{level}.{part}.{layer}"] = f"IN{3 * level + layer + 1:02}"
        found[f"unet.down_blocks.{level}.downsamplers"] = f"IN{3 * level + 3:02}"
        for layer in range(3):
            for part in ("resnets", "attentions"):
                found[f"unet.up_blocks.{level}.{part}.{layer}"] = f"OUT{3 * level + layer:02}"
        found[f"unet.up_blocks.{level}.upsamplers"] = f"OUT{3 * level + 2:02}"
    return found


_NUMBERED = {kind: _number_blocks(kind) for kind in _LEVELS}


def position_of(path: str, scheme: str) -> str | None:
    """The position of a scheme that a module path belongs to, or None where the scheme numbers none for it."""
    if path.startswith(TEXT):
        return "BASE"
    words = path.split(".")
    for length in range(2, 6):
        position = _NUMBERED[scheme.partition("-")[0]].get(".".join(words[:length]))
        if position is not None:
            return position if position in SCHEMES[scheme] else None
    return None


@dataclass(frozen=True)
class BlockWeights:
    """A factor on the weight by block: by name, or by one of the community's vectors."""

    named: tuple[tuple[str, float], ...] = ()
    """(block, factor): `down.1`, `mid`, `up.0.attentions.1`, `text_encoder`; the longest that fits counts, else 1."""
    scheme: str = ""
    values: tuple[float, ...] = ()

    def at(self, path: str) -> float:
        """The factor of a module path."""
        if self.scheme:
            position = position_of(path, self.scheme)
            return 1.0 if position is None else self.values[SCHEMES[self.scheme].index(position)]
        best, factor = -1, 1.0
        for block, value in self.named:
            prefix = prefix_of(block)
            if len(prefix) > best and (lies_in(path, prefix) or (prefix == TEXT and path.startswith(TEXT))):
                best, factor = len(prefix), value
        return factor

    def check_family(self, family: str, name: str) -> None:
        """Raises: ConfigError where the vector, or a block of SDXL's, is for another family than the base's."""
        kind = self.scheme.partition("-")[0]
        if self.scheme and family not in SCHEME_FAMILIES[kind]:
            raise ConfigError(
                f"{name}: {len(self.values)} block weights are {self.scheme}, which a base of family {family} has not; "
                "name the blocks, as in blocks=down.1=0.5,mid=0"
            )
        alien = [block for block, _ in self.named if block in BLOCK_SETS and family != BLOCK_SETS_FAMILY]
        if alien:
            raise ConfigError(f"{name}: block {alien[0]} is SDXL's, and the base is {family}; name its own blocks")

    def __str__(self) -> str:
        if self.scheme:
            return f"{self.scheme}/{','.join(_write(value) for value in self.values)}"
        return ",".join(f"{block}={_write(value)}" for block, value in self.named)


def parse_blocks(text: str) -> BlockWeights:
    """Reads `down.1=0.5,mid=0`, `sd1-17/1,0,…`, or bare values, whose number tells the scheme.

    Raises: ConfigError for a block that is not known, a number that is none, or a vector of the wrong length.
    """
    scheme, slash, rest = text.strip().partition("/")
    if not slash and "=" in text:
        named = []
        for item in text.split(","):
            block, _, value = item.partition("=")
            prefix_of(block.strip())  # raises where there is no such block
            named.append((block.strip(), _read(value, f"block {block.strip()}")))
        twice = {block for block, _ in named if sum(other == block for other, _ in named) > 1}
        if twice:
            raise ConfigError(f"blocks names {sorted(twice)[0]} twice; give it one weight")
        return BlockWeights(tuple(named))
    values = tuple(_read(value, "a block weight") for value in (rest if slash else text).split(","))
    lengths = {name: len(positions) for name, positions in SCHEMES.items()}
    if slash:
        if scheme not in SCHEMES:
            raise ConfigError(f"block scheme {scheme!r} is not known{suggest(scheme, SCHEMES) or _schemes()}")
        if len(values) != lengths[scheme]:
            raise ConfigError(f"{scheme} has {lengths[scheme]} block weights, not {len(values)}; give one for each")
        return BlockWeights(scheme=scheme, values=values)
    fitting = [name for name, length in lengths.items() if length == len(values)]
    if not fitting:
        raise ConfigError(f"{len(values)} block weights fit no scheme{_schemes()}, or name blocks: down.1=0.5,mid=0")
    if len(fitting) > 1:
        raise ConfigError(f"{len(values)} block weights fit {' and '.join(fitting)}; say which: {fitting[0]}/1,0,…")
    return BlockWeights(scheme=fitting[0], values=values)


def _schemes() -> str:
    return "; there are " + ", ".join(f"{name} ({len(positions)})" for name, positions in SCHEMES.items())


@dataclass(frozen=True)
class Schedule:
    """A factor on the weight over t, the fraction of the noise schedule that is done.

    Points (t, factor) with t rising, linear between them and constant outside; 0 before `start` and after `stop`.
    """

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    start: float = 0.0
    stop: float = 1.0

    def at(self, t: float) -> float:
        """The factor at t in 0..1; at `start` and `stop` themselves it acts."""
        if not self.start <= t <= self.stop:
            return 0.0
        place = bisect.bisect_right([point for point, _ in self.points], t)
        if place == 0:
            return self.points[0][1]
        if place == len(self.points):
            return self.points[-1][1]
        (t0, a), (t1, b) = self.points[place - 1], self.points[place]
        return a + (b - a) * (t - t0) / (t1 - t0)

    @property
    def constant(self) -> float | None:
        """The one factor that it has at every t, or None."""
        values = {value for _, value in self.points}
        return values.pop() if len(values) == 1 and self.start <= 0 and self.stop >= 1 else None


def parse_schedule(text: str) -> tuple[tuple[float, float], ...]:
    """Reads `0@0,1@0.5`: value@t, t from 0 (noise) to 1 (picture), rising.

    Raises: ConfigError.
    """
    points = []
    for item in text.split(","):
        value, at, t = item.partition("@")
        if not at:
            raise ConfigError(f"schedule {text!r}: {item.strip()!r} is no value@t; write one such as 0@0,1@0.5")
        points.append((_read_t(t, "a schedule's t"), _read(value, "a schedule's value")))
    if any(b <= a for (a, _), (b, _) in itertools.pairwise(points)):
        raise ConfigError(f"schedule {text!r}: t must rise from point to point; write one such as 0@0,1@0.5")
    return tuple(points)


@dataclass(frozen=True)
class Profile:
    """How one LoRA's weight varies."""

    blocks: BlockWeights | None = None
    schedule: Schedule | None = None

    def at(self, path: str, t: float | None = None) -> float:
        """The factor on the weight of a module path at a moment t.

        A schedule acts on the UNet alone, since the text is encoded once. With t None it is the factor of a plan that
        does not move: a schedule that does is left aside.
        """
        factor = 1.0 if self.blocks is None else self.blocks.at(path)
        if self.schedule is None or path.startswith(TEXT):
            return factor
        constant = self.schedule.constant
        if constant is not None:
            return factor * constant
        return factor if t is None else factor * self.schedule.at(t)

    @property
    def static(self) -> bool:
        """Whether it is the same at every t."""
        return self.schedule is None or self.schedule.constant is not None

    def parts(self) -> list[str]:
        """It as it is written after a LoRA's weights, a `key=value` each."""
        found = [f"blocks={self.blocks}"] if self.blocks is not None else []
        if self.schedule is not None:
            if self.schedule.points != ((0.0, 1.0),):
                points = ",".join(f"{_write(value)}@{_write(t)}" for t, value in self.schedule.points)
                found.append(f"schedule={points}")
            found += [f"start={_write(self.schedule.start)}"] if self.schedule.start > 0 else []
            found += [f"stop={_write(self.schedule.stop)}"] if self.schedule.stop < 1 else []
        return found


def parse_profile(parts: Mapping[str, str]) -> Profile | None:
    """The profile of `key=value` parts (`mask` is not its), or None where there is none.

    Raises: ConfigError.
    """
    if "blocks" in parts and "lbw" in parts:
        raise ConfigError("blocks and lbw are one and the same; give one of them")
    blocks = parts.get("blocks", parts.get("lbw"))
    schedule = None
    if {"schedule", "start", "stop"} & set(parts):
        points = parse_schedule(parts["schedule"]) if "schedule" in parts else ((0.0, 1.0),)
        start = _read_t(parts.get("start", "0"), "start")
        stop = _read_t(parts.get("stop", "1"), "stop")
        if start >= stop:
            raise ConfigError(f"start {_write(start)} is not before stop {_write(stop)}; the LoRA would never act")
        schedule = Schedule(points, start, stop)
    if blocks is None and schedule is None:
        return None
    return Profile(None if blocks is None else parse_blocks(blocks), schedule)


@dataclass(frozen=True)
class StackSpec:
    """A LoRA of a stack as the command line names it: a file, its weights, and how these vary."""

    file: Path
    weight: float = 1.0
    te_weight: float = 1.0
    profile: Profile | None = None
    mask: Path | None = None


def parse_stacked(text: str) -> StackSpec:
    """Reads FILE[:WEIGHT[:TE_WEIGHT]] and after it any of `:blocks=`, `:schedule=`, `:start=`, `:stop=`, `:mask=`.

    Raises: ConfigError.
    """
    end = text.lower().rfind(".safetensors")
    known = "|".join(KEYS) if end < 0 else r"[a-z_]+"
    first = re.compile(rf":(?:{known})=").search(text, max(0, end))
    plain, rest = (text[: first.start()], text[first.start() :]) if first else (text, "")
    try:
        spec: LoraSpec = parse_lora(plain)
        parts = split_parts(rest)
        profile = parse_profile(parts)
    except ConfigError as error:
        raise error if str(error).startswith("LoRA") else ConfigError(f"LoRA {text}: {error}") from None
    mask = Path(parts["mask"]) if "mask" in parts else None
    return StackSpec(spec.file, spec.weight, spec.te_weight, profile, mask)


def split_parts(text: str) -> dict[str, str]:
    """`:key=value:key=value` by key. Raises: ConfigError for a key that is not known, given twice, or empty."""
    parts: dict[str, str] = {}
    marks = list(re.finditer(r":([a-z_]+)=", text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):  # without a mark there is one end too many
        key, value = mark[1], text[mark.end() : end]
        if key not in KEYS:
            raise ConfigError(f"{key!r} is not known{suggest(key, KEYS) or '; use ' + ', '.join(KEYS)}")
        if key in parts:
            raise ConfigError(f"{key} is given twice; keep one")
        if not value.strip():
            raise ConfigError(f"{key} is empty; give it a value or leave it out")
        parts[key] = value.strip()
    return parts


def _read(text: str, what: str) -> float:
    if not NUMBER.fullmatch(text.strip()) or not math.isfinite(float(text)):
        raise ConfigError(f"{what} is {text.strip()!r}, which is no finite number; write one such as 0.5")
    return float(text)


def _read_t(text: str, what: str) -> float:
    t = _read(text, what)
    if not 0 <= t <= 1:
        raise ConfigError(f"{what} is {_write(t)}; give 0 (the start, pure noise) to 1 (the finished picture)")
    return t


def _write(number: float) -> str:
    return f"{number:.10g}"

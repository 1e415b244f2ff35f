"""The LoRAs of one command: found, read, and checked against the base before it is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adapter.delta import Adapter
from ..combining.methods import Method
from ..combining.plan import Member, Plan
from ..errors import ConfigError
from ..profiles import Profile, StackSpec
from .infotext import Tag, parse_prompt

MASK_SLACK = 0.02
"""How much a mask's ratio of width to height may differ from the picture's."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file in use: read, hashed, with its weights and how they vary."""

    path: Path
    adapter: Adapter
    weight: float
    te_weight: float
    sha256: str
    profile: Profile | None = None
    mask: Path | None = None

    @property
    def tag(self) -> str:
        return str(Tag(self.path.stem, self.weight, self.te_weight, self.profile, self.mask))


@dataclass(frozen=True)
class Stack:
    """A prompt without its LoRA tags, the LoRAs of the command and the prompt, and how they act together."""

    prompt: str
    loras: tuple[Lora, ...]
    plan: Plan

    def check_masks(self, width_px: int, height_px: int) -> None:
        """Raises: ConfigError where a mask cannot be scaled to a picture of this size."""
        for lora, member in ((lora, self.plan.by_place[i]) for i, lora in enumerate(self.loras)):
            if member.mask is None:
                continue
            high, wide = member.mask.shape
            if abs(wide / high / (width_px / height_px) - 1) > MASK_SLACK:
                raise ConfigError(
                    f"{lora.mask}: a mask of {wide} x {high} px cannot be scaled to a picture of {width_px} x "
                    f"{height_px} px; give one of the same shape"
                )


def gather_stack(
    prompt: str, specs: Sequence[StackSpec], lora_dir: Path | None = None, method: str | Method = "linear"
) -> Stack:
    """Reads the LoRAs that the command names and, after them, those that the prompt does.

    Raises: ConfigError for a tag, a name, a mask or a method that cannot be used, or two LoRAs of one name;
    AdapterFileError.
    """
    plain, tags = parse_prompt(prompt)
    named = [StackSpec(find_lora(t.name, lora_dir), t.weight, t.te_weight, t.profile, t.mask) for t in tags]
    found = [*specs, *named]
    names = [spec.file.stem for spec in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = found[names.index(name)].file
            hint = "give it once, with the sum of the weights" if first == found[i].file else "rename one of them"
            raise ConfigError(f"two LoRAs are called {name}: {first} and {found[i].file}; {hint}")
    loras = tuple(_read_lora(spec) for spec in found)
    members = [
        Member(
            lora.adapter,
            lora.weight,
            lora.te_weight,
            str(lora.path),
            profile=lora.profile,
            mask=None if lora.mask is None else read_mask(lora.mask),
        )
        for lora in loras
    ]
    return Stack(plain, loras, Plan.of(members, method=method))


def check_stack(stack: Stack, base: str, prediction: str = "auto", size_px: tuple[int, int] | None = None) -> None:
    """Checks from a base's small files, or its header, that the LoRAs fit it: nothing of its weights is read.

    Raises: AdapterFileError, ConfigError, BaseModelError.
    """
    if not stack.loras:
        return
    from ..bases.empty import make_empty_base
    from ..bases.facts import read_base_facts

    facts = read_base_facts(base, prediction)
    stack.check_masks(*(size_px or (facts.resolution_px, facts.resolution_px)))
    stack.plan.check(make_empty_base(facts.source, torch.float32, prediction))


def find_lora(name: str, folder: Path | None) -> Path:
    """name.safetensors of the folder.

    Raises: ConfigError that lists the nearest names.
    """
    if folder is None:
        raise ConfigError(f"<lora:{name}>: no folder to find it in; give --lora-dir DIR, or --lora FILE")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; give --lora-dir an existing one")
    there = {p.stem: p for p in sorted(folder.glob("*.safetensors"))}
    if name in there:
        return there[name]
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.4) or sorted(there)[:3]
    hint = f"nearest: {', '.join(near)}" if near else "there is no .safetensors file in it"
    raise ConfigError(f"<lora:{name}>: {folder} has no {name}.safetensors; {hint}")


def read_mask(path: Path) -> Tensor:
    """A picture's brightness as where a LoRA acts: float32 [H, W], white is 1.

    Raises: ConfigError where it is no picture, or black all over.
    """
    from ..data.picture import read_picture
    from ..errors import DataError

    try:
        pixels = np.asarray(read_picture(path).convert("L"), np.float32) / 255
    except (DataError, OSError) as error:
        raise ConfigError(f"mask {path}: {error}") from None
    if not pixels.any():
        raise ConfigError(f"mask {path}: is black all over, so the LoRA would act nowhere; paint its region white")
    return torch.from_numpy(pixels)


def _read_lora(spec: StackSpec) -> Lora:
    from ..adapter.file import file_sha256, read_adapter

    path = Path(spec.file)
    adapter = read_adapter(path)
    return Lora(path, adapter, spec.weight, spec.te_weight, file_sha256(path), spec.profile, spec.mask)

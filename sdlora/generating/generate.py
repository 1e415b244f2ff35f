"""Pictures from a base, a prompt and a stack of LoRAs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..bases.emphasis import parse_emphasis
from ..bases.family import Base
from ..bases.sampling import BATCH_PICTURES, SAMPLERS, Progress, check_request, sample
from ..combining.methods import Method, describe_method
from ..combining.plan import Plan, Stacked
from ..errors import ConfigError
from ..profiles import StackSpec
from .infotext import format_infotext
from .png import make_folder, write_next_png
from .stacking import Lora, Stack, gather_stack

_LOG = logging.getLogger(__name__)


def generate(
    base: Base,
    prompt: str,
    adapters: Stacked = (),
    *,
    seed: int = 0,
    images: int = 1,
    steps: int = 20,
    guidance: float = 5.0,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    sampler: str = "dpm++",
    clip_skip: int = 0,
    batch_size: int = BATCH_PICTURES,
    names: Sequence[str] | None = None,
    method: str | Method = "linear",
    progress: Progress | None = None,
) -> list[Image.Image]:
    """Pictures of the seeds seed, seed + 1, …; each depends on its own seed only. Sizes in pixels, None is the base's.

    `names` is what messages call the adapters; `method` is how they act together (`combining.methods.make_method`).

    Raises: ConfigError where a value is out of range; AdapterFileError where an adapter does not fit the base.
    """
    seeds = _check(base, seed, images, steps, guidance, width, height, sampler, batch_size)
    check_prompts(base, prompt, negative, clip_skip)
    plan = Plan.of(adapters, names, method)
    _tell(plan.check(base))
    with plan.applied(base, steps) as stacked:
        return sample(
            stacked,
            [prompt] * images,
            seeds=seeds,
            negative=negative,
            steps=steps,
            guidance=guidance,
            width_px=width,
            height_px=height,
            batch_size=batch_size,
            sampler=sampler,
            clip_skip=clip_skip,
            progress=progress,
        )


def generate_files(
    base: Base,
    prompt: str,
    loras: Sequence[tuple[Path, float, float]],
    *,
    out: Path,
    lora_dir: Path | None = None,
    method: str | Method = "linear",
    **options: Any,
) -> list[dict[str, Any]]:
    """`draw_files` with LoRAs as (file, weight, text encoder's weight); `<lora:name:weight>` in the prompt adds
    name.safetensors of `lora_dir`.

    Raises: ConfigError, AdapterFileError.
    """
    stack = gather_stack(
        prompt, [StackSpec(Path(file), weight, te_weight) for file, weight, te_weight in loras], lora_dir, method
    )
    return draw_files(base, prompt, stack, out=out, **options)


def draw_files(
    base: Base,
    prompt: str,
    stack: Stack,
    *,
    out: Path,
    negative: str = "",
    seed: int = 0,
    images: int = 1,
    steps: int = 20,
    guidance: float = 5.0,
    width: int | None = None,
    height: int | None = None,
    sampler: str = "dpm++",
    clip_skip: int = 0,
    batch_size: int = BATCH_PICTURES,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Writes the pictures as `out`/00000.png, … (the next free numbers), each with its `parameters` text.

    Returns `[{file, seed, prompt, loras: [{file, weight, sha256}], seconds}]`; `prompt` is as it was written.
    Everything is checked before the first byte is written.

    Raises: ConfigError, AdapterFileError.
    """
    plain, used, plan = stack.prompt, stack.loras, stack.plan
    seeds = _check(base, seed, images, steps, guidance, width, height, sampler, batch_size)
    check_prompts(base, plain, negative, clip_skip)
    stack.check_masks(width or base.resolution_px, height or base.resolution_px)
    _tell(plan.check(base))
    make_folder(Path(out))
    text = " ".join([plain, *(u.tag for u in used)]).strip()
    settings: dict[str, object] = {"Steps": steps, "Sampler": SAMPLERS[sampler], "CFG scale": f"{guidance:g}"}
    if clip_skip:
        settings["Clip skip"] = clip_skip + 1  # others count the last layer as 1
    if plan.method.name != "linear":
        settings["Combine"] = describe_method(plan.method)
    rows: list[dict[str, Any]] = []
    with plan.applied(base, steps) as stacked:
        for one, picture, seconds in _sample_batches(
            stacked,
            plain,
            seeds,
            batch_size,
            progress,
            {
                "negative": negative,
                "steps": steps,
                "guidance": guidance,
                "width_px": width,
                "height_px": height,
                "sampler": sampler,
                "clip_skip": clip_skip,
            },
        ):
            own = settings | {"Seed": one, "Size": f"{picture.width}x{picture.height}"} | _hashes(base, used)
            path = write_next_png(picture, Path(out), format_infotext(text, negative, own))
            acting = [{"file": str(u.path), "weight": u.weight, "sha256": u.sha256} for u in used]
            rows.append({"file": str(path), "seed": one, "prompt": prompt, "loras": acting, "seconds": seconds})
    return rows


def _sample_batches(
    base: Base,
    prompt: str,
    seeds: list[int],
    batch_size: int,
    progress: Progress | None,
    options: dict[str, Any],
) -> Iterator[tuple[int, Image.Image, float]]:
    """(seed, picture, seconds) batch by batch, so that pictures reach the disk while later ones are drawn."""
    starts = range(0, len(seeds), batch_size)
    for number, start in enumerate(starts):
        part = seeds[start : start + batch_size]

        def report(done: int, steps: int, number: int = number) -> None:
            if progress is not None:
                progress(number * steps + done, len(starts) * steps)

        began = time.perf_counter()
        pictures = sample(base, [prompt] * len(part), seeds=part, batch_size=batch_size, progress=report, **options)
        seconds = round((time.perf_counter() - began) / len(part), 3)
        yield from ((seed, picture, seconds) for seed, picture in zip(part, pictures, strict=True))


def _check(
    base: Base,
    seed: int,
    images: int,
    steps: int,
    guidance: float,
    width: int | None,
    height: int | None,
    sampler: str,
    batch_size: int,
) -> list[int]:
    if images < 1:
        raise ConfigError(f"images {images} is out of range; use 1 or more")
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is out of range; use 1 or more")
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is not known; use one of {', '.join(SAMPLERS)}")
    seeds = [seed + i for i in range(images)]
    width = base.resolution_px if width is None else width
    height = base.resolution_px if height is None else height
    check_request(base, steps=steps, guidance=guidance, width_px=width, height_px=height, seeds=seeds)
    return seeds


def check_prompts(base: Base, prompt: str, negative: str, clip_skip: int) -> None:
    """Raises: ConfigError where an emphasis is not finite or the clip skip leaves no layer."""
    base.check_clip_skip(clip_skip)
    for text in (prompt, negative):
        parse_emphasis(text)


def _tell(lines: list[str]) -> None:
    for line in lines:
        _LOG.warning("warning: %s", line)


def _hashes(base: Base, used: Sequence[Lora]) -> dict[str, object]:
    from .. import __version__

    found: dict[str, object] = {}
    if base.fingerprint:
        found["Model hash"] = base.fingerprint[:10]
    found["Model"] = base.name
    if used:
        # ten hex digits of the file's SHA-256: AutoV2
        found["Lora hashes"] = ", ".join(dict.fromkeys(f"{u.path.stem}: {u.sha256[:10]}" for u in used))
    return found | {"Version": f"sdlora {__version__}"}

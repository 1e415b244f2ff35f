"""How much memory a run will need, computed from a base's sizes alone, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layers import LoraLayers
from ..adapter.quantised import packed_bytes
from ..bases.empty import META, make_empty_base
from ..bases.family import Base
from ..bases.fast_layers import fast_layers
from ..bases.quantisation import quantise_base
from ..bases.text import Text
from ..config import Recipe
from ..data.latents import BATCH_PX
from .adapting import attach_layers
from .counting import Peak, counting_saved, fused_attention
from .recomputation import recomputing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENS = 77


def estimate_memory(source: Path, recipe: Recipe, size_px: tuple[int, int]) -> dict[str, Any]:
    """As `estimate`, for the base at a folder or file of which only the small files or the header are read.

    Raises: BaseModelError where it is no base; ConfigError where the recipe does not fit it.
    """
    return estimate(make_empty_base(source, DTYPES[recipe.precision], recipe.prediction), recipe, size_px)


def estimate(base: Base, recipe: Recipe, size_px: tuple[int, int]) -> dict[str, Any]:
    """The device's memory in bytes that training will need on an empty base, by what needs it, and when.

    size_px is the width and height of the largest pictures. What kernels and libraries keep for themselves is not in
    it, and neither are dropout's masks.

    Raises: ConfigError where the recipe does not fit the base.
    """
    base = replace(base, modules=dict(base.modules))
    parts = tuple(base.family.default_targets(recipe.text_encoder))
    loading = sum(_weights_bytes(module, "none") for module in base.modules.values())
    weights = {
        part: _weights_bytes(module, recipe.quantise if part in parts else "none")
        for part, module in base.modules.items()
    }
    encoding = _peak_of(lambda: _encode(base, recipe, size_px))
    preview = _peak_of(lambda: _decode(base, size_px)) if recipe.preview else 0
    if recipe.quantise != "none":  # one kind computes as the other does
        base = quantise_base(base, "int8", parts, own=False)
    with attach_layers(base, replace(recipe, merge=(), continue_from="")) as layers:
        kept, peak = _run_step(base, layers, recipe, size_px)
        adapter = _adapter_bytes(layers, recipe)
    stays = sum(weights[part] for part in parts) + (weights["vae"] if recipe.preview else 0)
    trained = stays + sum(adapter.values())
    when = {"loading": loading, "encoding": sum(weights.values()) + encoding, "training": trained + max(kept, peak)}
    if recipe.preview:
        when["preview"] = trained + preview
    return {
        "weights": weights,
        "weights_training": stays,
        "adapter": adapter,
        "activations": kept,
        "working": max(0, peak - kept),
        "encoding": encoding,
        "when": when,
        "total": max(when.values()),
        "based_on": {
            "family": base.family.name,
            "size_px": list(size_px),
            "batch_size": recipe.batch_size,
            "precision": recipe.precision,
            "quantise": recipe.quantise,
            "recompute": recipe.recompute,
            "optimizer": recipe.optimizer,
            "trained_parameters": layers.count,
        },
    }


def describe_memory(memory: dict[str, Any]) -> list[str]:
    """The estimate as a line for each thing that takes memory, and what they come to."""
    on, adapter = memory["based_on"], memory["adapter"]
    bits = "" if on["quantise"] == "none" else f", linear layers {on['quantise']}"
    parts = ", ".join(f"{part} {show_bytes(size)}" for part, size in memory["weights"].items())
    again = {"none": "", "feed-forward": ", feed-forward layers recomputed", "all": ", all recomputed"}
    width, height = on["size_px"]
    most = max(memory["when"], key=lambda name: memory["when"][name])
    return [
        f"{show_bytes(memory['weights_training'])} of weights stay while training ({on['precision']}{bits}; {parts})",
        f"{show_bytes(sum(adapter.values()))} for the LoRA: {show_bytes(adapter['factors'])} factors, "
        f"{show_bytes(adapter['gradients'])} gradients, {show_bytes(adapter['optimizer'])} {on['optimizer']}"
        + (f", {show_bytes(adapter['average'])} average" if adapter["average"] else ""),
        f"{show_bytes(memory['activations'])} kept for the backward pass (batch {on['batch_size']} of {width}x{height} "
        f"px{again[on['recompute']]}), and {show_bytes(memory['working'])} to work in",
        f"{show_bytes(memory['encoding'])} to encode pictures, before training",
        f"{show_bytes(memory['total'])} in all, at its most while {_DOING[most]}; from the sizes, not measured",
    ]


_DOING = {
    "loading": "loading",
    "encoding": "encoding pictures",
    "training": "training",
    "preview": "drawing previews",
}


def show_bytes(size_bytes: int) -> str:
    """A size as people read it: `5.22 GiB`, `14 MiB`, `900 KiB`."""
    for unit, bits in (("GiB", 30), ("MiB", 20)):
        if size_bytes >= 0.995 * 2**bits:
            value = size_bytes / 2**bits
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{math.ceil(size_bytes / 2**10)} KiB"


def optimizer_bytes(name: str, shapes: Iterable[Sequence[int]]) -> int:
    """What an optimizer by name keeps of float32 factors of these shapes between its steps."""
    return sum(_STATES[name](shape) for shape in shapes)


def _in_8_bits(shape: Sequence[int]) -> int:
    count = math.prod(shape)
    return 8 * count if count < 4096 else 2 * (count + 4 * math.ceil(count / 256))


def _by_rows_and_columns(shape: Sequence[int]) -> int:
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * (math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])))


_STATES: dict[str, Any] = {
    "adamw": lambda shape: 8 * math.prod(shape),
    "adamw8bit": _in_8_bits,
    "adafactor": _by_rows_and_columns,
    "prodigy": lambda shape: 16 * math.prod(shape),
    "lion": lambda shape: 4 * math.prod(shape),
    "schedule-free": lambda shape: 8 * math.prod(shape),
}


def _weights_bytes(module: nn.Module, kind: str) -> int:
    total = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    if kind in ("int8", "nf4"):
        for inner in module.modules():
            if isinstance(inner, nn.Linear):
                total += packed_bytes(inner.weight.shape, kind) - inner.weight.nbytes  # type: ignore[arg-type]
    return total


def _adapter_bytes(layers: LoraLayers, recipe: Recipe) -> dict[str, int]:
    factors = 4 * layers.count
    state = optimizer_bytes(recipe.optimizer, [p.shape for p in layers.parameters()])
    return {
        "factors": factors,
        "gradients": factors,
        "optimizer": state,
        "average": factors if recipe.ema_decay else 0,
    }


def _peak_of(run: Any) -> int:
    with torch.no_grad(), fused_attention(), Peak() as peak:
        run()
    return peak.peak_bytes


def _encode(base: Base, recipe: Recipe, size_px: tuple[int, int]) -> None:
    width, height = size_px  # as many at once as the cache encodes
    base.encode_pictures(torch.empty(max(1, BATCH_PX // (width * height)), 3, height, width, device=META))


def _decode(base: Base, size_px: tuple[int, int]) -> None:
    factor = base.latent_factor
    base.decode_latents(torch.empty(1, 4, size_px[1] // factor, size_px[0] // factor, device=META))


def _run_step(base: Base, layers: LoraLayers, recipe: Recipe, size_px: tuple[int, int]) -> tuple[int, int]:
    """What the backward pass needs kept, and the most that is alive at once in a step, in bytes."""
    batch, factor = recipe.batch_size, base.latent_factor
    x_t = torch.empty(batch, 4, size_px[1] // factor, size_px[0] // factor, device=META, dtype=base.dtype)
    t = torch.empty(batch, device=META, dtype=torch.int64)
    frozen = None if recipe.text_encoder else _text(base, recipe)
    ids = torch.empty(batch, len(base.tokenizers), recipe.max_chunks, _TOKENS, device=META, dtype=torch.int64)
    sizes = torch.empty(batch, 6, device=META)
    for p in layers.parameters():
        p.grad = torch.empty_like(p)  # gradients are counted with the LoRA
    weights = [p for m in base.modules.values() for p in m.parameters()] + list(layers.parameters())
    faster = recipe.fast_layers and not torch.cuda.is_available()
    with ExitStack() as stack:
        if faster:
            stack.enter_context(fast_layers(base.unet))
        stack.enter_context(recomputing(base.modules, recipe.recompute))
        stack.enter_context(fused_attention())
        peak = stack.enter_context(Peak())
        with counting_saved(weights) as saved:
            text = base.encode_text(ids, recipe.clip_skip) if frozen is None else frozen
            loss = base.predict(x_t, t, text, sizes).float().square().mean()
        kept = saved.bytes
        saved.forget()
        loss.backward()
    return kept, peak.peak_bytes


def _text(base: Base, recipe: Recipe) -> Text:
    unet: Any = base.unet
    batch, width = recipe.batch_size, int(unet.config.cross_attention_dim)
    states = torch.empty(batch, _TOKENS * recipe.max_chunks, width, device=META, dtype=base.dtype)
    second: Any = base.modules.get("text_encoder_2")
    pooled: Tensor | None = None
    if second is not None:
        pooled = torch.empty(batch, int(second.config.projection_dim), device=META, dtype=base.dtype)
    return Text(states, pooled)

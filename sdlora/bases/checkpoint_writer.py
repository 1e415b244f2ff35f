"""Writes the parts of a base as one `.safetensors` checkpoint, under the names that the tools people use expect."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.header import DTYPE_BYTES, printable
from ..disk import replacing
from ..errors import BaseModelError
from .architecture import CLIP_WORDS, FAMILIES, NAMES, choose_config, find_differing, make_part, part_names
from .checkpoint_keys import TEXT_PREFIXES, THIRDS, UNET_PREFIX, VAE_PREFIX, Slot, find_slots
from .checkpoint_kind import PARTS_KEY
from .schedule import PREDICTIONS

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v"): "stable-diffusion-xl-v1-base",
}
"""The names of Stability's modelspec, https://github.com/Stability-AI/ModelSpec."""

Pieces = dict[str, list[tuple[Tensor, Slot]]]
"""By key of the file: what it is made of, one tensor or three thirds."""


def write_checkpoint(
    modules: Mapping[str, nn.Module],
    path: Path,
    family: str,
    dtype: torch.dtype = torch.float16,
    *,
    prediction: str = "epsilon",
    zero_snr: bool = False,
) -> None:
    """Writes a base's parts as one checkpoint, whole or not at all; the same parts give the same bytes.

    `prediction` is `epsilon` or `v`; with v, the file says so as other tools look for it. Tensors are converted and
    written one at a time. Of an OpenCLIP-H, the last layer is not part of a Stable Diffusion 2 and is not in the file.

    Raises: BaseModelError where the parts have no such form, a weight is not finite as `dtype`, or the path cannot be
    written.
    """
    if family not in FAMILIES:
        raise BaseModelError(f"a {family} base has no single-file form; write a folder, or use {', '.join(FAMILIES)}")
    if dtype not in _DTYPES:
        raise BaseModelError(f"dtype {dtype} cannot be written; use float32, float16 or bfloat16")
    if prediction not in PREDICTIONS:
        raise BaseModelError(f"prediction {prediction!r} is not known; use {' or '.join(PREDICTIONS)}")
    if zero_snr and prediction != "v":
        raise BaseModelError("zero terminal SNR goes with prediction v; leave it off, or write prediction v")
    if path.suffix != ".safetensors":
        raise BaseModelError(f"{printable(path)} must end in .safetensors, or other tools will not open it")
    pieces, differing = _gather(modules, family)
    unet: Any = modules["unet"]
    side = int(unet.config.sample_size) * 8
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURES[family, prediction],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": prediction,
    }
    if differing:
        metadata[PARTS_KEY] = json.dumps(differing, sort_keys=True)
    markers = [name for name, there in (("v_pred", prediction == "v"), ("ztsnr", zero_snr)) if there]
    header = _make_header(pieces, dtype, metadata, markers)

    with replacing(path) as f:
        f.write(header)
        for key in sorted(pieces):
            value = _join(pieces[key]).to(dtype)
            if not bool(value.isfinite().all()):
                raise BaseModelError(f"{printable(path)}: {key} is not finite as {dtype}; nothing is written")
            f.write(value.view(torch.uint8).numpy().reshape(-1).data)


def _gather(modules: Mapping[str, nn.Module], family: str) -> tuple[Pieces, dict[str, dict[str, Any]]]:
    """What each key of the file is made of, and what differs from the family's configuration, by part."""
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX} | {p: known[0] for p, known in TEXT_PREFIXES[family].items()}
    pieces: Pieces = {}
    differing: dict[str, dict[str, Any]] = {}
    for part in part_names(family):
        if part not in modules:
            raise BaseModelError(f"a {family} checkpoint needs its {part}; give every part")
        module: Any = modules[part]
        own = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        if part.startswith("text_encoder") and own["vocab_size"] != CLIP_WORDS:
            raise BaseModelError(
                f"{part} knows {own['vocab_size']} words; a single file carries no vocabulary, so only one with CLIP's "
                f"{CLIP_WORDS} can be read back; write a folder"
            )
        if found := find_differing(family, part, own):
            differing[part] = found
        state = module.state_dict()
        try:
            config = choose_config(family, part, found)
            standard = {name: value.shape for name, value in make_part(family, part, config).state_dict().items()}
        except BaseModelError as e:
            raise BaseModelError(f"{part} is no part of a {NAMES[family]} checkpoint: {e}") from e
        misfits = sorted(n for n in {*state, *standard} if n not in state or standard.get(n) != state[n].shape)
        if misfits:
            raise BaseModelError(f"{part} is no part of a {NAMES[family]} checkpoint: {misfits[0]} does not fit")
        for name, slot in find_slots(part, prefixes[part], state, config).items():
            pieces.setdefault(slot.key, []).append((state[name], slot))
    return pieces, differing


def _make_header(pieces: Pieces, dtype: torch.dtype, metadata: Mapping[str, str], markers: list[str]) -> bytes:
    """The file's header; a marker is a tensor of no numbers behind the others."""
    rows: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in sorted(pieces):
        shape = _stored_shape(pieces[key])
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[_DTYPES[dtype]]
        rows[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    for name in markers:
        rows[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _stored_shape(piece: list[tuple[Tensor, Slot]]) -> tuple[int, ...]:
    tensor, slot = piece[0]
    shape = tuple(tensor.shape)
    if slot.form in THIRDS:
        return (3 * shape[0], *shape[1:])
    return {"transposed": shape[::-1], "matrix": (*shape, 1, 1)}.get(slot.form, shape)


def _join(piece: list[tuple[Tensor, Slot]]) -> Tensor:
    """The stored tensor, on the CPU, contiguous."""
    tensor, slot = piece[0]
    if slot.form in THIRDS:
        by_form = {s.form: t for t, s in piece}
        stored = torch.cat([by_form[form] for form in THIRDS])
    else:
        stored = tensor.T if slot.form == "transposed" else tensor
    return stored.detach().to("cpu").contiguous()

"""A diffusers folder on disk: what must be there, how it is checked, and how one part of it loads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BaseModelError

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""The weights file of each part, without `.safetensors` or `.fp16.safetensors`."""
PIPELINES = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionImg2ImgPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusionXLImg2ImgPipeline": ("text_encoder", "text_encoder_2"),
}
"""The text encoders of each kind of folder."""
SD2_TEXT_WIDTH = 1024
SPARE = ("position_ids", "text_projection.weight", "logit_scale")
"""Ends of weights that older folders hold and that no part of a base needs."""
SAMPLED_BLOCKS = 16
SAMPLED_BLOCK_BYTES = 4096


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a base.

    Raises: BaseModelError where the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{path}: the file is missing; copy or download the base again") from None
    except (OSError, ValueError) as e:
        raise BaseModelError(f"{path}: cannot be read as JSON ({e}); copy or download the base again") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: a JSON object is expected; copy or download the base again")
    return value


def read_text_parts(source: Path) -> tuple[str, ...]:
    """The text encoders that a diffusers folder's kind has, from its model_index.json.

    Raises: BaseModelError where the folder holds no Stable Diffusion 1.x, 2.x or XL.
    """
    if not (source / "model_index.json").is_file():
        raise BaseModelError(f"{source}: no model_index.json there; a base is a diffusers folder (unet/, vae/, …)")
    index = read_json(source / "model_index.json")
    kind = str(index.get("_class_name", ""))
    if "Inpaint" in kind:
        raise BaseModelError(f"{source}: this is an inpainting model ({kind}); use the plain Stable Diffusion")
    if kind not in PIPELINES:
        known = "a Stable Diffusion 1.x, 2.x or XL"
        raise BaseModelError(f"{source}: {kind or 'its kind'} is not supported; use {known}")
    parts = PIPELINES[kind]
    if len(parts) == 2 and not any(index.get("text_encoder") or (None,)):
        raise BaseModelError(f"{source}: this is an SDXL refiner (it has no first text encoder); use the SDXL base")
    return parts


def name_family(source: Path) -> str:
    """The family of a diffusers folder: `sd1`, `sd2` or `sdxl`.

    Raises: BaseModelError as `read_text_parts`, or where the UNet's config cannot be read.
    """
    if len(read_text_parts(source)) == 2:
        return "sdxl"
    unet = read_json(source / "unet" / "config.json")
    return "sd2" if unet.get("use_linear_projection") or unet.get("cross_attention_dim") == SD2_TEXT_WIDTH else "sd1"


def check_folder(source: Path) -> dict[str, Path]:
    """Checks a diffusers folder without loading it, and gives each part's weights file.

    Raises: BaseModelError where something is missing, damaged or not a Stable Diffusion 1.x, 2.x or XL.
    """
    text_parts = read_text_parts(source)
    for part in ("unet", "vae", *text_parts):
        read_json(source / part / "config.json")
    read_json(source / "scheduler" / "scheduler_config.json")
    for part in text_parts:
        folder = source / part.replace("text_encoder", "tokenizer")
        if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
            raise BaseModelError(f"{folder}: vocab.json and merges.txt are missing; the base is incomplete")
    weights = {part: _find_weights(source / part, WEIGHTS[part]) for part in ("unet", "vae", *text_parts)}
    for path in weights.values():
        read_header(path)
    return weights


def _find_weights(folder: Path, stem: str) -> Path:
    for suffix in (".safetensors", ".fp16.safetensors"):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    if next(folder.glob("*.bin"), None):
        raise BaseModelError(f"{folder}: only pickled .bin weights, which can run code; convert them to safetensors")
    raise BaseModelError(f"{folder}: {stem}.safetensors is missing; the base is incomplete, copy or download it again")


def read_header(path: Path) -> bytes:
    """The JSON header of a safetensors file whose length fits it.

    Raises: BaseModelError where the file is truncated or is no safetensors file.
    """
    size_bytes = path.stat().st_size
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size_bytes - 8:
                raise ValueError
            header = f.read(length)
        rows = json.loads(header)
        end_bytes = 8 + length + max(row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise BaseModelError(f"{path}: not a whole safetensors file; copy or download it again") from None
    except OSError as e:
        raise BaseModelError(f"{path}: cannot be read: {e.strerror}") from None
    if end_bytes != size_bytes:
        raise BaseModelError(
            f"{path}: has {size_bytes:,} bytes where its header says {end_bytes:,}; copy or download it again"
        )
    return header


def fingerprint_files(source: Path, weights: dict[str, Path]) -> str:
    """SHA-256 over the weights files' names, sizes and headers, and blocks sampled evenly over their contents.

    Fine-tunes of one model have the same headers, so the samples are what tells them apart.
    """
    digest = hashlib.sha256()
    for path in sorted(weights.values()):
        size_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(source).as_posix()} {size_bytes}\n".encode())
        digest.update(read_header(path))
        with path.open("rb") as f:
            for i in range(SAMPLED_BLOCKS):
                f.seek((size_bytes - SAMPLED_BLOCK_BYTES) * i // (SAMPLED_BLOCKS - 1) if i else 0)
                digest.update(f.read(SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()


def fingerprint_source(source: Path) -> str:
    """The fingerprint of a base's folder or file, from a few of its bytes. Raises: BaseModelError."""
    if source.is_file():
        return fingerprint_files(source.parent, {"checkpoint": source})
    return fingerprint_files(source, check_folder(source))


def load_part(cls: Any, folder: Path, weights: Path, dtype: torch.dtype) -> nn.Module:
    """One model of the folder, in the dtype.

    Raises: BaseModelError where its weights do not fit its config.
    """
    from diffusers import ModelMixin

    options: dict[str, Any] = {"variant": "fp16" if ".fp16." in weights.name else None}
    options["torch_dtype" if issubclass(cls, ModelMixin) else "dtype"] = dtype
    try:
        model, info = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as e:  # whatever a library raises on a damaged part, the user needs one line
        reason = " ".join(str(e).split())[:200]
        raise BaseModelError(f"{weights}: does not load with {folder / 'config.json'}: {reason}") from e
    found: dict[str, list[str]] = {
        "are missing": [str(k) for k in info.get("missing_keys", ())],
        "have the wrong shape": [str(k) for k in info.get("mismatched_keys", ())],
        "belong to nothing": [k for k in map(str, info.get("unexpected_keys", ())) if not k.endswith(SPARE)],
    }
    problems = [f"{len(keys)} weights {what} ({min(keys)} is the first)" for what, keys in found.items() if keys]
    if problems:
        raise BaseModelError(
            f"{weights}: does not fit config.json: {', '.join(problems)}; copy or download the base again"
        )
    check_finite(model, weights)
    return model  # type: ignore[no-any-return]


def check_finite(model: nn.Module, weights: Path) -> None:
    """Raises: BaseModelError naming how many weights are NaN or infinite, and the first."""
    broken = [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        fix = "--precision bf16 where float16 is too small for them, or another base"
        raise BaseModelError(
            f"{weights}: {len(broken)} of its weights hold NaN or infinity as {dtype} ({broken[0]} is the first); "
            f"use {fix if dtype == 'float16' else 'another base'}"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' notices and bars off the screen while a base loads: what matters is checked here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])
        if bars:
            transformers_logging.enable_progress_bar()

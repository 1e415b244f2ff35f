"""A base without its weights, on the meta device: what can be known of it in a second, whatever its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BaseModelError
from .architecture import make_part, read_family
from .family import Base
from .folder import name_family, quiet, read_json, read_text_parts
from .source import MINI_FOLDER

META = torch.device("meta")


def make_empty_base(source: Path, dtype: torch.dtype, prediction: str = "auto") -> Base:
    """The base of a diffusers folder or a checkpoint file, in the dtype, its tensors of the right sizes but empty.

    It has no tokenizers. A folder needs its configurations only. `prediction` is `auto`, `epsilon` or `v`.

    Raises: BaseModelError where a configuration is missing or makes no Stable Diffusion.
    """
    from .checkpoint_kind import identify_checkpoint
    from .single_file import read_configs

    if source.is_file():
        checkpoint = identify_checkpoint(source)
        kind, _ = checkpoint.settle(None if prediction == "auto" else prediction)
        family, configs = checkpoint.family, read_configs(checkpoint, kind)
    else:
        family = name_family(source)
        configs = {part: read_json(source / part / "config.json") for part in ("unet", "vae", *read_text_parts(source))}
    modules = {part: make_part(family, part, _known(part, config)) for part, config in configs.items()}
    return assemble_empty("mini" if source == MINI_FOLDER else family, modules, dtype, source)


def assemble_empty(family: str, modules: dict[str, nn.Module], dtype: torch.dtype, source: Path) -> Base:
    """A Base of empty modules of a family."""
    from .attention import PlainAttnProcessor
    from .families import FAMILIES

    own = FAMILIES[family]
    scheduler = read_family("sd1" if family == "mini" else family)["scheduler"]
    base = own.assemble(family, modules, (None,) * len(own.text_parts), scheduler, META, dtype, source)
    if family == "mini" and not torch.cuda.is_available():
        unet: Any = base.unet
        unet.set_attn_processor(PlainAttnProcessor())
    return base


def _known(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a folder's configuration that make a model: not the libraries' own notes, nor what is unknown."""
    if part.startswith("text_encoder"):
        return {k: v for k, v in config.items() if not k.startswith("_") and k not in ("architectures", "model_type")}
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with quiet():
        kind: Any = UNet2DConditionModel if part == "unet" else AutoencoderKL
        known: dict[str, Any] = kind.extract_init_dict(config)[0]
    return known


__all__ = ["BaseModelError", "assemble_empty", "make_empty_base"]

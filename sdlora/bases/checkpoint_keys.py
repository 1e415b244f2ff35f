"""The names of a single-file checkpoint: where each tensor of a diffusers or transformers part lies in it.

One direction is enough for both ways: a part's own names say which tensors must be in a file to read it, and which
to write. diffusers has converters too (`loaders.single_file_utils`), but they only read, take the whole file as one
state dict, leave unknown and missing keys to later, and lay text encoders out as the installed transformers wants;
as data the names are short.

Source: the modules' names in CompVis/stable-diffusion, Stability-AI/stablediffusion, Stability-AI/generative-models,
openai/CLIP and mlfoundations/open_clip, as published checkpoints have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..adapter.original import INNER as UNET_RESNET

Form = Literal["same", "transposed", "matrix", "first", "second", "third"]


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: its key, and what the tensor is in there.

    `matrix` may be stored as a 1x1 convolution [out, in, 1, 1]; `first`, `second` and `third` are thirds of a tensor
    that holds three, one below the other.
    """

    key: str
    form: Form = "same"


THIRDS: tuple[Form, ...] = ("first", "second", "third")
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model.")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
}
"""By family and part: how the keys of a text encoder may begin; the first is the one that is written."""

_UNET_TOPS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_WORDS = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_HARMLESS = re.compile(
    r"""
    model_ema\..* | .*\.model_ema\..* | (.*\.)?position_ids | (.*\.)?logit_scale | (.*\.)?attn_mask
    | (sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)? | betas | posterior_\w+ | logvar | lvlb_weights
    | scale_factor | global_step | epoch | v_pred | ztsnr | denoiser\..* | first_stage_model\.loss\..*
    | embedding_manager\..* | cond_stage_model\.(transformer\.)?(vision_model|visual_projection|visual)\..*
    | (cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight
    """,
    re.VERBOSE,
)
_UNUSED_OPEN_CLIP = re.compile(r"(cond_stage_model|conditioner\.embedders\.0)\.model\.(text_projection|visual\..*)")


def find_slots(part: str, prefix: str, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Slot]:
    """A part's own tensor names -> where they lie in a checkpoint; `config` is the part's diffusers configuration.

    `prefix` is how the part's keys begin; of a text encoder it also tells CLIP's layout from OpenCLIP's.
    """
    if part == "unet":
        layers = int(config["layers_per_block"])
        attends = ["Attn" in kind for kind in config["up_block_types"]]
        return {name: Slot(prefix + _unet_key(name, layers, attends)) for name in names}
    if part == "vae":
        blocks = len(config["up_block_types"])
        return {name: _vae_slot(name, prefix, blocks) for name in names}
    locate = _open_clip_slot if prefix.endswith(".model.") else _clip_slot
    return {name: locate(name, prefix) for name in names}


def is_harmless(key: str, family: str, text_layers: int) -> bool:
    """Whether a base loses nothing without this tensor: schedules, averages kept beside the weights, markers.

    Of an OpenCLIP-H, Stable Diffusion 2 never reads the last layer; `text_layers` is how many it reads.
    """
    if _HARMLESS.fullmatch(key):
        return True
    if family != "sd2":
        return False
    layer = re.search(r"\.model\.transformer\.resblocks\.(\d+)\.", key)
    return bool(_UNUSED_OPEN_CLIP.fullmatch(key)) or (layer is not None and int(layer[1]) == text_layers)


def _unet_key(name: str, layers: int, attends: list[bool]) -> str:
    for ours, theirs in _UNET_TOPS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if block:
        way, number, kind, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        first = number * (layers + 1) + (1 if way == "down" else 0)
        place = f"{'input' if way == 'down' else 'output'}_blocks.{first + index}"
        if kind == "resnets":
            return f"{place}.0.{_replace_start(rest, UNET_RESNET)}"
        if kind == "attentions":
            return f"{place}.1.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if attends[number] else 1}.{rest}"
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if middle:
        if middle[1] == "attentions":
            return f"middle_block.{2 * int(middle[2]) + 1}.{middle[3]}"
        return f"middle_block.{2 * int(middle[2])}.{_replace_start(middle[3], UNET_RESNET)}"
    raise KeyError(name)


def _vae_slot(name: str, prefix: str, blocks: int) -> Slot:
    attention = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
    if attention:
        key = f"{prefix}{attention[1]}.mid.attn_1.{_VAE_ATTENTION[attention[2]]}.{attention[3]}"
        return Slot(key, "same" if attention[2] == "group_norm" or attention[3] == "bias" else "matrix")
    for ours, theirs in _VAE_WORDS.items():
        name = re.sub(rf"\b{ours}\b", theirs, name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)
    name = re.sub(r"\bresnets\.", "block.", name)
    return Slot(prefix + re.sub(r"\b(down|up)samplers\.0\.", r"\1sample.", name))


def _clip_slot(name: str, prefix: str) -> Slot:
    return Slot(prefix + name.removeprefix("text_model."))


def _open_clip_slot(name: str, prefix: str) -> Slot:
    if name == "text_projection.weight":
        return Slot(f"{prefix}text_projection", "transposed")
    name = name.removeprefix("text_model.")
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return Slot(prefix + _replace_start(name, _OPEN_CLIP))
    place = f"{prefix}transformer.resblocks.{layer[1]}"
    fused = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2])
    if fused:
        return Slot(f"{place}.attn.in_proj_{fused[2]}", _THIRD_OF[fused[1]])
    return Slot(f"{place}.{_replace_start(layer[2], _OPEN_CLIP_LAYER)}")


_THIRD_OF = dict(zip("qkv", THIRDS, strict=True))


def _replace_start(name: str, words: Mapping[str, str]) -> str:
    for ours, theirs in words.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    raise KeyError(name)

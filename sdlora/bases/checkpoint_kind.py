"""What a single-file checkpoint is, from the names and shapes in its header alone: no weight is read for it.

How the others tell a velocity base from a noise base, where the file does not say: diffusers asks for the training
step in the file and else assumes velocity for every Stable Diffusion 2; ComfyUI compares one bias's spread with 0.09;
A1111 runs the UNet once and looks at the mean of what it gives. Each is a guess that a fine-tune can defeat, and a
wrong one trains for hours on the wrong target. Here a file's own markers and metadata count, and a Stable Diffusion 2
without any has to be told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..adapter.header import Entry, printable, read_header
from ..errors import AdapterFileError, BaseModelError
from .checkpoint_keys import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX

V_SAMPLE_SIZE = 96
"""Side of a latent of the Stable Diffusion 2 that predicts velocity: it was trained at 768 px, the other at 512."""
PARTS_KEY = "sdlora.parts"
"""Metadata of a file written here: JSON, by part what differs from the family's configuration."""


@dataclass(frozen=True)
class Checkpoint:
    """A single-file checkpoint from its header."""

    path: Path
    family: str
    """`sd1`, `sd2` or `sdxl`."""
    entries: dict[str, Entry]
    prefixes: dict[str, str]
    """By part: how its keys begin."""
    differing: dict[str, dict[str, Any]]
    """By part: what the file says differs from the family's configuration."""
    resolution_px: int | None
    """The side that the file says it was trained at."""
    prediction: str | None
    """`epsilon` or `v`, or None where nothing tells."""
    zero_snr: bool
    told_by: str = ""
    """What in the file tells that it predicts velocity."""

    def settle(self, prediction: str | None = None, zero_snr: bool | None = None) -> tuple[str, bool]:
        """`epsilon` or `v`, and whether the last step is pure noise: as was said, else as the file tells.

        Raises: BaseModelError where neither does.
        """
        found = prediction or self.prediction
        if found is None:
            which = (
                "a Stable Diffusion 2 predicts noise (trained at 512 px) or velocity (768 px)"
                if self.family == "sd2"
                else "it has a ztsnr key, which goes with velocity, but no v_pred key"
            )
            raise BaseModelError(
                f"{printable(self.path)} does not say what it predicts: {which}; "
                "add --prediction epsilon or --prediction v"
            )
        return found, (self.zero_snr and found == "v") if zero_snr is None else zero_snr


_FOREIGN: tuple[tuple[str, str], ...] = (
    (r"lora|hada_w|\.lokr_|\boft_(blocks|diag)", "a LoRA, not a base; give it with --lora, and a checkpoint as base"),
    (r"scaled_fp8|\.(scale_weight|weight_scale(_2)?|comfy_quant|quant_state\..*|absmax)$", "quantised with scales"),
    (r"^control_model\.|controlnet|input_hint_block|zero_conv|lllite", "a ControlNet"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"motion_module|temporal_transformer|time_stack|time_mixer", "a video model"),
    (r"^(string_to_param|emb_params|clip_l$|clip_g$)", "a textual inversion embedding"),
    (r"joint_blocks\.|text_encoders\.(clip|t5)|\.attn\.add_q_proj\.", "Stable Diffusion 3"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"(^|\.)(double|single)_blocks\.|single_transformer_blocks\.", "Flux"),
    (r"(^|\.)double_layers\.", "AuraFlow"),
    (r"adaln_single|cross_attn\.(kv|q)_linear|(^|\.)t_block\.|y_embedder\.", "PixArt or Sana"),
    (r"clip_txt_mapper|\.channelwise\.", "Stable Cascade"),
    (r"patchify_proj|cap_embedder|adaLN|img_mod|scale_shift_table|head\.modulation", "a diffusion transformer"),
    (r"(^|\.)(transformer_)?blocks\.\d+\.(self_attn|cross_attn|attn)\.", "a diffusion transformer"),
    (r"encoder_hid_proj|chatglm", "Kolors"),
    (r"^(noise_augmentor|embedder)\.", "a Stable unCLIP"),
    (r"^edm_mean$", "Playground 2.5"),
    (r"^edm_vpred\.", "a CosXL, whose noise schedule is another"),
    (r"^depth_model\.", "a depth-to-image model"),
    (r"^cond_stage_model\.roberta\.", "AltDiffusion"),
)
"""Keys that tell what a file is where it is no Stable Diffusion that is read, the surest first."""
_ALONE: tuple[tuple[str, str], ...] = (
    (r"model\.diffusion_model\..*|input_blocks\.0\.0\.weight", "a UNet alone"),
    (r"(unet\.)?down_blocks\.0\.(resnets|attentions)\.0\..*", "a UNet alone"),
    (r"((first_stage_model|vae)\.)?(encoder|decoder)\.(conv_in|down|up|mid).*", "a VAE alone"),
    (
        r"(cond_stage_model|conditioner|text_model|text_encoder)\..*|transformer\.(resblocks|text_model)\..*"
        r"|(encoder\.block\.0|shared\.weight|model\.embed_tokens|(embeddings\.)?token_embedding\.).*",
        "a text encoder alone",
    ),
)
_CHANNELS = {
    9: "an inpainting model",
    8: "an instruct-pix2pix model",
    7: "an upscaler",
    5: "a depth-to-image model",
}


def identify_checkpoint(path: Path) -> Checkpoint:
    """What a file is, read from its header.

    Raises: BaseModelError that says what it is where it is no Stable Diffusion 1.x, 2.x or SDXL, or is damaged.
    """
    try:
        entries, metadata = read_header(path)
    except AdapterFileError as e:
        raise BaseModelError(str(e).replace("copy or train it again", "copy or download it again")) from None

    def refuse(what: str) -> NoReturn:
        raise BaseModelError(f"{printable(path)} {what}")

    _refuse_foreign(entries, refuse)
    family = _find_family(entries, refuse)
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}
    for part, known in TEXT_PREFIXES[family].items():
        prefixes[part] = next((p for p in known if any(key.startswith(p) for key in entries)), known[0])
    for part, prefix in prefixes.items():
        if not any(key.startswith(prefix) for key in entries):
            kind = {"vae": "VAE", "text_encoder": "text encoder"}.get(part, "second text encoder")
            refuse(f"has no {kind}: none of its {len(entries)} keys begins with {prefix}; give a whole checkpoint")
    prediction, told_by = _find_prediction(entries, metadata, family)
    return Checkpoint(
        path,
        family,
        entries,
        prefixes,
        _read_differing(metadata, refuse),
        _read_side(metadata.get("modelspec.resolution", "")),
        prediction,
        "ztsnr" in entries,
        told_by,
    )


def _refuse_foreign(entries: Mapping[str, Entry], refuse: Any) -> None:
    if not entries:
        refuse("holds no tensors; give a whole checkpoint")
    for pattern, what in _FOREIGN:
        if any(re.search(pattern, key) for key in entries):
            known = "" if "; " in what else ", which is not supported; use a Stable Diffusion 1.x, 2.x or SDXL"
            refuse(f"is {what}{known}")
    unet, vae, text = (
        any(key.startswith(prefix) for key in entries)
        for prefix in (UNET_PREFIX, VAE_PREFIX, ("cond_stage_model.", "conditioner."))
    )
    if unet and (vae or text):
        return
    if vae and text:
        refuse("has no UNet; give a whole checkpoint")
    for pattern, what in _ALONE:
        if any(re.fullmatch(pattern, key) for key in entries):
            refuse(f"is {what}; give a whole checkpoint, with its UNet, VAE and text encoder")
    refuse(f"is no checkpoint that is known: none of its {len(entries)} keys fits, such as {printable(min(entries))}")


def _find_family(entries: Mapping[str, Entry], refuse: Any) -> str:
    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in entries)

    labels = f"{UNET_PREFIX}label_emb.0.0.weight" in entries
    first = entries.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    if channels != 4:
        what = _CHANNELS.get(channels, "another kind of model")
        refuse(f"is {what} (its UNet has {channels} input channels); use a plain Stable Diffusion, which has 4")
    if has("conditioner.embedders.1.model."):
        return "sdxl"
    if labels and has("conditioner.embedders.0.model."):
        refuse("is an SDXL refiner (it has only the second text encoder); use the SDXL base")
    if labels and has("conditioner.embedders.0.transformer."):
        return "sdxl"
    for family in ("sd2", "sd1"):
        if any(has(prefix) for prefix in TEXT_PREFIXES[family]["text_encoder"]):
            return family
    refuse("has no text encoder that is known; give a whole Stable Diffusion 1.x, 2.x or SDXL checkpoint")
    raise AssertionError


def _find_prediction(entries: Mapping[str, Entry], metadata: Mapping[str, str], family: str) -> tuple[str | None, str]:
    """What the file says that it predicts, and where: its markers first, then Stability's modelspec."""
    if "v_pred" in entries:
        return "v", "its v_pred key"
    for name in ("modelspec.prediction_type", "modelspec.predict_key"):
        said = metadata.get(name, "").strip().lower()
        if said in ("v", "v_prediction", "v-prediction", "velocity"):
            return "v", f"its metadata, {name}"
        if said in ("epsilon", "eps"):
            return "epsilon", f"its metadata, {name}"
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    if architecture in ("stable-diffusion-v2-768-v", "stable-diffusion-v2-512"):
        return ("v" if architecture.endswith("-v") else "epsilon"), "its metadata, modelspec.architecture"
    return (None if family == "sd2" or "ztsnr" in entries else "epsilon"), ""


def _read_differing(metadata: Mapping[str, str], refuse: Any) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(metadata.get(PARTS_KEY, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        refuse(f"has metadata {PARTS_KEY} that cannot be read; write the checkpoint again")
    return dict(found)


def _read_side(text: str) -> int | None:
    size = re.fullmatch(r"(\d{2,4})x(\d{2,4})", text)
    return int(size[1]) if size is not None and size[1] == size[2] and int(size[1]) % 8 == 0 else None

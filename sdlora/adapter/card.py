"""An adapter's card as a file's string metadata and back, as kohya's tools, modelspec and diffusers name it."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .delta import Card
from .keys import DEFAULT_FAMILY, GRAMMARS, SUFFIXES, path_of_dotted, uses_sdxl_names

FORMAT_VERSION = "1"
TAGS_KEY = "ss_tag_frequency"
"""How often each tag of the captions occurs; only where whoever trained the LoRA shares them."""
HASH_KEY = "modelspec.hash_sha256"
KEPT_KEYS = (
    "modelspec.title", "modelspec.author", "modelspec.date", "modelspec.description", "modelspec.license",
    "modelspec.usage_hint", "modelspec.tags", "modelspec.merged_from", "modelspec.thumbnail", "ss_output_name",
)  # fmt: skip
"""What a file's author says of it, which stays when it is written again."""


@dataclass(frozen=True)
class FamilyNames:
    """What a family is called in a file's metadata, and what its bases were trained at.

    Source: sd-scripts, `library/sai_model_spec.py` and `sdxl_model_util.MODEL_VERSION_SDXL_BASE_V1_0`.
    """

    kohya: str
    architecture: str
    resolution_px: int
    people: str
    """What people call it."""
    implementation: str = "diffusers"
    """Whose names kohya's files use."""


FAMILY_NAMES: dict[str, FamilyNames] = {
    "sd1": FamilyNames("sd_v1", "stable-diffusion-v1", 512, "Stable Diffusion 1.x"),
    "sd2": FamilyNames("sd_v2", "stable-diffusion-v2-512", 512, "Stable Diffusion 2.x"),
    "sdxl": FamilyNames(
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        1024,
        "SDXL",
        implementation="https://github.com/Stability-AI/generative-models",
    ),
    "mini": FamilyNames("sdlora_mini", "stable-diffusion-v1-mini", 128, "sdlora's built-in mini"),
}
VELOCITY_NAMES: dict[str, FamilyNames] = {
    "sd2": FamilyNames("sd_v2_v", "stable-diffusion-v2-768-v", 768, "Stable Diffusion 2.x with velocity prediction")
}
"""What is called otherwise where the base predicts velocity."""
TIMESTEPS = 1000
"""Steps of the noise schedules of all families."""
FAMILY_OF_TEXT_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""By the width of the text states that cross-attention reads."""
_DOWNS = ("_lora.down.weight", *(suffix for suffix, (_, role) in SUFFIXES.items() if role == "down"))

Alphas = Mapping[str, float]
Modules = Mapping[str, tuple[int, float]]
"""By module path: rank and alpha."""


def describe_card(card: Card, modules: Modules, format: str = "kohya") -> dict[str, str]:
    """The metadata of a file: strings, nothing private, nothing that differs from run to run."""
    ranks, alphas = {r for r, _ in modules.values()}, {a for _, a in modules.values()}
    base = public_name(card.base)
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": _title(card.trigger),
        "sdlora.version": FORMAT_VERSION,
    }
    metadata |= _describe_use(card)
    names = FAMILY_NAMES.get(card.family)
    if names:
        velocity = card.settings.get("prediction_type") in ("v", "v_prediction")
        names = VELOCITY_NAMES.get(card.family, names) if velocity else names
        side = card.settings.get("resolution") or names.resolution_px
        metadata |= {
            "ss_base_model_version": names.kohya,
            "ss_v2": str(card.family == "sd2"),  # A1111 tells SD 2.x by it
            "modelspec.architecture": f"{names.architecture}/lora",
            "modelspec.description": f"{_title(card.trigger)} for {names.people}",
            "modelspec.prediction_type": "v" if velocity else "epsilon",
            "modelspec.resolution": f"{side}x{side}",
            "modelspec.implementation": names.implementation if format == "kohya" else "diffusers",
        }
    if card.trigger:
        metadata["modelspec.trigger_phrase"] = card.trigger
        metadata["modelspec.usage_hint"] = f"Trigger: {card.trigger}"
        metadata["ss_output_name"] = re.sub(r"\W+", "_", card.trigger).strip("_")
    if card.family:
        metadata["sdlora.family"] = card.family
    if base:
        metadata["sdlora.base"] = metadata["ss_sd_model_name"] = base
    if card.settings:
        settings = dict(card.settings)
        if "base" in settings:
            settings["base"] = base or public_name(str(settings["base"]))
        metadata["sdlora.recipe"] = json.dumps(
            settings, sort_keys=True, ensure_ascii=False, default=lambda v: public_name(str(v))
        )
    metadata |= {key: card.metadata[key] for key in KEPT_KEYS if key in card.metadata}
    if card.settings.get("share_captions") and TAGS_KEY in card.metadata:
        metadata[TAGS_KEY] = card.metadata[TAGS_KEY]
    return {k: v.encode("utf-8", "replace").decode("utf-8") for k, v in metadata.items()}


def _describe_use(card: Card) -> dict[str, str]:
    """What hangs on the settings: the part of the schedule, the layers left out, what was combined; and the date."""
    settings, found = card.settings, {}
    t_min, t_max = settings.get("t_min", 0), settings.get("t_max", 1)
    if _is_number(t_min) and _is_number(t_max) and (t_min, t_max) != (0, 1):
        found["modelspec.timestep_range"] = f"{round(t_min * TIMESTEPS)},{round(t_max * TIMESTEPS) - 1}"
    if _is_number(settings.get("clip_skip")):
        found["ss_clip_skip"] = str(int(settings["clip_skip"]) + 1)  # others count the last layer too
    combined = settings.get("combined")
    if isinstance(combined, list):
        titles = [_title(str(row.get("trigger", ""))) for row in combined if isinstance(row, dict)]
        found["modelspec.merged_from"] = ", ".join(titles)
    if date := read_build_date():
        found["modelspec.date"] = date
    return found


def _title(trigger: str) -> str:
    return f"{trigger} LoRA" if trigger else "LoRA"


def read_build_date() -> str:
    """The date that SOURCE_DATE_EPOCH names, as 2026-01-31; empty without one: the clock would change the bytes.

    Raises: ConfigError where it is no number of seconds. Source: reproducible-builds.org, SOURCE_DATE_EPOCH.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return ""
    try:
        return datetime.datetime.fromtimestamp(int(text), datetime.UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"SOURCE_DATE_EPOCH = {text!r} is no number of seconds since 1970; unset it") from None


def describe_tags(captions: Iterable[str]) -> str:
    """How many pictures have each tag, as sd-scripts writes it; its folder's name is not the data folder's."""
    counts: dict[str, int] = {}
    for caption in captions:
        tags = {tag.strip() for line in caption.split("\n") for tag in line.split(",")}
        for tag in sorted(tags - {""}):
            counts[tag] = counts.get(tag, 0) + 1
    return json.dumps({"images": dict(sorted(counts.items()))}, ensure_ascii=False)


def read_card(metadata: Mapping[str, str], family: str) -> Card:
    """The card of a file for `family` that any tool may have written; what it does not say stays empty."""
    try:
        settings = json.loads(metadata.get("sdlora.recipe", "{}"))
    except (ValueError, RecursionError):
        settings = {}
    return Card(
        family=family,
        base=public_name(metadata.get("sdlora.base", "")),
        trigger=metadata.get("modelspec.trigger_phrase", ""),
        settings=settings if isinstance(settings, dict) else {},
        metadata=dict(metadata),
    )


def public_name(base: str) -> str:
    """A base's name without the folders that lead to it; a hub id `owner/name` stays as it is."""
    clean = base.replace("\\", "/").rstrip("/")
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", clean) is not None
    return clean if is_hub_id else clean.rsplit("/", 1)[-1]


def _public_text(value: object) -> str:
    """What a setting that JSON has no type for is written as; of a path, the last component."""
    return public_name(str(value))


def describe_alphas(modules: Modules, doras: Collection[str] = ()) -> dict[str, str]:
    """Ranks and alphas as diffusers keeps them for names that have no alpha of their own: one LoraConfig a part.

    `doras` are the modules that are DoRA; PEFT has one word on that for a whole part.
    """
    config: dict[str, Any] = {}
    for part in sorted({p.partition(".")[0] for p in modules}):
        mine = {_peft_name(p): x for p, x in sorted(modules.items()) if p.startswith(f"{part}.")}
        rank, alpha = next(iter(mine.values()))
        config[f"{part}.r"], config[f"{part}.lora_alpha"] = rank, _whole(alpha)
        config[f"{part}.target_modules"] = list(mine)
        config[f"{part}.rank_pattern"] = {n: r for n, (r, _) in mine.items() if r != rank}
        config[f"{part}.alpha_pattern"] = {n: _whole(a) for n, (_, a) in mine.items() if a != alpha}
        if any(p.startswith(f"{part}.") for p in doras):
            config[f"{part}.use_dora"] = True
    return {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}


def alphas_of(metadata: Mapping[str, str], family: str = DEFAULT_FAMILY) -> Alphas:
    """Alphas by module path that a diffusers file's metadata gives; a config that says nothing usable gives none."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    found = _Alphas()
    for part in GRAMMARS[family].prefixes:
        general: Any = config.get(f"{part}.lora_alpha")
        pattern: Any = config.get(f"{part}.alpha_pattern")
        if _is_number(general):
            found.general[part] = float(general)
        for name, alpha in (pattern if isinstance(pattern, dict) else {}).items():
            path = path_of_dotted(f"{part}.{name}", family)
            if path and _is_number(alpha):
                found[path] = float(alpha)
    return found


class _Alphas(dict[str, float]):
    """Alphas by path, and by part for the modules that no pattern names."""

    def __init__(self) -> None:
        super().__init__()
        self.general: dict[str, float] = {}

    def get(self, path: str, default: Any = None) -> Any:
        return self[path] if path in self else self.general.get(path.partition(".")[0], default)


def _peft_name(path: str) -> str:
    # PEFT matches names from their end, so without `text_model.` they fit both layouts of a CLIPTextModel.
    return path.partition(".")[2].removeprefix("text_model.")


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tell_family(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family that a file is for, from its keys' names, its metadata and the width of its text; else empty.

    `shapes` are its tensors' by key. SD 1.x and 2.x have the same names; the width of the text states tells them apart.
    """
    if uses_sdxl_names(shapes):
        return "sdxl"
    if said := metadata.get("sdlora.family", ""):
        return said
    for key, shape in shapes.items():
        if "attn2" in key and ("to_k" in key or "to_v" in key) and key.endswith(_DOWNS) and len(shape) == 2:
            return FAMILY_OF_TEXT_WIDTH.get(shape[1], "")
    if metadata.get("modelspec.architecture", "").startswith(FAMILY_NAMES["sdxl"].architecture):
        return "sdxl"
    word = metadata.get("ss_base_model_version", "")
    return next((f for f, names in FAMILY_NAMES.items() if word.startswith(names.kohya.partition("_base")[0])), "")


__all__ = ["FAMILY_NAMES", "alphas_of", "describe_alphas", "describe_card", "public_name", "read_card", "tell_family"]

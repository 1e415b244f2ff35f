"""What a LoRA's page says: a model card in Markdown, and the facts that A1111 reads beside a file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from ..adapter.card import FAMILY_NAMES
from ..adapter.header import printable
from ..config import DEFAULTS, FIELDS

_MARKS = re.compile(r"([\\`*_{}\[\]()#+!|<>~-])")
_VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
"""A1111's names of the families. Source: its `extensions-builtin/Lora/ui_edit_user_metadata.py`."""
_PIPELINES = {"sdxl": "StableDiffusionXLPipeline"}
_ALWAYS = ("steps", "batch_size", "learning_rate", "rank", "alpha", "resolution", "seed")
_WORDS = {"None": "the default", "True": "on", "False": "off"}
_UNSAID = ("base", "trigger", "class_data", "masks", "share_captions")
_LICENCE = "Not stated yet: write here under which terms the LoRA may be used. The base's own licence holds as well."


def write_page(name: str, summary: Mapping[str, Any], settings: Mapping[str, Any], previews: list[str]) -> str:
    """The model card of the file `name.safetensors` as Markdown; text from the file is escaped.

    `summary` is what `inspect` says, `settings` the recipe in the file, `previews` names of pictures beside the page.
    """
    family, trigger, base = (printable(summary[key] or "", 200) for key in ("family", "trigger", "base"))
    people = FAMILY_NAMES[family].people if family in FAMILY_NAMES else "an unknown base"
    facts = {
        "for": people + (f" ({escape(base)})" if base and base != family else ""),
        "trigger": f"`{_code(trigger)}`" if trigger else "none",
        "modules": ", ".join(f"{part} {count}" for part, count in summary["modules"].items() if count),
        "kinds": ", ".join(map(str, summary["kinds"])),
        "ranks": ", ".join(f"{rank} ({count})" for rank, count in summary["ranks"].items()),
        "file": f"{summary['format']} names, {summary['dtype']}, {summary['bytes']:,} bytes",
        "hashes": f"SHA-256 `{summary['sha256']}`, AutoV2 `{summary['autov2']}`, AutoV3 `{summary['autov3']}`",
    }
    blocks = [
        *_front_matter(family, trigger, base),
        f"# {escape(printable(name, 200))}",
        f"A LoRA for {people}." + (f" Its trigger is `{_code(trigger)}`." if trigger else ""),
        *(f"![preview]({picture})" for picture in previews),
        "| | |\n| --- | --- |\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value),
        "## How to use it",
        *describe_use(name, summary),
        "## How strong it is in each block",
        _describe_blocks(summary["energy"]),
    ]
    if rows := list_training(settings):
        table = "\n".join(f"| {escape(key)} | {escape(printable(value, 200))} |" for key, value in rows.items())
        blocks += ["## How it was trained", f"With sdlora.\n\n| | |\n| --- | --- |\n{table}"]
        blocks.append(f"`sdlora train FOLDER --like {_code(_file(name))}` repeats it on other pictures.")
    if summary["warnings"]:
        blocks += ["## Worth knowing", "\n".join(f"- {escape(printable(text, 300))}" for text in summary["warnings"])]
    return "\n\n".join([*blocks, "## Licence", _LICENCE]) + "\n"


def _front_matter(family: str, trigger: str, base: str) -> list[str]:
    """The lines that model hubs read: YAML, whose strings are written as JSON's."""
    lines = ["---", "tags:", "- lora", *(["- stable-diffusion"] if family in _VERSIONS else [])]
    lines += [f"base_model: {json.dumps(base)}"] if "/" in base else []
    lines += [f"instance_prompt: {json.dumps(trigger, ensure_ascii=False)}"] if trigger else []
    return ["\n".join([*lines, "license: other", "---"])]


_DENSE = {"loha", "lokr", "cp-locon", "full"}
"""Kinds, as `inspect` names them, of which diffusers refuses the whole file."""


def describe_use(name: str, summary: Mapping[str, Any]) -> list[str]:
    """A paragraph for each interface that opens the file as it is, and a line for those that do not."""
    family, format, kinds = summary["family"], summary["format"], summary["kinds"]
    trigger, base = printable(summary["trigger"] or "", 200), printable(summary["base"] or "", 200)
    file, prompt = _file(name), trigger or "your prompt"
    flag = f" --base {shlex.quote(base)}" if base and family != "mini" else ""
    command = f"sdlora generate {shlex.quote(prompt)} --lora {shlex.quote(file)}:1{flag}"
    texts = [f"**sdlora**\n\n{_fence(command)}"]
    if family == "mini":
        return [*texts, "Other tools have no such base: mini comes with sdlora alone."]
    if format == "kohya":
        words = f", and `{_code(trigger)}` in the prompt" if trigger else ""
        texts.append(f"**ComfyUI**: put the file into `models/loras` and choose it in a *Load LoRA* node{words}.")
        if "dora" in kinds:
            texts.append("**A1111, Forge**: A1111 takes a DoRA's lengths for those of its inputs, so use another tool.")
        else:
            line = f"<lora:{printable(name, 200)}:1> {prompt}"
            texts.append(f"**A1111, Forge**: put the file into `models/Lora` and write\n\n{_fence(line)}")
    else:
        texts.append(f"**ComfyUI, A1111, Forge** need other names: `sdlora convert {_code(file)} --to kohya --out …`.")
    if dense := sorted(_DENSE & set(kinds)):
        smaller = f"sdlora resize {_code(file)} --rank 32 --format diffusers --out …"
        texts.append(f"**diffusers** opens no {' or '.join(dense)} file; as plain LoRA, nearly the same: `{smaller}`.")
    elif {"bias", "norm"} & set(kinds):
        without = f"sdlora convert {_code(file)} --to diffusers --out …"
        texts.append(f"**diffusers** opens no changes of biases and norms; without them: `{without}`.")
    elif format == "peft" or (format == "kohya" and "dora" in kinds):
        why = "opens no PEFT names" if format == "peft" else "leaves out a DoRA's lengths under these names"
        texts.append(f"**diffusers** {why}: `sdlora convert {_code(file)} --to diffusers --out …`.")
    else:
        pipeline = _PIPELINES.get(family, "StableDiffusionPipeline")
        lines = [
            f"from diffusers import {pipeline}",
            "",
            f"pipe = {pipeline}.from_pretrained({base or 'the base'!r})",
            f'pipe.load_lora_weights(".", weight_name={file!r})',
            f'pipe({prompt!r}).images[0].save("picture.png")',
        ]
        texts.append("**diffusers**\n\n" + _fence("\n".join(lines), "python"))
    return texts


def _describe_blocks(energy: Mapping[str, float]) -> str:
    total = sum(energy.values()) or 1.0
    rows = [f"| {escape(block)} | {100 * value / total:.1f} % |" for block, value in energy.items()]
    return "\n".join(["| block | share of the change's energy |", "| --- | --- |", *rows])


def list_training(settings: Mapping[str, Any]) -> dict[str, str]:
    """The recipe as a person wants it: what matters always, and what is not the default; empty of foreign files."""
    if "steps" not in settings:
        return {}
    known = {name: settings[name] for name in FIELDS if name in settings and name not in _UNSAID}
    rows = {}
    for name, value in known.items():
        default = DEFAULTS[name]
        usual = list(default) if isinstance(default, tuple) else default
        if name in _ALWAYS or value not in (usual, default):
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            rows[name.replace("_", " ")] = _WORDS.get(str(shown), str(shown))
    return rows


def describe_sidecar(summary: Mapping[str, Any], title: str) -> dict[str, Any]:
    """What A1111 and Forge read from NAME.json."""
    return {
        "description": title,
        "sd version": _VERSIONS.get(summary["family"] or "", "Unknown"),
        "activation text": printable(summary["trigger"] or "", 200),
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "Trained with sdlora." if summary["metadata"].get("sdlora.version") else "",
    }


def escape(text: str) -> str:
    """Text as Markdown shows it letter by letter, on one line."""
    return _MARKS.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _code(text: str) -> str:
    """Text between backticks, which has none itself."""
    return text.replace("`", "'").replace("|", "\\|")


def _fence(text: str, language: str = "") -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _file(name: str) -> str:
    return f"{printable(name, 200)}.safetensors"


__all__ = ["describe_sidecar", "describe_use", "escape", "list_training", "write_page"]

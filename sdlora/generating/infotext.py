"""The `parameters` text in a PNG that A1111-style tools read, and the `<lora:name:weight>` tags of prompts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..profiles import Profile, parse_profile, split_parts

_TAG = re.compile(r"<lora:([^:>]*)(?::([^>]*))?>")
_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"


@dataclass(frozen=True)
class Tag:
    """`<lora:name:weight>`, or `<lora:name:te_weight:weight>` where the text encoder has a weight of its own.

    After the weights stands how they vary: `<lora:name:0.8:lbw=…:start=…:stop=…>`, as in `profiles.parse_stacked`.
    """

    name: str
    weight: float = 1.0
    te_weight: float = 1.0
    profile: Profile | None = None
    mask: Path | None = None

    def __str__(self) -> str:
        te_weight = [] if self.te_weight == self.weight else [f"{self.te_weight:.10g}"]
        more = [] if self.profile is None else [part.replace("blocks=", "lbw=", 1) for part in self.profile.parts()]
        more += [] if self.mask is None else [f"mask={self.mask.name}"]
        return f"<lora:{':'.join([self.name, *te_weight, f'{self.weight:.10g}', *more])}>"


def parse_prompt(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its `<lora:…>` tags, and the tags.

    As A1111 has it, a second number is the UNet's weight and the first one the text encoder's.

    Raises: ConfigError where a tag is not well formed.
    """
    tags = []
    for match in _TAG.finditer(prompt):
        name, numbers = match.group(1).strip(), match.group(2)
        plain, more = _split(numbers or "")
        try:
            values = [float(n) for n in plain.split(":")] if plain or (not more and numbers is not None) else [1.0]
        except ValueError:
            values = []
        if not name or not 1 <= len(values) <= 2 or not all(map(math.isfinite, values)):
            raise ConfigError(f"{match.group()}: not a LoRA tag; write <lora:name:weight>, such as <lora:ink:0.8>")
        try:
            parts = split_parts(more)
            profile = parse_profile(parts)
        except ConfigError as error:
            raise ConfigError(f"{match.group()}: {error}") from None
        tags.append(Tag(name, values[-1], values[0], profile, Path(parts["mask"]) if "mask" in parts else None))
    plain = _TAG.sub("", prompt)
    return (" ".join(plain.split()) if tags else plain), tags


def _split(text: str) -> tuple[str, str]:
    """What stands before the first `key=`, and the rest with a colon before it."""
    first = re.search(r"(?:^|:)[a-z_]+=", text)
    if first is None:
        return text, ""
    rest = text[first.start() :]
    return text[: first.start()], rest if rest.startswith(":") else f":{rest}"


def format_infotext(prompt: str, negative: str, settings: Mapping[str, object]) -> str:
    """The `parameters` text: the prompt, the negative prompt if any, and one line of settings in their order.

    Values that hold a comma, a colon or a line break are quoted as JSON strings.
    Source: AUTOMATIC1111 stable-diffusion-webui, its generation parameters text.
    """
    lines = [prompt]
    if negative:
        lines.append(f"{_NEGATIVE} {negative}")
    lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items()))
    return "\n".join(lines)


def parse_infotext(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings of a `parameters` text; the inverse of `format_infotext`."""
    *lines, last = text.strip().split("\n")
    if len(_SETTING.findall(last)) < 3:  # a text without settings
        lines, last = [*lines, last], ""
    prompt: list[str] = []
    negative: list[str] = []
    into = prompt
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            into, line = negative, line.removeprefix(_NEGATIVE).strip()
        into.append(line)
    settings = {key: _unquote(value) for key, value in _SETTING.findall(last)}
    return "\n".join(prompt).strip(), "\n".join(negative).strip(), settings


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value

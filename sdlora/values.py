"""Values as people write them: their types, how they are shown again, TOML, LORAs, and the nearest known word."""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
import tomllib
import types
import typing
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}


def typed(name: str, kind: Any, value: Any, example: Any = None) -> Any:
    """The value in the type `kind`: int, float, bool, str, a Literal, a tuple of str, or one of these or None.

    `example` is a number to name in the fix. Whole numbers are accepted where any number is.
    Raises: ConfigError for another type, NaN, infinity, or text with control characters.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else typed(name, options[0], value, example)
    if origin is Literal:
        if value not in options or type(value) is not str:
            near = suggest(value, options) if isinstance(value, str) else ""
            raise ConfigError(f"{name} = {show(value)} is not known; use {' or '.join(options)}{near}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            example = show(value) if isinstance(value, str) else '"…"'
            raise ConfigError(f"{name} = {show(value)} is not a list; give a list of texts: [{example}]")
        return tuple(typed(name, str, item) for item in value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else math.inf
    if type(value) is not kind:
        raise ConfigError(f"{name} = {show(value)} is not {_WORDS[kind]}{_type_hint(kind, value, example)}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} = {value} is not a finite number; give one such as {example or 1.0}")
    if kind is str:
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
            raise ConfigError(f"{name} = {_shorten(value)!a} holds a line break or a control character; remove it")
        return " ".join(value.split()) if name == "trigger" else value
    return value


def _type_hint(kind: type, value: Any, example: Any) -> str:
    if kind is str:
        short = isinstance(value, float) or (isinstance(value, int) and abs(value) <= 10**20)
        return f'; write "{show(value)}"' if short else "; put it in quotes"
    if isinstance(value, str):
        word = value.lower() if value.lower() in ("true", "false") else value
        if word in ("true", "false") if kind is bool else _spells(kind, word):
            return f"; write {word} without quotes"
    if kind is bool:
        return "; write true or false"
    whole = isinstance(value, float) and value.is_integer() and kind is int and abs(value) < 2**53
    return f"; write {int(value)}" if whole else f"; give one such as {example or 1}"


def _spells(kind: type, word: str) -> bool:
    return NUMBER.fullmatch(word) is not None and (kind is float or word.lstrip("+-").isdigit()) and len(word) < 20


def show(value: Any, depth: int = 0) -> str:
    """The value as a person would have written it, cut short where that is very long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | dict):
        if depth == _MOST_DEPTH:  # TOML may be nested deeper than Python can follow
            return "…"
        if isinstance(value, dict):
            items = [f"{key[:_MOST_CHARACTERS]} = {show(item, depth + 1)}" for key, item in value.items()]
        else:
            items = [show(item, depth + 1) for item in value]
        items[_MOST_ITEMS:] = ["…"] if len(items) > _MOST_ITEMS else []
        return f"{{{', '.join(items)}}}" if isinstance(value, dict) else f"[{', '.join(items)}]"
    if isinstance(value, int) and abs(value) > 10**20:  # str() of a huge int is slow and may be refused
        return "a very large number"
    if isinstance(value, datetime.date | datetime.time):
        return str(value)
    return repr(value) if not isinstance(value, str) else quote(_shorten(value))


_MOST_DEPTH, _MOST_ITEMS, _MOST_CHARACTERS = 4, 64, 300


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the known word nearest to this one, or nothing where none is near."""
    plain = {name.lstrip("-").replace("-", "_").lower(): name for name in known}
    word = word.lstrip("-").replace("-", "_").lower()
    if _ALIASES.get(word) in plain:
        return f"; did you mean {plain[_ALIASES[word]]}?"
    near = difflib.get_close_matches(word, plain, 1, 0.6)
    return f"; did you mean {plain[near[0]]}?" if near else ""


_ALIASES = {
    "lr": "learning_rate", "unet_lr": "learning_rate", "text_encoder_lr": "text_encoder_learning_rate",
    "batch": "batch_size", "train_batch_size": "batch_size", "dim": "rank", "network_dim": "rank",
    "network_alpha": "alpha", "conv_dim": "conv_rank", "network_dropout": "dropout", "scale_weight_norms": "max_norm",
    "loraplus_lr_ratio": "lora_plus_ratio", "network_weights": "continue_from", "use_dora": "dora",
    "max_train_steps": "steps", "num_steps": "steps", "epochs": "steps",
    "gradient_accumulation_steps": "accumulation", "model": "base", "pretrained_model_name_or_path": "base",
    "mixed_precision": "precision", "size": "resolution", "lora": "lora", "output": "out", "output_dir": "out",
    "cfg": "guidance", "guidance_scale": "guidance", "num_images": "images", "negative_prompt": "negative",
}  # fmt: skip


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises: ConfigError where it cannot be read or is no TOML, or a key could not be shown in a line.
    """
    text = ""
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); give a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {_explain_toml(text, str(error))}") from None
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else "has a number that is too long"
        raise ConfigError(f"{path}: is not TOML: {reason}; write key = value lines") from None
    for key in values:
        if not key or not key.isprintable() or len(key) > _MOST_CHARACTERS:
            raise ConfigError(f"{path}: unknown key {quote(_shorten(key))}; write key = value lines, such as rank = 8")
    return values


def _explain_toml(text: str, reason: str) -> str:
    """What is wrong with the line of a TOML text that tomllib stopped at, and the fix."""
    lines = text.split("\n")
    place = re.search(r" \(at (?:line ([0-9]+), column [0-9]+|end of document)\)", reason)
    if place is None:
        return f"is not TOML: {reason}; write key = value lines"
    full = [n for n, line in enumerate(lines, 1) if line.strip()] or [1]
    number = int(place[1]) if place[1] else full[-1]
    reason, line = reason[: place.start()], lines[number - 1].strip()
    key = line.partition("=")[0].strip()
    fix = "write key = value lines"
    if reason == "Cannot overwrite a value":
        fix = f"{_shorten(key)} is given twice, leave one out"
    elif reason == "Invalid value":
        fix = "put text in quotes, and write true or false, numbers as 0.5, and lists in square brackets"
    line = _shorten(line)
    return f"is not TOML: line {number}, {line if line.isprintable() else quote(line)}: {reason}; {fix}"


def to_toml(value: Any) -> str:
    """A bool, number, text or tuple of texts as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(to_toml(item) for item in value)}]"
    return quote(value) if isinstance(value, str) else repr(value)


def quote(text: str) -> str:
    """Text in quotes, as TOML's basic strings escape it."""
    # TOML's basic strings escape as JSON's do, except that DEL needs an escape too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA as the command line names it: FILE[:WEIGHT[:TE_WEIGHT]]."""

    file: Path
    weight: float = 1.0
    te_weight: float = 1.0


def parse_lora(text: str) -> LoraSpec:
    """Reads FILE[:WEIGHT[:TE_WEIGHT]]; colons that belong to the path are left in it.

    Raises: ConfigError for an empty FILE, or a weight that is no finite number.
    """
    end = [m.end() for m in re.finditer(r"\.safetensors(?=:|$)", text, re.IGNORECASE)]
    if end:
        file, rest = text[: end[-1]], text[end[-1] + 1 :]
        weights = rest.split(":") if end[-1] < len(text) else []
    else:
        weights = []
        file = text
        # without the suffix to go by, only numbers at the end can be weights: C:\style:0.5
        while len(weights) < 2 and ":" in file and NUMBER.fullmatch(file.rpartition(":")[2]):
            file, _, last = file.rpartition(":")
            weights.insert(0, last)
    if not file:
        raise ConfigError(f"LoRA {text!r} names no file; write FILE:WEIGHT, such as ink.safetensors:0.8")
    if len(weights) > 2:
        raise ConfigError(f"LoRA {text}: has {len(weights)} weights; write FILE:WEIGHT:TE_WEIGHT")
    for weight in weights:
        if not NUMBER.fullmatch(weight) or not math.isfinite(float(weight)):
            raise ConfigError(f"LoRA {text}: weight {weight!r} is no finite number; write FILE:WEIGHT, as {file}:0.8")
    numbers = [float(weight) for weight in weights] or [1.0]
    return LoraSpec(Path(file), numbers[0], numbers[-1])


def escape(line: str) -> str:
    """A line without what moves a terminal's cursor, colours or turns it: white space is a space, the rest spelt."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in line)

"""The command line's flags: a parser that answers in one line, the Recipe's fields as flags, and what a LORA is."""

from __future__ import annotations

import argparse
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .config import DEFAULTS, FIELDS, describe_fields
from .errors import ConfigError
from .values import suggest

RECIPE_GROUPS = {
    "what is learnt": ("base", "trigger", "resolution", "flip", "caption_dropout", "text_encoder"),
    "size of the LoRA": ("rank", "alpha"),
    "length and speed": ("steps", "batch_size", "accumulation", "precision", "seed"),
    "learning": (
        "learning_rate", "text_encoder_learning_rate", "schedule", "warmup_steps", "weight_decay", "min_snr_gamma",
        "max_grad_norm",
    ),
    "previews and checkpoints": ("preview", "preview_every", "checkpoint_every"),
}  # fmt: skip
_METAVARS = {"base": "BASE", "trigger": "TEXT", "resolution": "PX", "preview": "PROMPT"}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every complaint is one ConfigError, with the nearest known flag for an unknown one."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
        self._positionals.title = "given in order"

    def format_help(self) -> str:
        # argparse's own usage lists thirty flags before it says anything
        places = [f"{a.metavar} …" if a.nargs == "+" else str(a.metavar) for a in self._positionals._group_actions]
        self.usage = " ".join([self.prog, *places, "[--flag …]"])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if missing := re.match(r"the following arguments are required: (.*)", message):
            message = f"{missing[1]} is missing"
        elif extra := re.match(r"unrecognized arguments: (.*)", message):
            message = f"{extra[1]} is one argument too many; put quotes around text with spaces"
        elif "expected" in message and "argument" in message:
            message = message.replace(": expected one argument", " needs a value")
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """As `parse_args`, for values that begin with a dash too (`--learning-rate -1e-3`, `--negative -x-`).

        Raises: ConfigError for anything that does not fit.
        """
        return self.parse_args(list(self._join_values(argv)))

    def _join_values(self, argv: Sequence[str]) -> Iterator[str]:
        words = list(argv)
        while words:
            word = words.pop(0)
            flag, equals, _ = word.partition("=")
            if word == "--":
                yield from (word, *words)
                return
            if not word.startswith("-") or word == "-":
                yield word
                continue
            action = self._option_string_actions.get(flag)
            if action is None:
                known = list(self._option_string_actions)
                raise ConfigError(f"unknown flag {flag}{suggest(flag, known) or f'; see {self.prog} --help'}")
            follows = words[0] if words else ""
            if action.nargs != 0 and not equals and follows and not self._is_flag(follows):
                yield f"{flag}={words.pop(0)}"
            else:
                yield word

    def _is_flag(self, word: str) -> bool:
        return word.startswith("--") or word in self._option_string_actions


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def read_whole_number(text: str) -> int:
    """The whole number that a flag's value spells. Raises: argparse.ArgumentTypeError."""
    if re.fullmatch(r"[+-]?[0-9]{1,400}", text, re.ASCII) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def read_number(text: str) -> float:
    """The finite number that a flag's value spells. Raises: argparse.ArgumentTypeError."""
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of the Recipe, with its docstring as help; absent flags leave no attribute."""
    texts = describe_fields()
    for title, names in RECIPE_GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_field(group, name, texts[name].replace("`", "").replace("%", "%%"))


def _add_field(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    kind, default = FIELDS[name], DEFAULTS[name]
    flag, options = f"--{name.replace('_', '-')}", typing.get_args(kind)
    more: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name}
    shown = "on" if default is True else "off" if default is False else default
    more["help"] = text if default in (None, "", ()) else f"{text} (default: {shown})"
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
    elif typing.get_origin(kind) is tuple:
        group.add_argument(flag, action="append", metavar=_METAVARS[name], **more)
    elif typing.get_origin(kind) is typing.Literal:
        group.add_argument(flag, metavar="|".join(options), **more)
    else:
        base = options[0] if options else kind
        read = {int: read_whole_number, float: read_number}.get(base, str)
        metavar = _METAVARS.get(name, {int: "N", float: "X"}.get(base, "TEXT"))
        group.add_argument(flag, type=read, metavar=metavar, **more)


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
        while len(weights) < 2 and ":" in file and _NUMBER.fullmatch(file.rpartition(":")[2]):
            file, _, last = file.rpartition(":")
            weights.insert(0, last)
    if not file:
        raise ConfigError(f"LoRA {text!r} names no file; write FILE:WEIGHT, such as ink.safetensors:0.8")
    if len(weights) > 2:
        raise ConfigError(f"LoRA {text}: has {len(weights)} weights; write FILE:WEIGHT:TE_WEIGHT")
    for weight in weights:
        if not _NUMBER.fullmatch(weight) or not math.isfinite(float(weight)):
            raise ConfigError(f"LoRA {text}: weight {weight!r} is no finite number; write FILE:WEIGHT, as {file}:0.8")
    numbers = [float(weight) for weight in weights] or [1.0]
    return LoraSpec(Path(file), numbers[0], numbers[-1])

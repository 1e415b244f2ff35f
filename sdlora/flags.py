"""The command line's flags: a parser that answers in one line, and the Recipe's fields as flags."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import math
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from .config import DEFAULTS, FIELDS, Recipe
from .errors import ConfigError
from .values import NUMBER, suggest

RECIPE_GROUPS = {
    "what is learnt": (
        "base", "prediction", "zero_terminal_snr", "trigger", "resolution", "flip", "caption_dropout", "max_chunks",
        "clip_skip", "text_encoder",
    ),
    "what becomes of captions": (
        "caption_lines", "caption_variants", "shuffle_tags", "keep_tags", "tag_dropout", "wildcards",
    ),
    "how pictures are cut": ("buckets", "bucket_step_px", "max_aspect", "upscale", "small_buckets", "crop", "crops"),
    "which pictures are learnt, and what of them": ("skip_bad", "masks", "mask_outside"),
    "what the base keeps": (
        "init_word", "init_steps", "init_learning_rate", "class_data", "class_prompt", "class_images", "prior_weight",
    ),
    "what is adapted, and how": (
        "rank", "alpha", "rank_stabilised", "targets", "blocks", "block_ranks", "conv_rank", "conv_alpha", "dora",
        "dropout", "rank_dropout", "module_dropout", "max_norm", "continue_from", "merge",
    ),
    "length and speed": (
        "steps", "batch_size", "accumulation", "precision", "quantise", "recompute", "fast_layers", "seed",
    ),
    "learning": (
        "optimizer", "learning_rate", "lora_plus_ratio", "text_encoder_learning_rate", "text_encoder_2_learning_rate",
        "schedule", "schedule_cycles", "schedule_power", "warmup_steps", "weight_decay", "ema_decay", "max_grad_norm",
        "max_skipped_steps",
    ),
    "what is made small": (
        "loss", "huber_c", "huber_schedule", "weighting", "min_snr_gamma", "noise_offset", "pyramid_noise",
        "pyramid_discount", "input_perturbation", "t_min", "t_max", "t_bias",
    ),
    "previews, validation, checkpoints, what the file tells, and trackers": (
        "preview", "preview_every", "validation_share", "validate_every", "checkpoint_every", "share_captions",
        "tracker",
    ),
}  # fmt: skip
_METAVARS = {
    "base": "BASE", "trigger": "TEXT", "resolution": "PX", "preview": "PROMPT", "targets": "NAMES", "blocks": "BLOCKS",
    "block_ranks": "BLOCK=RANK[:ALPHA]", "continue_from": "FILE", "merge": "FILE[:W[:TE]]",
    "tracker": "NAME", "masks": "alpha|FOLDER", "class_data": "FOLDER", "class_prompt": "PROMPT",
}  # fmt: skip
_FLAGS = {"continue_from": "--continue"}
"""Flags that are not called as their field."""
_LISTS = ("targets", "blocks", "block_ranks")
"""Fields whose flag takes several words, with commas between them."""


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
        elif given := re.match(r"(.*): ignored explicit argument (.*)", message):
            message = f"{given[1]} takes no value and was given {given[2]}; write the one of them that you mean, alone"
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
    value = float(text) if NUMBER.fullmatch(text) else math.nan
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


@functools.cache
def describe_fields() -> dict[str, str]:
    """Each field's docstring, read from its module's source; it is what `sdlora train --help` says of the flag."""
    body = ast.parse(inspect.getsource(Recipe)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for line, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            texts[line.target.id] = " ".join(str(after.value.value).split())
    return texts


def _add_field(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    kind, default = FIELDS[name], DEFAULTS[name]
    flag, options = _FLAGS.get(name, f"--{name.replace('_', '-')}"), typing.get_args(kind)
    more: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name}
    shown = "on" if default is True else "off" if default is False else default
    shown = ", ".join(default) if isinstance(default, tuple) else shown
    more["help"] = text if default in (None, "", ()) else f"{text} (default: {shown})"
    if kind is bool or options[:1] == (bool,):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
    elif name in _LISTS:
        group.add_argument(flag, action="extend", type=_split_words, metavar=_METAVARS[name], **more)
    elif typing.get_origin(kind) is tuple:
        group.add_argument(flag, action="append", metavar=_METAVARS[name], **more)
    elif typing.get_origin(kind) is typing.Literal:
        group.add_argument(flag, metavar="|".join(options), **more)
    else:
        base = options[0] if options else kind
        read = {int: read_whole_number, float: read_number}.get(base, str)
        metavar = _METAVARS.get(name, {int: "N", float: "X"}.get(base, "TEXT"))
        group.add_argument(flag, type=read, metavar=metavar, **more)


def _split_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]

"""The verbs that make a LoRA ready for others: card and convert."""

from __future__ import annotations

import dataclasses
import datetime
from argparse import Namespace
from pathlib import Path

from .errors import ConfigError
from .file_verbs import choose_dtype
from .flags import Parser
from .places import check_files, check_folder, check_output
from .screen import show_name

_FORMATS = ("kohya", "diffusers", "peft")
_SAID = {
    "title": "its name",
    "author": "who made it",
    "license": "under which terms it may be used",
    "description": "what it is",
}
"""What `convert` can write into a file's metadata, by flag."""


def add_convert(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="LoRA to read")
    parser.add_argument("--to", metavar="|".join(_FORMATS), choices=_FORMATS, required=True, help="names to write")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="LoRA to write")
    said = parser.add_argument_group("what the file says of itself (without these: what it said before)")
    for name, what in _SAID.items():
        said.add_argument(f"--{name}", metavar="TEXT", help=what)
    said.add_argument(
        "--date", metavar="YYYY-MM-DD", help="when it was made (default: none, or that of SOURCE_DATE_EPOCH)"
    )
    said.add_argument("--thumbnail", metavar="PICTURE", type=Path, help="picture that interfaces show, made small")


def run_convert(args: Namespace) -> int:
    check_files([args.file])
    check_output(args.out, [args.file])
    more = {f"modelspec.{name}": value for name in _SAID if (value := getattr(args, name)) is not None}
    if args.date is not None:
        more["modelspec.date"] = read_date(args.date)
    from .adapter.file import read_adapter, write_adapter

    adapter = read_adapter(args.file)
    if args.thumbnail is not None:
        from .generating.sidecars import make_thumbnail

        more["modelspec.thumbnail"] = make_thumbnail(check_picture(args.thumbnail, "--thumbnail"))
    card = dataclasses.replace(adapter.card, metadata={**adapter.card.metadata, **more})
    same = dataclasses.replace(adapter, card=card)
    write_adapter(same, args.out, format=args.to, dtype=choose_dtype(None, adapter))
    print(show_name(args.out))
    return 0


def read_date(text: str) -> str:
    """A date as ISO 8601 writes it. Raises: ConfigError."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ConfigError(f"--date {text} is no date; write it as 2026-01-31") from None


def check_picture(path: Path, flag: str) -> Path:
    """Raises: ConfigError where there is no such file."""
    if not path.is_file():
        raise ConfigError(f"{flag} {path}: there is no such file; give a picture")
    return path


def add_card(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="LoRA to describe")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder to write to (default: that of FILE)")
    parser.add_argument(
        "--preview", metavar="PICTURE", type=Path, help="picture to show (default: the run folder's newest preview)"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run_card(args: Namespace) -> int:
    check_files([args.file])
    if args.preview is not None:
        check_picture(args.preview, "--preview")
    folder = args.file.parent if args.out is None else args.out
    check_folder(folder)
    from .generating.sidecars import write_sidecars

    for path in write_sidecars(args.file, folder, args.preview, args.force):
        print(show_name(path))
    return 0

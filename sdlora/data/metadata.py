"""Captions in `metadata.jsonl`: one JSON object a line, with `file_name` and `text`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .captions import MEND, CaptionError, clean_lines, find_control, read_plain

METADATA = "metadata.jsonl"
_ROW_FIX = 'write {"file_name": "a.png", "text": "a caption"} on each line'


@dataclass
class Rows:
    """One metadata file: its captions by picture, lines apart, its problems (file, problem, fix), its rows' places."""

    captions: dict[Path, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    places: dict[Path, tuple[str, str]] = field(default_factory=dict)

    def name_nothing(self, pictures: Iterable[Path]) -> list[tuple[str, str]]:
        """Rows (`metadata.jsonl line 3`, the name in it) whose picture is not among these."""
        there = set(pictures)
        return [place for path, place in self.places.items() if path not in there]


def read_rows(path: Path, name: str) -> Rows:
    """Reads a metadata file; `name` is what its problems call it. Never raises: all problems are in the Rows."""
    rows = Rows()
    try:
        text = read_plain(path).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        rows.problems.append((name, f"is not UTF-8 at byte {error.start}", "save it as UTF-8"))
        return rows
    except CaptionError as error:
        rows.problems.append((name, str(error), error.fix))
        return rows
    except OSError as error:
        rows.problems.append((name, f"cannot be read ({error.strerror or error})", MEND))
        return rows
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name} line {number}"
        try:
            file_name, caption = _read_row(line)
        except ValueError as error:
            rows.problems.append((place, *error.args))
            continue
        picture = path.parent / file_name
        if picture in rows.places:
            rows.problems.append((place, f"names {file_name} a second time", "delete one of the rows"))
        rows.places.setdefault(picture, (place, file_name))
        rows.captions.setdefault(picture, caption)
    return rows


def _read_row(line: str) -> tuple[str, str]:
    """A row's picture and caption. Raises: ValueError with two arguments, the problem and the fix."""
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except _Repeated as error:
        raise ValueError(f"has {error} twice", "leave one of them out") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({str(error).split(':')[0]})", _ROW_FIX) from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object", _ROW_FIX)
    name, caption = row.get("file_name"), row.get("text", "")
    if not isinstance(name, str) or not name.strip() or "\0" in name or not _is_unicode(name):
        raise ValueError("has no file_name", _ROW_FIX)
    if not isinstance(caption, str) or not _is_unicode(caption):
        raise ValueError("has a text that is no string of Unicode", _ROW_FIX)
    at = find_control(caption)
    if at is not None:
        problem = f"has a control character (U+{ord(caption[at]):04X}) in its text at character {at}"
        raise ValueError(problem, "delete that character")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith("\\"):
        raise ValueError(f"names the absolute path {name}", "name the picture relative to the metadata file")
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"climbs out of the folder with {name}", "name the picture relative to the metadata file")
    return name, clean_lines(caption)


class _Repeated(Exception):
    """The key that a JSON object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    for key in ("file_name", "text"):
        if sum(name == key for name, _ in pairs) > 1:
            raise _Repeated(key)
    return row


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)  # JSON can spell half a character

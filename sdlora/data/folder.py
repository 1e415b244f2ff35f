"""A data folder: finding its pictures and captions, and every problem it has, before anything is trained."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .captions import MEND, CaptionError, add_trigger, clean_caption, read_caption
from .likeness import Look, look_at
from .metadata import METADATA, Rows, read_rows
from .picture import decode_picture, fit_picture, read_picture, strict_warnings

__all__ = ["Example", "Problem", "Survey", "digest", "fit_picture", "read_picture", "scan_folder", "survey_folder"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jfif", ".jpe", ".jp2", ".psd", ".xcf", ".apng", ".tga", ".ppm", ".pgm",
     ".exr", ".dng", ".cr2", ".nef", ".arw"}
)  # fmt: skip
MAX_REPEATS = 10_000
_REPEATS = re.compile(r"([0-9]+)_.+")
_ADD_CAPTION = "write each one's caption in a .txt file of its name, or give --trigger"


@dataclass(frozen=True)
class Example:
    """A picture to learn from: its file, its name within the folder, its caption, and how often it counts."""

    path: Path
    name: str
    caption: str
    repeats: int
    size_px: tuple[int, int] = (0, 0)
    """Width and height, turned as its EXIF says; 0, 0 where nobody looked."""
    mask: Path | None = None
    """Where its mask is: a file of its own, the picture itself where that is its alpha channel, or nowhere."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of the folder, and what to do about it."""

    file: str
    problem: str
    fix: str


@dataclass
class Survey:
    """All of a folder: what can be trained on, what is wrong, and a hash of each picture's pixels by name."""

    folder: Path
    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    left_out: list[Problem] = field(default_factory=list)
    """What was wrong with what `leave_out_bad` took out."""
    pixels: dict[str, str] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)
    """What nearly equal pictures have nearly in common, by name."""
    pictures: int = 0
    """How many files are there that should be pictures."""
    captions: int = 0
    """How many pictures have a caption of their own."""
    masks: dict[str, float] = field(default_factory=dict)
    """How much of each picture its mask keeps, 0 to 1, by name."""
    masks_unused: list[str] = field(default_factory=list)
    """Masks that belong to no picture."""
    prior: Survey | None = None
    """The folder of class pictures; its problems are among these."""


def scan_folder(folder: str | Path, trigger: str = "", *, caption_lines: bool = False) -> list[Example]:
    """The folder's pictures with their captions, sorted by name, each decoded once to be sure of it.

    With caption_lines, the lines of a caption stay apart.

    Raises: DataError, one line that lists every problem of the folder.
    """
    survey = survey_folder(folder, trigger, caption_lines=caption_lines)
    if survey.problems:
        raise DataError(describe_problems(survey.folder, survey.problems))
    return survey.examples


def describe_problems(folder: Path, problems: list[Problem]) -> str:
    """All problems in one line; files that share one are named together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for p in problems:
        groups.setdefault((p.problem, p.fix), []).append(p.file)
    if len(problems) == 1 and problems[0].file == str(folder):
        return f"{folder}: {problems[0].problem}; {problems[0].fix}"
    parts = [f"{', '.join(names)}: {problem} ({fix})" for (problem, fix), names in groups.items()]
    return f"{folder}: {'; '.join(parts)}"


def survey_folder(
    folder: str | Path, trigger: str = "", *, caption_lines: bool = False, leave_out: Set[tuple[int, int]] = frozenset()
) -> Survey:
    """Looks at everything in a data folder; a problem is noted, never raised, so that all are found at once.

    `leave_out` are folders within it whose pictures do not count, such as masks, by device and number.
    """
    survey = Survey(Path(folder))
    trigger = clean_caption(trigger)
    found = _Finder(survey, trigger, caption_lines, leave_out)
    if not found.open_root():
        return survey
    found.walk()
    if not found.pictures and not survey.problems:
        _note(survey, str(folder), "has no pictures", f"put {', '.join(sorted(s[1:] for s in SUFFIXES))} files in it")
        return survey
    survey.pictures = len(found.pictures)
    captions = {p.name: found.find_caption(p) for p in found.pictures}
    rows_left = [where for rows in found.rows.values() for where in rows.name_nothing(p.path for p in found.pictures)]
    for file, named in rows_left:
        _note(survey, file, f"names {named}, which is no picture here", "correct the name or delete the row")
    for picture, (seen, problem) in zip(found.pictures, _check_pictures(found.pictures), strict=True):
        caption = captions[picture.name]
        if problem:
            _note(survey, picture.name, *problem)
        if caption == "" and not trigger:
            _note(survey, picture.name, "has no caption", _ADD_CAPTION)
        survey.captions += bool(caption)
        if seen is None or caption is None or (caption == "" and not trigger):
            continue
        survey.pixels[picture.name] = seen.pixels
        survey.looks[picture.name] = seen.look
        caption = add_trigger(caption, trigger)
        survey.examples.append(Example(picture.path, picture.name, caption, picture.repeats, seen.size_px))
    return survey


def digest(examples: Iterable[Example], *more: str) -> str:
    """SHA-256 over the pictures' bytes, captions and repeats in their order, and over any further texts.

    Names and places do not count: a moved folder is the same folder.
    """
    total = hashlib.sha256()
    for example in examples:
        with example.path.open("rb") as file:
            picture = hashlib.file_digest(file, "sha256").hexdigest()
        for part in (picture, example.caption, str(example.repeats)):
            _feed(total, part)
    for part in more:
        _feed(total, part)
    return total.hexdigest()


def _feed(total: hashlib._Hash, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    total.update(len(data).to_bytes(8, "little") + data)  # the length keeps "ab", "c" apart from "a", "bc"


def _note(survey: Survey, file: str, problem: str, fix: str) -> None:
    survey.problems.append(Problem(file, problem, fix))


@dataclass(frozen=True)
class _Picture:
    path: Path
    name: str
    repeats: int


class _Finder:
    """One walk through a folder: its pictures, caption files and metadata rows."""

    def __init__(self, survey: Survey, trigger: str, caption_lines: bool, leave_out: Set[tuple[int, int]]) -> None:
        self.survey = survey
        self.leave_out = leave_out
        self.trigger = trigger
        self.lines = caption_lines
        self.root = survey.folder
        self.pictures: list[_Picture] = []
        self.texts: dict[Path, Path] = {}
        self.rows: dict[Path, Rows] = {}

    def open_root(self) -> bool:
        """Whether the folder is one that can be listed; if not, the problem is noted."""
        name = str(self.root)
        try:
            if not self.root.exists():
                _note(self.survey, name, "does not exist", "check the path of the data folder")
            elif not self.root.is_dir():
                _note(self.survey, name, "is a file", "give the folder that holds the pictures")
            elif not os.listdir(self.root):
                _note(self.survey, name, "is empty", "put pictures and their captions in it")
            else:
                return True
        except (OSError, ValueError) as error:
            _note(self.survey, name, f"cannot be read ({_why(error)})", "check the path and the rights")
        return False

    def walk(self) -> None:
        """Visits each real folder once: links come last, so that a loop, or a second way in, adds nothing."""
        seen: set[tuple[int, int]] = set()
        folders: list[tuple[Path, int]] = [(self.root, 1)]
        links: list[tuple[Path, int]] = []
        while folders or links:
            folder, repeats = folders.pop(0) if folders else links.pop(0)
            try:
                found = folder.stat()
                place = (found.st_dev, found.st_ino)
                if place in seen or (place in self.leave_out and folder != self.root):
                    continue
                seen.add(place)
                names = sorted(os.listdir(folder))
            except OSError as error:
                _note(self.survey, self.name(folder), f"cannot be read ({_why(error)})", "give yourself the right to")
                continue
            for path in (folder / name for name in names if not name.startswith(".")):
                if os.path.isdir(path):
                    (links if path.is_symlink() else folders).append((path, repeats * self.repeats_of(path)))
                else:
                    self.take_file(path, repeats)
        self.pictures.sort(key=lambda p: p.name)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path != self.root else str(path)

    def repeats_of(self, folder: Path) -> int:
        match = _REPEATS.fullmatch(folder.name)
        if not match:
            return 1
        # A long run of digits is a date or a number, and int() refuses the longest.
        count = int(match[1]) if len(match[1]) < 10 else MAX_REPEATS + 1
        if not 1 <= count <= MAX_REPEATS:
            problem = f"would count its pictures {match[1][:20]} times"
            _note(self.survey, self.name(folder), problem, f"rename it, 1_… to {MAX_REPEATS}_…, or without a number")
            return 1
        return count

    def take_file(self, path: Path, repeats: int) -> None:
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            self.pictures.append(_Picture(path, self.name(path), repeats))
        elif suffix in (".txt", ".caption"):
            self.texts[path.with_suffix(suffix)] = path
        elif path.name == METADATA:
            self.rows[path.parent] = rows = read_rows(path, self.name(path))
            self.survey.problems.extend(Problem(*problem) for problem in rows.problems)
        elif suffix in UNREAD_SUFFIXES:
            _note(self.survey, self.name(path), "is of a kind that is not read", "save it as png or jpg, or delete it")

    def find_caption(self, picture: _Picture) -> str | None:
        """The picture's own caption, "" where it has none, None where its file is wrong (which is noted)."""
        for suffix in (".txt", ".caption"):
            path = self.texts.get(picture.path.with_suffix(suffix))
            if path is None:
                continue
            try:
                caption = read_caption(path, lines=self.lines)
                if caption or self.trigger:
                    return caption
                _note(self.survey, self.name(path), "is empty", "write a caption in it, or give --trigger")
            except OSError as error:
                _note(self.survey, self.name(path), f"cannot be read ({_why(error)})", MEND)
            except CaptionError as error:
                _note(self.survey, self.name(path), str(error), error.fix)
            return None
        for folder in (picture.path.parent, *picture.path.parent.parents):
            if folder in self.rows and picture.path in self.rows[folder].captions:
                caption = self.rows[folder].captions[picture.path]
                return caption if self.lines else clean_caption(caption)
            if folder == self.root:
                break
        return ""


@dataclass(frozen=True)
class _Seen:
    """What a decoded picture is: its pixels' SHA-256, its look, its width and height."""

    pixels: str
    look: Look
    size_px: tuple[int, int]


def _check_pictures(pictures: list[_Picture]) -> Iterator[tuple[_Seen | None, tuple[str, str] | None]]:
    """Decodes every picture once, in a few threads: what it is, or a problem and its fix where it fails."""

    def check(picture: _Picture) -> tuple[_Seen | None, tuple[str, str] | None]:
        try:
            image = decode_picture(picture.path)
        except ValueError as error:
            return None, (str(error.args[0]), str(error.args[1]))
        pixels = hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()
        return _Seen(pixels, look_at(image), image.size), None

    with strict_warnings(p.path for p in pictures), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(check, pictures)


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)

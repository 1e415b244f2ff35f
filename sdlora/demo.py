"""The demo: a style and a subject learnt from the sample folders, and both of them stacked on one sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .adapter.delta import Adapter
from .adapter.file import read_adapter
from .bases.family import load_base
from .bases.sampling import sample
from .combining.plan import Plan, Stacked
from .config import recipe_from_toml
from .data.folder import Example, scan_folder
from .data.picture import read_picture
from .errors import DataError
from .generating.grid import labelled_sheet
from .generating.png import write_png
from .training.loop import run_training
from .training.progress import say

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "a grinning mio cat, ink style",
    "a crying mio cat, ink style",
    "a mio cat face, ink style",
    "a pineapple, ink style",
    "a penguin, ink style",
    "a fire engine, ink style",
)
SEED = 4
STEPS = 20


@dataclass(frozen=True)
class Lesson:
    """One LoRA of the demo: its name, the folder it learns from and the preset that it uses."""

    name: str
    data: Path
    preset: Path


LESSONS = (
    Lesson("ink", ROOT / "datasets" / "ink", ROOT / "configs" / "mini-ink.toml"),
    Lesson("cat", ROOT / "datasets" / "cat", ROOT / "configs" / "mini-subject.toml"),
)
TRIGGERS = {"ink": "ink style", "cat": "mio"}


def run_demo(out: Path) -> dict[str, float]:
    """Trains `ink` and `cat` on the built-in base, draws `sheet.png` with neither, each and both; seconds by part.

    A demo that was stopped goes on where it was. Raises: DataError where the sample folders are not there.
    """
    seconds: dict[str, float] = {}
    began_s = time.perf_counter()
    adapters: dict[str, Adapter] = {}
    for lesson in LESSONS:
        started_s = time.perf_counter()
        adapters[lesson.name] = learn(lesson, out / f"{lesson.name}.safetensors")
        seconds[f"train {lesson.name}"] = time.perf_counter() - started_s
    started_s = time.perf_counter()
    write_png(draw_sheet(adapters["ink"], adapters["cat"]), out / "sheet.png")
    seconds["draw sheet"] = time.perf_counter() - started_s
    seconds["total"] = time.perf_counter() - began_s
    for path in (*(f"{lesson.name}.safetensors" for lesson in LESSONS), "sheet.png"):
        print(out / path)
    for name, value in seconds.items():
        print(f"{name:12} {value:6.1f} s")
    return seconds


def learn(lesson: Lesson, out: Path) -> Adapter:
    """Trains one LoRA of the demo to `out`, or takes the finished one."""
    for needed in (lesson.data, lesson.preset):
        if not needed.exists():
            raise DataError(f"{needed} is not there; run the demo from a checkout of the project, which has it")
    recipe = recipe_from_toml(lesson.preset, {"trigger": TRIGGERS[lesson.name]})
    return read_adapter(run_training(lesson.data, recipe, out))


def draw_sheet(style: Adapter, subject: Adapter) -> Image.Image:
    """What both LoRAs were shown, and below it the same prompts and noise with neither, each and both."""
    base = load_base("mini", precision="bf16")
    stacks: tuple[tuple[str, Stacked], ...] = (
        ("no LoRA", ()),
        ("ink (style)", [(style, 1.0)]),
        ("cat (subject)", [(subject, 1.0)]),
        ("ink + cat", [(style, 1.0), (subject, 1.0)]),
    )
    rows = []
    for number, (name, stack) in enumerate(stacks):
        say(f"drawing {len(PROMPTS)} pictures with {name} ({number + 1}/{len(stacks)})")
        with Plan.of(stack).applied(base, STEPS) as stacked:
            rows.append(sample(stacked, list(PROMPTS), seeds=[SEED] * len(PROMPTS), steps=STEPS))
    drawn = labelled_sheet(
        rows,
        PROMPTS,
        [name for name, _ in stacks],
        title="What the built-in base draws with them: same prompts, same noise",
    )
    shown = labelled_sheet(
        [[read_picture(e.path) for e in _spread(lesson.data)] for lesson in LESSONS],
        [""] * len(PROMPTS),
        [f"{lesson.name}: {len(scan_folder(lesson.data))} pictures" for lesson in LESSONS],
        title="What the two LoRAs were taught with",
    )
    sheet = Image.new("RGB", (max(drawn.width, shown.width), drawn.height + shown.height), "white")
    sheet.paste(shown, (0, 0))
    sheet.paste(drawn, (0, shown.height))
    return sheet


def _spread(folder: Path) -> list[Example]:
    examples = scan_folder(folder)
    return examples[:: max(1, len(examples) // len(PROMPTS))][: len(PROMPTS)]

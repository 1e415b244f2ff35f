"""The commands for LoRA files that the README and docs/files.md show, one after another as they stand there."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from sdlora import cli
from sdlora.adapter.delta import Adapter, Card
from sdlora.adapter.file import write_adapter
from tests.stored_loras import make_lora

ROOT = Path(cli.__file__).parents[1]


def read_commands(page: Path, heading: str) -> list[list[str]]:
    """The words of each `sdlora …` line of the first block under a heading, without its comment."""
    section = page.read_text(encoding="utf-8").partition(f"# {heading}\n")[2].partition("\n## ")[0]
    return [shlex.split(line, comments=True) for line in re.findall(r"^    sdlora (.+)$", section, re.MULTILINE)]


@pytest.mark.parametrize(("page", "heading"), [("README.md", "Work on LoRA files"), ("docs/files.md", "LoRA files")])
def test_every_command_works_as_it_is_written(tmp_path, monkeypatch, capsys, page, heading):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("ink", "cat")):
        lora = make_lora("mini", i, size=0.05)
        settings = {"steps": 1, "batch_size": 1, "base": "mini"}
        card = Card("mini", "mini", name, settings)
        write_adapter(Adapter(dict(list(lora.deltas.items())[::7]), card), f"{name}.safetensors")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (128, 128), "red").save("other/a.png")
    (tmp_path / "other" / "a.txt").write_text("a red square")
    commands = read_commands(ROOT / page, heading)
    assert {words[0] for words in commands} == {
        "inspect", "combine", "resize", "convert", "bake", "extract", "card", "train",
    }  # fmt: skip
    for words in commands:
        plan = ["--dry-run"] if words[0] == "train" else []
        assert cli.main([*words, *plan]) == 0, (words, capsys.readouterr().err)
    wanted = {word for words in commands for flag, word in itertools.pairwise(words) if flag == "--out"}
    there = {path.name for path in tmp_path.iterdir()}
    assert wanted - there <= {"other.safetensors"}
    assert {"ink.md", "ink.json"} <= there

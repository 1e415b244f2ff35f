"""Imports run one way, and the parts that must answer fast import nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "sdlora"
FLOORS = (
    {"errors"},
    {"disk", "heap"},
    {"values", "limits"},
    {"targets"},
    {"profiles"},
    {"agreement"},
    {"config"},
    {"adapter", "data"},
    {"bases"},
    {"training", "combining"},
    {"generating"},
    {"screen"},
    {"python", "demo", "flags", "places"},
    {"weighing", "file_verbs"},
    {"checkpoint_verbs", "sharing_verbs", "forecast"},
    {"cli"},
    {"__main__", "__init__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(path: Path) -> set[str]:
    """The project's own rooms that a file imports when it runs, type-checking imports left out."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    rooms: set[str] = set()
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        if node.level:
            package = inside[: len(inside) - node.level]
            target = (*package, *(node.module or "").split("."))
            names = [target[0]] if target[0] else [alias.name for alias in node.names]
            rooms |= {name for name in names if name in FLOOR}
    return rooms


FILES = sorted(p for p in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} has no floor; give it one here and in docs/architecture.md"
    for other in rooms_imported(path) - {room}:
        assert FLOOR[other] < FLOOR[room], f"{path} imports {other}, which is above it"


@pytest.mark.parametrize(
    "module", ["sdlora", "sdlora.profiles", "sdlora.config", "sdlora.cli", "sdlora.data.folder", "sdlora.data.captions"]
)
def test_fast_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_adapter_and_config_know_no_diffusers() -> None:
    for path in [*(ROOT / "adapter").glob("*.py"), ROOT / "config.py"]:
        assert "diffusers" not in {
            n.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            for n in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        }

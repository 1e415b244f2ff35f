"""What a disk may hold after the power went: recorded calls played back, those not synced in part and out of order.

The model is POSIX's, with no help from a file system: the bytes of a file are certain once the file was synced,
its name once its folder was. Whatever was not synced may be there or not, each call by itself; of a write's bytes none,
half or all may be there, or zeros in their place. A rename within a folder happens whole or not at all.
Source: Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), section 3, for what may be reordered.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from disk_calls import Call

MOST = 400
"""How many ways of one crash are looked at: all where there are no more, else so many drawn."""


@dataclass
class Node:
    """A file, or a folder of names: what is certain, and what was done since."""

    folder: bool
    content: bytes = b""
    synced: bytes = b""
    names: dict[str, Node] = field(default_factory=dict)
    """Now, as the running system sees it."""
    synced_names: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)
    """Changes of names since the folder was synced, in their order: what each name becomes, None for gone."""

    @property
    def unsure(self) -> bool:
        return not self.folder and self.content != self.synced


class Disk:
    """A folder on a disk that loses power."""

    def __init__(self, root: Path) -> None:
        self.root_path = os.path.realpath(root)
        self.root = _read(Path(root))

    def find(self, path: str) -> Node:
        node = self.root
        for part in Path(path).relative_to(self.root_path).parts:
            node = node.names[part]
        return node

    def apply(self, call: Call) -> None:
        """Does what a call did."""
        if call.kind == "write":
            self.find(call.path).content += call.content
        elif call.kind == "sync":
            node = self.find(call.path)
            node.synced = node.content
        elif call.kind == "sync folder":
            node = self.find(call.path)
            node.synced_names, node.pending = dict(node.names), []
        else:
            folder, name = self.find(os.path.dirname(call.path)), os.path.basename(call.path)
            change: dict[str, Node | None] = {name: None}
            if call.kind in ("create", "mkdir"):
                change = {name: Node(call.kind == "mkdir")}
            elif call.kind in ("rename", "link"):
                assert os.path.dirname(call.target) == os.path.dirname(call.path), "only within a folder"
                node = folder.names[name]
                change = {os.path.basename(call.target): node} | ({name: None} if call.kind == "rename" else {})
            _change(folder.names, change)
            folder.pending.append(change)

    def crashes(self, seed: int = 0, most: int = MOST) -> Iterator[Node]:
        """What may be on the disk if the power goes now."""
        folders, files = _list(self.root)
        choices: list[Sequence[object]] = [(False, True) for folder in folders for _ in folder.pending]
        choices += [("none", "half", "zeros", "all") for _ in files]
        count = 1
        for options in choices:
            count *= len(options)
        if count <= most:
            ways: Iterator[tuple[object, ...]] = itertools.product(*choices)
        else:
            chance = random.Random(seed)
            ways = (tuple(chance.choice(options) for options in choices) for _ in range(most))
        for way in ways:
            yield _crashed(self.root, folders, files, way)


def _read(path: Path) -> Node:
    """What lies on the disk, all of it certain."""
    if not path.is_dir():
        content = path.read_bytes()
        return Node(False, content, content)
    names = {p.name: _read(p) for p in sorted(path.iterdir())}
    return Node(True, names=names, synced_names=dict(names))


def _list(root: Node) -> tuple[list[Node], list[Node]]:
    """The folders that have changes that are not synced, and the files that have, wherever they may be reached."""
    folders: list[Node] = []
    files: list[Node] = []
    seen: set[int] = set()

    def walk(node: Node) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if node.folder:
            if node.pending:
                folders.append(node)
            found = [*node.names.values(), *node.synced_names.values()]
            for child in [*found, *(n for change in node.pending for n in change.values() if n is not None)]:
                walk(child)
        elif node.unsure:
            files.append(node)

    walk(root)
    return folders, files


def _crashed(root: Node, folders: list[Node], files: list[Node], way: Sequence[object]) -> Node:
    at = iter(way)
    names: dict[int, dict[str, Node]] = {}
    for folder in folders:
        kept = dict(folder.synced_names)
        for change in folder.pending:
            if next(at):
                _change(kept, change)
        names[id(folder)] = kept
    contents: dict[int, bytes] = {}
    for file in files:
        new, how = file.content[len(file.synced) :] if file.content.startswith(file.synced) else file.content, next(at)
        grown = {"none": b"", "half": new[: len(new) // 2], "zeros": bytes(len(new)), "all": new}[str(how)]
        contents[id(file)] = (file.synced if file.content.startswith(file.synced) else b"") + grown

    def build(node: Node) -> Node:
        if not node.folder:
            content = contents.get(id(node), node.synced)
            return Node(False, content, content)
        inside = names.get(id(node), node.synced_names)
        built = {name: build(child) for name, child in inside.items()}
        return Node(True, names=built, synced_names=dict(built))

    return build(root)


def _change(names: dict[str, Node], change: dict[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def write_out(node: Node, path: Path) -> None:
    """Makes files and folders of what is on the disk."""
    if not node.folder:
        path.write_bytes(node.content)
        return
    path.mkdir(exist_ok=True)
    for name, child in node.names.items():
        write_out(child, path / name)


def address(node: Node) -> tuple[object, ...] | bytes:
    """What tells one state of the disk from another."""
    if not node.folder:
        return node.content
    return tuple((name, address(child)) for name, child in sorted(node.names.items()))

"""Latents and text states kept on disk between runs, each under a key of all that decides it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..disk import write_atomic
from ..errors import DiskError

VERSION = "1"
"""Goes up when the same key would stand for other numbers."""


def make_key(*parts: object) -> str:
    """SHA-256 over the parts as texts, and over this format's version."""
    total = hashlib.sha256()
    for part in (VERSION, *parts):
        data = str(part).encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)  # the length keeps "ab", "c" apart from "a", "bc"
    return total.hexdigest()


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over the names, dtypes, shapes and values of modules' tensors: two fine-tunes differ in values alone."""
    total = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            total.update(_bytes(tensor))
    return total.hexdigest()


def name_machine(device: torch.device) -> str:
    """What else decides the bits of what a model computes: torch, the device, and on the CPU its number of threads."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return f"{torch.__version__} {device.type} {threads}"


@dataclass
class Store:
    """A folder of kept tensors, shared between runs; what cannot be read or written costs a line and not the run."""

    folder: Path
    found: int = 0
    """How many were read."""
    made: int = 0
    """How many were not there and were written."""
    _off: bool = field(default=False, repr=False)

    def read(self, key: str, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor] | None:
        """The float tensors under a key, or None where there are none; a damaged file is said, and counts as none.

        `shapes` is what they must have, by name.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            tensors = _read_checked(path, key, shapes)
        except (OSError, SafetensorError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            print(f"{path.name} in the cache is damaged ({reason}); it is made again", file=sys.stderr)
            return None
        self.found += 1
        return tensors

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors under a key: a whole file or none."""
        self.made += 1
        if self._off:
            return
        path = self._path(key)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            write_atomic(path, save(plain, {"key": key, "sha256": _sum(plain)}))
        except DiskError as error:
            self._off = True
            print(f"{error}; going on without a cache", file=sys.stderr)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _read_checked(path: Path, key: str, shapes: dict[str, tuple[int, ...]] | None) -> dict[str, Tensor]:
    """Raises: OSError, SafetensorError or ValueError where the file is not what was written under the key."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    if metadata.get("key") != key:
        raise ValueError("it holds another key")
    if shapes is not None and {name: tuple(x.shape) for name, x in tensors.items()} != shapes:
        raise ValueError("it holds other shapes")
    if metadata.get("sha256") != _sum(tensors):
        raise ValueError("its SHA-256 is another than was written")
    if not all(x.isfinite().all() for x in tensors.values()):
        raise ValueError("it holds numbers that are not finite")
    return tensors


def _sum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

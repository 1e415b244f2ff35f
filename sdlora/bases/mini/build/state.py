"""Build states on disk: written whole or not at all, so that a build killed at any moment goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from ....disk import write_atomic

_KEY = "structure"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors, numbers, texts and None, as safetensors. Raises: DiskError."""
    tensors: dict[str, torch.Tensor] = {}

    def write(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()  # two may share their numbers
            return {"tensor": name}
        if isinstance(value, dict):
            return {"items": [[key, write(inner)] for key, inner in value.items()]}  # keys may be numbers
        return [write(inner) for inner in value] if isinstance(value, list | tuple) else value

    structure = json.dumps(write(state))
    write_atomic(path, save(tensors, {_KEY: structure}))


def load_state(path: Path) -> dict[str, Any]:
    """The saved state, or an empty dict where there is none."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        structure = json.loads(file.metadata()[_KEY])

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return [read(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        return tensors[value["tensor"]] if "tensor" in value else {key: read(inner) for key, inner in value["items"]}

    found = read(structure)
    assert isinstance(found, dict)
    return found

"""Our kohya names against what diffusers' own loader of such files makes of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from full_size import FAMILIES, modules_of, paths_of

from sdlora.adapter.keys import find_module, read_key, write_keys


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_takes_every_name_for_the_same_module(family: str) -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    modules = modules_of(family)
    paths = [
        p
        for p in paths_of(family)
        if isinstance(find_module(modules, p), nn.Linear | nn.Conv2d) and not p.endswith("text_projection")
    ]
    assert len(paths) > 250
    written = {}
    for number, path in enumerate(paths):
        down, up = write_keys(path, "kohya", family)
        written[down], written[up] = torch.tensor([number, 0]), torch.tensor([number, 1])
    if family == "sdxl":
        written = _maybe_map_sgm_blocks_to_diffusers(written, modules["unet"].config)
    found, _ = _convert_non_diffusers_lora_to_diffusers(written)
    assert len(found) == 2 * len(paths)
    for key, value in found.items():
        number, side = value.tolist()
        # diffusers gives a text encoder's attention names of its own, which it translates once more later
        for ours, theirs in {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora"}.items():
            if key.startswith("text_encoder"):
                key = key.replace(theirs, f"{ours}.lora")
        if key.startswith("text_encoder"):
            key = key.replace("to_out_lora", "out_proj.lora")
        role = read_key(key, family)
        assert role is not None, key
        assert (role.path, role.role) == (paths[number], ("down", "up")[side]), key

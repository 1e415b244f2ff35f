"""A base whose linear layers are kept in 8 or 4 bits, for training on it (QLoRA)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from ..adapter.quantised import Quantisation, QuantisedLinear, load_bitsandbytes
from ..errors import ConfigError
from .family import Base

NF4_DEVICES = ("cuda", "cpu")


def check_quantise(kind: Literal["none", "int8", "nf4"], device: torch.device) -> None:
    """Finds what the quantisation lacks before a base is loaded.

    Raises: ConfigError where the package is missing or does not know the device.
    """
    if kind == "nf4":
        load_bitsandbytes()
        if device.type not in NF4_DEVICES:
            raise ConfigError(f'quantise = "nf4" runs on cuda and cpu, not on {device.type}; use quantise = "int8"')


def quantise_base(base: Base, kind: Literal["none", "int8", "nf4"], parts: Sequence[str], *, own: bool) -> Base:
    """A Base whose linear layers in these parts are in few bits; LoRAs must be merged into it before.

    With `own`, the base's modules themselves are changed, so that each dense weight leaves memory as it is packed;
    without it they stay as they were, and share with the result all that is not packed.

    Raises: ConfigError where the quantisation lacks its package or device.
    """
    if kind == "none":
        return base
    check_quantise(kind, base.device)
    modules = dict(base.modules)
    for part in parts:
        module = modules[part] if own else copy_tree(modules[part], {})
        _pack(module, kind)
        modules[part] = module
    return replace(base, modules=modules, extra={**base.extra, "quantised": kind})


def _pack(module: nn.Module, kind: Quantisation) -> None:
    for inner in list(module.modules()):
        for name, child in list(inner.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(child, QuantisedLinear):
                inner._modules[name] = QuantisedLinear(child, kind)


def copy_tree(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """The module and all inside it as new modules over the same tensors; `copies` has, by id, those made already."""
    if id(module) not in copies:
        new = copy.copy(module)
        new.__dict__ = {k: v.copy() if type(v) in (dict, OrderedDict) else v for k, v in module.__dict__.items()}
        copies[id(module)] = new
        new._modules = {k: None if m is None else copy_tree(m, copies) for k, m in module._modules.items()}
    return copies[id(module)]

"""The optimizers by name, each from the library that keeps it, imported only when it is asked for."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError, RunError

Groups = list[dict[str, Any]]
PACKAGES = {
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "prodigyopt"),
    "lion": ("lion_pytorch", "lion-pytorch"),
    "schedule-free": ("schedulefree", "schedulefree"),
}
"""The module of an optimizer that is not always installed, and the package that brings it."""


def check_optimizer(name: str, device: torch.device) -> None:
    """Finds what an optimizer lacks before any work is done.

    Raises: ConfigError naming the package that is missing; RunError where it needs a GPU.
    """
    if name in PACKAGES:
        _load(name)
    if name == "adamw8bit" and device.type == "cpu":
        raise RunError('optimizer = "adamw8bit" needs a GPU; use adamw')


def build_optimizer(name: str, groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer over groups that each have their own `lr`, and their own weight decay where they differ.

    Raises: ConfigError for a package that is missing.
    Source: Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2 (adamw); Dettmers et al. 2022,
    8-bit Optimizers via Block-wise Quantization; Shazeer & Stern 2018, Adafactor; Mishchenko & Defazio 2024, Prodigy;
    Chen et al. 2023, Symbolic Discovery of Optimization Algorithms; Defazio et al. 2024, The Road Less Scheduled.
    """
    return _BUILDERS[name](groups, weight_decay)


def _adamw(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=device in ("cpu", "cuda"))


def _adafactor(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # The learning rate is the recipe's: without this it would be scaled by the weights, and up factors start at 0.
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(groups, lr=groups[0]["lr"], weight_decay=weight_decay, **fixed)  # type: ignore[no-any-return, no-untyped-call]


def _adamw8bit(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return _load("adamw8bit").optim.AdamW8bit(groups, weight_decay=weight_decay)  # type: ignore[no-any-return]


def _prodigy(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    options = {"weight_decay": weight_decay, "use_bias_correction": True, "safeguard_warmup": True}
    with contextlib.redirect_stdout(io.StringIO()):  # it says there what weight decay it uses
        return _load("prodigy").Prodigy(groups, lr=groups[0]["lr"], **options)  # type: ignore[no-any-return]


def _lion(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return _load("lion").Lion(groups, lr=groups[0]["lr"], weight_decay=weight_decay)  # type: ignore[no-any-return]


def _schedule_free(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    module = _load("schedule-free")
    return module.AdamWScheduleFree(groups, lr=groups[0]["lr"], weight_decay=weight_decay)  # type: ignore[no-any-return]


_BUILDERS: dict[str, Callable[[Groups, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "lion": _lion,
    "schedule-free": _schedule_free,
}


def _load(name: str) -> Any:
    module, package = PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f'optimizer = "{name}" needs the package {package}; pip install {package}, or sdlora[optimizers] for all'
        ) from None

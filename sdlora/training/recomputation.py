"""What is not kept for the backward pass but computed again: feed-forward layers, or whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

How = Literal["none", "feed-forward", "all"]
Runner = Callable[..., Any]
"""Runs a function with its arguments, and does not keep what it saves for the backward pass."""


def run_again(function: Callable[..., Any], *args: Any) -> Any:
    """Runs it now, keeping its inputs alone, and once more in the backward pass.

    Nothing in a frozen base draws at random and the layers' dropout is addressed, so no generator is put back.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputing(modules: Mapping[str, nn.Module], how: How, run: Runner = run_again) -> Iterator[None]:
    """Within it, the UNet and the text encoders among a base's modules keep less; afterwards they are as before.

    `feed-forward` keeps nothing from inside the feed-forward layers, which hold a third of it; `all` keeps the inputs
    of resnets and transformer blocks alone. Gradients are the same. Source: Chen et al. 2016, Training Deep Nets with
    Sublinear Memory Cost, section 4.
    """
    with ExitStack() as undo:
        for part, module in modules.items():
            if part == "unet" and how == "all":
                undo.enter_context(_checkpointing(module, run))
            elif part != "vae" and how != "none":
                for inner in _find(module, part, how):
                    undo.enter_context(_rerunning(inner, run))
        yield


def _find(module: nn.Module, part: str, how: How) -> list[nn.Module]:
    """The modules inside that are run again, of which none lies in another."""
    from diffusers.models.attention import FeedForward
    from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

    kind: type[nn.Module] = FeedForward if part == "unet" else CLIPMLP if how == "feed-forward" else CLIPEncoderLayer
    return [inner for inner in module.modules() if isinstance(inner, kind)]


@contextmanager
def _rerunning(module: nn.Module, run: Runner) -> Iterator[None]:
    """transformers' own checkpointing is for models in training mode alone, and diffusers has none of one layer."""
    own: Any = module.__dict__.get("forward")
    original = module.forward

    def forward(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **options)
        return run(lambda *values: original(*values, **options), *args)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own  # type: ignore[method-assign]


@contextmanager
def _checkpointing(unet: Any, run: Runner) -> Iterator[None]:
    """diffusers' own checkpointing, and every module's attributes as they were afterwards."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(m, {n: m.__dict__[n] for n in names if n in m.__dict__}) for m in unet.modules()]
    unet.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        for module, values in before:
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)

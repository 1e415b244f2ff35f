"""Which modules of a base get a LoRA, and of what rank and alpha."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..targets import (
    UNET_KINDS,
    check_block_ranks,
    check_blocks,
    check_targets,
    endings_of,
    lies_in,
    parse_block_rank,
    prefix_of,
)
from ..values import suggest
from .keys import canonical_path

Targets = Mapping[str, tuple[str, ...]]
"""By part: kinds of modules (`attention`, `feed-forward`, …) and ends of module names (`to_q`, `ff.net.2`)."""


@dataclass(frozen=True)
class LayerPlan:
    """What is not the same for every layer, and what kind the layers are; the defaults are plain LoRA everywhere."""

    blocks: tuple[str, ...] = ()
    """Blocks of the UNet (`down`, `up.0`, `up.0.attentions.1`, `style-only`); none means all."""
    block_ranks: tuple[str, ...] = ()
    """`BLOCK=RANK[:ALPHA]`, the longest block wins; without an alpha, alpha / rank is that of the rest."""
    conv_rank: int | None = None
    """Rank of convolutions larger than 1 × 1, in every block."""
    conv_alpha: float | None = None
    rank_stabilised: bool = False
    """Scales by alpha / √rank. Source: Kalajdzievski 2023, A Rank Stabilization Scaling Factor, theorem 3.2."""
    dora: bool = False
    dropout: float = 0.0
    """The share of each layer's input that is dropped for its low-rank part; below, of its rank and of the layers."""
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def describe(self) -> list[str]:
        """A few words for everything that is not the default."""
        lines = [f"only in {', '.join(self.blocks)}"] if self.blocks else []
        lines += [f"ranks by block {', '.join(self.block_ranks)}"] if self.block_ranks else []
        if self.conv_rank is not None or self.conv_alpha is not None:
            rank = "the same rank" if self.conv_rank is None else f"rank {self.conv_rank}"
            alpha = "" if self.conv_alpha is None else f", alpha {self.conv_alpha:g}"
            lines.append(f"convolutions of {rank}{alpha}")
        lines += ["rank-stabilised: scale alpha / √rank"] if self.rank_stabilised else []
        lines += ["DoRA"] if self.dora else []
        shares = {"the input": self.dropout, "the rank": self.rank_dropout, "whole modules": self.module_dropout}
        dropped = [f"{share:g} of {what}" for what, share in shares.items() if share]
        return lines + ([f"drops {', '.join(dropped)}"] if dropped else [])


@dataclass(frozen=True)
class Site:
    """One module to adapt, its canonical path, and its LoRA's size; alpha / rank is the scale whatever the plan."""

    path: str
    module: nn.Linear | nn.Conv2d
    rank: int
    alpha: float


def find_sites(
    modules: Mapping[str, nn.Module], targets: Targets, rank: int, alpha: float, plan: LayerPlan
) -> list[Site]:
    """The modules that the targets name, in the blocks of the plan, in the model's order.

    Raises: ConfigError where a target, a block, a block's rank or a part matches nothing, or a target no Linear or
    Conv2d.
    """
    check_blocks(plan.blocks)
    check_block_ranks(plan.block_ranks)
    if not any(targets.values()):
        raise ConfigError("no module is named to be adapted; give at least one target")
    found = {part: _matches(modules, part, words, plan) for part, words in targets.items()}
    for word in dict.fromkeys(word for words in targets.values() for word in words):
        asked = [part for part, words in targets.items() if word in words]
        if not any(word in hits for part in asked for _, _, hits in found[part]):
            raise ConfigError(_matches_nothing(word, asked, plan))
    for part, matches in found.items():
        if not matches:
            words = ", ".join(targets[part]) or "none"
            raise ConfigError(f"no target ({words}) matches a module of {part}; add attention, or leave {part} out")
    sites = [Site(path, m, *_size(path, m, rank, alpha, plan)) for ms in found.values() for path, m, _ in ms]
    _check_used(sites, plan)
    return sites


def _matches(
    modules: Mapping[str, nn.Module], part: str, words: tuple[str, ...], plan: LayerPlan
) -> list[tuple[str, nn.Linear | nn.Conv2d, set[str]]]:
    """Path, module and the words that match it, of the part's modules in the plan's blocks."""
    check_targets(words or ("attention",))
    if part not in modules:
        raise ConfigError(f"target part {part!r} is not loaded; the base has {', '.join(sorted(modules))}")
    endings = {word: endings_of(word, part) for word in words}
    blocks = [prefix_of(block) for block in plan.blocks] if part == "unet" else []
    found: list[tuple[str, nn.Linear | nn.Conv2d, set[str]]] = []
    for name, module in modules[part].named_modules():
        path = canonical_path(part, name)
        if blocks and not any(lies_in(path, block) for block in blocks):
            continue
        hits = {w for w, ends in endings.items() if any(name == e or name.endswith(f".{e}") for e in ends)}
        if not hits:
            continue
        if not isinstance(module, nn.Linear | nn.Conv2d) or (isinstance(module, nn.Conv2d) and module.groups != 1):
            kind = type(module).__name__
            raise ConfigError(f"target {min(hits)!r} matches {part}.{name}, a {kind}, not a Linear or Conv2d")
        if "forward" in module.__dict__:
            raise ConfigError(f"{part}.{name} already runs with another forward; detach what is attached to it first")
        found.append((path, module, hits))
    return found


def _matches_nothing(word: str, parts: list[str], plan: LayerPlan) -> str:
    where = f"{' or '.join(parts)}" + (f" in {', '.join(plan.blocks)}" if plan.blocks else "")
    hint = "; see the module names of the base" if word not in UNET_KINDS else ""
    return f"target {word!r} matches no module of {where}{suggest(word, UNET_KINDS) if hint else ''}{hint}"


def _size(path: str, module: nn.Linear | nn.Conv2d, rank: int, alpha: float, plan: LayerPlan) -> tuple[int, float]:
    """The rank and alpha of one module's layer."""
    own_rank, own_alpha = rank, alpha
    inside = [x for x in map(parse_block_rank, plan.block_ranks) if lies_in(path, x.prefix)]
    if inside:
        block = max(inside, key=lambda x: x.prefix.count("."))
        own_rank, own_alpha = block.rank, alpha * block.rank / rank if block.alpha is None else block.alpha
    if _is_wide(module):
        if plan.conv_rank is not None:
            own_rank, own_alpha = plan.conv_rank, alpha * plan.conv_rank / rank
        if plan.conv_alpha is not None:
            own_alpha = plan.conv_alpha
    if plan.rank_stabilised:
        # A file has the rule alpha / rank only; what it can hold is what is trained with.
        own_alpha = float(torch.tensor(own_alpha * math.sqrt(own_rank), dtype=torch.float32))
    return own_rank, own_alpha


def _is_wide(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1


def _check_used(sites: list[Site], plan: LayerPlan) -> None:
    for block in plan.blocks:
        if not any(lies_in(site.path, prefix_of(block)) for site in sites):
            raise ConfigError(f"block {block!r} has no module that is targeted; {_known_blocks(sites)}")
    for text in plan.block_ranks:
        if not any(lies_in(site.path, parse_block_rank(text).prefix) for site in sites):
            raise ConfigError(f"block_ranks has {text!r}, where nothing is adapted; {_known_blocks(sites)}")
    if (plan.conv_rank, plan.conv_alpha) != (None, None) and not any(_is_wide(site.module) for site in sites):
        name = "conv_rank" if plan.conv_rank is not None else "conv_alpha"
        raise ConfigError(f"{name} has no convolution larger than 1×1 to act on; add convolutions to the targets")


def _known_blocks(sites: list[Site]) -> str:
    blocks = list(dict.fromkeys(_short_names(sites)))
    return f"adapted are {', '.join(blocks[:12])}"


def _short_names(sites: list[Site]) -> Iterator[str]:
    for site in sites:
        part, first, *rest = site.path.split(".")
        if part != "unet":
            yield part
        elif first in ("down_blocks", "up_blocks") and rest:
            yield f"{first.removesuffix('_blocks')}.{rest[0]}"
        elif first == "mid_block":
            yield "mid"


__all__ = ["LayerPlan", "Site", "Targets", "find_sites"]

"""What of a base can be adapted, by name: kinds of modules, blocks of the UNet, and ranks by block."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import ConfigError
from .values import suggest

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
UNET_KINDS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "self-attention": tuple(f"attn1.{name}" for name in _ATTENTION),
    "cross-attention": tuple(f"attn2.{name}" for name in _ATTENTION),
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": ("proj_in", "proj_out"),
    "convolutions": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time": ("time_emb_proj",),
}
"""What a UNet's modules of each kind end with."""
TEXT_KINDS: dict[str, tuple[str, ...]] = {
    "attention": _CLIP_ATTENTION,
    "self-attention": _CLIP_ATTENTION,
    "feed-forward": ("mlp.fc1", "mlp.fc2"),
}
"""What a CLIP text encoder's modules of each kind end with; it has no module of the other kinds."""
BLOCK_SETS = {"content-only": "up.0.attentions.0", "style-only": "up.0.attentions.1"}
"""SDXL's blocks that hold a picture's content and its style. Source: Frenkel et al. 2024, B-LoRA, section 4."""
BLOCK_SETS_FAMILY = "sdxl"
_UNET_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)
_BLOCK = re.compile(r"(down|mid|up)(\.[A-Za-z0-9_]+)*", re.ASCII)
_RANKED = re.compile(r"(down|mid|up|text_encoder|text_encoder_2)(\.[A-Za-z0-9_]+)*", re.ASCII)
_SIZE = re.compile(r"(?P<rank>[0-9]{1,4})(:(?P<alpha>[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?))?", re.ASCII)
MAX_RANK = 1024


def endings_of(word: str, part: str) -> tuple[str, ...]:
    """What the modules of a part end with that a target names: of a kind's word, those of the kind; else the word."""
    kinds = UNET_KINDS if part == "unet" else TEXT_KINDS
    if word in UNET_KINDS:
        return kinds.get(word, ())
    return (word,)


def check_targets(words: tuple[str, ...]) -> None:
    """Raises: ConfigError for no word, or one that is neither a kind nor how a module's name can end."""
    if not words:
        raise ConfigError(f"targets = [] adapts nothing; give at least one of {', '.join(UNET_KINDS)}")
    for word in words:
        if word not in UNET_KINDS and not _NAME.fullmatch(word):
            near = suggest(word, UNET_KINDS) or f"; use {', '.join(UNET_KINDS)}, or the end of a module's name"
            raise ConfigError(f"target {word!r} is not known{near}")


def prefix_of(block: str) -> str:
    """The start of the module paths in a block: `unet.up_blocks.0` for `up.0`; a text encoder's keep `text_model.`.

    Raises: ConfigError where no block is called so.
    """
    block = BLOCK_SETS.get(block, block)
    if not _RANKED.fullmatch(block):
        known = "down, mid, up, down.1, up.0.attentions.1"
        raise ConfigError(f"block {block!r} is not known; use one such as {known}, or {' or '.join(BLOCK_SETS)}")
    first, _, rest = block.partition(".")
    if first in _UNET_BLOCKS:
        return ".".join(filter(None, ("unet", _UNET_BLOCKS[first], rest)))
    return f"{first}.text_model.encoder.layers.{rest}" if rest else first


def check_blocks(blocks: tuple[str, ...]) -> None:
    """Raises: ConfigError for a word that names no block of a UNet."""
    for block in blocks:
        if block not in BLOCK_SETS and not _BLOCK.fullmatch(block):
            near = suggest(block, BLOCK_SETS) or "; use down, mid, up or a part of one, such as up.0.attentions.1"
            raise ConfigError(f"block {block!r} is not known{near}")


def lies_in(path: str, prefix: str) -> bool:
    """Whether a module path is the prefix or lies under it."""
    return path == prefix or path.startswith(f"{prefix}.")


@dataclass(frozen=True)
class BlockRank:
    """The rank, and where given the alpha, of a block's layers."""

    text: str
    prefix: str
    rank: int
    alpha: float | None


def parse_block_rank(text: str) -> BlockRank:
    """Reads BLOCK=RANK[:ALPHA], such as `up.0=16:8`.

    Raises: ConfigError for another form, an unknown block, or a rank or alpha out of range.
    """
    block, equals, size = text.partition("=")
    found = _SIZE.fullmatch(size.strip())
    if not equals or found is None:
        raise ConfigError(f"block_ranks has {text!r}; write BLOCK=RANK or BLOCK=RANK:ALPHA, such as up.0=16:8")
    rank, alpha = int(found["rank"]), float(found["alpha"]) if found["alpha"] else None
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"block_ranks has {text!r}: rank {rank} is out of range; give 1 to {MAX_RANK}")
    if alpha is not None and not (0 < alpha < math.inf):
        raise ConfigError(f"block_ranks has {text!r}: alpha {alpha:g} is out of range; give a number above 0")
    return BlockRank(text, prefix_of(block.strip()), rank, alpha)


def check_block_ranks(texts: tuple[str, ...]) -> None:
    """Raises: ConfigError for an entry that cannot be read, or a block that is named twice."""
    seen: dict[str, str] = {}
    for text in texts:
        prefix = parse_block_rank(text).prefix
        if prefix in seen:
            raise ConfigError(f"block_ranks names one block twice: {seen[prefix]!r} and {text!r}; keep one")
        seen[prefix] = text

"""SDXL's UNet under the names of its first release, which kohya's files use, and back.

That release numbers the blocks through: `input_blocks.0` is the first convolution, then every resnet (with the
attention behind it) and every downsampler takes one number; `output_blocks` counts the resnets of the way up.
Source: Stability AI's generative-models, `sgm/modules/diffusionmodules/openaimodel.py`, `UNetModel`.
"""

from __future__ import annotations

LEVELS = 3
"""Resolutions of the UNet: down blocks, and as many up blocks."""
RESNETS = 2
"""Resnets of a down block; an up block has one more."""

OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
"""`out_0` and `out_2` stand for `out.0` and `out.2`: `out` is no word of its own, or `proj_out` could be read twice."""
INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Inside a resnet; what is inside an attention has the same names in both."""


def _number_blocks() -> dict[str, str]:
    """diffusers' name of each block -> the original one."""
    names = dict(OUTER)
    step = RESNETS + 1  # numbers that a level takes: down, its resnets and the downsampler; up, its resnets
    for level in range(LEVELS):
        for i in range(RESNETS):
            number = 1 + level * step + i
            names[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{number}.1"
        for i in range(step):
            number = level * step + i
            names[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{number}.1"
        if level + 1 < LEVELS:  # the last level has no sampler
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * step}.0.op"
            names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{(level + 1) * step - 1}.2.conv"
    return names


TO_ORIGINAL = _number_blocks()
FROM_ORIGINAL = {original: name for name, original in TO_ORIGINAL.items()}
_FROM_INNER = {original: name for name, original in INNER.items()}
# fmt: off
WORDS = frozenset((
    "input_blocks", "middle_block", "output_blocks", "op", "out_0", "out_2", "time_embed", "label_emb",
    "in_layers", "emb_layers", "out_layers", "skip_connection",
))
# fmt: on
"""The words of the original names that diffusers' do not have."""


def original_name(name: str) -> str | None:
    """The original name of a UNet module (`conv_out` gives `out_2`), or None where SDXL's UNet has none."""
    found = _split(name, TO_ORIGINAL)
    if found is None:
        return None
    block, original, rest = found
    if ".resnets." in block and rest:
        inner = INNER.get(rest)
        return None if inner is None else f"{original}.{inner}"
    return f"{original}.{rest}" if rest else original


def diffusers_name(original: str) -> str | None:
    """The name of a UNet module in diffusers for its original one, or None where it is none."""
    found = _split(original, FROM_ORIGINAL)
    if found is None:
        return None
    _, name, rest = found
    if ".resnets." in name and rest:
        inner = _FROM_INNER.get(rest)
        return None if inner is None else f"{name}.{inner}"
    return f"{name}.{rest}" if rest else name


def _split(name: str, table: dict[str, str]) -> tuple[str, str, str] | None:
    """The longest start of a name that the table has, what the table gives for it, and the rest."""
    words = name.split(".")
    for size in range(len(words), 0, -1):
        start = ".".join(words[:size])
        if start in table:
            rest = ".".join(words[size:])
            pair = f"{start} {table[start]}"
            holds_others = ".resnets." in pair or ".attentions." in pair
            return (start, table[start], rest) if holds_others or not rest else None
    return None

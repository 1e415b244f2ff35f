"""Names of modules in LoRA files: kohya's, diffusers' and PEFT's for one canonical path.

A canonical path is a part (`unet`, `text_encoder`) and the module's dotted name in diffusers or transformers;
a CLIP text encoder's names keep `text_model.`, whichever way the installed transformers lays the model out. With
`.bias` behind it, it is the bias of that module (`vector.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor, nn

from . import lycoris, original, positional
from .vector import OF_BIAS, bias_of, split_parameter

FORMATS = ("kohya", "diffusers", "peft")


@dataclass(frozen=True)
class Grammar:
    """How one kind of model names its modules: kohya's prefix by part, and the words that a dotted name is made of."""

    prefixes: dict[str, str]
    words: dict[str, frozenset[str]]
    original_unet: bool = False
    """Whether kohya's names of the UNet are those of its first release (`adapter/original.py`), not diffusers'."""


# fmt: off
_UNET_WORDS = frozenset((
    "conv_in", "time_embedding", "linear_1", "linear_2", "conv_norm_out", "conv_out",
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
    "conv", "conv1", "conv2", "conv_shortcut", "norm1", "norm2", "norm3", "norm", "time_emb_proj",
    "proj_in", "proj_out", "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out",
    "ff", "net", "proj",
))
_CLIP_WORDS = frozenset((
    "text_model", "embeddings", "token_embedding", "position_embedding", "encoder", "layers",
    "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
    "layer_norm1", "layer_norm2", "mlp", "fc1", "fc2", "final_layer_norm",
))
# fmt: on

_SD1 = Grammar(
    prefixes={"unet": "lora_unet_", "text_encoder": "lora_te_"},
    words={"unet": _UNET_WORDS, "text_encoder": _CLIP_WORDS},
)
_SDXL = Grammar(
    prefixes={"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    words={
        "unet": _UNET_WORDS | {"add_embedding"} | original.WORDS,
        "text_encoder": _CLIP_WORDS,
        "text_encoder_2": _CLIP_WORDS | {"text_projection"},
    },
    original_unet=True,
)
GRAMMARS: dict[str, Grammar] = {"sd1": _SD1, "sd2": _SD1, "mini": _SD1, "sdxl": _SDXL}
"""By family; a family with other names is one more row."""
DEFAULT_FAMILY = "sd1"

SDXL_PREFIXES = (
    "lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_", "lora_te1_", "lora_te2_",
    "text_encoder_2.",
)  # fmt: skip
"""How a key starts that only a file for SDXL has."""
FOREIGN_PREFIXES: dict[str, str] = {
    "lora_unet_double_blocks_": "flux",
    "lora_unet_single_blocks_": "flux",
    "lora_unet_joint_blocks_": "sd3",
    "lora_te3_": "flux or sd3",
    "transformer.": "flux or sd3",
}
"""How a key of a family without a grammar starts: only to say which family a refused file is for."""

SUFFIXES: dict[str, tuple[str, str]] = {
    ".lora_down.weight": ("kohya", "down"),
    ".lora_up.weight": ("kohya", "up"),
    ".alpha": ("kohya", "alpha"),
    ".lora_A.weight": ("diffusers", "down"),
    ".lora_B.weight": ("diffusers", "up"),
    ".lora_A.default.weight": ("peft", "down"),
    ".lora_B.default.weight": ("peft", "up"),
    ".lora.down.weight": ("diffusers", "down"),
    ".lora.up.weight": ("diffusers", "up"),
    ".lora_linear_layer.down.weight": ("diffusers", "down"),
    ".lora_linear_layer.up.weight": ("diffusers", "up"),
    ".dora_scale": ("kohya", "magnitude"),
    ".lora_magnitude_vector": ("diffusers", "magnitude"),
    ".lora_magnitude_vector.weight": ("diffusers", "magnitude"),
    ".lora_magnitude_vector.default.weight": ("peft", "magnitude"),
    ".lora_mid.weight": ("kohya", "mid"),
    ".diff": ("kohya", "diff"),
    ".scalar": ("kohya", "scalar"),
    **{f".{role}": ("kohya", role) for role in lycoris.ROLES if "_" in role},
}
"""How the key of a module's tensor ends: the naming it belongs to, and the tensor's role."""
EMBEDDING_PREFIXES = ("bundle_emb.", "<")
"""How the keys of textual-inversion embeddings begin that come with a LoRA; they are kept, and not used."""

OLD_PROCESSOR_SUFFIXES: dict[str, str] = {
    ".processor.to_q_lora": ".to_q.lora",
    ".processor.to_k_lora": ".to_k.lora",
    ".processor.to_v_lora": ".to_v.lora",
    ".processor.to_out_lora": ".to_out.0.lora",
}
"""Names that diffusers wrote before 0.20, and what they are called since."""

OTHER_KINDS: dict[str, str] = {
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".lora_B.bias": "LoRA with bias",
    ".lora_up.bias": "LoRA with bias",
    ".on_input": "(IA)³",
}
"""Tensors that change what a file means: it cannot be read without them."""

PEFT_PREFIX = "base_model.model."
WRITTEN_SUFFIXES: dict[str, tuple[str, str]] = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
}
MAGNITUDE_SUFFIXES: dict[str, str] = {
    "kohya": ".dora_scale",
    "diffusers": ".lora_magnitude_vector",
    "peft": ".lora_magnitude_vector",
}


class Role(NamedTuple):
    """What one key of a file is: its canonical path, its role (`down`, `up`, `alpha`, `magnitude`), the naming."""

    path: str
    role: str
    format: str


def canonical_path(part: str, name: str) -> str:
    """The canonical path of the module `name` of a part, as `named_modules` gives it."""
    flattened = part.startswith("text_encoder") and name.split(".")[0] in ("encoder", "embeddings", "final_layer_norm")
    return f"{part}.text_model.{name}" if flattened else f"{part}.{name}"


def find_module(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The module at a canonical path, in both layouts of a CLIPTextModel (with `text_model.` or flattened).

    Raises: KeyError where there is none.
    """
    part, _, name = path.partition(".")
    root = modules[part]
    names = [name]
    if part.startswith("text_encoder") and name.startswith("text_model."):
        names.append(name.removeprefix("text_model."))
    for candidate in filter(None, names):
        try:
            return root.get_submodule(candidate)
        except AttributeError:
            continue
    raise KeyError(path)


def find_parameter(modules: Mapping[str, nn.Module], path: str) -> nn.Parameter:
    """The weight or the bias that a canonical path means. Raises: KeyError where there is none."""
    module, name = split_parameter(path)
    found = getattr(find_module(modules, module), name, None)
    if not isinstance(found, Tensor):
        raise KeyError(path)
    return cast(nn.Parameter, found)


def split_words(name: str, words: frozenset[str]) -> str | None:
    """The dotted form of an underscored name, or None where it is not made of the words and numbers.

    The longest word wins; no name of the grammars can be read in two ways (a test goes over all of them).
    """
    pieces = name.split("_")
    longest = max(w.count("_") for w in words) + 1
    dotted: list[str] = []
    at = 0
    while at < len(pieces):
        for size in range(min(longest, len(pieces) - at), 0, -1):
            word = "_".join(pieces[at : at + size])
            if word in words or (size == 1 and _is_index(word)):
                dotted.append(word)
                at += size
                break
        else:
            return None
    return ".".join(dotted)


def is_known(path: str, family: str = DEFAULT_FAMILY) -> bool:
    """Whether the grammar of the family can name the canonical path."""
    part, _, name = split_parameter(path)[0].partition(".")
    grammar = GRAMMARS[family]
    words = grammar.words.get(part)
    if words is None or not name or not all(w in words or _is_index(w) for w in name.split(".")):
        return False
    return part != "unet" or not grammar.original_unet or original.original_name(name) is not None


def kohya_name(path: str, family: str = DEFAULT_FAMILY) -> str:
    """kohya's name of a module: `lora_unet_…_to_q` for `unet.….to_q`.

    Raises: KeyError where the family has no such part or module.
    """
    part, _, name = path.partition(".")
    grammar = GRAMMARS[family]
    if part == "unet" and grammar.original_unet:
        first = original.original_name(name)
        if first is None:
            raise KeyError(path)
        name = first
    return grammar.prefixes[part] + name.replace(".", "_")


def path_of_kohya(name: str, family: str = DEFAULT_FAMILY) -> str | None:
    """The canonical path of kohya's module name, or None where it is none of the family's."""
    grammar = GRAMMARS[family]
    for part, prefix in grammar.prefixes.items():
        if name.startswith(prefix):
            dotted = split_words(name.removeprefix(prefix), grammar.words[part])
            if dotted is None:
                return None
            if part == "unet" and grammar.original_unet:  # some tools give SDXL's blocks diffusers' names
                dotted = original.diffusers_name(dotted) or dotted
            path = canonical_path(part, dotted)
            return path if is_known(path, family) else None
    return None


def path_of_dotted(name: str, family: str = DEFAULT_FAMILY) -> str | None:
    """The canonical path of a diffusers or PEFT module name, or None where it is none of the family's.

    A PEFT file of a single model leaves the part out; `text_model.` then tells the text encoder from the UNet.
    """
    bare = name.removeprefix(PEFT_PREFIX)
    part, _, rest = bare.partition(".")
    if part in GRAMMARS[family].prefixes:
        path = canonical_path(part, rest)
    else:
        path = canonical_path("text_encoder", bare)
        path = path if path.startswith("text_encoder.text_model.") else f"unet.{bare}"
    return path if is_known(path, family) else None


def read_key(key: str, family: str = DEFAULT_FAMILY) -> Role | None:
    """What a file's key is, or None where it is no key of a module of the family."""
    if (found := positional.read_positional(key)) is not None:
        return Role(*found, "positional") if is_known(found[0], family) else None
    for old, new in OLD_PROCESSOR_SUFFIXES.items():
        key = key.replace(old, new)
    for suffix, (naming, role) in SUFFIXES.items():
        if key.endswith(suffix):
            name = key.removesuffix(suffix)
            if "." not in name:
                path = path_of_kohya(name, family)
                naming = "kohya"
            else:
                path = path_of_dotted(name, family)
                naming = "peft" if name.startswith(PEFT_PREFIX) else "diffusers" if naming == "kohya" else naming
            if path is not None and role in OF_BIAS:
                path = bias_of(path)
            return None if path is None else Role(path, role, naming)
    return None


def uses_sdxl_names(keys: Iterable[str]) -> bool:
    """Whether a key is one that only a file for SDXL has."""
    return any(key.removeprefix(PEFT_PREFIX).startswith(SDXL_PREFIXES) for key in keys)


def foreign_family(keys: Iterable[str]) -> str:
    """The family without a grammar that a file's keys tell of, such as `flux`; empty where they tell of none."""
    for key in keys:
        for start, family in FOREIGN_PREFIXES.items():
            if key.removeprefix(PEFT_PREFIX).startswith(start):
                return family
    return ""


def other_kind(key: str) -> str | None:
    """The kind of adapter that a key belongs to where it is one that is not read, such as `LoHa`."""
    for mark, kind in OTHER_KINDS.items():
        if key.endswith(mark) or (mark.endswith("_") and mark in key):
            return kind
    return None


def write_name(path: str, format: str, family: str = DEFAULT_FAMILY, single: bool = False) -> str:
    """A module's name in a file; where the file holds a `single` part, PEFT leaves the part's name out."""
    if format == "kohya":
        return kohya_name(path, family)
    if format == "peft":
        # Without its part's name, what is in a second text encoder would be read as the first's.
        bare = single and not path.startswith("text_encoder_2.")
        return PEFT_PREFIX + (path.partition(".")[2] if bare else path)
    return path


def write_keys(path: str, format: str, family: str = DEFAULT_FAMILY, single: bool = False) -> tuple[str, str]:
    """The keys of a module's down and up factors."""
    down, up = WRITTEN_SUFFIXES[format]
    name = write_name(path, format, family, single)
    return name + down, name + up


def _is_index(word: str) -> bool:
    return word.isascii() and word.isdigit() and (word == "0" or not word.startswith("0"))

"""What the package carries of each family, so that a single file loads offline: configurations, CLIP's vocabulary."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BaseModelError
from .folder import quiet

CARRIED = Path(__file__).parent / "carried"
FAMILIES = ("sd1", "sd2", "sdxl")
NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
CLIP_WORDS = 49408
CLIP_TOKENS = 77
_MERGES = CLIP_WORDS - 2 * 256 - 2

MAY_DIFFER: dict[str, frozenset[str]] = {
    "unet": frozenset((
        "block_out_channels", "layers_per_block", "down_block_types", "up_block_types",
        "attention_head_dim", "cross_attention_dim", "transformer_layers_per_block", "use_linear_projection",
        "upcast_attention", "norm_num_groups", "norm_eps", "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )),
    "vae": frozenset((
        "block_out_channels", "layers_per_block", "down_block_types", "up_block_types",
        "norm_num_groups", "scaling_factor", "force_upcast",
    )),
    "text_encoder": frozenset((
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "projection_dim",
        "layer_norm_eps",
    )),
}  # fmt: skip
"""What of a part's configuration a file written here may say differs from the family's."""
_MOST_LAYERS = 128
_MOST = 65_536


@functools.cache
def read_family(family: str) -> dict[str, Any]:
    """The carried configurations of a family: of each part, and `scheduler`."""
    values: dict[str, Any] = json.loads((CARRIED / f"{family}.json").read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if isinstance(value, dict)}


def part_names(family: str) -> list[str]:
    """The parts of a family: unet, vae and its text encoders."""
    return [name for name in read_family(family) if name != "scheduler"]


def choose_config(family: str, part: str, differing: Mapping[str, Any]) -> dict[str, Any]:
    """The part's configuration with what differs in it from the family's.

    Raises: BaseModelError where a difference is no known one, or of a size that no such model has.
    """
    allowed = MAY_DIFFER["text_encoder" if part.startswith("text_encoder") else part]
    for key, value in differing.items():
        if key not in allowed or not _is_plausible(key, value):
            raise BaseModelError(f"{part} with {key} = {str(value)[:60]} is no {NAMES[family]}; give another base")
    return {**read_family(family)[part], **differing}


def _is_plausible(key: str, value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 16 and all(_is_plausible(key, v) and not isinstance(v, list) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return 0 <= value <= (_MOST_LAYERS if "layers" in key else _MOST)
    if isinstance(value, float):
        return 0 < value < _MOST
    return isinstance(value, bool) or value is None or (isinstance(value, str) and len(value) <= 64)


def make_part(family: str, part: str, config: Mapping[str, Any]) -> nn.Module:
    """An empty model of the part, its weights on the meta device: it takes no memory until weights are put into it.

    Raises: BaseModelError where the configuration makes no such model.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        with quiet(), torch.device("meta"):
            options = {"config": CLIPTextConfig(**values)} if part.startswith("text_encoder") else values
            module: nn.Module = kinds[part](**options)
            return module
    except Exception as e:  # a configuration from a file's metadata can be any nonsense
        reason = " ".join(str(e).split())[:120]
        raise BaseModelError(f"{part}: its sizes make no {NAMES[family]}: {reason}; give another base") from e


def fill_buffers(module: nn.Module, device: torch.device) -> None:
    """Gives the buffers that no file holds their values: a text encoder's position numbers, int64 [1, 77]."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            assert leaf == "position_ids", name
            value = torch.arange(buffer.shape[-1], device=device).expand(1, -1)
            setattr(module.get_submodule(owner), leaf, value)


def make_tokenizers(family: str) -> tuple[Any, ...]:
    """CLIP's tokenizer for each text encoder of the family, from the carried vocabulary.

    CLIP pads with its end token, OpenCLIP with token 0, which is `!`.
    """
    pads = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}[family]
    return tuple(make_clip_tokenizer(pad) for pad in pads)


def make_clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer of 49,408 words and 77 tokens, built from the carried byte-pair vocabulary."""
    from transformers import CLIPTokenizer

    words, merges = read_vocabulary()
    pairs: Any = list(merges)
    return CLIPTokenizer(vocab=dict(words), merges=pairs, model_max_length=CLIP_TOKENS, pad_token=pad_token)


@functools.cache
def read_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's words with their numbers, and its merges in order.

    The words are 256 bytes as characters, the same at the end of a word, one for each merge, and the two marks.
    Source: Radford et al. 2021, CLIP, section 2.4; the file's own header names its form.
    """
    with gzip.open(CARRIED / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")[1 : _MERGES + 1]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(c) for c in range(256, 256 + 256 - len(letters))]  # stand-ins for bytes that do not print
    words = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


def find_differing(family: str, part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model's configuration differs from the family's, as JSON values."""
    carried = read_family(family)[part]
    allowed = MAY_DIFFER["text_encoder" if part.startswith("text_encoder") else part]
    found: dict[str, Any] = {}
    for key in sorted(allowed):
        if key not in config:
            continue
        value = json.loads(json.dumps(config[key], default=list))
        if value != carried.get(key):
            found[key] = value
    return found

"""Names of modules: every name of the real models goes through each format and comes back."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from sdlora.adapter import keys
from sdlora.adapter.keys import canonical_path, find_module, kohya_name, path_of_kohya, read_key, write_keys


@functools.cache
def sd15_modules() -> dict[str, nn.Module]:
    """Stable Diffusion 1.5's UNet and text encoder without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return {"unet": unet, "text_encoder": text}


@functools.cache
def sd15_paths() -> list[str]:
    """Of every module that has weights."""
    return [
        canonical_path(part, n)
        for part, m in sd15_modules().items()
        for n, x in m.named_modules()
        if n and any(True for _ in x.parameters())
    ]


def test_sd15_has_as_many_adaptable_modules_as_kohya_files_of_it() -> None:
    linear = [p for p in sd15_paths() if isinstance(find_module(sd15_modules(), p), nn.Linear)]
    attention = [p for p in linear if p.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    text = [p for p in linear if p.startswith("text_encoder.")]
    assert (len(attention), len(text)) == (128, 72)  # 16 × 2 × 4, 12 × 6


def test_every_module_name_comes_back_from_kohyas() -> None:
    for path in sd15_paths():
        assert path_of_kohya(kohya_name(path)) == path
    assert len({kohya_name(p) for p in sd15_paths()}) == len(sd15_paths())


def test_no_name_can_be_split_in_two_ways() -> None:
    def splits(pieces: list[str], words: frozenset[str]) -> int:
        ways = [1] + [0] * len(pieces)
        for end in range(1, len(pieces) + 1):
            for begin in range(end):
                word = "_".join(pieces[begin:end])
                if word in words or (end - begin == 1 and word.isdigit()):
                    ways[end] += ways[begin]
        return ways[-1]

    for path in sd15_paths():
        part, _, name = path.partition(".")
        assert splits(name.replace(".", "_").split("_"), keys.GRAMMARS["sd1"].words[part]) == 1, path


@pytest.mark.parametrize("format", keys.FORMATS)
@pytest.mark.parametrize("single", [False, True])
def test_every_written_key_is_read_as_its_module_and_role(format: str, single: bool) -> None:
    for path in sd15_paths():
        down, up = write_keys(path, format, single=single)
        assert read_key(down) == (path, "down", format)
        assert read_key(up) == (path, "up", format)


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TE = "text_model.encoder.layers.3.self_attn"


@pytest.mark.parametrize(
    ("key", "path", "role", "format"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
            f"unet.{Q}.to_q",
            "down",
            "kohya",
        ),
        (f"lora_unet_{Q.replace('.', '_')}_to_out_0.alpha", f"unet.{Q}.to_out.0", "alpha", "kohya"),
        (
            "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight",
            f"text_encoder.{TE}.q_proj",
            "up",
            "kohya",
        ),
        (f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q", "down", "diffusers"),
        (f"unet.{Q}.to_q.lora.up.weight", f"unet.{Q}.to_q", "up", "diffusers"),
        (f"unet.{Q}.to_q.alpha", f"unet.{Q}.to_q", "alpha", "diffusers"),
        (f"unet.{Q}.processor.to_out_lora.down.weight", f"unet.{Q}.to_out.0", "down", "diffusers"),
        (f"text_encoder.{TE}.q_proj.lora_linear_layer.up.weight", f"text_encoder.{TE}.q_proj", "up", "diffusers"),
        (
            "text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight",
            f"text_encoder.{TE}.q_proj",
            "down",
            "diffusers",
        ),
        (f"base_model.model.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q", "down", "peft"),
        (f"base_model.model.{Q}.to_q.lora_B.default.weight", f"unet.{Q}.to_q", "up", "peft"),
        ("base_model.model.encoder.layers.3.self_attn.q_proj.lora_B.weight", f"text_encoder.{TE}.q_proj", "up", "peft"),
        (f"base_model.model.unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q", "down", "peft"),
    ],
)
def test_known_spellings(key: str, path: str, role: str, format: str) -> None:
    assert read_key(key) == (path, role, format)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",  # SDXL
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_unet_down_blocks_00_attentions_0.lora_down.weight",  # a leading zero would not come back
        "lora_unet_.lora_down.weight",
        "lora_unet_down_blocks__0.lora_down.weight",
        "lora_unet_down_blocks_0",
        "unet.nothing.lora_A.weight",
        "vae.encoder.conv_in.lora_A.weight",
        "unet..lora_A.weight",
        ".lora_A.weight",
        "",
        "bundle_emb.word.string_to_param",
    ],
)
def test_other_keys_are_no_names(key: str) -> None:
    assert read_key(key) is None


def test_find_module_knows_both_layouts_of_clip() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1)])})})

    old = Old()
    new = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1)])})})
    path = "text_encoder.text_model.encoder.layers.0"
    assert find_module({"text_encoder": old}, path) is old.text_model["encoder"]["layers"][0]
    assert find_module({"text_encoder": new}, path) is new["encoder"]["layers"][0]
    for missing in ("text_encoder.text_model.encoder.layers.1", "unet.encoder", "vae.x", "unet"):
        with pytest.raises(KeyError):
            find_module({"text_encoder": new, "unet": nn.Module()}, missing)

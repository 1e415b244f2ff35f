"""Names of modules: every name of the real models goes through each format and comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from full_size import FAMILIES, modules_of, paths_of

from sdlora.adapter import keys
from sdlora.adapter.keys import find_module, kohya_name, path_of_kohya, read_key, write_keys

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@pytest.mark.parametrize(
    ("family", "attention", "text", "text_2"), [("sd1", 128, 72, 0), ("sd2", 128, 138, 0), ("sdxl", 560, 72, 192)]
)
def test_a_family_has_as_many_adaptable_modules_as_kohyas_files_of_it(family, attention, text, text_2) -> None:
    linear = [p for p in paths_of(family) if isinstance(find_module(modules_of(family), p), nn.Linear)]
    text_paths = [p for p in linear if ".layers." in p]
    assert sum(p.startswith("unet.") and p.endswith(ATTENTION) for p in linear) == attention
    assert sum(p.startswith("text_encoder.") for p in text_paths) == text
    assert sum(p.startswith("text_encoder_2.") for p in text_paths) == text_2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_name_comes_back_from_kohyas(family: str) -> None:
    paths = paths_of(family)
    for path in paths:
        assert path_of_kohya(kohya_name(path, family), family) == path
    assert len({kohya_name(p, family) for p in paths}) == len(paths)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_can_be_split_in_two_ways(family: str) -> None:
    def splits(pieces: list[str], words: frozenset[str]) -> int:
        ways = [1] + [0] * len(pieces)
        for end in range(1, len(pieces) + 1):
            for begin in range(end):
                word = "_".join(pieces[begin:end])
                if word in words or (end - begin == 1 and word.isdigit()):
                    ways[end] += ways[begin]
        return ways[-1]

    grammar = keys.GRAMMARS[family]
    for path in paths_of(family):
        part = path.partition(".")[0]
        bare = kohya_name(path, family).removeprefix(grammar.prefixes[part])
        assert splits(bare.split("_"), grammar.words[part]) == 1, path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", keys.FORMATS)
@pytest.mark.parametrize("single", [False, True])
def test_every_written_key_is_read_as_its_module_and_role(family: str, format: str, single: bool) -> None:
    for path in paths_of(family):
        down, up = write_keys(path, format, family, single=single)
        assert read_key(down, family) == (path, "down", format)
        assert read_key(up, family) == (path, "up", format)


SDXL_NAMES = {
    "unet.conv_in": "lora_unet_input_blocks_0_0",
    "unet.conv_out": "lora_unet_out_2",
    "unet.time_embedding.linear_2": "lora_unet_time_embed_2",
    "unet.add_embedding.linear_1": "lora_unet_label_emb_0_0",
    "unet.down_blocks.0.resnets.1.conv1": "lora_unet_input_blocks_2_0_in_layers_2",
    "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "unet.down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
    "unet.down_blocks.1.resnets.0.time_emb_proj": "lora_unet_input_blocks_4_0_emb_layers_1",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "unet.down_blocks.2.attentions.1.proj_in": "lora_unet_input_blocks_8_1_proj_in",
    "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": (
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "unet.mid_block.resnets.1.conv2": "lora_unet_middle_block_2_out_layers_3",
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_out_0"
    ),
    "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
    "unet.up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
    "unet.up_blocks.2.resnets.2.conv1": "lora_unet_output_blocks_8_0_in_layers_2",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj": (
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"
    ),
    "text_encoder_2.text_projection": "lora_te2_text_projection",
}


@pytest.mark.parametrize("path", SDXL_NAMES)
def test_names_of_sdxl_are_those_of_its_first_release(path: str) -> None:
    assert kohya_name(path, "sdxl") == SDXL_NAMES[path]


@pytest.mark.parametrize("path", SDXL_NAMES)
def test_sdxl_blocks_under_diffusers_names_are_read_too(path: str) -> None:
    part, _, name = path.partition(".")
    prefix = keys.GRAMMARS["sdxl"].prefixes[part]
    assert path_of_kohya(prefix + name.replace(".", "_"), "sdxl") == path


@pytest.mark.parametrize(
    "name",
    ["lora_unet_input_blocks_9_0_in_layers_2", "lora_unet_input_blocks_3_0_in_layers_2", "lora_unet_input_blocks_4_2",
     "lora_unet_middle_block_3_in_layers_2", "lora_unet_output_blocks_9_1_proj_in", "lora_unet_input_blocks_4_0_to_q",
     "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te3_text_model_encoder_layers_0_mlp_fc1"],
)  # fmt: skip
def test_what_sdxl_has_not_is_no_name(name: str) -> None:
    assert path_of_kohya(name, "sdxl") is None


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

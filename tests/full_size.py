"""The real models' modules without weights, for tests over all of their names."""

from __future__ import annotations

import functools

import torch
from torch import nn

from sdlora.adapter.keys import canonical_path

FAMILIES = ("sd1", "sd2", "sdxl")


@functools.cache
def modules_of(family: str) -> dict[str, nn.Module]:
    """UNet and text encoders of SD 1.5, SD 2.1 or SDXL on the meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    with torch.device("meta"):
        if family == "sd1":
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
            return {"unet": unet, "text_encoder": CLIPTextModel(clip_l)}
        if family == "sd2":
            unet = UNet2DConditionModel(
                sample_size=96,
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            )
            config = CLIPTextConfig(
                hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23
            )
            return {"unet": unet, "text_encoder": CLIPTextModel(config)}
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        config = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
        )
        return {
            "unet": unet,
            "text_encoder": CLIPTextModel(clip_l),
            "text_encoder_2": CLIPTextModelWithProjection(config),
        }


@functools.cache
def paths_of(family: str) -> list[str]:
    """Canonical paths of every module that has weights."""
    return [
        canonical_path(part, n)
        for part, m in modules_of(family).items()
        for n, x in m.named_modules()
        if n and any(True for _ in x.parameters(recurse=False))
    ]

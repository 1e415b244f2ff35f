"""A Stable Diffusion of random weights, small enough for every test: 64 px, latents 8 x 8, about 0.1 M parameters."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from sdlora.bases.family import Base
from sdlora.bases.sd import StableDiffusion

TEXT_WIDTH = 32
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def make_tiny_tokenizer():
    """Letters and the word `cat`; 77 tokens, as every CLIP has them."""
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("i", "n"), ("in", "k</w>"), ("a", "p"), ("ap", "p")]
    words = letters + [f"{c}</w>" for c in letters] + ["".join(m) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=77)


def make_tiny_parts(seed: int = 0, **unet_options) -> dict[str, nn.Module]:
    """`unet`, `vae` and `text_encoder` with random weights; the same seed gives the same bytes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = len(make_tiny_tokenizer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": TEXT_WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        }
        unet = UNet2DConditionModel(**(options | unet_options))
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.18215,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
                pad_token_id=words - 1,
            )
        )
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


def make_tiny_base(seed: int = 0, *, family: str = "mini", dtype: torch.dtype = torch.float32, **unet_options) -> Base:
    """A tiny Base on the CPU; `unet_options` go to UNet2DConditionModel (another width: LoRAs misfit)."""
    parts = make_tiny_parts(seed, **unet_options)
    return StableDiffusion(family).assemble(
        "tiny", parts, make_tiny_tokenizer(), SCHEDULE, torch.device("cpu"), dtype, fingerprint=f"tiny-{seed}"
    )


def save_tiny_pipeline(folder: Path, seed: int = 0, **unet_options) -> Path:
    """Writes the same tiny model as a diffusers folder and returns the folder."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    parts = make_tiny_parts(seed, **unet_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline(
            **parts,
            tokenizer=make_tiny_tokenizer(),
            scheduler=PNDMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "clip_sample"}, skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(folder)
    return Path(folder)

"""A Stable Diffusion of random weights, small enough for every test: 64 px, latents 8 x 8, about 0.1 M parameters."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from sdlora.bases.family import Base

TEXT_WIDTH, SECOND_WIDTH, POOLED_WIDTH = 32, 40, 24
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


def make_tiny_tokenizer(pad: str = "<|endoftext|>"):
    """Letters and the word `cat`; 77 tokens, as every CLIP has them; `pad` as the base's second tokenizer has it."""
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())  # "!" is the first, so its id is 0, as in CLIP
    merges = [("c", "a"), ("ca", "t</w>"), ("i", "n"), ("in", "k</w>"), ("a", "p"), ("ap", "p")]
    words = letters + [f"{c}</w>" for c in letters] + ["".join(m) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {w: i for i, w in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad)


def make_tiny_tokenizers(family: str) -> tuple:
    """One for each text encoder, padding as those of the family do."""
    pads = {"sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}.get(family, ("<|endoftext|>",))
    return tuple(make_tiny_tokenizer(pad) for pad in pads)


def make_tiny_parts(seed: int = 0, family: str = "mini", **unet_options) -> dict[str, nn.Module]:
    """`unet`, `vae`, `text_encoder` (and `text_encoder_2`) with random weights; the same seed gives the same bytes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**(UNET | FAMILY_UNET.get(family, {}) | unet_options))
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        )
        parts = {"unet": unet, "vae": vae, "text_encoder": _make_text_encoder(family)}
        if family == "sdxl":
            parts["text_encoder_2"] = _make_text_encoder(family, second=True)
    return parts


UNET = {
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
# As the real ones: SD 2.x by heads of one width, SDXL with its attention at the depths and its two kinds of condition.
FAMILY_UNET: dict[str, dict] = {
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": TEXT_WIDTH + SECOND_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 8,
    },
}


def _make_text_encoder(family: str, second: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = len(make_tiny_tokenizer())
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=SECOND_WIDTH if second else TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3 if family in ("sd2", "sdxl") else 2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu" if family == "sd2" or second else "quick_gelu",
        projection_dim=POOLED_WIDTH if second else 512,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=0 if family == "sd2" or second else words - 1,
    )
    return CLIPTextModelWithProjection(config) if second else CLIPTextModel(config)


def make_tiny_base(
    seed: int = 0, *, family: str = "mini", dtype: torch.dtype = torch.float32, schedule: dict | None = None,
    **unet_options,
) -> Base:  # fmt: skip
    """A tiny Base on the CPU; `unet_options` go to UNet2DConditionModel (another width: LoRAs misfit)."""
    from sdlora.bases.families import FAMILIES

    return FAMILIES[family].assemble(
        "tiny",
        make_tiny_parts(seed, family, **unet_options),
        make_tiny_tokenizers(family),
        SCHEDULE | (schedule or {}),
        torch.device("cpu"),
        dtype,
        fingerprint=f"tiny-{seed}",
    )


def make_tiny_sd2_base(seed: int = 0, **options) -> Base:
    """A tiny SD 2.x with velocity prediction: linear projections, a text encoder whose padding is "!"."""
    return make_tiny_base(seed, family="sd2", schedule={"prediction_type": "v_prediction"}, **options)


def make_tiny_sdxl_base(seed: int = 0, **options) -> Base:
    """A tiny SDXL: two text encoders, pooled text, sizes."""
    return make_tiny_base(seed, family="sdxl", **options)


def save_tiny_pipeline(
    folder: Path, seed: int = 0, *, family: str = "mini", schedule: dict | None = None, **unet_options
) -> Path:
    """Writes the same tiny model as a diffusers folder and returns the folder."""
    make_tiny_pipeline(seed, family=family, schedule=schedule, **unet_options).save_pretrained(folder)
    return Path(folder)


def make_tiny_pipeline(seed: int = 0, *, family: str = "mini", schedule: dict | None = None, **unet_options):
    """The same tiny model as diffusers' pipeline of its family."""
    from diffusers import EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = make_tiny_parts(seed, family, **unet_options)
    options = {k: v for k, v in SCHEDULE.items() if k != "clip_sample"} | (schedule or {})
    tokenizers = make_tiny_tokenizers(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "sdxl":
            options.pop("set_alpha_to_one")
            return StableDiffusionXLPipeline(
                **parts,
                tokenizer=tokenizers[0],
                tokenizer_2=tokenizers[1],
                scheduler=EulerDiscreteScheduler(**options),
                add_watermarker=False,
            )
        return StableDiffusionPipeline(
            **parts,
            tokenizer=tokenizers[0],
            scheduler=PNDMScheduler(**options, skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

"""Trains the UNet and the text encoder of `mini` from scratch on the latents of the art in all its looks."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...norm import use_fast_group_norm
from .art import BASE_SETS
from .captions import caption
from .looks import LOOKS, move
from .pictures import CAT_LABEL, Pictures
from .state import load_state, save_state
from .vae import SCALING_FACTOR, encode_means

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
PLAIN_VARIANTS = 4
LOOK_VARIANTS = 8
PLAIN_SHARE = 0.55
EMPTY_CAPTION_SHARE = 0.1
STYLE_WORD_SHARE = 0.5
MIN_SNR_GAMMA = 5.0
EMA_DECAY = 0.999
DECAY_SHARE = 0.3  # the last part of the run, in which the learning rate falls to nothing


def new_unet() -> UNet2DConditionModel:
    """UNet2DConditionModel for 16 x 16 latents, cross-attention at 16, 8 and 4, heads 32 wide, 36 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 192, 384),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(3, 6, 12),
    )


def new_text_encoder(tokens: int) -> CLIPTextModel:
    """CLIPTextModel, four layers, 128 wide, with the vocabulary's last two entries as start and end."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=128,
            bos_token_id=tokens - 2,
            eos_token_id=tokens - 1,
            pad_token_id=tokens - 1,
        )
    )


def trained_things(pictures: Pictures) -> list[str]:
    """The things that `mini` is taught: drawn by all four sets of the base, the phases of the moon left out."""
    drawn: dict[str, set[str]] = {}
    for label, art in zip(pictures.labels, pictures.arts, strict=True):
        if art in BASE_SETS:
            drawn.setdefault(label, set()).add(art)
    return sorted(
        label
        for label, arts in drawn.items()
        if len(arts) == len(BASE_SETS) and "moon" not in label.split()[:-1] + label.split()[1:] and label != CAT_LABEL
    )


@dataclass(frozen=True)
class Pool:
    """Latents float16 [N, V, 4, 16, 16] (scaled; the first PLAIN_VARIANTS plain) and the words of every variant's look."""

    latents: Tensor
    labels: list[str]
    arts: list[str]
    words: list[list[str]]


def encode_pool(pictures: Pictures, vae: nn.Module, work: Path, seed: int = 0) -> Pool:
    """Every trained drawing plain, moved and in LOOK_VARIANTS looks, encoded once; cached in the build folder."""
    things = set(trained_things(pictures))
    mine = pictures.where(
        [label in things and art in BASE_SETS for label, art in zip(pictures.labels, pictures.arts, strict=True)]
    )
    index = work / "pool.json"
    saved = load_state(work / "pool.pt") if index.exists() else {}
    if not saved:
        latents, words = [], []
        for row in range(len(mine.labels)):
            rng = np.random.default_rng((seed, row))
            picture = Image.fromarray(np.asarray(mine.pixels[row]))
            variants = [picture] + [move(picture, rng) for _ in range(PLAIN_VARIANTS - 1)]
            said = [""] * PLAIN_VARIANTS
            for choice in rng.permutation(len(LOOKS))[:LOOK_VARIANTS]:
                looked, word = LOOKS[choice](move(picture, rng), rng)
                variants.append(looked)
                said.append(word)
            pixels = np.stack([np.asarray(v) for v in variants])
            latents.append((encode_means(vae, pixels) * SCALING_FACTOR).half())
            words.append(said)
            if row % 100 == 0:
                print(f"pool {row}/{len(mine.labels)}", flush=True)
        saved = {"latents": torch.stack(latents)}
        save_state(work / "pool.pt", saved)
        index.write_text(json.dumps(words), encoding="utf-8")
    words = json.loads(index.read_text(encoding="utf-8"))
    return Pool(saved["latents"], mine.labels, mine.arts, words)


def _draw_batch(pool: Pool, step: int, batch: int, seed: int) -> tuple[Tensor, list[str]]:
    rng = np.random.default_rng((seed, 17, step))
    rows = rng.integers(0, len(pool.labels), batch)
    picked, prompts = [], []
    for row in rows:
        if rng.random() < PLAIN_SHARE:
            variant = int(rng.integers(0, PLAIN_VARIANTS))
        else:
            variant = int(rng.integers(PLAIN_VARIANTS, PLAIN_VARIANTS + LOOK_VARIANTS))
        look = pool.words[row][variant]
        words = [look] if look else []
        if rng.random() < (0.3 if look else STYLE_WORD_SHARE):
            words.append(f"{pool.arts[row]} style")
        empty = rng.random() < EMPTY_CAPTION_SHARE
        prompts.append("" if empty else caption(pool.labels[row], words, rng))
        picked.append(pool.latents[row, variant])
    return torch.stack(picked).float(), prompts


def timestep_table(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of every timestep [T], and the loss weight [T] that makes it min-SNR-5 in expectation.

    Timesteps that min-SNR would weigh down are drawn less often instead, which costs no step on them.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = snr.clamp_max(MIN_SNR_GAMMA) / snr
    share = weight.clamp_min(0.15)
    share = share / share.sum()
    return share, weight / share / (weight / share).mean()


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, then a straight fall to 2 % over the last DECAY_SHARE."""
    left = (steps - step) / max(1, round(steps * DECAY_SHARE))
    return peak * min(1.0, (step + 1) / 200) * min(1.0, 0.02 + 0.98 * left)


def train_unet(
    pool: Pool,
    tokenizer: CLIPTokenizer,
    work: Path,
    *,
    steps: int,
    batch: int = 32,
    learning_rate: float = 6e-4,
    seed: int = 0,
    device: str = "cpu",
    stop_at: int | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trains both to `steps`, going on from the last saved state, and returns their running averages."""
    torch.manual_seed(seed)
    unet, text = new_unet(), new_text_encoder(len(tokenizer))
    use_fast_group_norm(unet)
    unet.set_attn_processor(AttnProcessor())  # plain matrix attention: faster than SDPA's CPU kernel at these widths
    unet.to(device, memory_format=torch.channels_last).train()
    text.to(device).train()
    text.set_attn_implementation("eager")
    both = nn.ModuleDict({"unet": unet, "text_encoder": text})
    decayed = [p for p in both.parameters() if p.dim() > 1]
    others = [p for p in both.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    average = [p.detach().clone() for p in both.parameters()]
    start = 0
    saved = load_state(work / "unet.part.pt")
    if saved:
        both.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = [a.to(device) for a in saved["average"]], saved["step"]
    noise_scheduler = DDPMScheduler(**SCHEDULE)
    share, weight = timestep_table(noise_scheduler.alphas_cumprod)
    weight = weight.to(device)
    log = open(work / "unet.log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    began, losses = time.perf_counter(), []
    last = steps if stop_at is None else min(stop_at, steps)
    for step in range(start, last):
        lr = learning_rate_at(step, steps, learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x0, prompts = _draw_batch(pool, step, batch, seed)
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(x0.shape, generator=rng)
        t = torch.multinomial(share, batch, replacement=True, generator=rng)
        x_t = noise_scheduler.add_noise(x0, noise, t).to(device).contiguous(memory_format=torch.channels_last)
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.autocast(device, torch.bfloat16):
            states = text(ids.to(device))[0]
            predicted = unet(x_t, t.to(device), states).sample
        error = (predicted.float() - noise.to(device)).square().mean((1, 2, 3))  # [B]
        loss = (error * weight[t.to(device)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, list(both.parameters()), 1 - decay)
        losses.append(error.detach().mean())
        if (step + 1) % 50 == 0 or step + 1 == last:
            rate = (time.perf_counter() - began) / (step + 1 - start)
            row = {
                "step": step + 1,
                "error": round(torch.stack(losses).mean().item(), 5),
                "lr": lr,
                "s_per_step": round(rate, 4),
            }
            losses = []
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if (step + 1) % 250 == 0 or step + 1 == last:
            state = {
                "model": both.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
            }
            save_state(work / "unet.part.pt", state)
            if (work / "STOP").exists():
                break
    log.close()
    with torch.no_grad():
        for p, a in zip(both.parameters(), average, strict=True):
            p.copy_(a)
    return unet.eval().requires_grad_(False), text.eval().requires_grad_(False)

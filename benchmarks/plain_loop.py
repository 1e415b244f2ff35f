"""The training loop that everyone writes, to measure ours against: diffusers' UNet, peft's LoRA, AdamW, autocast.

As diffusers' train_text_to_image_lora.py has it: frozen weights in bf16, factors in float32, latents and text made
before. Nothing of sdlora is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def train_plainly(
    unet: nn.Module,
    *,
    steps: int,
    batch_size: int,
    rank: int,
    latents: torch.Tensor,
    text: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    more: dict[str, torch.Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Seconds of each step; latents [N, 4, H/8, W/8] and text [N, 77, D] on the CPU, a picture a row.

    `more` is what SDXL wants beside the text, a row for each picture too.
    """
    from peft import LoraConfig, get_peft_model

    device = next(unet.parameters()).device
    unet.requires_grad_(False)
    model: Any = get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))  # type: ignore[arg-type]
    factors = [p for p in model.parameters() if p.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        began_s = time.perf_counter()
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        t = torch.randint(len(alphas_cumprod), (batch_size,), generator=generator)
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = (alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise).to(device, torch.bfloat16)
        added = {key: value[rows].to(device) for key, value in (more or {}).items()}
        with torch.autocast(device.type, torch.bfloat16):
            said = model(
                x_t,
                t.to(device),
                encoder_hidden_states=text[rows].to(device, torch.bfloat16),
                added_cond_kwargs=added or None,
            ).sample
        loss = F.mse_loss(said.float(), noise.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - began_s)
        after_step()
    return seconds

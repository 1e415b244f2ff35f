"""Trains the AutoencoderKL of `mini`: 128 px to 4 x 16 x 16 latents and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ...norm import use_fast_group_norm
from .pictures import Pictures
from .state import load_state, save_state

SCALING_FACTOR = 0.18215  # Stable Diffusion 1.x's: tools that hard-code it decode mini's latents rightly
CROP_PX = 64
KL_WEIGHT = 2e-4
GRADIENT_WEIGHT = 0.5
MSE_WEIGHT = 2.0
CHROMA_WEIGHT = 2.0
COLOUR_WEIGHT = 3.0
"""Weight of a linear probe from the latents to each cell's mean colour; without it the latents carried one
orange-blue axis and no green or purple, still after 4,300 steps."""
DECAY_SHARE = 0.4


def new_vae() -> Any:
    """AutoencoderKL, f = 8, 4 latent channels, 3.4 M parameters."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=128,
        scaling_factor=SCALING_FACTOR,
    )


def _vary_colours(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Some pictures greyscale, inverted, with swapped channels or on a tinted ground: x is [B, 3, H, W] in 0..1."""
    b = x.shape[0]
    pick = torch.rand(b, generator=rng)
    grey = x.mean(1, keepdim=True).expand_as(x)
    swapped = x[:, torch.randperm(3, generator=rng)]
    tint = torch.rand(b, 3, 1, 1, generator=rng)

    def choose(low: float, high: float) -> torch.Tensor:
        return ((pick >= low) & (pick < high))[:, None, None, None]

    x = torch.where(choose(0.0, 0.1), grey, x)
    x = torch.where(choose(0.1, 0.15), 1 - x, x)
    x = torch.where(choose(0.15, 0.25), swapped, x)
    return torch.where(choose(0.25, 0.4), x * tint, x)


def _gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def _chroma_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = a - b
    return (d - d.mean(1, keepdim=True)).abs().mean()


def _batch(pictures: Pictures, step: int, batch: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng((seed, step))
    rows = rng.integers(0, len(pictures.labels), batch)
    at = rng.integers(0, (128 - CROP_PX) // 8 + 1, (batch, 2)) * 8
    crops = np.stack([pictures.pixels[r, y : y + CROP_PX, x : x + CROP_PX] for r, (y, x) in zip(rows, at, strict=True)])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255  # [B, 3, 64, 64]


def train_vae(
    pictures: Pictures,
    work: Path,
    *,
    steps: int,
    batch: int = 24,
    learning_rate: float = 1.2e-3,
    seed: int = 0,
    decoder_only: bool = False,
    name: str = "vae",
) -> Any:
    """Trains to `steps`, going on from the last saved state; `decoder_only` leaves the latents as they are."""
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    use_fast_group_norm(vae)
    if decoder_only:
        vae.load_state_dict(load_state(work / "vae.safetensors")["model"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    probe = torch.nn.Conv2d(4, 3, 1)
    params = [p for p in [*vae.parameters(), *probe.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    start = 0
    saved = load_state(work / f"{name}.part.safetensors")
    if saved:
        vae.load_state_dict(saved["model"])
        probe.load_state_dict(saved["probe"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
    began, shown = time.perf_counter(), 0.0
    for step in range(start, steps):
        progress = step / steps
        lr = learning_rate * min(1, (step + 1) / 100) * min(1, 0.02 + 0.98 * (1 - progress) / DECAY_SHARE)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = _vary_colours(_batch(pictures, step, batch, seed), rng) * 2 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=rng)
            out = vae.decode(posterior.mean + posterior.std * noise).sample
        out = out.float()
        rec = (out - x).abs().mean() + MSE_WEIGHT * F.mse_loss(out, x)
        rec = rec + GRADIENT_WEIGHT * _gradient_loss(out, x) + CHROMA_WEIGHT * _chroma_loss(out, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        colour = (probe(posterior.mean.float()) - F.avg_pool2d(x, 8)).abs().mean()
        loss = rec + KL_WEIGHT * kl + (0 if decoder_only else COLOUR_WEIGHT) * colour
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in vae.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        if time.perf_counter() - shown > 15 or step + 1 == steps:
            shown = time.perf_counter()
            rate = (shown - began) / (step + 1 - start)
            parts = f"rec {rec.item():.4f} kl {kl.item():.2f} colour {colour.item():.3f}"
            print(f"{name} {step + 1}/{steps} {parts} {rate:.3f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_state(
                work / f"{name}.part.safetensors",
                {
                    "model": vae.state_dict(),
                    "probe": probe.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step + 1,
                },
            )
    vae.load_state_dict(average)
    vae.eval().requires_grad_(False)
    if not decoder_only:
        normalise_latents(vae, pictures)
    save_state(work / f"{name}.safetensors", {"model": vae.state_dict()})
    return vae


@torch.no_grad()
def encode_means(vae: Any, pixels: np.ndarray, batch: int = 32) -> torch.Tensor:
    """Posterior means, float32 [N, 4, 16, 16], of uint8 pictures [N, 128, 128, 3]."""
    means = []
    for i in range(0, len(pixels), batch):
        x = torch.from_numpy(np.array(pixels[i : i + batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            means.append(vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float())
    return torch.cat(means)


@torch.no_grad()
def normalise_latents(vae: Any, pictures: Pictures) -> None:
    """Folds an affine map into the two 1 x 1 convolutions: every channel gets mean 0 and std 1 / SCALING_FACTOR.

    The decoder undoes it exactly, so reconstructions do not change.
    """
    rows = np.random.default_rng(0).permutation(len(pictures.labels))[:1024]
    z = encode_means(vae, pictures.pixels[np.sort(rows)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    gain = 1 / (std * SCALING_FACTOR)  # [4]
    q, p = vae.quant_conv, vae.post_quant_conv
    q.weight[:4] *= gain[:, None, None, None]
    q.bias[:4] = (q.bias[:4] - mean) * gain
    q.bias[4:] += 2 * gain.log()
    p.bias += p.weight[:, :, 0, 0] @ mean
    p.weight /= gain[None, :, None, None]


@torch.no_grad()
def reconstruction_db(vae: Any, pixels: np.ndarray, batch: int = 32) -> float:
    """Mean PSNR in dB of decoding the posterior mean, over uint8 pictures [N, 128, 128, 3]."""
    total: list[float] = []
    for i in range(0, len(pixels), batch):
        x = torch.from_numpy(np.array(pixels[i : i + batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            out = vae.decode(z).sample.float().clamp(-1, 1)
        mse = ((out - x) / 2).square().mean((1, 2, 3))
        total += (-10 * mse.clamp_min(1e-8).log10()).tolist()
    return sum(total) / len(total)


def load_vae(work: Path, name: str) -> Any:
    """The finished autoencoder of the build folder, `vae` or `decoder`, ready to use."""
    vae = new_vae().to(memory_format=torch.channels_last)
    vae.load_state_dict(load_state(work / f"{name}.safetensors")["model"])
    return vae.eval().requires_grad_(False)

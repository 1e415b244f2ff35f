"""From noise to pictures: a deterministic solver with classifier-free guidance, several pictures at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from .family import Base
from .folder import quiet
from .prompts import encode_prompts
from .text import Text

Progress = Callable[[int, int], None]
"""Called after every solver step with the steps done and all steps."""

SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM"}
"""The samplers, and the names that other tools have for them."""
BATCH_PICTURES = 8
MAX_SEED = 2**63 - 1


def make_scheduler(base: Base, sampler: str = "dpm++") -> Any:
    """The diffusers scheduler of a sampler, set up for the base's noise schedule.

    Steps are spaced `trailing`, so that the first starts at pure noise (t = T - 1), as the pictures' noise is.

    Raises: ConfigError where the sampler is not known.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    with quiet():
        if sampler == "dpm++":
            return DPMSolverMultistepScheduler.from_config(
                base.scheduler_config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
            )
        if sampler == "ddim":
            options = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
            return DDIMScheduler.from_config(base.scheduler_config, **options)
    raise ConfigError(f"sampler {sampler!r} is not known; use one of {', '.join(SAMPLERS)}")


def make_noise(seed: int, height_px: int, width_px: int, factor: int = 8) -> Tensor:
    """A picture's initial noise, float32 [4, H/8, W/8] on the CPU: the same for every machine, batch and precision."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((4, height_px // factor, width_px // factor), generator=generator, dtype=torch.float32)


def sample(
    base: Base,
    prompts: list[str],
    *,
    seeds: list[int],
    negative: str = "",
    steps: int = 20,
    guidance: float = 5.0,
    width_px: int | None = None,
    height_px: int | None = None,
    batch_size: int = BATCH_PICTURES,
    sampler: str = "dpm++",
    clip_skip: int = 0,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """One picture for each prompt and its seed; what a picture shows depends on these two only, not on its batch.

    Prompts may be of any length and may hold emphasis (`emphasis.parse_emphasis`). `guidance` 1 is no guidance; the
    size is the base's own where None; `clip_skip` leaves out that many last layers of the text encoders.

    Raises: ConfigError where a value is out of range.
    """
    if not prompts:
        return []
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed a prompt")
    wordings = encode_prompts(base, prompts, negative, clip_skip)
    size = max(1, batch_size)
    total = steps * sum(-(-len(wording.rows) // size) for wording in wordings)
    found: dict[int, Image.Image] = {}
    done = 0
    for wording in wordings:

        def report(now: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + now, total)

        pictures = sample_encoded(
            base,
            wording.text,
            wording.negative,
            seeds=[seeds[row] for row in wording.rows],
            steps=steps,
            guidance=guidance,
            width_px=width_px,
            height_px=height_px,
            batch_size=size,
            sampler=sampler,
            progress=report,
        )
        found |= dict(zip(wording.rows, pictures, strict=True))
        done += steps * -(-len(wording.rows) // size)
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def sample_encoded(
    base: Base,
    text: Text,
    negative_text: Text,
    *,
    seeds: list[int],
    steps: int = 20,
    guidance: float = 5.0,
    width_px: int | None = None,
    height_px: int | None = None,
    batch_size: int = BATCH_PICTURES,
    sampler: str = "dpm++",
    progress: Progress | None = None,
) -> list[Image.Image]:
    """`sample` for encoded prompts, text [B, N, D] and negative_text [1, N, D]: needs no text encoder.

    Raises: ConfigError where a value is out of range.
    """
    width_px = base.resolution_px if width_px is None else width_px
    height_px = base.resolution_px if height_px is None else height_px
    check_request(base, steps=steps, guidance=guidance, width_px=width_px, height_px=height_px, seeds=seeds)
    if len(seeds) != len(text):
        raise ConfigError(f"{len(seeds)} seeds for {len(text)} prompts; give one seed a prompt")
    batches = range(0, len(seeds), max(1, batch_size))
    pictures: list[Image.Image] = []
    for number, start in enumerate(batches):
        part = seeds[start : start + batches.step]
        noise = torch.stack([make_noise(s, height_px, width_px, base.latent_factor) for s in part])

        def report(done: int, before: int = number * steps) -> None:
            if progress is not None:
                progress(before + done, len(batches) * steps)

        scheduler = make_scheduler(base, sampler)
        z = solve(base, noise, text[start : start + len(part)], negative_text, scheduler, steps, guidance, report)
        bad = [s for s, picture in zip(part, z, strict=True) if not picture.isfinite().all()]
        if bad:
            raise ConfigError(f"the picture of seed {bad[0]} is not finite; lower the weights or use precision fp32")
        pictures += to_pictures(base.decode_latents(z))
    return pictures


def solve(
    base: Base,
    noise: Tensor,
    text: Text,
    negative_text: Text,
    scheduler: Any,
    steps: int,
    guidance: float,
    report: Callable[[int], None],
) -> Tensor:
    """Latents x0, float32 [B, 4, H/8, W/8], from noise of that shape; the solver's state stays in float32.

    Guided prediction: uncond + guidance · (cond - uncond), both in one batch.
    Source: Ho and Salimans 2022, Classifier-Free Diffusion Guidance, equation 6 (their w + 1 is `guidance`).
    """
    scheduler.set_timesteps(steps, device=base.device)
    text = text.to(base.device)
    guided = guidance != 1
    if guided:
        text = Text.cat([negative_text.to(base.device, text.states.dtype).expand(len(text)), text])  # [2B, N, D]
    x_t = noise.to(base.device) * scheduler.init_noise_sigma
    for done, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x_t, t)
        x_in = torch.cat([x_in, x_in]) if guided else x_in
        output = base.predict(x_in, t.expand(len(x_in)), text).float()
        if guided:
            uncond, cond = output.chunk(2)
            output = uncond + guidance * (cond - uncond)
        x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        report(done + 1)
    return x_t


def to_pictures(x: Tensor) -> list[Image.Image]:
    """RGB pictures of x [B, 3, H, W] in -1..1."""
    pixels = (x.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def check_request(base: Base, *, steps: int, guidance: float, width_px: int, height_px: int, seeds: list[int]) -> None:
    """Checks what the user asked of the sampler.

    Raises: ConfigError naming the value and the fix.
    """
    longest = len(base.alphas_cumprod)
    if not 1 <= steps <= longest:
        raise ConfigError(f"steps {steps} is out of range; use 1 to {longest}")
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance {guidance} is not a finite number; 1 is none, 5 is usual")
    for name, size_px in (("width", width_px), ("height", height_px)):
        if size_px < base.latent_factor or size_px % base.latent_factor:
            raise ConfigError(f"{name} {size_px} px is not a positive multiple of {base.latent_factor}")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"seed {seed} is out of range; use 0 to {MAX_SEED}")

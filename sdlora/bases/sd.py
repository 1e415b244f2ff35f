"""Stable Diffusion 1.x and 2.x, and `mini`, which has the same architecture: one CLIP text encoder, a UNet, a VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseModelError
from .family import Base
from .folder import check_folder, fingerprint_files, load_part, quiet, read_json
from .source import resolve_source

__all__ = ["StableDiffusion", "mini", "resolve_source", "sd1", "sd2"]

SD2_TEXT_WIDTH = 1024


@dataclass
class StableDiffusion:
    """The family of bases with one CLIP text encoder; `name` is `mini`, `sd1` or `sd2`."""

    name: str

    def load(self, source: Path, name: str, device: torch.device, dtype: torch.dtype) -> Base:
        """Loads a diffusers folder: every part frozen, in eval mode, on the device and in the dtype.

        Raises: BaseModelError where a part is missing, damaged, or of a kind that is not supported.
        """
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        weights = check_folder(source)
        scheduler_config = read_json(source / "scheduler" / "scheduler_config.json")
        _check_prediction(source, scheduler_config)
        with quiet():
            kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
            modules = {part: load_part(cls, source / part, weights[part], dtype) for part, cls in kinds.items()}
            try:
                tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer", local_files_only=True)
                scheduler = DDPMScheduler.from_config(scheduler_config)
            except Exception as e:
                reason = str(e).strip().split("\n")[0]
                raise BaseModelError(f"{source}: the tokenizer or the scheduler cannot be read: {reason}") from e
        _check_unet(source, modules["unet"])
        return self.assemble(
            name, modules, tokenizer, scheduler.config, device, dtype, source, fingerprint_files(source, weights)
        )

    def assemble(
        self,
        name: str,
        modules: dict[str, nn.Module],
        tokenizer: Any,
        scheduler_config: Any,
        device: torch.device,
        dtype: torch.dtype,
        source: Path = Path(),
        fingerprint: str = "",
    ) -> Base:
        """A Base of parts that exist already: moved, frozen and set up for the device."""
        from diffusers import DDPMScheduler

        from .attention import PlainAttnProcessor
        from .norm import use_fast_group_norm

        unet: Any = modules["unet"]
        for part, module in modules.items():
            # nn.Module's own `to`: diffusers' override warns about an empty list of parts to keep in float32
            nn.Module.to(module, device=device, dtype=dtype)
            if part != "text_encoder" and device.type in ("cpu", "cuda"):
                nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
            module.eval().requires_grad_(False)
        family = self
        if self.name == "sd1" and unet.config.cross_attention_dim == SD2_TEXT_WIDTH:
            family = sd2
        if device.type == "cpu":
            use_fast_group_norm(unet)
            if family.name == "mini":
                unet.set_attn_processor(PlainAttnProcessor())
        positions = int(modules["text_encoder"].config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        config = {k: v for k, v in dict(scheduler_config).items() if not k.startswith("_")}
        betas = DDPMScheduler.from_config(config).betas
        alphas_cumprod = torch.cumprod(1 - betas.double(), 0)  # [T]
        return Base(name, family, source, modules, tokenizer, config, alphas_cumprod, device, dtype, fingerprint)

    def tokenize(self, base: Base, prompts: list[str]) -> tuple[Tensor, list[int]]:
        whole = base.tokenizer(prompts, padding=False, truncation=False, verbose=False).input_ids
        padded = base.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=base.tokenizer.model_max_length
        ).input_ids
        return torch.tensor(padded, dtype=torch.int64), [len(ids) for ids in whole]

    def encode_text(self, base: Base, ids: Tensor) -> Tensor:
        return base.modules["text_encoder"](ids.to(base.device))[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_pictures(self, base: Base, x: Tensor) -> tuple[Tensor, Tensor]:
        vae: Any = base.modules["vae"]
        posterior = vae.encode(x.to(base.device, base.dtype)).latent_dist
        scaling = float(vae.config.scaling_factor)
        return posterior.mean.float() * scaling, posterior.std.float() * scaling

    @torch.no_grad()
    def decode_latents(self, base: Base, z: Tensor) -> Tensor:
        vae: Any = base.modules["vae"]
        z = z.to(base.device) / float(vae.config.scaling_factor)
        return vae.decode(z.to(base.dtype)).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]

    def predict(self, base: Base, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        y = base.unet(x_t.to(base.dtype), t, encoder_hidden_states=text.to(base.dtype), return_dict=False)[0]
        return y.to(x_t.dtype)  # type: ignore[no-any-return]

    def default_targets(self, text_encoder: bool) -> dict[str, tuple[str, ...]]:
        targets: dict[str, tuple[str, ...]] = {"unet": ("to_q", "to_k", "to_v", "to_out.0")}
        if text_encoder:
            targets["text_encoder"] = ("q_proj", "k_proj", "v_proj", "out_proj")
        return targets


mini = StableDiffusion("mini")
sd1 = StableDiffusion("sd1")
sd2 = StableDiffusion("sd2")


def _check_prediction(source: Path, scheduler_config: dict[str, Any]) -> None:
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise BaseModelError(f"{source}: prediction type {kind!r} is not known; use an epsilon or v_prediction base")


def _check_unet(source: Path, unet: Any) -> None:
    channels = int(unet.config.in_channels)
    if channels == 9:
        raise BaseModelError(f"{source}: an inpainting model (its UNet has 9 input channels); use the plain one")
    if channels != 4:
        raise BaseModelError(f"{source}: its UNet has {channels} input channels; a Stable Diffusion 1.x or 2.x has 4")

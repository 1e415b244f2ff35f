"""Stable Diffusion 1.x and 2.x, and `mini`, which has the same architecture: one CLIP text encoder, a UNet, a VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseModelError
from .emphasis import weigh
from .facts import LATENT_FACTOR
from .family import Base
from .folder import check_folder, fingerprint_files, load_part, quiet, read_json
from .schedule import choose_schedule, cumulate_alphas
from .source import resolve_source
from .text import Text

__all__ = ["StableDiffusion", "mini", "resolve_source", "sd1", "sd2"]

ROW_TOKENS = 77
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class StableDiffusion:
    """A family of bases with CLIP text encoders, a UNet and a VAE; the fields are what the families differ in."""

    name: str
    text_parts: tuple[str, ...] = ("text_encoder",)
    """The text encoders, in the order in which their states are joined."""
    spare_layers: int = 0
    """Last layers of a text encoder that the family itself leaves out."""
    upcast_vae: bool = False
    """Whether the VAE runs in float32 where float16 would overflow, as its config says."""
    zero_blank: bool = False
    """Whether the base learnt zeros as its empty prompt."""

    def load(self, source: Path, name: str, device: torch.device, dtype: torch.dtype) -> Base:
        """Loads a diffusers folder: every part frozen, in eval mode, on the device and in the dtype.

        Raises: BaseModelError where a part is missing, damaged, or of a kind that is not supported.
        """
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        weights = check_folder(source)
        scheduler_config = read_json(source / "scheduler" / "scheduler_config.json")
        _check_prediction(source, scheduler_config)
        kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        kinds |= dict(zip(self.text_parts, (CLIPTextModel, CLIPTextModelWithProjection), strict=False))
        upcast = self._upcasts(read_json(source / "vae" / "config.json"), dtype)
        with quiet():
            modules = {
                part: load_part(cls, source / part, weights[part], torch.float32 if part == "vae" and upcast else dtype)
                for part, cls in kinds.items()
            }
            try:
                folders = [source / part.replace("text_encoder", "tokenizer") for part in self.text_parts]
                tokenizers = tuple(CLIPTokenizer.from_pretrained(f, local_files_only=True) for f in folders)
                scheduler = DDPMScheduler.from_config(scheduler_config)
            except Exception as e:
                reason = str(e).strip().split("\n")[0]
                raise BaseModelError(f"{source}: the tokenizer or the scheduler cannot be read: {reason}") from e
        fingerprint = fingerprint_files(source, weights)
        base = self.assemble(name, modules, tokenizers, scheduler.config, device, dtype, source, fingerprint)
        zeros = read_json(source / "model_index.json").get("force_zeros_for_empty_prompt", self.zero_blank)
        base.zero_blank = self.zero_blank and bool(zeros)
        return base

    def assemble(
        self,
        name: str,
        modules: dict[str, nn.Module],
        tokenizers: tuple[Any, ...],
        scheduler_config: Any,
        device: torch.device,
        dtype: torch.dtype,
        source: Path = Path(),
        fingerprint: str = "",
    ) -> Base:
        """A Base of parts that exist already: moved, frozen and set up for the device.

        Raises: BaseModelError where a part is missing or does not fit the family, or the noise schedule is impossible.
        """
        from .attention import PlainAttnProcessor
        from .norm import use_fast_group_norm

        self._check_parts(source if source.name else Path(name), modules, tokenizers)
        unet: Any = modules["unet"]
        vae_config: Any = modules["vae"].config
        upcast = self._upcasts(dict(vae_config), dtype)
        for part, module in modules.items():
            # nn.Module's own `to`: diffusers' override warns about an empty list of parts to keep in float32
            nn.Module.to(module, device=device, dtype=torch.float32 if part == "vae" and upcast else dtype)
            if part not in self.text_parts and device.type in ("cpu", "cuda"):
                nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
            module.eval().requires_grad_(False)
        if device.type == "cpu":
            use_fast_group_norm(unet)
            if self.name == "mini":
                unet.set_attn_processor(PlainAttnProcessor())
        config = {k: v for k, v in dict(scheduler_config).items() if not k.startswith("_")}
        config = choose_schedule(config, None, None, name)
        alphas_cumprod = cumulate_alphas(config)  # [T]
        base = Base(name, self, source, modules, tokenizers, config, alphas_cumprod, device, dtype, fingerprint)
        base.zero_blank = self.zero_blank
        return base

    def encode_text(self, base: Base, ids: Tensor, clip_skip: int = 0, weights: Tensor | None = None) -> Text:
        b, _, c, n = ids.shape
        states: list[Tensor] = []
        pooled: Tensor | None = None
        for i, part in enumerate(self.text_parts):
            rows = ids[:, i].reshape(b * c, n).to(base.device)
            y, own_pooled = self.read_layer(base.modules[part], rows, clip_skip)
            y = y.view(b, c, n, -1)
            if weights is not None:
                y = weigh(y, weights[:, i].to(base.device))
            states.append(y.reshape(b, c * n, -1))  # [B, 77·C, D]
            if own_pooled is not None:
                pooled = own_pooled.view(b, c, -1)[:, 0]  # [B, P]
        return Text(states[0] if len(states) == 1 else torch.cat(states, -1), pooled)

    def read_layer(self, encoder: nn.Module, ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """States [B, 77, D] of a layer of one text encoder, the last or `clip_skip` before it, with the final norm."""
        if not clip_skip:
            return encoder(ids)[0], None
        states = encoder(ids, output_hidden_states=True).hidden_states[-1 - clip_skip]
        norm: Any = getattr(encoder, "text_model", encoder)
        return norm.final_layer_norm(states), None

    def most_clip_skip(self, base: Base) -> int:
        """The largest clip skip that leaves every text encoder a layer."""
        layers = [int(base.modules[part].config.num_hidden_layers) for part in self.text_parts]  # type: ignore[union-attr, arg-type]
        return min(layers) - 1 - self.spare_layers

    @torch.no_grad()
    def encode_pictures(self, base: Base, x: Tensor) -> tuple[Tensor, Tensor]:
        vae: Any = base.modules["vae"]
        posterior = vae.encode(x.to(base.device, vae.dtype)).latent_dist
        scaling = float(vae.config.scaling_factor)
        return posterior.mean.float() * scaling, posterior.std.float() * scaling

    @torch.no_grad()
    def decode_latents(self, base: Base, z: Tensor) -> Tensor:
        vae: Any = base.modules["vae"]
        z = z.to(base.device) / float(vae.config.scaling_factor)
        return vae.decode(z.to(vae.dtype)).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]

    def predict(self, base: Base, x_t: Tensor, t: Tensor, text: Text, sizes: Tensor | None = None) -> Tensor:
        y = base.unet(
            x_t.to(base.dtype),
            t,
            encoder_hidden_states=text.states.to(base.dtype),
            added_cond_kwargs=self.conditions(base, x_t, text, sizes),
            return_dict=False,
        )[0]
        return y.to(x_t.dtype)  # type: ignore[no-any-return]

    def conditions(self, base: Base, x_t: Tensor, text: Text, sizes: Tensor | None) -> dict[str, Tensor] | None:
        """What the UNet is told beside the time and the text's states; nothing in these families."""
        return None

    def default_targets(self, text_encoder: bool) -> dict[str, tuple[str, ...]]:
        targets: dict[str, tuple[str, ...]] = {"unet": ("to_q", "to_k", "to_v", "to_out.0")}
        if text_encoder:
            targets |= dict.fromkeys(self.text_parts, ("q_proj", "k_proj", "v_proj", "out_proj"))
        return targets

    def _upcasts(self, vae_config: dict[str, Any], dtype: torch.dtype) -> bool:
        return self.upcast_vae and dtype == torch.float16 and bool(vae_config.get("force_upcast", True))

    def _check_parts(self, source: Path, modules: dict[str, nn.Module], tokenizers: tuple[Any, ...]) -> None:
        for part in ("unet", "vae", *self.text_parts):
            if part not in modules:
                raise BaseModelError(f"{source}: has no {part}, which every {self.name} base has; give a whole base")
        if len(tokenizers) != len(self.text_parts):
            there, wanted = len(tokenizers), len(self.text_parts)
            raise BaseModelError(f"{source}: has {there} tokenizers for {wanted} text encoders; give a whole base")
        for part in self.text_parts:
            positions = int(modules[part].config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
            if positions != ROW_TOKENS:
                raise BaseModelError(
                    f"{source}: its {part} reads {positions} tokens where a CLIP reads {ROW_TOKENS}; give another base"
                )
        self.check_vae(source, modules)
        self.check_unet(source, modules)

    def check_vae(self, source: Path, modules: dict[str, Any]) -> None:
        """Raises: BaseModelError where the VAE makes other latents than the UNet and the resolutions are for."""
        vae = modules["vae"].config
        side_px = 2 ** (len(vae.block_out_channels) - 1)
        if (side_px, vae.latent_channels) != (LATENT_FACTOR, LATENT_CHANNELS):
            raise BaseModelError(
                f"{source}: its VAE makes {vae.latent_channels} channels of each {side_px} x {side_px} px where a "
                f"{self.name} has {LATENT_CHANNELS} of {LATENT_FACTOR} x {LATENT_FACTOR}; use its own VAE"
            )

    def check_unet(self, source: Path, modules: dict[str, Any]) -> None:
        """Raises: BaseModelError where the UNet is of another kind, or reads other text than the encoders give."""
        unet = modules["unet"].config
        if unet.in_channels == 9:
            raise BaseModelError(f"{source}: an inpainting model (its UNet has 9 input channels); use the plain one")
        if unet.in_channels != 4:
            raise BaseModelError(f"{source}: its UNet has {unet.in_channels} input channels; a {self.name} has 4")
        width = sum(int(modules[part].config.hidden_size) for part in self.text_parts)
        if unet.cross_attention_dim != width:
            raise BaseModelError(
                f"{source}: its UNet reads text {unet.cross_attention_dim} wide and its text encoders give {width}; "
                "use parts that belong together"
            )


mini = StableDiffusion("mini")
sd1 = StableDiffusion("sd1")
sd2 = StableDiffusion("sd2")


def _check_prediction(source: Path, scheduler_config: dict[str, Any]) -> None:
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise BaseModelError(f"{source}: prediction type {kind!r} is not known; use an epsilon or v_prediction base")
    scheduler = str(scheduler_config.get("_class_name", ""))
    if scheduler.startswith("EDM") or "Flow" in scheduler:
        raise BaseModelError(f"{source}: its noise schedule is {scheduler}, which is not supported; use another base")

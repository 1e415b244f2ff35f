"""What a picture shows and how it is drawn, as vectors: from mini's judge, or from CLIP and DINO where one has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..bases.folder import quiet
from ..bases.mini.judge import Judge, load_judge
from ..bases.source import HUB_ID
from ..errors import ConfigError

BATCH_PICTURES = 32
DINO_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
"""The `model_type`s of DINO's config.json; the first DINO is a plain ViT."""


_FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]


class Features(Protocol):
    """Two readings of a picture, each a unit vector, so that a product of two is a cosine."""

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        ...

    def style(self, pictures: Sequence[Image.Image]) -> Tensor:
        """How they are drawn: float32 [B, D] on the CPU."""
        ...

    def subject(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What they show: float32 [B, D] on the CPU."""
        ...


class JudgeFeatures:
    """The judge that ships with mini: its style head and its subject head, taught to keep out of each other's way."""

    name = "mini's judge"

    def __init__(self, judge: Judge | None = None) -> None:
        self._judge = judge or load_judge()

    def style(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self._judge.embed_style(pictures)

    def subject(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self._judge.embed(pictures)


class ClipFeatures:
    """CLIP's image embedding, for both readings; alone it tells styles better than it tells characters.

    Source: Radford et al. 2021, CLIP; as CLIP-I in Ruiz et al. 2023, DreamBooth, section 4.2.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu") -> None:
        """`model` is a folder or a hub id. Raises: ConfigError where it holds no CLIP."""
        self.name = f"CLIP ({_short(model)})"
        self._model, self._prepare = _load(model, "CLIP", "--clip", ("clip", "clip_vision_model"), device)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self._model(pixel_values=pixels).image_embeds

    def style(self, pictures: Sequence[Image.Image]) -> Tensor:
        return _encode_all(pictures, self._prepare, self._encode, self._model)

    subject = style


class DinoFeatures:
    """DINO's class token, for both readings; it tells characters, and styles less well.

    Source: Caron et al. 2021, DINO; as the DINO score in Ruiz et al. 2023, DreamBooth, section 4.2.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu") -> None:
        """`model` is a folder or a hub id of any version. Raises: ConfigError where it holds no DINO."""
        self.name = f"DINO ({_short(model)})"
        self._model, self._prepare = _load(model, "DINO", "--dino", DINO_TYPES, device)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self._model(pixel_values=pixels).last_hidden_state[:, 0]

    def style(self, pictures: Sequence[Image.Image]) -> Tensor:
        return _encode_all(pictures, self._prepare, self._encode, self._model)

    subject = style


@dataclass(frozen=True)
class TwoFeatures:
    """The style by one reader, the subject by another."""

    by_style: Features
    by_subject: Features

    @property
    def name(self) -> str:
        return f"{self.by_style.name} for the style, {self.by_subject.name} for the subject"

    def style(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.by_style.style(pictures)

    def subject(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.by_subject.subject(pictures)


def check_features(family: str, clip: str | None, dino: str | None) -> None:
    """Raises: ConfigError where a base of another family than mini has nothing to look at its pictures with."""
    if family != "mini" and clip is None and dino is None:
        raise ConfigError(
            f"a base of family {family} needs CLIP and DINO to look at its pictures; give --clip and --dino a folder "
            "or hub id, such as openai/clip-vit-large-patch14 and facebook/dinov2-base"
        )


def load_features(
    family: str, clip: str | None = None, dino: str | None = None, device: torch.device | str = "cpu"
) -> Features:
    """CLIP for the style and DINO for the subject, or the one that is given for both; without either, mini's judge.

    Raises: ConfigError where a model cannot be read, or the base's family is not mini and none is given.
    """
    check_features(family, clip, dino)
    by_clip = None if clip is None else ClipFeatures(clip, device)
    by_dino = None if dino is None else DinoFeatures(dino, device)
    if by_clip is not None and by_dino is not None:
        return TwoFeatures(by_clip, by_dino)
    return by_clip or by_dino or JudgeFeatures()


def _load(
    source: str, what: str, flag: str, types: tuple[str, ...], device: torch.device | str
) -> tuple[Any, Callable[[list[Image.Image]], Tensor]]:
    """A model and what turns pictures into its pixels."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    folder = _find(source, what, flag)
    try:
        with quiet():
            config: Any = AutoConfig.from_pretrained(folder)
            kind = str(config.model_type)
            if kind not in types:
                raise ConfigError(f"{flag} {source}: is a {kind}, not a {what}; give a folder or hub id of one")
            if kind == "clip":  # of the two towers, the one that sees; its own part of the config may lack the width
                config.vision_config.projection_dim = config.projection_dim
                config = config.vision_config
            made: Any = CLIPVisionModelWithProjection if what == "CLIP" else AutoModel
            model = made.from_pretrained(folder, config=config, use_safetensors=True, dtype=torch.float32)
            processor: Any = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever the library says
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{flag} {source}: no {what} can be read there ({reason}); give a folder or hub id") from None
    model.to(device).eval().requires_grad_(False)

    def prepare(pictures: list[Image.Image]) -> Tensor:
        pixels: Tensor = processor([p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]
        return pixels

    return model, prepare


def _find(source: str, what: str, flag: str) -> Path:
    """The folder of a model: the one that is given, or the cached or downloaded copy of a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(source):
        raise ConfigError(f"{flag} {source}: there is no such folder; give one that holds a {what}, or a hub id")
    from huggingface_hub import HfApi, snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_FILES, local_files_only=True))
    except Exception:  # not in the cache, whatever the reason: ask the hub
        pass
    try:
        HfApi().model_info(source, timeout=10)
        return Path(snapshot_download(source, allow_patterns=_FILES))
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{flag} {source}: no such folder here, and the hub does not give it: {reason}") from None


def _encode_all(
    pictures: Sequence[Image.Image],
    prepare: Callable[[list[Image.Image]], Tensor],
    encode: Callable[[Tensor], Tensor],
    model: Any,
) -> Tensor:
    found = []
    for start in range(0, len(pictures), BATCH_PICTURES):
        pixels = prepare(list(pictures[start : start + BATCH_PICTURES]))
        found.append(F.normalize(encode(pixels.to(model.device)).float(), dim=1).cpu())
    return torch.cat(found)


def _short(model: str) -> str:
    return model if not Path(model).is_dir() else Path(model).resolve().name

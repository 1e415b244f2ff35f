"""What can be known of a base without loading it: its side in pixels and its tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BaseModelError

if TYPE_CHECKING:
    from .family import Family

LATENT_FACTOR = 8
"""Pixels along one side of a latent cell."""
CHUNK_TOKENS = 75
"""Tokens of a prompt that a CLIP text encoder reads at once, between its start and its end."""
_CONFIGS = tuple(f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2"))
_FEW_FILES = ("model_index.json", *_CONFIGS, "tokenizer/*")


@dataclass(frozen=True)
class BaseFacts:
    """A base from its small files alone."""

    source: Path
    resolution_px: int
    family: str
    """`mini`, `sd1`, `sd2` or `sdxl`."""

    def count_tokens(self, captions: list[str], chunks: int = 1) -> tuple[list[int], int]:
        """Each caption's length in tokens, start and end counted, and how many the base reads in that many chunks.

        Raises: BaseModelError where the tokenizer cannot be read.
        """
        from transformers import CLIPTokenizer

        from .architecture import make_clip_tokenizer

        try:
            if self.source.is_file():
                tokenizer = make_clip_tokenizer()
            else:
                tokenizer = CLIPTokenizer.from_pretrained(self.source / "tokenizer", local_files_only=True)
            ids = tokenizer(captions, padding=False, truncation=False, verbose=False).input_ids if captions else []
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise BaseModelError(f"{self.source}: its tokenizer cannot be read: {reason}; give a whole base") from None
        return [len(row) for row in ids], chunks * CHUNK_TOKENS + 2


def read_base_facts(name: str, prediction: str = "auto") -> BaseFacts:
    """Looks a base up by name; of a hub id, only its small files are downloaded, of a single file its header is read.

    `prediction` is what the flag says: `auto`, `epsilon` or `v`.

    Raises: BaseModelError where there is no such base, a part of it is missing, or it does not say what it predicts.
    """
    from .folder import check_folder, name_family
    from .source import resolve_source

    known: Family | None = None
    path = Path(name).expanduser()
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        source, _, known = resolve_source(name)
        if source.is_file():
            return _read_file_facts(source, prediction)
        check_folder(source)
    else:
        source = _fetch_few(name)
    try:
        side = int(json.loads((source / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BaseModelError(f"{source}: its unet/config.json has no usable sample_size; give a whole base") from None
    return BaseFacts(source, side * LATENT_FACTOR, known.name if known else name_family(source))


def _read_file_facts(path: Path, prediction: str) -> BaseFacts:
    from .checkpoint_kind import identify_checkpoint
    from .single_file import read_configs

    checkpoint = identify_checkpoint(path)
    kind, _ = checkpoint.settle(None if prediction == "auto" else prediction)
    side = int(read_configs(checkpoint, kind)["unet"]["sample_size"])
    return BaseFacts(path, side * LATENT_FACTOR, checkpoint.family)


def _fetch_few(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FEW_FILES)))
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise BaseModelError(f"{name}: no such folder here, and the hub does not give it: {reason}") from None

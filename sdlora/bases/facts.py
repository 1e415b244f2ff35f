"""What can be known of a base without loading it: its side in pixels and its tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import BaseModelError

LATENT_FACTOR = 8
"""Pixels along one side of a latent cell."""
_FEW_FILES = ("model_index.json", "unet/config.json", "tokenizer/*")


@dataclass(frozen=True)
class BaseFacts:
    """A base from its small files alone."""

    source: Path
    resolution_px: int

    def count_tokens(self, captions: list[str]) -> tuple[list[int], int]:
        """Each caption's length in tokens, start and end counted, and how many the base reads.

        Raises: BaseModelError where the tokenizer cannot be read.
        """
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.source / "tokenizer", local_files_only=True)
            ids = tokenizer(captions, padding=False, truncation=False, verbose=False).input_ids if captions else []
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise BaseModelError(f"{self.source}: its tokenizer cannot be read: {reason}; give a whole base") from None
        return [len(row) for row in ids], min(int(tokenizer.model_max_length), 77)


def read_base_facts(name: str) -> BaseFacts:
    """Looks a base up by name; of a hub id, only its small files are downloaded.

    Raises: BaseModelError where there is no such base, or a part of it is missing.
    """
    from .folder import check_folder
    from .source import resolve_source

    path = Path(name).expanduser()
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        source = resolve_source(name)[0]
        check_folder(source)
    else:
        source = _fetch_few(name)
    try:
        side = int(json.loads((source / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BaseModelError(f"{source}: its unet/config.json has no usable sample_size; give a whole base") from None
    return BaseFacts(source, side * LATENT_FACTOR)


def _fetch_few(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FEW_FILES)))
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise BaseModelError(f"{name}: no such folder here, and the hub does not give it: {reason}") from None

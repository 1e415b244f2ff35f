"""What goes into the base's forward pass, on its device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases.family import Base
from ..bases.text import Text
from ..data.cache import Encoded


def send(x: Tensor, base: Base) -> Tensor:
    """x [B, 4, H/8, W/8] as the UNet takes it: its device, dtype and memory layout."""
    return x.to(base.device, base.dtype, non_blocking=True, memory_format=torch.channels_last)


def text_of(base: Base, encoded: Encoded, caption: Tensor, clip_skip: int) -> Text:
    """The text of caption rows int64 [B]; through the text encoders where they are trained."""
    if encoded.text is None:
        text = base.encode_text(encoded.ids[caption], clip_skip)
        return text.blank(caption == len(encoded.ids) - 1) if base.zero_blank else text
    return encoded.text[caption].to(base.device, base.dtype, non_blocking=True)

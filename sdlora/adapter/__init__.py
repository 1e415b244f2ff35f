"""Adapters: what a LoRA file means, how it is read and written, and the layers that learn one."""

from .delta import Adapter, Card, Delta, Dora, LowRank, weight_on
from .file import autov2, check_fit, file_sha256, misfits, read_adapter, write_adapter
from .keys import canonical_path, find_module
from .layers import TEXT_ENCODER_TARGETS, UNET_TARGETS, LoraLayer, LoraLayers, attach
from .sites import LayerPlan

__all__ = [
    "TEXT_ENCODER_TARGETS",
    "UNET_TARGETS",
    "Adapter",
    "Card",
    "Delta",
    "Dora",
    "LayerPlan",
    "LoraLayer",
    "LoraLayers",
    "LowRank",
    "attach",
    "autov2",
    "canonical_path",
    "check_fit",
    "file_sha256",
    "find_module",
    "misfits",
    "read_adapter",
    "weight_on",
    "write_adapter",
]

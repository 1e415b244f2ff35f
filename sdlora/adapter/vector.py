"""Changes of biases and norms: a number for each channel, with no ranks.

What changes a module's weight stands under the module's path; what changes its bias under the path and `.bias`. Other
tools add them as they are, times the LoRA's strength, whatever the alpha. Source: LyCORIS, the modules full (`diff_b`)
and norms (`w_norm`, `b_norm`), and ComfyUI's `comfy/lora.py`, which also writes a norm's weight as `diff`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROLES = ("diff_b", "b_norm", "w_norm")
"""What such a tensor is called in a file; that of a norm's weight may also be called `diff`."""
OF_BIAS = ("diff_b", "b_norm")
_BIAS = ".bias"


@dataclass(frozen=True)
class Vector:
    """ΔW = value [n], of a bias or of a norm's weight."""

    value: Tensor
    role: str
    """Its name in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.value.shape))

    @property
    def kind(self) -> str:
        """`bias` of a layer's own, `norm` of a norm's weight or bias."""
        return "bias" if self.role == "diff_b" else "norm"

    def weight(self) -> Tensor:
        return self.value.float()

    def tensors(self) -> dict[str, Tensor]:
        """The tensor by its role."""
        return {self.role: self.value}


def split_parameter(path: str) -> tuple[str, str]:
    """The module of a path, and which of its parameters the path means: `weight` or `bias`."""
    return (path.removesuffix(_BIAS), "bias") if path.endswith(_BIAS) else (path, "weight")


def bias_of(module: str) -> str:
    """The path of a module's bias."""
    return module + _BIAS


def is_norm(path: str) -> bool:
    """Whether a path is a norm's, or its bias's."""
    return "norm" in split_parameter(path)[0].rpartition(".")[2]


__all__ = ["OF_BIAS", "ROLES", "Vector", "bias_of", "is_norm", "split_parameter"]

"""The frozen UNet split between processes (FSDP): each keeps a part of every block, and all gather a block as it runs.

What is learnt is whole in every process, as without it: a LoRA is megabytes. Importing this imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RunError

if TYPE_CHECKING:
    from torch import nn

    from ..bases.family import Base

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""What is gathered at a time: these hold nearly all of a UNet, and no two of them run at once."""
_TRUE = ("1", "true", "yes")
_FILES = "configs/accelerate/two-gpus-fsdp.yaml"


@dataclass(frozen=True)
class Split:
    """How the launcher was told to split the base."""

    offload: bool = False
    """Whether the parts lie in the CPU's memory, and come to the GPU block by block."""
    reshard: bool = True
    """Whether a block that has run is given up until the backward pass needs it again."""

    @classmethod
    def read(cls, processes: int) -> Split | None:
        """What accelerate's launcher says in the environment, None where it says nothing of FSDP.

        Raises: RunError for FSDP's first version, and for a single process.
        """
        if not _is_true("ACCELERATE_USE_FSDP"):
            return None
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise RunError(
                f"fsdp_version = {version} splits what is trained too; set fsdp_version: 2 in the launcher's file, as "
                f"{_FILES} does"
            )
        if processes == 1:
            raise RunError("FSDP splits the base between processes and there is one; launch two or more, or none of it")
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
        return cls(_is_true("FSDP_OFFLOAD_PARAMS"), reshard not in ("false", "no_reshard", "shard_grad_op"))

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Within it accelerate and transformers know nothing of FSDP: the one wraps what it is to train, and the other
        loads no weights but in one process."""
        from accelerate.utils import patch_environment

        with patch_environment(ACCELERATE_USE_FSDP="false"):  # type: ignore[no-untyped-call]
            yield

    def divide(self, base: Base) -> str:
        """Splits the base's UNet, which from then on runs in all processes at the same time; returns a line on it."""
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        unet = base.unet
        total = _expose(unet)
        # Pinned memory is for copies to a GPU.
        offload = CPUOffloadPolicy(pin_memory=base.device.type == "cuda") if self.offload else OffloadPolicy()
        count = torch.distributed.get_world_size()
        options: dict[str, Any] = {
            "mesh": init_device_mesh(base.device.type, (count,)),
            "reshard_after_forward": self.reshard,
            "offload_policy": offload,
        }
        for module in list(unet.modules()):
            if type(module).__name__ in _BLOCKS:
                fully_shard(module, **options)
        fully_shard(unet, **options)
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
        here = sum(p.to_local().nbytes for p in unet.parameters())  # type: ignore[attr-defined]
        where = ", in the CPU's memory" if self.offload else ""
        return f"the UNet split between {count} processes: {here / 2**20:,.2f} of {total / 2**20:,.2f} MiB here{where}"


def _expose(unet: nn.Module) -> int:
    """Makes every weight a parameter that can be split: contiguous, and the codes of quantised layers too.

    Returns their bytes. The tensors of others who share them stay as they are.
    """
    from torch import nn

    from ..adapter.quantised import QuantisedLinear

    for module in unet.modules():
        if isinstance(module, QuantisedLinear):
            module.expose_codes()
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_contiguous():  # convolutions are channels_last
                module._parameters[name] = nn.Parameter(parameter.detach().contiguous(), requires_grad=False)
    return sum(p.nbytes for p in unet.parameters())


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE

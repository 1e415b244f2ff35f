"""A process that trains from Python on a Base that it has already, and looks at it afterwards: for `launched.start`."""

from __future__ import annotations

from pathlib import Path

import torch


def main(argv: list[str]) -> int:
    """argv is the data folder and the LoRA to write. Returns 0 where the base is what it was."""
    from torch.distributed.tensor import DTensor

    from sdlora.python import train
    from tests.tiny import make_tiny_base

    base = make_tiny_base()
    before = {name: parameter.detach().clone() for name, parameter in base.unet.named_parameters()}
    strides = [parameter.stride() for parameter in base.unet.parameters()]
    out = Path(argv[1])
    train(argv[0], base=base, out=out, steps=2, rank=2, batch_size=2, precision="fp32", warmup_steps=0)
    after = dict(base.unet.named_parameters())
    same = all(torch.equal(after[name].detach(), value) for name, value in before.items())
    whole = not any(isinstance(parameter, DTensor) for parameter in after.values())
    return 0 if same and whole and strides == [parameter.stride() for parameter in after.values()] else 3

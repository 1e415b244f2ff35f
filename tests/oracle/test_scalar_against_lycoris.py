"""`.scalar` keys against LyCORIS itself, where it is installed.

pip install --no-deps lycoris-lora==3.2.0 toml einops
"""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sdlora.adapter.file import read_adapter

pytest.importorskip("lycoris", reason="LyCORIS is no dependency; the formulas are held in tests/unit/test_lycoris.py")
LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
OUT, IN = 24, 32


def make_module(kind: str):
    """One of LyCORIS' modules with random numbers in everything that it learns, and what it is called in a file."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    name, *words = kind.split()
    conv, tucker = "conv" in words or "tucker" in words, "tucker" in words
    inner = nn.Conv2d(IN, OUT, 3, padding=1, bias=False) if conv else nn.Linear(IN, OUT, bias=False)
    options = {"lora_dim": 4, "alpha": 3.0, "use_scalar": True, "use_tucker": tucker}
    options |= {"decompose_both": True, "factor": 4} if name == "lokr" else {}
    options |= {"full_matrix": True} if "whole" in words else {}
    module = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[name]("x", inner, 1.0, **options)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return module, CONV if conv else LINEAR


@pytest.mark.parametrize(
    "kind",
    ["locon", "locon conv", "locon tucker", "loha", "loha conv", "loha tucker", "lokr", "lokr tucker", "lokr whole"],
)
def test_scalar_acts_as_in_lycoris(tmp_path, kind):
    """The module's raw state, `scalar` apart, and what LyCORIS writes of it, the number folded in: both are its ΔW."""
    module, path = make_module(kind)
    expected = output_of(module)
    raw = {name: p.detach() for name, p in module.named_parameters()} | {"alpha": module.alpha}
    assert "scalar" in raw
    assert float(raw["scalar"]) not in (0.0, 1.0)
    for tensors in (raw, {name: t.detach() for name, t in module.state_dict().items()}):
        file = tmp_path / "a.safetensors"
        prefix = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
        safetensors.torch.save_file({f"{prefix}.{name}": t.contiguous() for name, t in tensors.items()}, file)
        weight = read_adapter(file).deltas[path].weight()
        torch.testing.assert_close(run(weight), expected, rtol=1e-4, atol=1e-4)
    assert float(expected.norm()) > 1


def run(weight: Tensor) -> Tensor:
    x = example(weight.dim() == 4)
    return nn.functional.conv2d(x, weight, padding=1) if weight.dim() == 4 else nn.functional.linear(x, weight)


def example(conv: bool) -> Tensor:
    return torch.randn(*((2, IN, 5, 5) if conv else (5, IN)), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def output_of(module: nn.Module) -> Tensor:
    """What the module adds to the output of the layer that it changes, by its own forward."""
    module.eval()
    x = example(isinstance(module.org_module[0], nn.Conv2d))
    module.apply_to()
    try:
        return module(x) - module.org_forward(x)
    finally:
        module.restore()

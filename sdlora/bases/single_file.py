"""Bases from a single `.safetensors` checkpoint, without a network: Stable Diffusion 1.x, 2.x and SDXL.

diffusers' `from_single_file` is not used for this: without a network it finds no configuration and no tokenizer, it
takes a file of an unknown kind for a Stable Diffusion 1, and it says nothing of keys that it leaves out. It is what
the tests hold this against.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..adapter.header import FLOAT_DTYPES, printable
from ..errors import BaseModelError
from .architecture import (
    CLIP_WORDS,
    NAMES,
    choose_config,
    fill_buffers,
    make_part,
    make_tokenizers,
    read_family,
)
from .checkpoint_keys import THIRDS, Slot, find_slots, is_harmless
from .checkpoint_kind import V_SAMPLE_SIZE, Checkpoint, identify_checkpoint
from .checkpoint_writer import write_checkpoint
from .family import Base
from .folder import fingerprint_files
from .schedule import choose_schedule

_LOG = logging.getLogger(__name__)
__all__ = ["load_single_file", "read_checkpoint", "write_checkpoint"]


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint: empty, on the meta device, and where each of its tensors lies in the file."""

    name: str
    module: nn.Module
    slots: dict[str, Slot]


def load_single_file(
    path: Path,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Base:
    """A Base from a single-file checkpoint; `prediction` (`epsilon` or `v`) and `zero_snr` go before what it says.

    Weights go tensor by tensor to the device and the dtype, so the file is never in memory as a whole.

    Raises: BaseModelError where the file is another kind of model, is damaged, or lacks or holds other tensors.
    """
    from .families import FAMILIES

    checkpoint = identify_checkpoint(path)
    kind, zero = checkpoint.settle(prediction, zero_snr)
    config = choose_schedule(read_family(checkpoint.family)["scheduler"], kind, zero, name)
    parts = match_parts(checkpoint, kind)
    if kind == "v" and prediction is None:
        snr = ", with zero terminal SNR" if zero else ""
        _LOG.warning("note: %s predicts velocity%s (%s)", printable(name), snr, checkpoint.told_by)
    modules = {part.name: _fill_part(checkpoint, part, device, dtype) for part in parts}
    return FAMILIES[checkpoint.family].assemble(
        name,
        modules,
        make_tokenizers(checkpoint.family),
        config,
        device,
        dtype,
        path,
        fingerprint_files(path.parent, {"checkpoint": path}),
    )


def read_checkpoint(path: Path) -> dict[str, dict[str, Tensor]]:
    """By part, the tensors of a checkpoint under diffusers' and transformers' names, in the file's dtypes, on the CPU.

    Raises: BaseModelError as `load_single_file`.
    """
    checkpoint = identify_checkpoint(path)
    parts = match_parts(checkpoint, checkpoint.prediction or "epsilon")
    return {part.name: read_part(checkpoint, part, torch.device("cpu"), None) for part in parts}


def read_configs(checkpoint: Checkpoint, prediction: str) -> dict[str, dict[str, Any]]:
    """By part, the configuration of the checkpoint's models.

    Raises: BaseModelError where the file says of itself what no such model has.
    """
    family, differing = checkpoint.family, checkpoint.differing
    try:
        configs = {part: choose_config(family, part, differing.get(part, {})) for part in checkpoint.prefixes}
    except BaseModelError as e:
        raise BaseModelError(f"{printable(checkpoint.path)}: {e}") from None
    if checkpoint.resolution_px is not None:
        configs["unet"]["sample_size"] = checkpoint.resolution_px // 8
    elif checkpoint.family == "sd2" and prediction == "v":
        configs["unet"]["sample_size"] = V_SAMPLE_SIZE
    return configs


def match_parts(checkpoint: Checkpoint, prediction: str) -> list[Part]:
    """The models of a checkpoint, empty, once every tensor that they need is in the file and no other is.

    Raises: BaseModelError naming what is missing, of another shape or dtype, or belongs to nothing, with counts.
    """
    configs = read_configs(checkpoint, prediction)
    parts: list[Part] = []
    for name, config in configs.items():
        try:
            module = make_part(checkpoint.family, name, config)
            slots = find_slots(name, checkpoint.prefixes[name], module.state_dict(), config)
        except BaseModelError as e:
            raise BaseModelError(f"{printable(checkpoint.path)}: {e}") from e
        except (KeyError, IndexError) as e:  # a configuration from the file's metadata, of blocks that have no names
            raise BaseModelError(f"{printable(checkpoint.path)}: its {name} has a module {e} of no known name") from e
        parts.append(Part(name, module, slots))
    _check_keys(checkpoint, parts, int(configs["text_encoder"]["num_hidden_layers"]))
    for part in parts:
        _check_shapes(checkpoint, part)
    return parts


def _check_keys(checkpoint: Checkpoint, parts: list[Part], text_layers: int) -> None:
    name, kind = printable(checkpoint.path), NAMES[checkpoint.family]
    wanted = {slot.key for part in parts for slot in part.slots.values()}
    missing = sorted(wanted - set(checkpoint.entries))
    others = sorted(set(checkpoint.entries) - wanted)
    dropped = [key for key in others if is_harmless(key, checkpoint.family, text_layers)]
    extra = sorted(set(others) - set(dropped))
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} of the {len(wanted)} tensors of a {kind} ({_name_some(missing)})")
    if extra:
        problems.append(f"holds {len(extra)} that no {kind} has ({_name_some(extra)})")
    if problems:
        raise BaseModelError(f"{name} {' and '.join(problems)}; download it again, or use another checkpoint")
    left = [key for key in dropped if key not in ("v_pred", "ztsnr")]  # these two tell how the base predicts
    if left:
        _LOG.warning(
            "note: %s: %d tensors that a base does not need are left out (%s)", name, len(left), _name_some(left)
        )


def _name_some(keys: list[str], count: int = 3) -> str:
    shown = ", ".join(printable(key, 90) for key in keys[:count])
    return shown if len(keys) <= count else f"{shown}, …"


def _check_shapes(checkpoint: Checkpoint, part: Part) -> None:
    """Every tensor has the shape that the model wants, and a float dtype."""
    name, kind = printable(checkpoint.path), NAMES[checkpoint.family]
    for own, tensor in part.module.state_dict().items():
        slot = part.slots[own]
        entry, shape = checkpoint.entries[slot.key], tuple(tensor.shape)
        fits = {
            "same": (shape,),
            "transposed": (shape[::-1],),
            "matrix": (shape, (*shape, 1), (*shape, 1, 1)),
        }.get(slot.form, ((3 * shape[0], *shape[1:]),))
        if entry.shape not in fits:
            if own.endswith("token_embedding.weight"):
                raise BaseModelError(
                    f"{name}: its text encoder knows {entry.shape[0]} words where CLIP's vocabulary has {CLIP_WORDS}; "
                    "use a checkpoint with CLIP's own vocabulary"
                )
            raise BaseModelError(
                f"{name}: {printable(slot.key)} is {_size(entry.shape)} where a {kind} has {_size(fits[0])}; "
                "models of other sizes are not supported"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise BaseModelError(
                f"{name}: {printable(slot.key)} is {entry.dtype}; quantised checkpoints are not supported, "
                "use one in F32, F16 or BF16"
            )


def _fill_part(checkpoint: Checkpoint, part: Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    # The family decides whether its VAE stays in float32, so that is what it gets.
    state = read_part(checkpoint, part, device, torch.float32 if part.name == "vae" else dtype)
    part.module.load_state_dict(state, strict=True, assign=True)
    fill_buffers(part.module, device)
    return part.module


def read_part(checkpoint: Checkpoint, part: Part, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one part under its own names, on the device, in the dtype or (None) the file's.

    Raises: BaseModelError where a tensor cannot be read, is not finite, or does not fit the dtype.
    """
    name = printable(checkpoint.path)
    state: dict[str, Tensor] = {}
    try:
        with safe_open(checkpoint.path, framework="pt", device="cpu") as file:
            for own, tensor in part.module.state_dict().items():
                slot = part.slots[own]
                stored = _take(file.get_tensor(slot.key), slot, tuple(tensor.shape))
                # a copy: what the library gives is a view of the file, and changes when the file does
                value = stored.to(device, dtype or stored.dtype, copy=True).contiguous()
                checked = value if value.element_size() > 1 else value.float()
                if not bool(checked.isfinite().all()):
                    raise BaseModelError(f"{name}: {_why_not_finite(stored, slot.key, dtype)}")
                state[own] = value
    except BaseModelError:
        raise
    except Exception as e:  # the library raises what it likes; the header is sound, so this is the disk
        raise BaseModelError(f"{name} cannot be read: {printable(e)}; copy or download it again") from e
    return state


def _take(stored: Tensor, slot: Slot, shape: tuple[int, ...]) -> Tensor:
    if slot.form in THIRDS:
        return stored.chunk(3)[THIRDS.index(slot.form)]
    return stored.T if slot.form == "transposed" else stored.reshape(shape)


def _why_not_finite(stored: Tensor, key: str, dtype: torch.dtype | None) -> str:
    if bool(stored.float().isfinite().all()):
        return f"{printable(key)} is too large for {str(dtype).removeprefix('torch.')}; use --precision bf16 or fp32"
    return f"{printable(key)} holds NaN or infinity: the checkpoint is broken; use another one"


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"

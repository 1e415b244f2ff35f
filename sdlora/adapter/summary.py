"""What a LoRA file is: the document of `sdlora inspect`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .delta import Delta, Dora, LowRank
from .file import file_sha256, read_adapter
from .header import printable, read_header
from .lycoris import KINDS
from .positional import read_positional
from .vector import Vector, split_parameter

AUTOV3_DIGITS = 12
_KINDS = {"LowRank": "lora", "Dora": "dora", "Loha": "loha", "Lokr": "lokr", "CpLocon": "cp-locon", "Full": "full"}
MOST_BYTES = 200_000_000
"""Of a larger file the hashes and the energy, which need every byte, are left out unless they are asked for."""
_SCALES = (".alpha", ".scalar", ".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""How the keys end of what is no factor; it may have a dtype of its own."""
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def summarize(path: Path, full: bool = False) -> dict[str, Any]:
    """One element of `inspect --json`; `energy` maps a block to the sum of its modules' ‖ΔW‖² (Frobenius).

    Of a file of more than `MOST_BYTES` only the header is read, and `energy` and the hashes are None, unless `full`.
    Raises: AdapterFileError where the file is no LoRA that is read.
    """
    warnings: list[str] = []
    entries, metadata = read_header(path)
    whole = full or path.stat().st_size <= MOST_BYTES
    adapter = read_adapter(path, warn=warnings.append, look=whole)
    if not whole:
        size = f"{path.stat().st_size / 1e9:.1f} GB"
        warnings.append(f"of {size} only the header was read: --full adds energy and hashes, and looks for NaN")
    sha256 = file_sha256(path) if whole else None
    dtypes = Counter(e.dtype for key, e in entries.items() if e.dtype in _FLOATS and not key.endswith(_SCALES))
    if len(dtypes) > 1:
        warnings.append(f"its factors have {len(dtypes)} dtypes: {', '.join(sorted(dtypes))}")
    inner: list[Any] = [d.inner if isinstance(d, Dora) else d for d in adapter.deltas.values()]
    doras = [delta for delta in adapter.deltas.values() if isinstance(delta, Dora)]
    if doras:
        warnings.append("energy is that of the low-rank factors: what DoRA's magnitudes add depends on the base")
    energy: dict[str, float] = {}
    for name, delta in adapter.deltas.items() if whole else ():
        block = block_of(name)
        energy[block] = energy.get(block, 0.0) + energy_of(delta.inner if isinstance(delta, Dora) else delta)
    parts = Counter(name.partition(".")[0] for name in {split_parameter(path)[0] for path in adapter.deltas})
    return {
        "file": str(path),
        "format": naming_of(entries),
        "family": adapter.card.family or None,
        "kinds": sorted({_name_kind(d) for delta in adapter.deltas.values() for d in _layers(delta)}),
        "modules": {part: parts.get(part, 0) for part in ("unet", "text_encoder", "text_encoder_2")},
        "ranks": count_values(d.rank for d in inner if hasattr(d, "rank")),
        "alphas": count_values(d.alpha for d in inner if hasattr(d, "alpha")),
        "dtype": dtypes.most_common(1)[0][0] if dtypes else None,
        "parameters": sum(count_parameters(delta) for delta in adapter.deltas.values()),
        "bytes": path.stat().st_size,
        "trigger": adapter.card.trigger or None,
        "base": adapter.card.base or None,
        "sha256": sha256,
        "autov2": sha256[:10] if sha256 else None,
        "autov3": tensors_sha256(path)[:AUTOV3_DIGITS] if whole else None,
        "metadata": metadata,
        "energy": energy if whole else None,
        "warnings": warnings,
    }


def energy_of(delta: Delta) -> float:
    """‖ΔW‖² (Frobenius); of a low-rank pair through r x r Gram matrices, so that ΔW is never made."""
    if isinstance(delta, LowRank):
        up, down = delta.up.double().flatten(1), delta.down.double().flatten(1)
        return float(delta.scale**2 * ((up.T @ up) * (down @ down.T)).sum())
    return float(delta.weight().double().square().sum())


def count_parameters(delta: Delta) -> int:
    """The numbers that a file holds for a module, its alpha not counted."""
    if isinstance(delta, Dora):
        return count_parameters(delta.inner) + delta.magnitude.numel()
    if isinstance(delta, LowRank):
        return delta.down.numel() + delta.up.numel()
    return sum(tensor.numel() for tensor in delta.tensors().values()) if isinstance(delta, KINDS) else 0


def _name_kind(delta: Delta) -> str:
    return delta.kind if isinstance(delta, Vector) else _KINDS[type(delta).__name__]


def _layers(delta: Delta) -> list[Delta]:
    """A delta, and what is inside of a DoRA that is no plain pair."""
    return [delta, delta.inner] if isinstance(delta, Dora) and not isinstance(delta.inner, LowRank) else [delta]


def naming_of(keys: Iterable[str]) -> str:
    """Whose names the keys are: kohya's, PEFT's (`base_model.model.`), diffusers', or numbers (positional)."""
    keys = list(keys)
    if any(read_positional(key) for key in keys):
        return "positional"
    if any(key.startswith(("lora_unet_", "lora_te")) for key in keys):
        return "kohya"
    return "peft" if any(key.startswith("base_model.model.") for key in keys) else "diffusers"


def count_values(values: Iterable[float]) -> dict[str, int]:
    """How many modules have each value, by the value as text, smallest first."""
    return {f"{value:g}": n for value, n in sorted(Counter(values).items())}


def block_of(module: str) -> str:
    """A module's block: `unet.down_blocks.0`, `unet.mid_block`, `text_encoder.layers.3`."""
    part, *names = module.split(".")
    if "layers" in names:
        return f"{part}.layers.{names[names.index('layers') + 1]}"
    return ".".join([part, *names[:2]] if len(names) > 1 and names[1].isdigit() else [part, *names[:1]])


def tensors_sha256(path: Path) -> str:
    """SHA-256 of the file behind its header, so that changed metadata does not change it (AutoV3 is its start).

    Source: sd-scripts' `addnet_hash_safetensors`, which A1111 shows as the LoRA's hash.
    """
    total = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def list_summary(summary: dict[str, Any]) -> list[str]:
    """The same for a person; text from the file is made safe to show."""
    counts = {name: ", ".join(f"{v} ({n})" for v, n in summary[name].items()) for name in ("ranks", "alphas")}
    rows = {
        "format": f"{summary['format']}, {summary['dtype']}, {summary['bytes']:,} bytes",
        "family": summary["family"] or "unknown",
        "base": summary["base"] or "unknown",
        "trigger": summary["trigger"] or "none",
        "modules": ", ".join(f"{part} {n}" for part, n in summary["modules"].items() if n),
        "ranks": counts["ranks"],
        "alphas": counts["alphas"],
        "parameters": f"{summary['parameters']:,}",
    }
    if summary["sha256"]:
        rows["sha256"] = summary["sha256"]
        rows["hashes"] = f"AutoV2 {summary['autov2']}, AutoV3 {summary['autov3']}"
    lines = [printable(summary["file"], 400), *(f"  {name:<12}{printable(text)}" for name, text in rows.items())]
    energy = summary["energy"] or {}
    total = sum(energy.values()) or 1.0
    lines += [f"  {'energy':<12}{block} {100 * value / total:.1f} %" for block, value in energy.items()]
    return lines + [f"  {'warning':<12}{text}" for text in summary["warnings"]]

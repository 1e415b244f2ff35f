"""What a LoRA file is: the document of `sdlora inspect`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .delta import Dora, pair_of
from .file import file_sha256, read_adapter
from .header import printable, read_header

AUTOV3_DIGITS = 12
_KINDS = {"LowRank": "lora", "Dora": "dora"}
_SCALES = (".alpha", ".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""How the keys end of what is no factor; it may have a dtype of its own."""
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def summarize(path: Path) -> dict[str, Any]:
    """One element of `inspect --json`; `energy` maps a block to the sum of its modules' ‖ΔW‖² (Frobenius).

    Raises: AdapterFileError where the file is no LoRA that is read.
    """
    warnings: list[str] = []
    adapter = read_adapter(path, warn=warnings.append)
    entries, metadata = read_header(path)
    sha256 = file_sha256(path)
    dtypes = Counter(e.dtype for key, e in entries.items() if e.dtype in _FLOATS and not key.endswith(_SCALES))
    if len(dtypes) > 1:
        warnings.append(f"its factors have {len(dtypes)} dtypes: {', '.join(sorted(dtypes))}")
    pairs = [pair for delta in adapter.deltas.values() if (pair := pair_of(delta)) is not None]
    doras = [delta for delta in adapter.deltas.values() if isinstance(delta, Dora)]
    if doras:
        warnings.append("energy is that of the low-rank factors: what DoRA's magnitudes add depends on the base")
    energy: dict[str, float] = {}
    for name, delta in adapter.deltas.items():
        block = block_of(name)
        weight = (pair_of(delta) or delta).weight()
        energy[block] = energy.get(block, 0.0) + float(weight.double().square().sum())
    parts = Counter(name.partition(".")[0] for name in adapter.deltas)
    return {
        "file": str(path),
        "format": naming_of(entries),
        "family": adapter.card.family or None,
        "kinds": sorted({_KINDS.get(type(d).__name__, type(d).__name__) for d in adapter.deltas.values()}),
        "modules": {part: parts.get(part, 0) for part in ("unet", "text_encoder", "text_encoder_2")},
        "ranks": count_values(pair.rank for pair in pairs),
        "alphas": count_values(pair.alpha for pair in pairs),
        "dtype": dtypes.most_common(1)[0][0] if dtypes else None,
        "parameters": sum(pair.down.numel() + pair.up.numel() for pair in pairs)
        + sum(dora.magnitude.numel() for dora in doras),
        "bytes": path.stat().st_size,
        "trigger": adapter.card.trigger or None,
        "base": adapter.card.base or None,
        "sha256": sha256,
        "autov2": sha256[:10],
        "autov3": tensors_sha256(path)[:AUTOV3_DIGITS],
        "metadata": metadata,
        "energy": energy,
        "warnings": warnings,
    }


def naming_of(keys: Iterable[str]) -> str:
    """Whose names the keys are: kohya's, PEFT's (`base_model.model.`) or diffusers'."""
    keys = list(keys)
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
        "sha256": summary["sha256"],
        "hashes": f"AutoV2 {summary['autov2']}, AutoV3 {summary['autov3']}",
    }
    lines = [printable(summary["file"], 400), *(f"  {name:<12}{printable(text)}" for name, text in rows.items())]
    total = sum(summary["energy"].values()) or 1.0
    lines += [f"  {'energy':<12}{block} {100 * value / total:.1f} %" for block, value in summary["energy"].items()]
    return lines + [f"  {'warning':<12}{text}" for text in summary["warnings"]]

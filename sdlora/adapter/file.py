"""Reads and writes adapters as .safetensors files under kohya's, diffusers' or PEFT's names."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..disk import write_atomic
from ..errors import AdapterFileError
from . import card as cards
from . import keys, lycoris
from .delta import Adapter, Delta, Dora, shape_of
from .header import Entry, parse_header, printable, read_header, replace_metadata
from .pairs import check_entries, make_ready, name_tensors, read_delta
from .vector import Vector

WRITTEN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _warn_on_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def write_adapter(
    adapter: Adapter, path: str | Path, format: str = "kohya", dtype: torch.dtype = torch.float32
) -> None:
    """Writes one .safetensors file, whole or not at all; the same adapter gives the same bytes.

    `format` is kohya, diffusers or peft; factors are stored as `dtype` (float32, float16, bfloat16), alphas as float32.
    Raises: AdapterFileError where the adapter cannot be written so, or its bytes come back wrong; DiskError where it
    cannot be written.
    """
    path = Path(path)
    if format not in keys.FORMATS:
        raise AdapterFileError(f"format {format!r} is not known; use {', '.join(keys.FORMATS)}")
    if dtype not in WRITTEN_DTYPES:
        raise AdapterFileError(f"dtype {dtype} cannot be written; use float32, float16 or bfloat16")
    if path.suffix != ".safetensors":
        raise AdapterFileError(f"{printable(path)} must end in .safetensors, or other tools will not open it")
    if not adapter.deltas:
        raise AdapterFileError(f"{printable(path)} would hold no module; nothing is written")
    kept = adapter.deltas if format == "kohya" else _leave_vectors(adapter.deltas, format, path)
    deltas = {p: make_ready(p, kept[p], dtype) for p in sorted(kept)}
    doras = {p for p, d in deltas.items() if isinstance(d, Dora)}
    inner: dict[str, Any] = {p: d.inner if isinstance(d, Dora) else d for p, d in deltas.items()}
    sizes = {p: (d.rank, d.alpha) for p, d in inner.items() if hasattr(d, "rank")}
    metadata = cards.describe_card(adapter.card, sizes, format)
    if any(isinstance(d, lycoris.KINDS) for d in inner.values()):
        metadata["ss_network_module"] = "lycoris.kohya"
    if format != "kohya":
        metadata |= cards.describe_alphas(sizes, doras)
    tensors = name_tensors(deltas, format, adapter.card.family)
    if format == "kohya":
        tensors |= {key: value.detach().to("cpu").contiguous().clone() for key, value in adapter.embeddings.items()}
    elif adapter.embeddings:
        _warn_on_stderr(f"{printable(path)}: {format} files hold no embeddings; {_count(adapter.embeddings)} left out")
    data = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(memoryview(data)[start:]).hexdigest()
    metadata |= {cards.HASH_KEY: f"0x{digest}", "sshs_model_hash": digest}  # modelspec's name, and kohya's and A1111's
    content = replace_metadata(data, metadata)
    write_atomic(path, content, lambda written: _check_written(written, content, path))


def _leave_vectors(deltas: Mapping[str, Delta], format: str, path: Path) -> dict[str, Delta]:
    """Without the changes of biases and norms, which only kohya's names have room for.

    Raises: AdapterFileError where nothing else is there.
    """
    kept = {p: delta for p, delta in deltas.items() if not isinstance(delta, Vector)}
    left = sorted(deltas.keys() - kept.keys())
    if not kept:
        raise AdapterFileError(
            f"{left[0]} is a change of a bias or norm, as all in it are; {format} has no names for them, use kohya"
        )
    if left:
        _warn_on_stderr(
            f"{printable(path)}: {format} files hold no changes of biases and norms; {len(left)} left out, "
            f"{left[0]} for one"
        )
    return kept


def _check_written(written: Path, content: bytes, path: Path) -> None:
    """Reads back what is to become `path`."""
    found = written.read_bytes()
    if found != content:
        raise AdapterFileError(f"{printable(path)} was not stored as written; check the disk")
    length = int.from_bytes(found[:8], "little")
    parse_header(found[8 : 8 + length], len(found) - 8 - length, printable(path))


def read_adapter(path: str | Path, *, warn: Callable[[str], None] = _warn_on_stderr, look: bool = True) -> Adapter:
    """Reads a LoRA file of any naming and kind; factors keep the file's dtype, a missing alpha means the rank.

    What is not used is named through `warn`, one line at a time. Tensors are mapped: without `look`, which searches
    them for NaN, reading costs the file's header, and a tensor's bytes are read when it is used.
    Raises: AdapterFileError where the file is broken, holds another kind of adapter, or nothing of it fits.
    """
    path = Path(path)
    entries, metadata = read_header(path)
    name = printable(path)
    if foreign := keys.foreign_family(entries):
        raise AdapterFileError(f"{name} is a LoRA for {foreign}; give one for Stable Diffusion 1, 2 or XL")
    said = cards.tell_family(metadata, {key: entry.shape for key, entry in entries.items()})
    family = said if said in keys.GRAMMARS else keys.DEFAULT_FAMILY
    modules, unknown = _sort_keys(entries, name, family)
    if not modules:
        raise AdapterFileError(f"{name} {_why_nothing_fits(entries)}")
    embeddings = [key for key in unknown if key.startswith(keys.EMBEDDING_PREFIXES)]
    unknown = [key for key in unknown if key not in embeddings]
    for key in unknown[:5]:
        warn(f"{name}: {printable(key)} belongs to no module of a {family} base and is left out")
    if len(unknown) > 5:
        warn(f"{name}: {len(unknown) - 5} more such keys are left out")
    if embeddings:
        warn(f"{name} also holds {_count(embeddings)}: kept when it is converted, not used")
    check_entries(modules, entries, name)
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as e:  # the library raises what it likes; the header is sound, so this is the disk or the dtype
        raise AdapterFileError(f"{name} cannot be read: {printable(e)}") from e
    alphas = cards.alphas_of(metadata, family)
    deltas: dict[str, Delta] = {
        p: read_delta(p, roles, tensors, alphas, name, look=look) for p, roles in sorted(modules.items())
    }
    return Adapter(deltas, cards.read_card(metadata, said), {key: tensors[key] for key in embeddings})


def _count(embeddings: Collection[str]) -> str:
    """How many embeddings, and what they are called."""
    names = dict.fromkeys(key.removeprefix("bundle_emb.").partition(".")[0] for key in embeddings)
    return f"{len(names)} embedding{'s' if len(names) > 1 else ''} ({', '.join(printable(n, 40) for n in names)})"


def _sort_keys(entries: Mapping[str, Entry], name: str, family: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module path -> role -> key, and the keys that are nothing known."""
    modules: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in entries:
        kind = keys.other_kind(key)
        if kind:
            raise AdapterFileError(f"{name} is not plain LoRA: {printable(key)} makes it {kind}, which is not read yet")
        role = keys.read_key(key, family)
        if role is None:
            unknown.append(key)
            continue
        twin = modules.setdefault(role.path, {}).setdefault(role.role, key)
        if twin != key:
            raise AdapterFileError(f"{name} names {printable(role.path)} twice: {printable(twin)} and {printable(key)}")
    return modules, unknown


def _why_nothing_fits(entries: Mapping[str, Entry]) -> str:
    if not entries:
        return "holds no tensors; it is no LoRA"
    return f"is no LoRA that is known: none of its {len(entries)} keys fits, such as {printable(min(entries))}"


def misfits(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """What keeps an adapter from acting on a base's parts: one line for each module, empty where everything fits."""
    problems: list[str] = []
    for path, delta in adapter.deltas.items():
        try:
            weight = keys.find_parameter(modules, path)
        except KeyError:
            part = path.partition(".")[0]
            problems.append(f"{path} is not in the base" + ("" if part in modules else f" ({part} is not loaded)"))
            continue
        shape = shape_of(delta)
        whole = tuple(weight.shape)
        if shape != whole and (len(shape) != 2 or shape != (whole[0], weight[0].numel())):  # flat is as good
            problems.append(f"{path} is {_size(shape)} in the LoRA and {_size(tuple(weight.shape))} in the base")
    return problems


def check_fit(adapter: Adapter, modules: Mapping[str, nn.Module], name: str) -> None:
    """Makes sure that every module of the adapter called `name` is in the base, with the same shape.

    Raises: AdapterFileError that names the first misfit and both shapes.
    """
    problems = misfits(adapter, modules)
    if problems:
        made_for = f" (it says {printable(adapter.card.base, 60)})" if adapter.card.base else ""
        count = f", and {len(problems) - 1} more of {len(adapter.deltas)} modules" if len(problems) > 1 else ""
        raise AdapterFileError(f"{printable(name)} is for another base{made_for}: {problems[0]}{count}")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the whole file, 64 lower-case hex digits."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise AdapterFileError(f"{printable(path)} cannot be read: {printable(e.strerror or e)}") from e


def autov2(path: str | Path) -> str:
    """The first ten hex digits of the file's SHA-256, as A1111 and Civitai show it."""
    return file_sha256(path)[:10]


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


__all__ = ["autov2", "check_fit", "file_sha256", "misfits", "read_adapter", "write_adapter"]

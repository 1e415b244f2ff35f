"""A corpus of LoRA files that are wrong in one way each, and what reading one must come to."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sdlora.adapter.file import read_adapter
from sdlora.errors import AdapterFileError

MOST_S = 1.0
Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "down_blocks_0_resnets_0_conv1"


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _pair(name: str, alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    found = {f"{name}.lora_down.weight": rand(4, 8), f"{name}.lora_up.weight": rand(6, 4)}
    return found if alpha is None else found | {f"{name}.alpha": torch.tensor(alpha)}


def sound_files() -> dict[str, bytes]:
    """A small sound file of each kind and naming."""
    q, conv = f"lora_unet_{Q}", f"lora_unet_{CONV}"
    dotted = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    sides = {"A": (4, 8), "B": (6, 4)}
    peft = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}
    loha = {f"{q}.hada_w{n}_a": rand(6, 2) for n in (1, 2)} | {f"{q}.hada_w{n}_b": rand(2, 8) for n in (1, 2)}
    files: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "kohya": (_pair(q), {"ss_network_dim": "4", "modelspec.title": "a LoRA"}),
        "two modules": (_pair(q) | _pair(q.replace("to_q", "to_k"), None), {}),
        "half": ({k: v.half() for k, v in _pair(q).items()}, {}),
        "diffusers": (
            {f"{dotted}.lora_A.weight": rand(4, 8), f"{dotted}.lora_B.weight": rand(6, 4)},
            {"lora_adapter_metadata": json.dumps(peft)},
        ),
        "peft": ({f"base_model.model.{dotted}.lora_{s}.weight": rand(*z) for s, z in sides.items()}, {}),
        "dora": (_pair(q) | {f"{q}.dora_scale": rand(6, 1)}, {}),
        "loha": (loha, {}),
        "lokr": ({f"{q}.lokr_w1": rand(2, 4), f"{q}.lokr_w2": rand(3, 2)}, {}),
        "cp": (
            {
                f"{conv}.lora_down.weight": rand(2, 8, 1, 1),
                f"{conv}.lora_mid.weight": rand(2, 2, 3, 3),
                f"{conv}.lora_up.weight": rand(6, 2, 1, 1),
            },
            {},
        ),
        "full": ({f"{conv}.diff": rand(6, 8, 3, 3)}, {}),
        "positional": ({"unet:0:down": rand(4, 8), "unet:0:up": rand(6, 4)}, {}),
        "embedding": (_pair(q) | {"bundle_emb.mio.string_to_param.*": rand(1, 8)}, {}),
    }  # fmt: skip
    return {name: safetensors.torch.save(tensors, metadata=metadata) for name, (tensors, metadata) in files.items()}


def join(header: Any, data: bytes) -> bytes:
    """A file of a header (a dict, or its text) and the tensors' bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def part(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A sound file's header and its tensors' bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def broken_rules() -> Iterator[tuple[str, bytes]]:
    """Each sound file against each rule of the format, and of LoRAs; every one of these must be refused."""
    for kind, content in sound_files().items():
        header, data = part(content)
        keys = [key for key in header if key != "__metadata__"]
        first = max(keys, key=lambda key: header[key]["data_offsets"][0])  # the last one in the file
        row = header[first]
        begin, end = row["data_offsets"]

        def but(header=header, first=first, row=row, **changes):
            return {**header, first: {**row, **changes}}

        yield f"{kind}: a hole", join(but(data_offsets=[begin + 4, end + 4]), data + b"\0" * 4)
        yield f"{kind}: overlaps", join(but(data_offsets=[begin - 2, end - 2]), data)
        yield f"{kind}: ends after the file", join(header, data[:-1])
        yield f"{kind}: bytes behind", join(header, data + b"\0")
        yield f"{kind}: unknown dtype", join(but(dtype="F7"), data)
        yield (
            f"{kind}: whole numbers",
            join(but(dtype={2: "I16", 4: "I32"}[(end - begin) // max(1, _count(row))]), data),
        )
        yield f"{kind}: negative size", join(but(shape=[-1, *row["shape"][1:]]), data)
        yield f"{kind}: a size that is no number", join(but(shape=["4"]), data)
        yield f"{kind}: huge sizes", join(but(shape=[2**62, 2**62]), data)
        yield f"{kind}: no offsets", join({**header, first: {"dtype": "F32", "shape": [1]}}, data)
        yield f"{kind}: an entry that is a list", join({**header, first: []}, data)
        yield f"{kind}: a key twice", join(json.dumps(header)[:-1].encode() + b', "x": 1, "x": 2}', data)
        yield f"{kind}: metadata of numbers", join({**header, "__metadata__": {"a": 1}}, data)
        yield f"{kind}: no JSON", join(b"{" + json.dumps(header).encode(), data)
        yield f"{kind}: no UTF-8", join(b"\xff" + json.dumps(header).encode(), data)
        yield f"{kind}: deeply nested", join(b"[" * 100_000, data)
        yield f"{kind}: NaN", _with_floats(header, data, float("nan"))
        yield f"{kind}: infinity", _with_floats(header, data, float("inf"))
        yield f"{kind}: names of nothing", join({f"x{i}": header[key] for i, key in enumerate(keys)}, data)
        yield f"{kind}: header length 2^63", struct.pack("<Q", 2**63) + content[8:]
        yield f"{kind}: header length 0", struct.pack("<Q", 0) + content[8:]
        yield f"{kind}: header longer than the file", struct.pack("<Q", len(content)) + content[8:]
    q = f"lora_unet_{Q}"
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        yield f"alpha {alpha}", safetensors.torch.save(_pair(q, alpha))
    yield "alpha of two numbers", safetensors.torch.save(_pair(q, None) | {f"{q}.alpha": rand(2)})
    yield (
        "ranks that differ",
        safetensors.torch.save({f"{q}.lora_down.weight": rand(4, 8), f"{q}.lora_up.weight": rand(6, 3)}),
    )
    yield "no up factor", safetensors.torch.save({f"{q}.lora_down.weight": rand(4, 8)})
    yield "no down factor", safetensors.torch.save({f"{q}.lora_up.weight": rand(6, 4)})
    yield "rank 0", safetensors.torch.save({f"{q}.lora_down.weight": rand(0, 8), f"{q}.lora_up.weight": rand(6, 0)})
    yield "flat factors", safetensors.torch.save({f"{q}.lora_down.weight": rand(4), f"{q}.lora_up.weight": rand(4)})
    yield "no tensors", safetensors.torch.save({})
    flux = "lora_unet_double_blocks_0_img_attn_qkv"
    yield "Flux", safetensors.torch.save({f"{flux}.lora_{side}.weight": rand(4, 4) for side in ("up", "down")})
    yield "nothing", b""
    yield "seven bytes", b"1234567"
    yield "a pickle", pickle.dumps({"a": 1})
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    yield "a zipped pickle", zipped.getvalue()
    yield "a page", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(64)


def damaged(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Sound files with random bytes changed, cut off, put in or taken out; some of these are sound still."""
    draws, files = random.Random(seed), list(sound_files().items())
    for number in range(count):
        kind, content = draws.choice(files)
        changed, how = bytearray(content), draws.choice(("flip", "flip", "flip", "cut", "insert", "remove", "swap"))
        (length,) = struct.unpack("<Q", content[:8])
        within = 8 + length if draws.random() < 0.8 else len(content)  # mostly in the header
        for _ in range(draws.choice((1, 1, 2, 8))):
            at = draws.randrange(min(within, len(changed))) if changed else 0
            if how == "flip":
                changed[at] ^= 1 << draws.randrange(8)
            elif how == "cut":
                del changed[at:]
            elif how == "insert":
                changed[at:at] = bytes([draws.randrange(256)])
            elif how == "remove":
                del changed[at : at + 1]
            elif changed:
                other = draws.randrange(min(within, len(changed)))
                changed[at], changed[other] = changed[other], changed[at]
            if not changed:
                break
        yield f"{kind}, {how}, number {number} of seed {seed}", bytes(changed)


def find_fault(path: Path) -> tuple[str, bool]:
    """What is wrong with how a file is read, empty where nothing is; and whether it was read.

    It must be refused in one printable line that names it, or give modules; within a second.
    """
    warned: list[str] = []
    began_s = time.perf_counter()
    try:
        adapter = read_adapter(path, warn=warned.append)
    except AdapterFileError as error:
        text, read = str(error), False
        fault = "" if path.name in text and text.isprintable() else f"not one line that names it: {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}", False
    else:
        read, fault = True, "" if adapter.deltas else "read without a module"
        fault = fault or next((f"not printable: {w!r}" for w in warned if not w.isprintable()), "")
    took_s = time.perf_counter() - began_s
    return fault or (f"took {took_s:.1f} s" if took_s > MOST_S else ""), read


def _count(row: dict[str, Any]) -> int:
    count = 1
    for size in row["shape"]:
        count *= size
    return count


def _with_floats(header: dict[str, Any], data: bytes, value: float) -> bytes:
    """The same file with one number of its first factor exchanged."""
    key = min(k for k in header if k != "__metadata__" and not k.endswith("alpha") and not k.startswith("bundle"))
    begin, code = header[key]["data_offsets"][0], {"F32": "<f", "F16": "<e"}[header[key]["dtype"]]
    number = struct.pack(code, value)
    return join(header, data[:begin] + number + data[begin + len(number) :])

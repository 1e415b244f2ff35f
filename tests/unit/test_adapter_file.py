"""LoRA files: what comes back is what was written, and a broken file is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sdlora.adapter import (
    Adapter,
    Card,
    Dora,
    LowRank,
    autov2,
    check_fit,
    file_sha256,
    misfits,
    read_adapter,
    weight_on,
    write_adapter,
)
from sdlora.adapter.header import printable
from sdlora.errors import AdapterFileError, DiskError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Q = f"unet.{BLOCK}.attn1.to_q"
K = f"unet.{BLOCK}.attn2.to_k"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
KOHYA_Q = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
CARD = Card(
    family="mini",
    base="mini",
    trigger="inkstyle ü",
    settings={"base": "mini", "steps": 300, "learning_rate": 0.001, "alpha": None, "preview": ["a cat"]},
)


def pair(rank: int, out: int, width: int, alpha: float, *kernel: int, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, *kernel, generator=g)
    return LowRank(down, torch.randn(out, rank, *(1 for _ in kernel), generator=g), alpha)


def make_adapter(*paths: str, card: Card = CARD) -> Adapter:
    all_pairs = {
        Q: pair(4, 16, 16, 4.0),
        K: pair(2, 16, 24, 0.5, seed=1),
        CONV: pair(3, 8, 6, 1.75, 3, 3, seed=2),
        TEXT: pair(4, 12, 12, 8.0, seed=3),
    }
    return Adapter({p: all_pairs[p] for p in paths or all_pairs}, card)


def same(a: Adapter, b: Adapter) -> bool:
    return a.deltas.keys() == b.deltas.keys() and all(
        x.alpha == y.alpha and x.down.dtype == y.down.dtype and torch.equal(x.down, y.down) and torch.equal(x.up, y.up)
        for x, y in ((a.deltas[p], b.deltas[p]) for p in a.deltas)
    )


def fail(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("paths", [(), (Q, K), (TEXT,)])
def test_every_format_gives_back_the_same_bits_and_card(tmp_path: Path, format: str, paths: tuple[str, ...]) -> None:
    adapter = make_adapter(*paths)
    write_adapter(adapter, tmp_path / "a.safetensors", format)
    again = read_adapter(tmp_path / "a.safetensors", warn=fail)
    assert same(again, adapter)
    assert dataclasses.replace(again.card, metadata={}) == CARD
    write_adapter(again, tmp_path / "b.safetensors", format)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_dtypes_are_the_rounded_factors_with_exact_alphas(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = make_adapter()
    write_adapter(adapter, tmp_path / "a.safetensors", dtype=dtype)
    expected = Adapter({p: LowRank(x.down.to(dtype), x.up.to(dtype), x.alpha) for p, x in adapter.deltas.items()})
    assert same(read_adapter(tmp_path / "a.safetensors"), expected)


def test_kohya_files_have_a_zero_dim_float_alpha_in_every_module(tmp_path: Path) -> None:
    write_adapter(make_adapter(), tmp_path / "a.safetensors", dtype=torch.float16)
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 12
    alphas = {k: v for k, v in tensors.items() if k.endswith(".alpha")}
    assert {k: v.item() for k, v in alphas.items()} == {
        f"{KOHYA_Q}.alpha": 4.0,
        f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k.alpha": 0.5,
        "lora_unet_down_blocks_0_resnets_0_conv1.alpha": 1.75,
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha": 8.0,
    }
    assert all(v.shape == () and v.dtype == torch.float32 for v in alphas.values())


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as f:
        return f.metadata()  # type: ignore[no-any-return]


def test_metadata_says_what_tools_ask_for(tmp_path: Path) -> None:
    write_adapter(make_adapter(Q), tmp_path / "a.safetensors")
    metadata = metadata_of(tmp_path / "a.safetensors")
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "inkstyle ü LoRA",
        "modelspec.trigger_phrase": "inkstyle ü",
        "modelspec.resolution": "128x128",
        "modelspec.prediction_type": "epsilon",
        "sdlora.family": "mini",
        "sdlora.base": "mini",
    }
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["sdlora.recipe"]) == CARD.settings
    write_adapter(make_adapter(card=Card(family="sd1", settings={"resolution": 768})), tmp_path / "b.safetensors")
    metadata = metadata_of(tmp_path / "b.safetensors")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.resolution"] == "768x768"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


def test_nothing_private_reaches_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "secret-home"
    card = Card(
        base=str(folder / "base"), settings={"base": str(folder / "base"), "config": folder / "x.toml"}, trigger="t"
    )
    write_adapter(Adapter(make_adapter(Q).deltas, card), folder / "private-name.safetensors")
    data = (folder / "private-name.safetensors").read_bytes()
    assert not any(word in data for word in (b"secret-home", b"private-name", str(tmp_path).encode()))
    assert read_adapter(folder / "private-name.safetensors").card.base == "base"


def test_the_same_adapter_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    write_adapter(make_adapter(), tmp_path / "a.safetensors")
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]\n"
        "from test_adapter_file import make_adapter\n"
        "from sdlora.adapter import write_adapter\n"
        f"write_adapter(make_adapter(), {str(tmp_path / 'b.safetensors')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_hashes_are_the_whole_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (file_sha256(tmp_path / "x"), autov2(tmp_path / "x")) == (sha, sha[:10])
    with pytest.raises(AdapterFileError, match="missing"):
        file_sha256(tmp_path / "missing")


# Reading what others wrote


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def kohya(alpha: Any = 2.0, rank: int = 4) -> dict[str, Tensor]:
    tensors = {f"{KOHYA_Q}.lora_down.weight": torch.ones(rank, 8), f"{KOHYA_Q}.lora_up.weight": torch.ones(8, rank)}
    return tensors if alpha is None else tensors | {f"{KOHYA_Q}.alpha": torch.as_tensor(alpha)}


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(None, 4.0), (torch.tensor(1.5).half(), 1.5), (torch.tensor([3.0]), 3.0), (torch.tensor(2.0).double(), 2.0)],
)
def test_alphas_of_other_tools(tmp_path: Path, alpha: Any, expected: float) -> None:
    delta = read_adapter(save(tmp_path / "a.safetensors", kohya(alpha))).deltas[Q]
    assert delta.alpha == expected
    assert torch.equal(delta.weight(), torch.full((8, 8), expected))  # alpha / rank · rank ones


def test_keys_of_nothing_known_are_named_one_line_each(tmp_path: Path) -> None:
    lines: list[str] = []
    extra = {f"odd\x1b[31m\u202e.{i}": torch.ones(1) for i in range(9)}
    adapter = read_adapter(save(tmp_path / "a.safetensors", kohya() | extra), warn=lines.append)
    assert list(adapter.deltas) == [Q]
    assert len(lines) == 6
    assert all(r"odd\x1b[31m\u202e." in line for line in lines[:5])
    assert "4 more" in lines[5]
    assert not any(c in "".join(lines) for c in "\x1b\u202e\n")


def test_warnings_go_to_stderr_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_adapter(save(tmp_path / "a.safetensors", kohya() | {"odd": torch.ones(1)}))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (100, "")])
def test_family_of_a_silent_file_is_told_by_the_width_of_its_text(tmp_path: Path, width: int, family: str) -> None:
    name = f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": torch.ones(8, 1)}
    assert read_adapter(save(tmp_path / "a.safetensors", tensors)).card.family == family


@pytest.mark.parametrize(
    ("tensors", "metadata", "family"),
    [
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1": 8}, {}, "sdxl"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1": 8}, {"sdlora.family": "sd1"}, "sdxl"),
        ({"lora_unet_input_blocks_4_1_proj_in": 8}, {}, "sdxl"),
        ({f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_v": 2048}, {}, "sdxl"),
        ({f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_v": 8}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_v": 8}, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
        (
            {f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_v": 8},
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
            "sdxl",
        ),
        ({f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_v": 8}, {}, ""),
    ],
)
def test_a_files_family_is_told_by_its_names_its_text_and_its_metadata(
    tmp_path: Path, tensors: dict[str, int], metadata: dict[str, str], family: str
) -> None:
    name, width = next(iter(tensors.items()))
    pair = {f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": torch.ones(8, 1)}
    adapter = read_adapter(save(tmp_path / "a.safetensors", pair, metadata), warn=fail)
    assert adapter.card.family == family
    assert len(adapter.deltas) == 1


SDXL_PATHS = (
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.up_blocks.1.upsamplers.0.conv",
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
    "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("paths", [SDXL_PATHS, SDXL_PATHS[:1], SDXL_PATHS[-1:]])
def test_sdxl_comes_back_in_every_format(tmp_path: Path, format: str, paths: tuple[str, ...]) -> None:
    pairs = {p: pair(3, 8, 6, 1.5, *((3, 3) if p.endswith("conv") else ()), seed=i) for i, p in enumerate(paths)}
    adapter = Adapter(pairs, Card(family="sdxl"))
    write_adapter(adapter, tmp_path / "a.safetensors", format)
    again = read_adapter(tmp_path / "a.safetensors", warn=fail)
    assert same(again, adapter)
    assert again.card.family == "sdxl"


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("sd1", {}, ("sd_v1", "stable-diffusion-v1", "epsilon", "512x512", "False", "diffusers")),
        ("sd2", {}, ("sd_v2", "stable-diffusion-v2-512", "epsilon", "512x512", "True", "diffusers")),
        (
            "sd2",
            {"prediction_type": "v_prediction"},
            ("sd_v2_v", "stable-diffusion-v2-768-v", "v", "768x768", "True", "diffusers"),
        ),
        (
            "sdxl",
            {},
            ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "epsilon", "1024x1024", "False",
             "https://github.com/Stability-AI/generative-models"),
        ),
        (
            "sdxl",
            {"prediction_type": "v_prediction", "resolution": 768},
            ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "v", "768x768", "False",
             "https://github.com/Stability-AI/generative-models"),
        ),
    ],
)  # fmt: skip
def test_metadata_names_the_family_as_sd_scripts_does(
    tmp_path: Path, family: str, settings: dict[str, Any], expected: tuple[str, ...]
) -> None:
    adapter = Adapter({SDXL_PATHS[0]: pair(2, 8, 8, 2.0)}, Card(family=family, settings=settings))
    write_adapter(adapter, tmp_path / "a.safetensors")
    metadata = metadata_of(tmp_path / "a.safetensors")
    keys = ("ss_base_model_version", "modelspec.architecture", "modelspec.prediction_type", "modelspec.resolution",
            "ss_v2", "modelspec.implementation")  # fmt: skip
    version, architecture, *rest = expected
    assert [metadata[k] for k in keys] == [version, f"{architecture}/lora", *rest]
    write_adapter(adapter, tmp_path / "b.safetensors", "diffusers")
    assert metadata_of(tmp_path / "b.safetensors")["modelspec.implementation"] == "diffusers"


def test_a_module_that_sdxl_has_not_cannot_be_named(tmp_path: Path) -> None:
    adapter = Adapter({"unet.down_blocks.3.resnets.0.conv1": pair(1, 8, 8, 1.0, 3, 3)}, Card(family="sdxl"))
    with pytest.raises(AdapterFileError, match=r"down_blocks\.3\.resnets\.0\.conv1 has no name in a sdxl file"):
        write_adapter(adapter, tmp_path / "a.safetensors")


# DoRA


def make_dora(path: str, *, on_input: bool = False) -> tuple[Adapter, Dora, Tensor]:
    kernel = (3, 3) if path == CONV else ()
    low = pair(2, 8, 6, 1.0, *kernel)
    g = torch.Generator().manual_seed(5)
    shape = (1, 6, *(1 for _ in kernel)) if on_input else (8, 1, *(1 for _ in kernel))
    dora = Dora(low, 0.5 + torch.rand(*shape, generator=g))
    return Adapter({path: dora}, CARD), dora, torch.randn(8, 6, *kernel, generator=g)


@pytest.mark.parametrize("path", [Q, CONV])
@pytest.mark.parametrize(("format", "key"), [("kohya", "dora_scale"), ("diffusers", "lora_magnitude_vector")])
def test_dora_comes_back_whole_and_its_lengths_in_float32(tmp_path: Path, path: str, format: str, key: str) -> None:
    adapter, dora, base = make_dora(path)
    write_adapter(adapter, tmp_path / "a.safetensors", format, torch.float16)
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    (stored,) = (v for k, v in tensors.items() if k.endswith(f".{key}"))
    ones = (1, 1) if path == CONV else ()
    assert stored.shape == ((8, 1, *ones) if format == "kohya" else (1, 8, 1, 1) if ones else (8,))
    assert stored.dtype == torch.float32
    again = read_adapter(tmp_path / "a.safetensors", warn=fail).deltas[path]
    assert isinstance(again, Dora)
    assert torch.equal(again.magnitude, dora.magnitude)
    write_adapter(adapter, tmp_path / "a.safetensors", format)
    again = read_adapter(tmp_path / "a.safetensors", warn=fail).deltas[path]
    assert torch.equal(weight_on(again, base), weight_on(dora, base))


def test_lengths_by_input_as_older_lycoris_wrote_them(tmp_path: Path) -> None:
    for path in (Q, CONV):
        adapter, dora, base = make_dora(path, on_input=True)
        write_adapter(adapter, tmp_path / "a.safetensors")
        again = read_adapter(tmp_path / "a.safetensors", warn=fail).deltas[path]
        turned = base + dora.inner.weight()
        for i in range(6):
            length = turned[:, i].norm()
            expected = dora.magnitude.flatten()[i] * turned[:, i] / length - base[:, i]
            torch.testing.assert_close(weight_on(again, base)[:, i], expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(AdapterFileError, match="a length for each input"):
            write_adapter(adapter, tmp_path / "b.safetensors", "diffusers")


def test_a_dora_says_that_it_needs_its_base() -> None:
    with pytest.raises(AdapterFileError, match="depends on the base's weight"):
        make_dora(Q)[1].weight()


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(begin: int = 0, end: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


BROKEN: dict[str, bytes] = {
    "zero_bytes": b"",
    "seven_bytes": b"1234567",
    "text": b"this is no safetensors file but a note to self",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "pickle": pickle.dumps({"a": 1}),
    "torch_zip": b"PK\x03\x04" + bytes(60),
    "header_past_the_end": raw(b"{}", length=99),
    "header_of_exabytes": raw(b"{}", length=2**63),
    "header_empty": raw(b""),
    "header_no_json": raw(b"{nonsense}"),
    "header_no_utf8": raw(b'{"\xff": 1}'),
    "header_a_list": raw([1, 2]),
    "header_deep": raw(b"[" * 100_000 + b"]" * 100_000),
    "header_nan": raw(b'{"__metadata__": NaN}'),
    "header_long_number": raw(b'{"a": ' + b"9" * 10_000 + b"}"),
    "twice": raw(b'{"a": 1, "a": 2}'),
    "metadata_numbers": raw({"__metadata__": {"a": 1}}),
    "metadata_list": raw({"__metadata__": []}),
    "row_a_number": raw({"a": 3}),
    "row_without_dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "row_with_more": raw({"a": row() | {"more": 1}}, bytes(4)),
    "dtype_unknown": raw({"a": row(dtype="F31")}, bytes(4)),
    "dtype_a_list": raw({"a": row(dtype=["F32"])}, bytes(4)),
    "shape_negative": raw({"a": row(shape=(-1,))}, bytes(4)),
    "shape_text": raw({"a": row(shape="1")}, bytes(4)),
    "shape_true": raw({"a": row(shape=(True,))}, bytes(4)),
    "shape_float": raw({"a": row(shape=(1.0,))}, bytes(4)),
    "shape_huge": raw({"a": row(shape=(2**62, 2**62))}, bytes(4)),
    "offsets_backwards": raw({"a": row(4, 0)}, bytes(4)),
    "offsets_too_few": raw({"a": row() | {"data_offsets": [0]}}, bytes(4)),
    "offsets_past_the_end": raw({"a": row(0, 4)}, bytes(3)),
    "size_wrong": raw({"a": row(0, 4, shape=(2,))}, bytes(4)),
    "overlap": raw({"a": row(0, 4), "b": row(2, 6)}, bytes(6)),
    "hole": raw({"a": row(0, 4), "b": row(5, 9)}, bytes(9)),
    "tail": raw({"a": row()}, bytes(9)),
    "no_tensors": raw({}),
    "name_with_newline": raw({"bad\nname\u202e": row(dtype="F31")}, bytes(4)),
}


WHY = {
    "zero_bytes": "is empty",
    "seven_bytes": "only 7 bytes",
    "png": "no .safetensors file",
    "pickle": "is a pickle",
    "torch_zip": "is a pickle",
    "header_past_the_end": "ends at byte 107 of 10",
    "header_no_json": "no JSON",
    "header_deep": "no JSON",
    "twice": "a is in it twice",
    "metadata_numbers": "not made of strings",
    "dtype_unknown": "unknown dtype F31",
    "shape_negative": "the shape [-1]",
    "shape_true": "the shape [True]",
    "shape_huge": "not what its shape and dtype need",
    "offsets_backwards": "the offsets [4, 0]",
    "offsets_past_the_end": "truncated",
    "size_wrong": "not what its shape and dtype need",
    "overlap": "b overlaps",
    "hole": "b leaves a hole",
    "tail": "5 bytes follow",
    "no_tensors": "no tensors",
    "name_with_newline": r"bad\nname\u202e",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[case])
    message = refused(path)
    assert WHY.get(case, "") in message
    assert "none of its" not in message  # refused for its header, not for its names


def refused(path: Path) -> str:
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(path, warn=fail)
    message = str(caught.value)
    assert message.startswith(printable(path))
    assert message.isprintable()
    assert len(message) < 500
    return message


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(make_adapter(Q), path)
    whole = path.read_bytes()
    for cut in [*range(0, 64), *range(64, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        refused(path)


UP, DOWN, ALPHA = f"{KOHYA_Q}.lora_up.weight", f"{KOHYA_Q}.lora_down.weight", f"{KOHYA_Q}.alpha"


def without(key: str) -> dict[str, Tensor]:
    return {k: v for k, v in kohya().items() if k != key}


MEANINGLESS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no_up": (without(UP), DOWN),
    "no_down": (without(DOWN), UP),
    "alpha_only": ({ALPHA: torch.tensor(1.0)}, ALPHA),
    "nan": (kohya() | {UP: torch.full((8, 4), float("nan"))}, UP),
    "inf": (kohya() | {DOWN: torch.full((4, 8), float("inf")).half()}, DOWN),
    "alpha_zero": (kohya(0.0), ALPHA),
    "alpha_negative": (kohya(-1.0), ALPHA),
    "alpha_nan": (kohya(float("nan")), ALPHA),
    "alpha_vector": (kohya([1.0, 2.0]), ALPHA),
    "alpha_whole_number": (kohya(2), ALPHA),
    "rank_mismatch": (kohya() | {UP: torch.ones(8, 3)}, "rank 4"),
    "rank_zero": (kohya(rank=0), Q),
    "one_dim": (kohya() | {DOWN: torch.ones(4)}, Q),
    "three_dims": (kohya() | {DOWN: torch.ones(4, 8, 1), UP: torch.ones(8, 4, 1)}, Q),
    "conv_with_linear": (kohya() | {DOWN: torch.ones(4, 8, 3, 3)}, Q),
    "integers": (kohya() | {UP: torch.ones(8, 4, dtype=torch.int32)}, UP),
    "two_names": (kohya() | {f"{Q}.lora_A.weight": torch.ones(4, 8)}, Q),
    "dora_alone": ({f"{KOHYA_Q}.dora_scale": torch.ones(8, 1)}, f"{KOHYA_Q}.dora_scale"),
    "dora_of_another_size": (kohya() | {f"{KOHYA_Q}.dora_scale": torch.ones(7, 1)}, f"{KOHYA_Q}.dora_scale is [7, 1]"),
    "dora_nan": (kohya() | {f"{KOHYA_Q}.dora_scale": torch.full((8, 1), float("nan"))}, f"{KOHYA_Q}.dora_scale"),
    "loha": ({f"{KOHYA_Q}.hada_w1_a": torch.ones(8, 4)}, "LoHa"),
    "lokr": ({f"{KOHYA_Q}.lokr_w1": torch.ones(8, 4)}, "LoKr"),
    "sdxl": (
        {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(4, 8)},
        "no up factor for unet.down_blocks.1.attentions.0.proj_in",
    ),
    "flux_with_text": (
        {f"{t}.lora_down.weight": torch.ones(4, 8) for t in ("lora_te1_text_x", "lora_unet_double_blocks_0_x")},
        "flux",
    ),
    "flux": ({"transformer.single_blocks.0.lora_A.weight": torch.ones(4, 8)}, "flux"),
    "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(4, 8)}, "model.diffusion_model.out.2.weight"),
}


@pytest.mark.parametrize("case", MEANINGLESS)
def test_files_that_mean_nothing_name_the_key(tmp_path: Path, case: str) -> None:
    tensors, named = MEANINGLESS[case]
    assert named in refused(save(tmp_path / "a.safetensors", tensors))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.safetensors")
    assert "folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(tmp_path / "pipe")
    refused(tmp_path / "zero\0byte")
    refused(tmp_path / ("long" * 100))
    refused(tmp_path / "new\nline\x1b")


# Writing


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: Adapter({}), "no module"),
        (lambda a: Adapter({"unet.nothing": a.deltas[Q]}), "unet.nothing"),
        (lambda a: Adapter({Q: dataclasses.replace(a.deltas[Q], alpha=0.0)}), "alpha 0"),
        (lambda a: Adapter({Q: dataclasses.replace(a.deltas[Q], up=torch.ones(16, 3))}), "rank 4"),
        (lambda a: Adapter({Q: dataclasses.replace(a.deltas[Q], up=torch.full((16, 4), float("inf")))}), "not finite"),
        (lambda a: Adapter({Q: object()}), "object"),  # type: ignore[dict-item]
    ],
)
def test_what_cannot_be_written_leaves_no_file(
    tmp_path: Path, change: Callable[[Adapter], Adapter], named: str
) -> None:
    with pytest.raises(AdapterFileError, match=named):
        write_adapter(change(make_adapter()), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_factor_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    adapter = Adapter({Q: LowRank(torch.full((1, 2), 1e6), torch.ones(2, 1), 1.0)})
    with pytest.raises(AdapterFileError, match="float16"):
        write_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (
        tmp_path / "file" / "a.safetensors",
        tmp_path / "folder.safetensors",
        tmp_path / "a.ckpt",
        tmp_path / ("x" * 300 + ".safetensors"),
        Path("/proc/nowhere/a.safetensors"),
    ):
        with pytest.raises((AdapterFileError, DiskError)) as caught:
            write_adapter(make_adapter(), path)
        assert "\n" not in str(caught.value)
    write_adapter(make_adapter(), tmp_path / "new" / "folders" / "a.safetensors")
    assert [p.name for p in (tmp_path / "new" / "folders").iterdir()] == ["a.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors", "new"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(make_adapter(Q), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(DiskError, match=r"a.safetensors, [\d,]+ bytes, cannot be written: No space left"):
            write_adapter(make_adapter(TEXT), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    write_adapter(make_adapter(TEXT), path)
    assert list(read_adapter(path).deltas) == [TEXT]


def test_a_disk_that_stores_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"other")
    with pytest.raises(AdapterFileError, match="not stored as written"):
        write_adapter(make_adapter(Q), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# Fitting a base


def modules(width: int = 16) -> dict[str, nn.Module]:
    def nest(name: str, module: nn.Module) -> nn.Module:
        for word in reversed(name.split(".")):
            module = nn.ModuleDict({word: module})
        return module

    return {"unet": nest(f"{BLOCK}.attn1.to_q", nn.Linear(width, width))}


def test_an_adapter_fits_the_base_with_its_names_and_shapes() -> None:
    check_fit(make_adapter(Q), modules(), "a.safetensors")
    assert misfits(make_adapter(Q), modules()) == []


def test_a_misfit_names_the_module_and_both_shapes() -> None:
    with pytest.raises(AdapterFileError) as caught:
        check_fit(make_adapter(Q), modules(20), "a\n.safetensors")
    assert str(caught.value).startswith(r"a\n.safetensors is for another base (it says mini): ")
    assert f"{Q} is 16×16 in the LoRA and 20×20 in the base" in str(caught.value)
    with pytest.raises(AdapterFileError, match=r"2 more of 4 modules"):
        check_fit(make_adapter(), modules(), "a")
    assert misfits(make_adapter(TEXT), modules()) == [f"{TEXT} is not in the base (text_encoder is not loaded)"]


def test_a_header_whose_length_begins_as_a_pickle_does_is_read(tmp_path):
    """640 is 0x0280: its first two bytes are those of a pickle of protocol 2."""
    path, wanted = tmp_path / "a.safetensors", {bytes((0x80, n)) for n in range(1, 6)}
    write_adapter(make_adapter(), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    aims = [n for n in range(length, length + 0x10100) if n.to_bytes(8, "little")[:2] in wanted]
    for aim in aims:
        padded = aim.to_bytes(8, "little") + data[8 : 8 + length] + b" " * (aim - length) + data[8 + length :]
        path.write_bytes(padded)
        assert set(read_adapter(path).deltas) == set(make_adapter().deltas)
    assert len(aims) == 5

"""Kinds that are no plain low-rank pair: read, held against formulas written out entry by entry, and written again."""

import itertools

import pytest
import safetensors.torch
import torch

from sdlora.adapter.delta import Adapter, Card, Dora, weight_on
from sdlora.adapter.file import check_fit, read_adapter, write_adapter
from sdlora.adapter.lycoris import CpLocon, Full, Loha, Lokr
from sdlora.adapter.positional import list_paths
from sdlora.adapter.summary import summarize
from sdlora.cli import main
from sdlora.combining.plan import Plan
from sdlora.combining.stack import combine
from sdlora.errors import AdapterFileError
from tests.tiny import make_tiny_base

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
OUT, IN = 6, 8


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def name_of(path: str) -> str:
    return "lora_unet_" + path.removeprefix("unet.").replace(".", "_")


def save(tmp_path, path: str, tensors: dict, more: dict | None = None, metadata: dict | None = None):
    file = tmp_path / "a.safetensors"
    named = {f"{name_of(path)}.{role}": t.contiguous() for role, t in tensors.items()}
    safetensors.torch.save_file({**named, **(more or {})}, file, metadata=metadata)
    return file


def loha(tucker: bool = False, conv: bool = False, rank: int = 3) -> dict:
    columns = IN * 9 if conv and not tucker else IN
    if tucker:
        parts = {f"hada_w{n}_a": rand(rank, OUT, seed=n) for n in (1, 2)}
        parts |= {f"hada_w{n}_b": rand(rank, IN, seed=n + 2) for n in (1, 2)}
        return parts | {f"hada_t{n}": rand(rank, rank, 3, 3, seed=n) for n in (1, 2)}
    parts = {f"hada_w{n}_a": rand(OUT, rank, seed=n) for n in (1, 2)}
    return parts | {f"hada_w{n}_b": rand(rank, columns, seed=n + 2) for n in (1, 2)}


def test_loha_is_the_product_of_two_pairs_entry_by_entry(tmp_path):
    parts = loha()
    delta = read_adapter(save(tmp_path, LINEAR, parts | {"alpha": torch.tensor(1.5)})).deltas[LINEAR]
    assert isinstance(delta, Loha)
    expected = torch.zeros(OUT, IN)
    for o, i in itertools.product(range(OUT), range(IN)):
        first = sum(parts["hada_w1_a"][o, r] * parts["hada_w1_b"][r, i] for r in range(3))
        second = sum(parts["hada_w2_a"][o, r] * parts["hada_w2_b"][r, i] for r in range(3))
        expected[o, i] = 1.5 / 3 * first * second
    torch.testing.assert_close(delta.weight(), expected)


def test_loha_of_a_convolution_flat_and_as_tucker(tmp_path):
    parts = loha(conv=True)
    delta = read_adapter(save(tmp_path, CONV, parts)).deltas[CONV]  # without alpha the scale is 1
    flat = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    torch.testing.assert_close(delta.weight(), flat.view(OUT, IN, 3, 3))
    parts = loha(tucker=True)
    delta = read_adapter(save(tmp_path, CONV, parts | {"alpha": torch.tensor(6.0)})).deltas[CONV]
    expected = torch.ones(OUT, IN, 3, 3)
    for n in (1, 2):
        a, b, t = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts[f"hada_t{n}"]
        one = torch.zeros(OUT, IN, 3, 3)
        for i, j in itertools.product(range(3), range(3)):
            one += a[i].view(OUT, 1, 1, 1) * b[j].view(1, IN, 1, 1) * t[i, j]
        expected *= one
    torch.testing.assert_close(delta.weight(), 2.0 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["whole", "pair"])
@pytest.mark.parametrize("second", ["whole", "pair", "tucker"])
def test_lokr_is_the_kronecker_product(tmp_path, first, second):
    """w1 [2, 4] x w2 [3, 2]: entry (o, i) is w1[o // 3, i // 2] · w2[o % 3, i % 2]."""
    conv = second == "tucker"
    parts = {"lokr_w1": rand(2, 4)} if first == "whole" else {"lokr_w1_a": rand(2, 2), "lokr_w1_b": rand(2, 4, seed=5)}
    w1 = parts["lokr_w1"] if first == "whole" else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if second == "whole":
        w2 = rand(3, 2)
        parts["lokr_w2"] = w2
    elif second == "pair":
        parts |= {"lokr_w2_a": rand(3, 2), "lokr_w2_b": rand(2, 2, seed=9)}
        w2 = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    else:
        parts |= {"lokr_w2_a": rand(2, 3), "lokr_w2_b": rand(2, 2, seed=9), "lokr_t2": rand(2, 2, 3, 3)}
        w2 = torch.einsum("ip,jr,ijkl->prkl", parts["lokr_w2_a"], parts["lokr_w2_b"], parts["lokr_t2"])
    path = CONV if conv else LINEAR
    delta = read_adapter(save(tmp_path, path, parts | {"alpha": torch.tensor(5.0)})).deltas[path]
    assert isinstance(delta, Lokr)
    scale = 1.0 if (first, second) == ("whole", "whole") else 5.0 / 2
    found = delta.weight()
    for o, i in itertools.product(range(6), range(8)):
        torch.testing.assert_close(found[o, i], scale * w1[o // 3, i // 2] * w2[o % 3, i % 2], rtol=1e-4, atol=1e-5)


def test_flat_lokr_of_a_convolution_takes_the_modules_kernel(tmp_path):
    parts = {"lokr_w1": rand(2, 4), "lokr_w2_a": rand(3, 2), "lokr_w2_b": rand(2, 2 * 9, seed=9)}
    delta = read_adapter(save(tmp_path, CONV, parts)).deltas[CONV]
    w2 = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).view(3, 2, 3, 3)
    expected = torch.stack(
        [torch.cat([torch.cat([w * w2[o] for w in row]) for row in [r]]) for r in parts["lokr_w1"] for o in range(3)]
    )
    torch.testing.assert_close(delta.weight(), expected)


def test_cp_locon_and_full_differences(tmp_path):
    parts = {
        "lora_down.weight": rand(2, IN, 1, 1),
        "lora_mid.weight": rand(2, 2, 3, 3),
        "lora_up.weight": rand(OUT, 2, 1, 1),
    }
    delta = read_adapter(save(tmp_path, CONV, parts | {"alpha": torch.tensor(1.0)})).deltas[CONV]
    assert isinstance(delta, CpLocon)
    x = rand(1, IN, 5, 5)
    inner = torch.nn.functional.conv2d(x, parts["lora_down.weight"])
    middle = torch.nn.functional.conv2d(inner, parts["lora_mid.weight"], padding=1)
    expected = torch.nn.functional.conv2d(middle, parts["lora_up.weight"]) * 0.5
    found = torch.nn.functional.conv2d(x, delta.weight(), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    whole = rand(OUT, IN, 3, 3)
    delta = read_adapter(save(tmp_path, CONV, {"diff": whole})).deltas[CONV]
    assert isinstance(delta, Full)
    assert torch.equal(delta.weight(), whole)


def test_lengths_on_top_of_a_loha(tmp_path):
    parts, base = loha(), rand(OUT, IN, seed=77)
    lengths = rand(OUT, 1).abs()
    delta = read_adapter(save(tmp_path, LINEAR, parts | {"dora_scale": lengths})).deltas[LINEAR]
    assert isinstance(delta, Dora)
    turned = base + (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    expected = lengths * turned / turned.norm(dim=1, keepdim=True) - base
    torch.testing.assert_close(weight_on(delta, base), expected, rtol=1e-4, atol=1e-5)


LOKR = {"lokr_w1": rand(2, 4), "lokr_w2_a": rand(3, 2), "lokr_w2_b": rand(2, 2)}
CP = {"lora_down.weight": rand(2, IN, 1, 1), "lora_mid.weight": rand(2, 2, 3, 3), "lora_up.weight": rand(OUT, 2, 1, 1)}
KINDS = {
    "loha": (LINEAR, loha() | {"alpha": torch.tensor(1.5)}),
    "tucker loha": (CONV, loha(tucker=True) | {"alpha": torch.tensor(1.5)}),
    "lokr": (LINEAR, LOKR | {"alpha": torch.tensor(4.0)}),
    "cp": (CONV, CP | {"alpha": torch.tensor(1.0)}),
    "full": (CONV, {"diff": rand(OUT, IN, 3, 3)}),
    "dora": (LINEAR, loha() | {"alpha": torch.tensor(1.5), "dora_scale": rand(OUT, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_to_kohya_gives_the_same_tensors(tmp_path, kind):
    file = save(tmp_path, *KINDS[kind])
    again = tmp_path / "b.safetensors"
    assert main(["convert", str(file), "--to", "kohya", "--out", str(again)]) == 0
    before, after = safetensors.torch.load_file(file), safetensors.torch.load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dora"])
@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_what_other_names_cannot_hold_is_one_line(tmp_path, capsys, kind, format):
    file = save(tmp_path, *KINDS[kind])
    out = tmp_path / "b.safetensors"
    assert main(["convert", str(file), "--to", format, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "use kohya, or make it low rank first (sdlora resize FILE --rank R)" in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_a_base_draws_with_it_as_with_its_dense_change(tmp_path, kind):
    base = make_tiny_base()
    path = CONV if kind == "full" else LINEAR
    out, into = base.unet.get_submodule(path.removeprefix("unet.")).weight.shape[:2]
    parts = {
        "loha": {f"hada_w{n}_a": rand(out, 2, seed=n) for n in (1, 2)}
        | {f"hada_w{n}_b": rand(2, into, seed=n + 2) for n in (1, 2)},
        "lokr": {"lokr_w1": rand(2, 2), "lokr_w2": rand(out // 2, into // 2)},
        "full": {"diff": rand(out, into, 3, 3)},
    }[kind]  # fmt: skip
    adapter = read_adapter(save(tmp_path, path, parts))
    check_fit(adapter, base.modules, "a")
    module = base.unet.get_submodule(path.removeprefix("unet."))
    pristine = module.weight.detach().clone()
    with Plan.of([(adapter, 0.5)]).applied(base) as stacked:
        found = stacked.unet.get_submodule(path.removeprefix("unet.")).weight.detach() - pristine
    torch.testing.assert_close(found, 0.5 * adapter.deltas[path].weight().view_as(pristine), rtol=1e-4, atol=1e-5)
    assert found.norm() > 0.1
    both = combine([(adapter, 0.5), (adapter, 0.25)])
    torch.testing.assert_close(both.deltas[path].weight(), 0.75 * adapter.deltas[path].weight(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({k: v for k, v in loha().items() if k != "hada_w2_b"}, "is a LoHa without hada_w2_b"),
        (loha() | {"lora_down.weight": rand(2, IN)}, "is a LoHa and has down too, which is of another kind"),
        (loha() | {"hada_t1": rand(3, 3, 3, 3)}, "one of hada_t1 and hada_t2"),
        (loha() | {"hada_w2_b": rand(3, IN + 1)}, "do not go together"),
        (loha() | {"hada_w1_a": rand(OUT, 2)}, "do not go together"),
        ({"lokr_w1": rand(2, 4)}, "is a LoKr without a whole lokr_w2"),
        (LOKR | {"lokr_w1_a": rand(2, 2), "lokr_w1_b": rand(2, 4)}, "whole lokr_w1"),
        ({"lokr_w1": rand(2, 4, 1, 1), "lokr_w2": rand(3, 2)}, "do not go together"),
        ({"lora_mid.weight": rand(2, 2, 3, 3), "lora_down.weight": rand(2, IN, 1, 1)}, "without up"),
        ({"diff": rand(OUT)}, "do not go together"),
        (loha() | {"alpha": torch.tensor(0.0)}, "is an alpha of 0.0"),
        (loha() | {"hada_w1_a": torch.full((OUT, 3), float("nan"))}, "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_what_is_no_whole_kind_is_one_line(tmp_path, tensors, says):
    with pytest.raises(AdapterFileError, match=says):
        read_adapter(save(tmp_path, LINEAR, tensors))


SCALED = {
    "lora": (LINEAR, {"lora_down.weight": rand(2, IN), "lora_up.weight": rand(OUT, 2)}),
    "locon": (CONV, {"lora_down.weight": rand(2, IN, 3, 3), "lora_up.weight": rand(OUT, 2, 1, 1)}),
    "cp": (CONV, CP),
    "loha": (LINEAR, loha()),
    "tucker loha": (CONV, loha(tucker=True)),
    "lokr": (LINEAR, LOKR),
    "lokr of two pairs": (
        LINEAR,
        {"lokr_w1_a": rand(2, 2), "lokr_w1_b": rand(2, 4), "lokr_w2_a": rand(3, 2), "lokr_w2_b": rand(2, 2)},
    ),
    "whole lokr": (LINEAR, {"lokr_w1": rand(2, 4), "lokr_w2": rand(3, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("number", [0.3, -1.7, 0.0])
@pytest.mark.parametrize("kind", SCALED)
def test_scalar_multiplies_the_change_and_survives_writing(tmp_path, kind, number, dtype):
    """LyCORIS' `use_scalar`: ΔW of the same file without it, times the number; written again it is in the factors."""
    path, tensors = SCALED[kind]
    tensors = {k: v.to(dtype) for k, v in tensors.items()} | {"alpha": torch.tensor(1.5)}
    plain = read_adapter(save(tmp_path, path, tensors)).deltas[path].weight()
    file = save(tmp_path, path, tensors | {"scalar": torch.tensor(number)})
    found = read_adapter(file).deltas[path].weight()
    torch.testing.assert_close(found, torch.tensor(number) * plain, rtol=1e-6, atol=1e-6)
    again = tmp_path / "b.safetensors"
    assert main(["convert", str(file), "--to", "kohya", "--out", str(again)]) == 0
    torch.testing.assert_close(read_adapter(again).deltas[path].weight(), found, rtol=1e-6, atol=1e-6)
    stored = {k.partition(".")[2]: v for k, v in safetensors.torch.load_file(again).items()}
    assert "scalar" not in stored  # which other tools do not know
    whole = kind == "whole lokr"
    if number > 0 and not whole:
        assert all(torch.equal(stored[k], v) for k, v in tensors.items() if k != "alpha")
        assert float(stored["alpha"]) == pytest.approx(1.5 * number)


def test_scalar_acts_before_the_lengths_of_a_dora(tmp_path):
    parts, base, lengths = loha(), rand(OUT, IN, seed=77), rand(OUT, 1).abs()
    more = {"dora_scale": lengths, "scalar": torch.tensor(0.25)}
    delta = read_adapter(save(tmp_path, LINEAR, parts | more)).deltas[LINEAR]
    turned = base + 0.25 * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    expected = lengths * turned / turned.norm(dim=1, keepdim=True) - base
    torch.testing.assert_close(weight_on(delta, base), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (loha() | {"scalar": torch.ones(2)}, "scalar must be a single number"),
        (loha() | {"scalar": torch.tensor(float("inf"))}, "scalar holds NaN or infinity"),
        ({"diff": rand(OUT, IN), "scalar": torch.tensor(1.0)}, "a.safetensors: .* and has scalar too"),
        ({"scalar": torch.tensor(1.0)}, "scalar but no (up|down) factor"),
    ],
)
def test_what_is_no_scalar_is_one_line(tmp_path, tensors, says):
    with pytest.raises(AdapterFileError, match=says):
        read_adapter(save(tmp_path, LINEAR, tensors))


def test_scalar_is_looked_at_where_the_factors_are_not(tmp_path):
    file = save(tmp_path, LINEAR, loha() | {"scalar": torch.tensor(float("nan"))})
    with pytest.raises(AdapterFileError, match="scalar is nan"):
        read_adapter(file, look=False)


def test_embeddings_in_a_file_are_named_and_kept(tmp_path, capsys):
    more = {"bundle_emb.mio.string_to_param.*": rand(2, 16), "<s1>": rand(1, 16)}
    file = save(tmp_path, LINEAR, loha(), more)
    assert read_adapter(file).deltas.keys() == {LINEAR}
    assert "also holds 2 embeddings (<s1>, mio): kept when it is converted, not used" in capsys.readouterr().err
    again = tmp_path / "b.safetensors"
    assert main(["convert", str(file), "--to", "kohya", "--out", str(again)]) == 0
    after = safetensors.torch.load_file(again)
    assert all(torch.equal(after[key], value) for key, value in more.items())
    pair = {"lora_down.weight": rand(2, IN), "lora_up.weight": rand(OUT, 2)}
    capsys.readouterr()
    out = tmp_path / "c.safetensors"
    assert main(["convert", str(save(tmp_path, LINEAR, pair, more)), "--to", "peft", "--out", str(out)]) == 0
    assert "peft files hold no embeddings; 2 embeddings (<s1>, mio) left out" in capsys.readouterr().err


def test_positions_are_those_of_the_first_trainer(tmp_path):
    paths = list_paths()
    assert (len(paths["unet"]), len(paths["text_encoder"])) == (144, 48)
    assert len(set(paths["unet"])) == 144
    block = "unet.{}.transformer_blocks.0."
    assert paths["unet"][0] == block.format("down_blocks.0.attentions.0") + "attn1.to_q"
    assert paths["unet"][4] == block.format("down_blocks.0.attentions.0") + "ff.net.0.proj"
    assert paths["unet"][9 * 6 + 8] == block.format("up_blocks.1.attentions.0") + "attn2.to_out.0"
    assert paths["unet"][143] == block.format("mid_block.attentions.0") + "attn2.to_out.0"
    layer = "text_encoder.text_model.encoder.layers.{}.self_attn.{}"
    assert paths["text_encoder"][:5] == (
        *(layer.format(0, n) for n in ("k_proj", "v_proj", "q_proj", "out_proj")),
        layer.format(1, "k_proj"),
    )
    file = tmp_path / "a.safetensors"
    down, up = rand(4, 320), rand(320, 4)
    text = {"text_encoder:2:up": rand(768, 4), "text_encoder:2:down": rand(4, 768)}
    safetensors.torch.save_file({"unet:0:down": down, "unet:0:up": up, **text}, file)
    adapter = read_adapter(file)
    assert list(adapter.deltas) == [layer.format(0, "q_proj"), paths["unet"][0]]
    torch.testing.assert_close(adapter.deltas[paths["unet"][0]].weight(), up @ down)
    assert summarize(file)["format"] == "positional"


def test_number_beyond_the_last_layer_is_named(tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"unet:{n}:{r}": rand(4, 4) for n in (0, 144) for r in ("up", "down")}, file)
    read_adapter(file)
    assert capsys.readouterr().err.count("unet:144:") == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_narrow_numbers_are_read_as_they_are(tmp_path, dtype):
    down, up = rand(2, IN).to(dtype), rand(OUT, 2).to(dtype)
    delta = read_adapter(save(tmp_path, LINEAR, {"lora_down.weight": down, "lora_up.weight": up})).deltas[LINEAR]
    torch.testing.assert_close(delta.weight(), up.float() @ down.float())


def test_summary_knows_every_kind(tmp_path):
    for kind, word in {"loha": "loha", "lokr": "lokr", "cp": "cp-locon", "full": "full"}.items():
        file = save(tmp_path, *KINDS[kind])
        found = summarize(file)
        assert found["kinds"] == [word]
        (delta,) = read_adapter(file).deltas.values()
        assert sum(found["energy"].values()) == pytest.approx(float(delta.weight().square().sum()), rel=1e-5)
        tensors = [t for role, t in KINDS[kind][1].items() if role != "alpha"]
        assert found["parameters"] == sum(t.numel() for t in tensors)
    assert summarize(save(tmp_path, *KINDS["dora"]))["kinds"] == ["dora", "loha"]


def test_of_a_large_file_the_header_is_read_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("sdlora.adapter.summary.MOST_BYTES", 100)
    parts = {"lora_down.weight": torch.full((2, IN), float("nan")), "lora_up.weight": rand(OUT, 2)}
    file = save(tmp_path, LINEAR, parts | {"alpha": torch.tensor(1.0)})
    found = summarize(file)
    assert (found["sha256"], found["autov2"], found["autov3"], found["energy"]) == (None, None, None, None)
    assert (found["ranks"], found["alphas"]) == ({"2": 1}, {"1": 1})
    assert "only the header was read: --full" in found["warnings"][-1]
    with pytest.raises(AdapterFileError, match="holds NaN"):
        summarize(file, full=True)


def test_kinds_of_a_written_file_are_told_to_other_tools(tmp_path):
    adapter = read_adapter(save(tmp_path, *KINDS["loha"]))
    out = tmp_path / "b.safetensors"
    write_adapter(Adapter(adapter.deltas, Card(family="sd1")), out)
    with safetensors.safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("lycoris.kohya", "3")

"""What is kept on disk holds against what is encoded, and a damaged file against nothing."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora.data.cache import encode_folder
from sdlora.data.folder import scan_folder
from sdlora.data.store import Store, fingerprint, make_key
from tests.pictures import make_folder
from tests.tiny import make_tiny_base, make_tiny_sdxl_base

KEY = make_key("a", 1)


def encode(base, folder, store, **options):
    options = {"resolution_px": 64, "flip": True, "text": True, "progress": False} | options
    return encode_folder(base, scan_folder(folder), store=store, **options)


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def same(a, b):
    pairs = [(x.mean, y.mean) for x, y in zip(a.latents, b.latents, strict=True)]
    pairs += [(x.std, y.std) for x, y in zip(a.latents, b.latents, strict=True)]
    pairs += [(a.sizes, b.sizes), (a.ids, b.ids), (a.text.states, b.text.states)]
    if a.text.pooled is not None:
        pairs.append((a.text.pooled, b.text.pooled))
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("make", [make_tiny_base, make_tiny_sdxl_base])
def test_a_second_run_reads_the_same_bits_and_encodes_nothing(tmp_path, monkeypatch, capsys, make):
    folder = make_folder(tmp_path / "data", 3, side_px=70)
    first = encode(make(), folder, Store(tmp_path / "cache"))
    assert capsys.readouterr().err == f"cache {tmp_path / 'cache'}: 0 found, 7 made\n"
    plain = encode(make(), folder, None)
    torch.testing.assert_close(first.mean, plain.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.text.states, plain.text.states, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.sizes, plain.sizes)
    base = make()
    for name in ("encode_pictures", "encode_text"):
        monkeypatch.setattr(type(base), name, lambda self, *a: pytest.fail("encoded again"))
    second = encode(base, folder, Store(tmp_path / "cache"))
    assert "7 found, 0 made" in capsys.readouterr().err
    assert same(first, second)
    assert not [path for path in files(tmp_path / "cache") if path.suffix != ".safetensors"]


def test_whatever_decides_the_numbers_makes_another_key(tmp_path, capsys):
    folder, place = make_folder(tmp_path / "data", 1), tmp_path / "cache"

    def made(base=None, **options):
        store = Store(place)
        encode(base or make_tiny_base(), folder, store, **options)
        return store.made

    assert made() == 3  # a picture, its caption and the empty one
    assert made() == 0
    assert made(flip=False) == 1
    assert made(sizes=[(64, 48)]) == 1
    assert made(clip_skip=1) == 2
    assert made(chunks=2) == 0  # the caption fits in one chunk
    assert made(make_tiny_base(1)) == 3
    assert made(make_tiny_base(dtype=torch.bfloat16)) == 3
    Image.open(folder / "0.png").rotate(90).save(folder / "0.png")
    assert made() == 1
    (folder / "0.txt").write_text("a cat")
    assert made() == 1
    base = make_tiny_base()
    with torch.no_grad():  # two fine-tunes have the same names and shapes
        next(base.modules["text_encoder"].parameters())[0] += 1
    assert made(base) == 2


def spoil(path, how):
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "not finite":
        save_file({"x": torch.tensor([torch.nan])}, path, {"key": KEY})
    else:
        save_file({"x": torch.ones(3)}, path, {"key": make_key("b")})


@pytest.mark.parametrize("how", ["cut short", "empty", "one bit", "not finite", "another key"])
def test_a_damaged_file_is_said_and_made_again(tmp_path, capsys, how):
    store = Store(tmp_path)
    store.write(KEY, {"x": torch.ones(3)})
    (path,) = files(tmp_path)
    spoil(path, how)
    assert store.read(KEY, {"x": (3,)}) is None
    line = capsys.readouterr().err
    assert line.startswith(f"{path.name} in the cache is damaged (")
    assert line.endswith("; it is made again\n")
    assert line.count("\n") == 1
    store.write(KEY, {"x": torch.ones(3)})
    assert torch.equal(store.read(KEY, {"x": (3,)})["x"], torch.ones(3))
    assert store.read(KEY, {"x": (4,)}) is None
    assert "other shapes" in capsys.readouterr().err
    assert (store.found, store.made) == (1, 2)


def test_a_cache_that_cannot_be_written_costs_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    store.write(KEY, {"x": torch.ones(1)})
    store.write(KEY, {"x": torch.ones(1)})
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'file'}" in said
    assert "cannot be written: Not a directory" in said
    assert said.endswith("; going on without a cache\n")


def test_nothing_half_written_is_left_where_the_disk_fails(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    Store(tmp_path).write(KEY, {"x": torch.ones(1)})
    assert files(tmp_path) == []
    assert "No space left" in capsys.readouterr().err


def test_a_fingerprint_is_of_names_shapes_and_values():
    layer = torch.nn.Linear(2, 2)
    before = fingerprint([layer])
    assert fingerprint([layer]) == before
    assert fingerprint([layer.to(torch.bfloat16)]) != before
    layer = layer.float()
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert fingerprint([layer]) != before

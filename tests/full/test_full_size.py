"""The real architectures under random weights, as one file and as a folder, without a network: train, go on, draw.

Run with `make test-full`; it needs some 16 GiB of memory and 20 GB of disk, which it gives back.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from benchmarks.full_size import make_parts, write_folder
from sdlora.bases.checkpoint_writer import write_checkpoint
from sdlora.cli import main
from sdlora.training import loop
from tests.pictures import make_folder

pytestmark = pytest.mark.full

GIB = 2**30
NEEDED = {"sd1": (6 * GIB, 6 * GIB), "sdxl": (16 * GIB, 20 * GIB)}
"""Memory and disk that a test asks for before it starts."""
PROJECTIONS = [f"attn{i}_{end}" for i in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out_0")]
TRAIN = ("--steps", "2", "--batch-size", "1", "--rank", "2", "--resolution", "64", "--precision", "bf16",
         "--device", "cpu", "--checkpoint-every", "1", "--no-cache", "--learning-rate", "1e-3")  # fmt: skip
DRAW = ("--steps", "2", "--width", "64", "--height", "64", "--precision", "bf16", "--device", "cpu", "--seed", "3")


def list_modules(family: str) -> set[str]:
    """The UNet modules of kohya's attention-only LoRA files, written out from the two published layouts."""
    if family == "sd1":
        blocks = [f"down_blocks_{i}_attentions_{j}" for i in (0, 1, 2) for j in (0, 1)]
        blocks += ["mid_block_attentions_0"] + [f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
        depths = dict.fromkeys(blocks, 1)
    else:
        depths = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
        depths |= {"middle_block_1": 10} | {f"output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)}
    return {
        f"lora_unet_{block}_transformer_blocks_{i}_{projection}"
        for block, depth in depths.items()
        for i in range(depth)
        for projection in PROJECTIONS
    }


def write_bases(family: str, place: Path) -> tuple[Path, Path]:
    """The same base as one file and as a folder, both called `base`, so that their LoRAs can be the same."""
    parts = make_parts(family)
    file, folder = place / "file" / "base.safetensors", place / "folder" / "base"
    write_checkpoint(parts, file, family, torch.bfloat16)
    write_folder(parts, family, folder)
    return file, folder


@pytest.fixture
def place(tmp_path):
    """A folder that does not outlive the test, whatever pytest keeps."""
    place = tmp_path / "bases"
    place.mkdir()
    yield place
    shutil.rmtree(place)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Lets no connection leave this machine."""

    def refuse(*args):
        raise AssertionError(f"a connection was tried: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def check_room(family: str, place: Path) -> None:
    memory_bytes, disk_bytes = NEEDED[family]
    text = Path("/proc/meminfo")
    if text.exists():
        free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.read_text().splitlines()}
        if free["MemAvailable"] < memory_bytes:
            pytest.skip(f"needs {memory_bytes / GIB:.0f} GiB of free memory")
    if shutil.disk_usage(place).free < disk_bytes:
        pytest.skip(f"needs {disk_bytes / GIB:.0f} GiB of free disk")


@contextmanager
def watch_memory() -> Iterator[list[int]]:
    """The most bytes of its own that this process held, in a list of one.

    The pages of weights files that a library maps are left out: the system takes them back when it needs the room.
    """
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            most[0] = max(most[0], int(rows["RssAnon"].split()[0]) * 1024)

    watcher = threading.Thread(target=look, daemon=True)
    if Path("/proc/self/status").exists():
        watcher.start()
    try:
        yield most
    finally:
        done.set()


def train_in_two_goes(data: Path, base: Path, out: Path, monkeypatch) -> list[float]:
    """Two steps, stopped after the first and gone on with by the same command; their losses."""
    command = ["train", str(data), "--base", str(base), "--out", str(out), *TRAIN]
    original = loop.rate_at
    with monkeypatch.context() as patch:

        def stop(step, recipe):
            if step == 1:
                raise KeyboardInterrupt
            return original(step, recipe)

        patch.setattr(loop, "rate_at", stop)
        assert main(command) == 130
    gc.collect()
    assert not out.exists()
    metrics = out.with_suffix(".run") / "metrics.jsonl"
    before = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in before] == [1]
    assert main(command) == 0
    gc.collect()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rows[0] == before[0]
    assert [row["step"] for row in rows] == [1, 2]
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(("family", "count"), [("sd1", 128), ("sdxl", 560)])
def test_full_size_file_and_folder_train_go_on_and_draw_alike(family, count, place, tmp_path, monkeypatch, capsys):
    check_room(family, place)
    begin_s = time.perf_counter()
    with watch_memory() as memory:
        data = make_folder(tmp_path / "data", 2)
        file, folder = write_bases(family, place)
        gc.collect()
        losses, pictures, files = [], [], []
        for base, name in ((file, "file"), (folder, "folder")):
            out = tmp_path / f"{name}.safetensors"
            losses.append(train_in_two_goes(data, base, out, monkeypatch))
            files.append(safetensors.torch.load_file(out))
            capsys.readouterr()
            draw = ["generate", "a red square", "--base", str(base), "--lora", str(out), "--out", str(tmp_path / name)]
            assert main([*draw, *DRAW, "--json"]) == 0
            gc.collect()
            (row,) = json.loads(capsys.readouterr().out)
            with Image.open(row["file"]) as picture:
                pictures.append((picture.size, picture.tobytes()))  # the text beside the pixels names the LoRA's file
    with capsys.disabled():
        print(f"\n{family}: {time.perf_counter() - begin_s:.0f} s, at most {memory[0] / GIB:.1f} GiB of memory", end="")
        print(f" beside mapped files, losses {losses[0]}")

    assert losses[0] == losses[1]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses[0])
    modules = {key.partition(".")[0] for key in files[0]}
    assert modules == list_modules(family)
    assert len(modules) == count
    ends = {"alpha", "lora_down.weight", "lora_up.weight"}
    assert set(files[0]) == {f"{module}.{end}" for module in modules for end in ends}
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    learnt = [key for key, value in files[0].items() if key.endswith("lora_up.weight") and bool(value.any())]
    assert len(learnt) == count
    assert pictures[0] == pictures[1]
    assert memory[0] < 16 * GIB

"""A base split between processes (FSDP) trains as one that each process holds: losses, file, previews, validation."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from launched import launch
from pictures import make_folder
from short_runs import rows
from tiny import make_tiny_base, save_tiny_pipeline

from sdlora.training.run import Run

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip
"""What accelerate's launcher puts into the environment, with its own default for loading, which would load in one."""
CHOICES = {
    "plain": ["--preview", "a cat", "--validation-share", "0.2", "--ema-decay", "0.9"],
    "int8": ["--quantise", "int8", "--recompute", "all", "--dropout", "0.2", "--rank-dropout", "0.2"],
    "nf4": ["--quantise", "nf4"],
    "everything": [
        "--dora", "--text-encoder", "--targets", "attention,feed-forward,convolutions", "--recompute", "feed-forward",
        "--class-prompt", "a cat", "--class-images", "3",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("split")
    make_folder(place / "data", 5)
    save_tiny_pipeline(place / "base")
    return place


@pytest.fixture(autouse=True)
def cache(place):
    os.environ["SDLORA_CACHE"] = str(place / "cache")


def words(place, out, *more):
    fixed = "--steps 4 --rank 2 --precision fp32 --device cpu --learning-rate 1e-2 --warmup-steps 2 --batch-size 2"
    return ["train", str(place / "data"), "--base", str(place / "base"), "--out", str(out), *fixed.split(), *more]


def train(place, name, *more, environment=None):
    out = place / f"{name}.safetensors"
    argv = words(place, out, *more)
    return out, launch(place / f"printed-{name}", argv, argv, environment=environment)


def weigh_unet(linear_bytes):
    """Bytes of the tiny UNet in float32, its linear layers' weights with so many bytes a number."""
    unet = make_tiny_base().unet
    linear = sum(m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Linear))
    return 4 * (sum(p.numel() for p in unet.parameters()) - linear) + linear_bytes * linear


@pytest.mark.parametrize("choice", CHOICES)
def test_a_split_base_gives_what_a_whole_one_in_each_process_gives(place, choice):
    if choice == "nf4":
        pytest.importorskip("bitsandbytes")
    whole, _ = train(place, f"{choice}-whole", *CHOICES[choice])
    split, ended = train(place, f"{choice}-split", *CHOICES[choice], environment=FSDP)
    assert [e.code for e in ended] == [0, 0], ended[0].err
    assert ended[1].err == ended[1].out == ""
    for a, b in zip(rows(whole), rows(split), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b.keys() == a.keys()
    if choice == "plain":
        assert rows(split)[-1]["validation_loss"] == pytest.approx(rows(whole)[-1]["validation_loss"], rel=1e-5)
    first, second = load_file(whole), load_file(split)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name].float(), first[name].float(), rtol=1e-3, atol=5e-5)
    here, total = map(
        float, re.search(r"split between 2 processes: ([\d.]+) of ([\d.]+) MiB here", ended[0].err).groups()
    )
    assert 0.49 < here / total < 0.53  # what does not divide evenly is rounded up
    assert total == pytest.approx(weigh_unet({"int8": 1, "nf4": 0.5}.get(choice, 4)) / 2**20, abs=0.006)
    if choice == "plain":
        drawn = [np.asarray(Image.open(Run(out).previews / "step-000004-0.png"), int) for out in (whole, split)]
        assert abs(drawn[0] - drawn[1]).max() <= 2
        assert [path.name for path in Run(split).previews.iterdir()] == ["step-000004-0.png"]


@pytest.fixture(scope="module")
def split(place):
    """A run with a split base, and nothing else."""
    os.environ["SDLORA_CACHE"] = str(place / "cache")
    out, ended = train(place, "long", "--checkpoint-every", "2", environment=FSDP)
    assert [e.code for e in ended] == [0, 0], ended[0].err
    return out


def test_a_stopped_run_goes_on_split_as_it_was_to_the_same_bytes(place, split):
    run, content = Run(split), split.read_bytes()
    run.done.unlink()
    split.unlink()
    shutil.rmtree(run.checkpoints / "step-000004")  # as if it had ended before it
    _, ended = train(place, "long", "--checkpoint-every", "2")
    assert [e.code for e in ended] == [2, 2]
    assert "the splitting of the base changed" in ended[0].err
    _, ended = train(place, "long", "--checkpoint-every", "2", environment=FSDP)
    assert [e.code for e in ended] == [0, 0], ended[0].err
    assert split.read_bytes() == content


def test_a_block_may_stay_gathered(place, split):
    """The setting that trades memory for time changes no bit of what is learnt."""
    out, ended = train(place, "kept", environment=FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"})
    assert [e.code for e in ended] == [0, 0], ended[0].err
    assert out.read_bytes() == split.read_bytes()


def test_a_base_that_python_gives_stays_whole(place):
    out = place / "python.safetensors"
    argv = [str(place / "data"), str(out)]
    ended = launch(place / "printed-python", argv, argv, environment=FSDP, module="tests.given_base")
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    assert "the UNet split between 2 processes" in ended[0].err
    assert out.exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version = 1 splits what is trained too; set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true keeps the base in the CPU's memory for a GPU"),
    ],
)
def test_what_cannot_be_split_so_is_one_line(place, environment, message):
    out, ended = train(place, "refused", environment=FSDP | environment)
    assert [e.code for e in ended] == [2, 2]
    assert sum(message in line for line in ended[0].err.splitlines()) == 1
    assert ended[0].err.splitlines()[-1].startswith("error: ")
    assert ended[1].err == ""
    assert not Run(out).folder.exists()

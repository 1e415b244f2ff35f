"""How a run ends: by a signal, a closed terminal, a lack of memory, a lock, a base that changed; and what it says."""

import dataclasses
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from kills import make_context
from pictures import make_folder
from tiny import make_tiny_base

from sdlora.bases.source import MINI_FOLDER
from sdlora.cli import main
from sdlora.config import Recipe
from sdlora.errors import BaseModelError, RunError
from sdlora.training import loop, step
from sdlora.training.loop import train_adapter
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run
from sdlora.training.shortage import find_savings, is_shortage

RECIPE = Recipe(steps=6, batch_size=2, rank=1, warmup_steps=1, precision="fp32", checkpoint_every=2, flip=False)
STEPS = 400
FLAGS = ["--steps", str(STEPS), "--batch-size", "1", "--rank", "1", "--device", "cpu", "--resolution", "64"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 2)


@pytest.fixture(scope="module")
def context():
    return make_context()


def run_command(argv, log):
    """The command line in a process that has its libraries already; what it prints goes to a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    heed_signals()
    sys.exit(main(argv))


def heed_signals():
    """Undoes what nohup and shells ignore for all that they start."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def begin(context, data, out):
    """`sdlora train` on mini, once it has made some steps."""
    command = ["train", str(data), "--out", str(out), *FLAGS]
    process = context.Process(target=run_command, args=(command, out.with_suffix(".log")))
    process.start()
    await_steps(out, process.is_alive)
    return process


def await_steps(out, is_alive):
    deadline_s = time.monotonic() + 120
    while len(read_rows(Run(out).metrics)) < 3:
        assert is_alive(), "it ended before its third step"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def end(process, out):
    """The exit code, and what was printed."""
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, out.with_suffix(".log").read_text()


def saved_steps(out):
    return sorted(int(p.name[5:]) for p in Run(out).checkpoints.glob("step-??????"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_saves_and_says_how_to_go_on(context, data, tmp_path, number, code):
    out = tmp_path / "a.safetensors"
    process = begin(context, data, out)
    os.kill(process.pid, number)
    found, said = end(process, out)
    assert found == code, said
    last = said.strip().splitlines()[-1]
    done = re.fullmatch(
        rf"stopped after step (\d+) of {STEPS}, state saved in .*a\.run; run the same command again to go on", last
    )
    assert done, last
    assert saved_steps(out) == [int(done[1])]
    assert not out.exists()


@pytest.mark.slow
def test_a_second_signal_stops_at_once(context, data, tmp_path):
    out = tmp_path / "a.safetensors"
    process = begin(context, data, out)
    for number in (signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    found, said = end(process, out)
    # the second may come while the first is being handled, or after the run has ended by it
    assert found in (129, 143), said
    if found == 129:
        assert "stopped at once; the same command goes on from the last saved step" in said


@pytest.mark.slow
def test_a_terminal_that_is_closed_saves_too(data, tmp_path):
    """What is printed then fails; the run must end as by any signal all the same."""
    out = tmp_path / "a.safetensors"
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "sdlora", "train", str(data), "--out", str(out), *FLAGS]
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    process = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=_own(slave))
    await_steps(out, lambda: process.poll() is None)
    os.close(slave)
    os.close(master)  # the system sends SIGHUP, and every write fails from here on
    assert process.wait(timeout=60) == 129
    assert len(saved_steps(out)) == 1
    assert saved_steps(out)[0] >= 3


def _own(terminal):
    def take():
        import fcntl
        import termios

        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        heed_signals()

    return take


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_exits_at_once_and_names_the_first(context, data, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    first = begin(context, data, out)
    assert main(["train", str(data), "--out", str(out), *FLAGS]) == 2
    said = capsys.readouterr().err
    assert f"is in use by another training run (pid {first.pid}); wait for it or choose another --out" in said
    first.kill()
    first.join()
    with Run(out).locked():
        assert len(read_rows(Run(out).metrics)) >= 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_lack_of_memory_names_what_to_lower_and_touches_nothing(data, tmp_path, monkeypatch, error):
    assert is_shortage(error)
    out = tmp_path / "a.safetensors"
    original, calls = step.weighted_error, [0]

    def fail(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "weighted_error", fail)
        with pytest.raises(RunError) as raised:
            train_adapter(data, make_tiny_base(), RECIPE, out)
    assert str(raised.value) == (
        "out of memory while training on 2 pictures at once; checkpoints are untouched; give --recompute all, which "
        "goes on from the last checkpoint, or with --restart --batch-size 1 --accumulation 2 or "
        "--quantise int8 or --precision bf16 or a smaller --resolution"
    )
    assert saved_steps(out) == [2]
    train_adapter(data, make_tiny_base(), dataclasses.replace(RECIPE, recompute="all"), out)  # as the line says
    assert saved_steps(out) == [4, 6]


def test_other_errors_are_not_taken_for_it(data, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(step, "weighted_error", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        train_adapter(data, make_tiny_base(), RECIPE, tmp_path / "a.safetensors")


def test_what_is_lowered_already_is_not_named():
    lean = Recipe(recompute="all", batch_size=1, quantise="nf4", precision="bf16")
    assert find_savings(lean, "cuda") == ([], ["a smaller --resolution"])
    assert find_savings(Recipe(), "cuda", training=False) == ([], ["--quantise nf4", "a smaller --resolution"])
    assert find_savings(Recipe(batch_size=3, accumulation=2), "cuda")[1][0] == "--batch-size 1 --accumulation 6"


def test_a_base_that_changed_or_went_is_named_with_its_hash_before_anything_is_loaded(data, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(MINI_FOLDER, base)
    recipe = dataclasses.replace(RECIPE, base=str(base), steps=1, warmup_steps=0, batch_size=1, precision="bf16")
    out = tmp_path / "a.safetensors"
    loop.run_training(data, recipe, out, device="cpu")
    weights = next((base / "unet").glob("*.safetensors"))
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    monkeypatch.setattr(loop, "load_base", lambda *a, **k: pytest.fail("loaded"))
    begun_s = time.perf_counter()
    with pytest.raises(RunError, match=r"was begun on another base: base has hash \w{12} now and had \w{12}; bring"):
        loop.run_training(data, recipe, out, device="cpu")
    shutil.rmtree(base)
    with pytest.raises(BaseModelError, match=r"base: .*; .*a\.run was begun on a base of hash [0-9a-f]{12}"):
        loop.run_training(data, recipe, out, device="cpu")
    assert time.perf_counter() - begun_s < 5

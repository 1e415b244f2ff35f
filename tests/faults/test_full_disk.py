"""A disk that is full, read-only, or limits a file's size, at every call of a save: what was there before stays."""

import errno
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from disk_calls import fail_at, let, watching
from kills import make_context
from pictures import make_folder
from states import make, same

from sdlora import disk
from sdlora.adapter.delta import Adapter, LowRank
from sdlora.adapter.file import write_adapter
from sdlora.cli import main
from sdlora.disk import replacing, write_atomic, write_new
from sdlora.errors import DiskError
from sdlora.training.checkpoint import find_damage, load_newest, save_checkpoint

ERRORS = [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO]
Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def failures(root, work):
    """Every call of some work, each with every error, once and from there on; what `watching` is to be given for it."""
    with watching(root, let) as calls:
        work()
    for number, call in enumerate(calls):
        for error in ERRORS:
            for for_ever in (False, True):
                yield (number, call, os.strerror(error), for_ever), fail_at(number, error, for_ever)


@pytest.fixture
def folder(tmp_path):
    """Where two checkpoints are, and a copy of them for each try."""

    def fresh():
        if (tmp_path / "run").exists():
            shutil.rmtree(tmp_path / "run")
        for step in (1, 2):
            save_checkpoint(tmp_path / "run" / "checkpoints", make(step))
        return tmp_path / "run" / "checkpoints"

    return fresh


def test_a_save_that_fails_leaves_the_checkpoints_before_it(folder, tell):
    place, tries = folder(), 0
    for where, hook in failures(place.parent, lambda: save_checkpoint(place, make(3))):
        _, _, reason, for_ever = where
        folder()
        with watching(place.parent, hook), pytest.raises(DiskError) as raised:
            save_checkpoint(place, make(3))
        said = str(raised.value)
        assert str(place / "step-000003") in said, where
        assert re.search(rf", [\d,]+ bytes, cannot be written: {reason}; ", said), where
        assert "\n" not in said, where
        found = load_newest(place, lambda line: None)
        assert same(found, make(found.step)), where
        assert found.step in (2, 3), where
        assert sum(not find_damage(p) for p in place.glob("step-??????")) >= 2, where
        if not for_ever:  # else it cannot be removed either
            assert not list(place.glob("step-*.tmp-*")), where
        save_checkpoint(place, make(4))  # there is room again
        assert same(load_newest(place, lambda line: None), make(4)), where
        assert len(list(place.iterdir())) == 2, where
        tries += 1
    assert tries >= 100
    tell(f"{tries} failing calls")


def test_there_must_be_room_for_twice_the_size(folder, monkeypatch):
    place = folder()
    size = sum(p.stat().st_size for p in (place / "step-000002").iterdir())
    for free, fits in ((2 * size + 200, True), (2 * size - 200, False)):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        with watching(place.parent, let) as calls:
            if fits:
                save_checkpoint(place, make(3))
                continue
            with pytest.raises(
                DiskError, match=rf"{place} has room for [\d,]+ bytes, and [\d,]+ are needed; make room"
            ):
                save_checkpoint(place, make(4))
            assert calls == []
    assert same(load_newest(place, print), make(3))


@pytest.mark.parametrize("write", ["write_atomic", "write_new", "replacing", "write_adapter"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, write):
    path = tmp_path / "deep" / "a.safetensors"

    def adapter(value):
        return Adapter({Q: LowRank(torch.full((1, 4), value), torch.ones(3, 1), 1.0)})

    def work(value):
        if write == "write_adapter":
            write_adapter(adapter(float(value)), path)
        elif write == "replacing":
            with replacing(path) as file:
                file.write(b"%d" % value)
                file.write(b" more")
        else:
            (write_new if write == "write_new" else write_atomic)(path, b"%d and more" % value)

    path.parent.mkdir()
    tries = 0
    for where, hook in failures(path.parent, lambda: work(2)):
        path.unlink(missing_ok=True)
        before = b"" if write == "write_new" else work(1) or path.read_bytes()
        said = ""
        try:
            with watching(path.parent, hook):
                work(2)
        except DiskError as raised:
            said = str(raised)
        tries += bool(said)
        assert not said or (str(path) in said and where[2] in said), where
        found = path.read_bytes() if path.exists() else b""
        assert not list(path.parent.glob(".*")) or where[3] or where[1].kind == "unlink", where
        for left in path.parent.iterdir():
            left.unlink()
        work(2)
        assert found in (before, path.read_bytes()), where
    assert tries >= 4 * 2 * len(ERRORS)


def run_limited(argv, log, limit_bytes):
    """The command line in a process that may write no larger file; what it prints goes to a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    sys.exit(main(argv))


@pytest.mark.slow
def test_a_limit_on_a_files_size_ends_a_run_in_one_line_and_it_goes_on_without(tmp_path):
    """A real limit, by the system, and the command line."""
    data, out, log = make_folder(tmp_path / "data", 2), tmp_path / "a.safetensors", tmp_path / "log"
    command = ["train", str(data), "--out", str(out), "--steps", "2", "--batch-size", "1", "--rank", "2"]
    command += ["--checkpoint-every", "1", "--device", "cpu"]
    context = make_context()

    def run(limit_bytes):
        process = context.Process(target=run_limited, args=(command, log, limit_bytes))
        process.start()
        process.join(300)
        return process.exitcode

    assert run(150_000) == 2, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: "), last
    assert "cannot be written: File too large; raise the limit on a file's size (ulimit -f)" in last
    assert "bytes" in last
    assert not out.exists()
    assert not list(out.with_suffix(".run").rglob("*.tmp-*"))
    assert run(resource.RLIM_INFINITY) == 0, log.read_text()
    assert out.exists()

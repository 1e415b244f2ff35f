"""Several processes train as one does with their batches put together: losses, file, draws, masks, errors, signals."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from launched import finish, launch, start
from pictures import make_folder
from tiny import save_tiny_pipeline

from sdlora.training.checkpoint import load_newest
from sdlora.training.metrics import read_rows
from sdlora.training.run import Run

STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data folder, one that differs, and a base."""
    place = tmp_path_factory.mktemp("processes")
    make_folder(place / "data", 5)
    make_folder(place / "other", 4)
    save_tiny_pipeline(place / "base")
    return place


def words(place, out, *more, data="data"):
    fixed = f"--steps {STEPS} --rank 2 --precision fp32 --device cpu --learning-rate 1e-2 --warmup-steps 2"
    return ["train", str(place / data), "--base", str(place / "base"), "--out", str(out), *fixed.split(), *more]


def rows(out):
    return read_rows(Run(out).metrics)


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def check_alike(one, two):
    """Losses, rates and gradient norms of all steps, and the file's tensors, to float tolerance."""
    assert [row["step"] for row in rows(two)] == list(range(1, STEPS + 1))
    for a, b in zip(rows(one), rows(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["lr"] == a["lr"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name].float(), first[name].float(), rtol=1e-3, atol=2e-5)
    assert max(float(first[name].abs().max()) for name in first if name.endswith("lora_up.weight")) > 1e-3


@pytest.fixture(scope="module")
def two(place, tmp_path_factory):
    """Two processes with batch 2, a preview and a validation loss; and what they printed."""
    os.environ["SDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    out = place / "two.safetensors"
    argv = words(place, out, "--batch-size", "2", "--preview", "a cat", "--validation-share", "0.2")
    return out, launch(place / "printed-two", argv, argv)


def test_two_processes_give_what_one_gives_with_twice_the_batch(place, two):
    out, ended = two
    assert [e.code for e in ended] == [0, 0], ended[0].err
    one = place / "one.safetensors"
    (alone,) = launch(place / "printed-one", words(place, one, "--batch-size", "4", "--validation-share", "0.2"))
    assert alone.code == 0, alone.err
    check_alike(one, out)
    assert rows(out)[-1]["validation_loss"] == pytest.approx(rows(one)[-1]["validation_loss"], rel=1e-5)


def test_the_main_process_alone_prints_and_writes(place, two):
    out, ended = two
    assert ended[1].out == ended[1].err == ""
    assert ended[0].out == f"{out}\n"
    assert "6 steps of 2 x 2 processes (6 epochs)" in ended[0].err  # 4 of 5 pictures: 24 images in 6 steps
    assert "cache" in ended[0].err
    assert [p.name for p in Run(out).previews.iterdir()] == [f"step-{STEPS:06d}-0.png"]
    with safe_open(out, "pt") as file:
        assert '"processes": 2' in json.dumps(dict(file.metadata())).replace('\\"', '"')


def test_each_process_has_dropout_masks_of_its_own(place):
    """Two processes are two passes of one step, masks included; the same mask in both would be another run."""
    one, two = place / "one-drop.safetensors", place / "two-drop.safetensors"
    more = ["--batch-size", "2", "--dropout", "0.3", "--rank-dropout", "0.3", "--module-dropout", "0.2"]
    (alone,) = launch(place / "one-drop", words(place, one, *more, "--accumulation", "2"))
    argv = words(place, two, *more)
    ended = launch(place / "two-drop", argv, argv)
    assert [alone.code, *(e.code for e in ended)] == [0, 0, 0]
    check_alike(one, two)


def test_masks_and_class_pictures_are_shared_out_with_the_passes(place):
    one, two = place / "one-class.safetensors", place / "two-class.safetensors"
    make_folder(place / "class", 3)
    (place / "masks").mkdir()
    for picture in (place / "data").glob("*.png"):
        Image.linear_gradient("L").resize(Image.open(picture).size).save(place / "masks" / picture.name)
    more = ["--class-data", str(place / "class"), "--prior-weight", "0.5", "--masks", str(place / "masks")]
    more += ["--dropout", "0.3", "--batch-size", "2"]
    (alone,) = launch(place / "printed-one-class", words(place, one, *more, "--accumulation", "2"))
    argv = words(place, two, *more)
    ended = launch(place / "printed-two-class", argv, argv)
    assert [alone.code, *(e.code for e in ended)] == [0, 0, 0], alone.err + ended[0].err
    check_alike(one, two)
    assert "3 class pictures, 4 in each step beside yours" in ended[0].err
    plain = place / "two-plain.safetensors"
    argv = words(place, plain, *more[4:])  # without class pictures
    assert [e.code for e in launch(place / "printed-two-plain", argv, argv)] == [0, 0]
    assert all(b["loss"] > a["loss"] for a, b in zip(rows(plain), rows(two), strict=True))


def test_class_pictures_are_drawn_by_one_process_and_sent_to_other_machines(place):
    one, two = (place / f"{name}-drawn.safetensors" for name in ("one", "two"))
    more = ["--class-prompt", "a cat", "--class-prompt", "ink", "--class-images", "5", "--batch-size"]
    (alone,) = launch(place / "printed-one-drawn", words(place, one, *more, "4"))
    argv = words(place, two, *more, "2")
    ended = launch(place / "printed-two-drawn", argv, argv)
    assert [alone.code, *(e.code for e in ended)] == [0, 0, 0], alone.err + ended[0].err
    check_alike(one, two)
    drawn = {path.name: path.read_bytes() for path in (Run(one).folder / "class").iterdir()}
    assert len(drawn) == 11
    assert {path.name: path.read_bytes() for path in (Run(two).folder / "class").iterdir()} == drawn

    disks = [place / "here", place / "there"]
    for disk in disks:
        disk.mkdir()
    argv = words(place, "two.safetensors", *more, "2")
    ended = launch(place / "printed-apart", argv, argv, disks=disks)
    assert [e.code for e in ended] == [0, 0], ended[0].err
    assert (disks[0] / "two.safetensors").read_bytes() == two.read_bytes()
    sent = {path.name: path.read_bytes() for path in (disks[1] / "two.run" / "class").iterdir()}
    assert sent == {name: data for name, data in drawn.items() if name != "drawn.json"}
    assert not (disks[1] / "two.safetensors").exists()


def make_shapes(folder, *sizes):
    folder.mkdir()
    for i, size in enumerate(sizes):
        colour = (40 * i % 256, 200 - 25 * i % 200, 30 * i)
        Image.new("RGB", size, colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")
    return folder


def test_a_step_of_several_processes_holds_one_bucket(place):
    """Of the pictures and of the class pictures: a step's pictures, and so its bucket, are those of all processes."""
    square, wide = (64, 64), (96, 48)
    make_shapes(place / "shapes", square, wide, square, wide, square, wide, square, wide, square)
    make_shapes(place / "class-shapes", wide, square, wide, square, wide, square, wide, square, square)
    one, two = place / "one-bucket.safetensors", place / "two-bucket.safetensors"
    more = ["--buckets", "--class-data", str(place / "class-shapes"), "--batch-size"]
    (alone,) = launch(place / "printed-one-bucket", words(place, one, *more, "4", data="shapes"))
    argv = words(place, two, *more, "2", data="shapes")
    ended = launch(place / "printed-two-bucket", argv, argv)
    assert [alone.code, *(e.code for e in ended)] == [0, 0, 0], alone.err + ended[0].err
    check_alike(one, two)
    assert "bucket 80 x 48 px: 4 pictures" in ended[0].err


@pytest.mark.parametrize("short", ["shapes", "class"])
def test_a_bucket_that_fills_one_process_and_not_all_is_refused(place, tmp_path, short):
    square, wide = (64, 64), (96, 48)
    full = make_shapes(tmp_path / "full", *[square] * 4, *[wide] * 4)
    small = make_shapes(tmp_path / "small", *[square] * 4, *[wide] * 3)
    data, classes = (small, full) if short == "shapes" else (full, small)
    more = ["--buckets", "--batch-size", "2", "--class-data", str(classes)]
    argv = words(place, tmp_path / "out.safetensors", *more, data=str(data))
    ended = launch(tmp_path / "printed", argv, argv)
    assert [e.code for e in ended] == [2, 2]
    line = f"error: {small}: a bucket has fewer images an epoch than the 4 of a step"
    assert lines(ended[0].err)[-1].startswith(line)
    assert "80 x 48 px has 3" in ended[0].err
    assert ended[1].err == ""


def test_sigterm_to_any_process_stops_all_after_the_same_step(place, tmp_path):
    out = tmp_path / "out.safetensors"
    argv = words(place, out, "--batch-size", "1", "--steps", "100000")
    processes = start(tmp_path / "printed", argv, argv)
    while not rows(out):
        time.sleep(0.002)
        assert processes[0].is_alive()
    os.kill(processes[1].pid, signal.SIGTERM)  # as a launcher, or a cluster that wants its machine back
    ended = finish(tmp_path / "printed", processes)
    assert [e.code for e in ended] == [130, 143], ended[0].err  # the other one got no signal of its own
    done = len(rows(out))
    assert lines(ended[0].err)[-1].startswith(f"stopped after step {done} of 100000, state saved in")
    assert ended[1].err == ""
    assert load_newest(Run(out).checkpoints, print).step == done


def test_a_stopped_run_goes_on_to_the_same_bytes_with_as_many_processes_only(place, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    more = ["--batch-size", "1", "--ema-decay", "0.9", "--accumulation", "2", "--no-cache"]
    argv = words(place, whole, *more)
    assert [e.code for e in launch(tmp_path / "whole", argv, argv)] == [0, 0]

    argv = words(place, out, *more)
    processes = start(tmp_path / "stopped", argv, argv)
    while not rows(out):
        time.sleep(0.002)
        assert processes[0].is_alive()
    for _ in range(2):  # the terminal's, and the launcher's own
        os.kill(processes[1].pid, signal.SIGINT)  # one process alone: all stop after the same step
    ended = finish(tmp_path / "stopped", processes)
    assert [e.code for e in ended] == [130, 130], ended[0].err
    done = len(rows(out))
    assert 1 <= done < STEPS
    assert lines(ended[0].err)[-1].startswith(f"stopped after step {done} of {STEPS}, state saved in")
    assert ended[1].err == ""
    assert [p.name for p in Run(out).checkpoints.iterdir()] == [f"step-{done:06d}"]
    assert load_newest(Run(out).checkpoints, print).step == done

    (alone,) = launch(tmp_path / "alone", argv)
    assert alone.code == 2
    assert "the number of processes changed (2 -> 1)" in lines(alone.err)[-1]
    assert [e.code for e in launch(tmp_path / "on", argv, argv)] == [0, 0]
    assert out.read_bytes() == whole.read_bytes()
    same = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows(x)] for x in (out, whole)]
    assert same[0] == same[1]

    again = launch(tmp_path / "again", argv, argv)
    assert [e.code for e in again] == [0, 0]
    assert "is finished already; nothing to do" in again[0].err


@pytest.mark.parametrize("wrong", [0, 1])
def test_an_error_of_one_process_ends_all_and_is_printed_once(place, tmp_path, wrong):
    out = tmp_path / "out.safetensors"
    argvs = [words(place, out), words(place, out)]
    argvs[wrong] = words(place, out, data="nowhere")
    ended = launch(tmp_path / "printed", *argvs)
    assert [e.code for e in ended] == [2, 2]
    (line,) = lines(ended[0].err)[-1:]
    assert line.startswith("error: process 1: " if wrong else "error: ")
    assert "nowhere" in line
    assert sum(e.err.count("error:") for e in ended) == 1
    assert ended[1].err == ""
    assert not out.exists()


def test_an_error_that_only_the_main_process_can_find_ends_all(place, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"someone else's")
    ended = launch(tmp_path / "printed", *[words(place, out)] * 2)
    assert [e.code for e in ended] == [2, 2]
    assert lines(ended[0].err)[-1].startswith(f"error: {out} exists but no run to go on with")
    assert ended[1].err == ""


def test_processes_with_other_data_or_settings_are_told_apart(place, tmp_path):
    out = tmp_path / "out.safetensors"
    ended = launch(tmp_path / "data", words(place, out), words(place, out, data="other"))
    assert [e.code for e in ended] == [2, 2]
    assert lines(ended[0].err)[-1].startswith("error: process 1 differs from process 0 in: pictures or captions")
    ended = launch(tmp_path / "steps", words(place, out), words(place, out, "--seed", "7"))
    assert [e.code for e in ended] == [2, 2]
    assert "process 1 differs from process 0 in: seed" in ended[0].err
    assert not Run(out).recipe.exists()


def test_a_process_that_dies_ends_the_others_in_one_line(place, tmp_path):
    out = tmp_path / "out.safetensors"
    argv = words(place, out, "--batch-size", "2", "--steps", "100000")
    processes = start(tmp_path / "printed", argv, argv)
    while not rows(out):
        time.sleep(0.01)
        assert processes[0].is_alive()
    processes[1].kill()
    ended = finish(tmp_path / "printed", processes)
    assert [e.code for e in ended] == [2, -9]
    assert lines(ended[0].err)[-1].startswith("error: process 0 lost another one in the middle of a step")
    assert "Traceback" not in ended[0].err

"""Whole training runs on a tiny base: they learn, and they go on where they stopped, to the bit."""

import dataclasses
import gc
import hashlib
import json
import os
import signal
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import make_folder
from short_runs import Stop, rows, stop_at, train_until
from tiny import make_tiny_base

from sdlora.adapter.file import read_adapter
from sdlora.adapter.layers import attach
from sdlora.config import Recipe
from sdlora.data.cache import encode_folder
from sdlora.data.folder import scan_folder
from sdlora.errors import DataError, RunError, RunInterrupted
from sdlora.training import checkpoint, loop, state, step
from sdlora.training.loop import run_training, train_adapter
from sdlora.training.run import Run

RECIPE = Recipe(
    steps=12, batch_size=2, rank=2, warmup_steps=2, precision="fp32", checkpoint_every=4, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def change(**values):
    return dataclasses.replace(RECIPE, **values)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, sha256(p)) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("straight") / "out.safetensors"
    train_adapter(folder, make_tiny_base(), RECIPE, out)
    return out


def own_forwards(base):
    """The modules that run another forward than their class's."""
    return {
        id(m): m.__dict__["forward"]
        for part in base.modules.values()
        for m in part.modules()
        if "forward" in m.__dict__
    }


def fixed_loss(base, encoded):
    """The error on epsilon of all pictures with the same noise at the same times."""
    generator = torch.Generator().manual_seed(99)
    errors = []
    with torch.no_grad():
        for i in range(encoded.mean.shape[1]):
            for t in (50, 250, 500, 750, 950):
                noise = torch.randn(1, 4, 8, 8, generator=generator)
                alpha_bar = base.alphas_cumprod[t]
                x_t = (alpha_bar.sqrt() * encoded.mean[0, i : i + 1] + (1 - alpha_bar).sqrt() * noise).float()
                errors.append(base.predict(x_t, torch.tensor([t]), encoded.text[i : i + 1]).sub(noise).square().mean())
    return float(torch.stack(errors).mean())


def test_overfitting_lowers_the_loss_on_fixed_noise(folder, out):
    base = make_tiny_base()
    encoded = encode_folder(base, scan_folder(folder), resolution_px=64, flip=False, text=True, progress=False)
    before = fixed_loss(base, encoded)
    adapter = train_adapter(folder, base, change(steps=80, batch_size=4, rank=8, learning_rate=2e-2), out)
    assert fixed_loss(base, encoded) == before  # the base is as it was
    with attach(
        {"unet": base.unet}, {"unet": base.family.default_targets(False)["unet"]}, rank=8, alpha=8.0, seed=5
    ) as layers:
        factors = {f"{path}.{side}": getattr(d, side) for path, d in adapter.deltas.items() for side in ("down", "up")}
        layers.load_factors(factors)
        after = fixed_loss(base, encoded)
    assert after < 0.8 * before, (before, after)
    losses = [row["loss"] for row in rows(out)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_leaves_what_the_contract_names(folder, straight):
    run = Run(straight)
    assert {p.name for p in run.folder.iterdir()} >= {"recipe.toml", "metrics.jsonl", "loss.png", "checkpoints"}
    assert [row["step"] for row in rows(straight)] == list(range(1, 13))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000008", "step-000012"]
    assert Image.open(run.loss).size == (960, 480)
    assert not [p for p in run.folder.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]


def test_file_holds_the_trained_factors_and_no_path(folder, straight):
    adapter = read_adapter(straight)
    assert len(adapter.deltas) == 32  # q, k, v, out of self- and cross-attention in four transformer blocks
    assert all(float(d.weight().abs().max()) > 0 for d in adapter.deltas.values())
    assert adapter.card.base == "tiny"
    assert adapter.card.settings["steps"] == 12
    assert "preview" not in adapter.card.settings
    with safe_open(straight, "pt") as file:
        text = json.dumps(file.metadata())
    for private in (str(folder), str(straight.parent), folder.name, os.uname().nodename):
        assert private not in text


def test_base_stays_bit_identical_and_usable(folder, out):
    base = make_tiny_base()
    before = {n: v.clone() for part in base.modules.values() for n, v in part.state_dict().items()}
    parts, forwards = set(base.modules), own_forwards(base)
    train_adapter(folder, base, change(steps=3, text_encoder=True), out)
    after = {n: v for part in base.modules.values() for n, v in part.state_dict().items()}
    assert set(base.modules) == parts
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert own_forwards(base) == forwards


def test_same_command_twice_gives_the_same_bytes(folder, straight, out):
    train_adapter(folder, make_tiny_base(), RECIPE, out)
    assert sha256(out) == sha256(straight)


def test_another_seed_gives_another_file(folder, straight, out):
    train_adapter(folder, make_tiny_base(), change(seed=1), out)
    assert sha256(out) != sha256(straight)


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, text_encoder, schedule):
    recipe = change(text_encoder=text_encoder, schedule=schedule, accumulation=2, checkpoint_every=3)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train_adapter(folder, make_tiny_base(), recipe, whole)
    for calls in (5, 4, 3):  # dies in its 5th, then 4th, then 3rd step
        train_until(monkeypatch, calls, folder, make_tiny_base(), recipe, parts)
        assert not parts.exists()
    train_adapter(folder, make_tiny_base(), recipe, parts)
    assert parts.read_bytes() == whole.read_bytes()
    assert rows(parts) == rows(whole)


@pytest.mark.parametrize(("where", "module", "count"), [("write_adapter", loop, 1), ("save_checkpoint", state, 3)])
def test_killed_before_the_end_the_same_command_completes(folder, straight, out, monkeypatch, where, module, count):
    with monkeypatch.context() as patch:
        stop_at(patch, where, count, module)
        with pytest.raises(Stop):
            train_adapter(folder, make_tiny_base(), RECIPE, out)
    train_adapter(folder, make_tiny_base(), RECIPE, out)
    assert sha256(out) == sha256(straight)


def test_killed_between_file_and_mark_the_same_command_completes(folder, straight, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            train_adapter(folder, make_tiny_base(), RECIPE, out)
    assert out.exists()
    train_adapter(folder, make_tiny_base(), RECIPE, out)
    assert sha256(out) == sha256(straight)
    assert Run(out).done.exists()


def test_finished_run_says_so_and_changes_nothing(folder, out, capsys):
    first = train_adapter(folder, make_tiny_base(), change(steps=3), out)
    before = snapshot(out.parent)
    capsys.readouterr()
    again = train_adapter(folder, make_tiny_base(), change(steps=3), out)
    assert "finished already" in capsys.readouterr().err
    assert {p: v for p, v in snapshot(out.parent).items() if p.name != "lock"} == {
        p: v for p, v in before.items() if p.name != "lock"
    }
    assert all(torch.equal(first.deltas[p].weight(), again.deltas[p].weight()) for p in first.deltas)


def test_another_recipe_is_refused_by_name(folder, out):
    train_adapter(folder, make_tiny_base(), change(steps=2), out)
    before = sha256(out)
    with pytest.raises(RunError, match=r"rank 2 -> 4.*--restart") as error:
        train_adapter(folder, make_tiny_base(), change(steps=2, rank=4), out)
    assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="steps 2 -> 1"):
        train_adapter(folder, make_tiny_base(), change(steps=1, warmup_steps=1), out)
    assert sha256(out) == before
    train_adapter(folder, make_tiny_base(), change(steps=2, checkpoint_every=1), out)  # decides nothing


def test_changed_data_and_base_are_refused(tmp_path, out):
    folder = make_folder(tmp_path / "data", 3)
    train_adapter(folder, make_tiny_base(), change(steps=2), out)
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(RunError, match="pictures or captions changed"):
        train_adapter(folder, make_tiny_base(), change(steps=2), out)
    make_folder(tmp_path / "data", 3)
    with pytest.raises(RunError, match="base's weights changed"):
        train_adapter(folder, make_tiny_base(seed=1), change(steps=2), out)


def test_restart_starts_over(folder, straight, out):
    train_adapter(folder, make_tiny_base(), change(steps=3, seed=4), out)
    train_adapter(folder, make_tiny_base(), RECIPE, out, restart=True)
    assert sha256(out) == sha256(straight)
    assert rows(out) == rows(straight)


def test_a_file_of_another_origin_is_not_overwritten(folder, out):
    out.write_bytes(b"somebody's work")
    with pytest.raises(RunError, match="--restart"):
        train_adapter(folder, make_tiny_base(), change(steps=2), out)
    assert out.read_bytes() == b"somebody's work"


def test_damaged_newest_checkpoint_goes_on_from_the_one_before(folder, straight, out, monkeypatch, capsys):
    train_until(monkeypatch, 10, folder, make_tiny_base(), RECIPE, out)
    newest = Run(out).checkpoints / "step-000008" / "factors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    train_adapter(folder, make_tiny_base(), RECIPE, out)
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert "step-000008" in lines[0]
    assert "going on from step-000004" in lines[0]
    assert sha256(out) == sha256(straight)
    assert rows(out) == rows(straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(folder, straight, out, monkeypatch, number):
    original, calls = step.weighted_error, [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 6:
            os.kill(os.getpid(), number)
        return original(*args)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(step, "weighted_error", interrupted)
        with pytest.raises(RunInterrupted, match=r"after step 6 of 12.*same command"):
            train_adapter(folder, make_tiny_base(), RECIPE, out)
    assert signal.getsignal(number) is handler
    assert [row["step"] for row in rows(out)] == list(range(1, 7))
    assert (Run(out).checkpoints / "step-000006").is_dir()
    train_adapter(folder, make_tiny_base(), RECIPE, out)
    assert sha256(out) == sha256(straight)
    assert rows(out) == rows(straight)


def test_second_signal_stops_at_once(folder, out, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    base = make_tiny_base()
    forwards = own_forwards(base)
    with monkeypatch.context() as patch:
        patch.setattr(step, "weighted_error", interrupted)
        with pytest.raises(RunInterrupted, match="at once"):
            train_adapter(folder, base, RECIPE, out)
    assert own_forwards(base) == forwards


def test_trains_outside_the_main_thread(folder, straight, out):
    thread = threading.Thread(target=train_adapter, args=(folder, make_tiny_base(), RECIPE, out))
    thread.start()
    thread.join()
    assert sha256(out) == sha256(straight)


def poison(monkeypatch, what, when):
    """Makes the loss or the gradient of some passes, counted from 1, infinite or NaN."""
    original, calls = step.weighted_error, [0]

    def poisoned(*args):
        calls[0] += 1
        loss = original(*args)
        if calls[0] in when:
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda g: g * float("inf"))
        return loss

    monkeypatch.setattr(step, "weighted_error", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_and_keeps_the_last_good_state(folder, straight, out, monkeypatch, what):
    with monkeypatch.context() as patch:
        poison(patch, what, {7})
        with pytest.raises(RunError, match=rf"the {what} of step 7 is not finite.*learning_rate"):
            train_adapter(folder, make_tiny_base(), change(max_skipped_steps=0), out)
    assert not out.exists()
    assert (Run(out).checkpoints / "step-000006").is_dir()
    train_adapter(folder, make_tiny_base(), RECIPE, out)  # the poison gone, it goes on from step 6
    assert sha256(out) == sha256(straight)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_and_counted(folder, out, tmp_path, monkeypatch, capsys, what):
    recipe = change(max_skipped_steps=2, ema_decay=0.9)
    with monkeypatch.context() as patch:
        poison(patch, what, {3, 4, 7})
        train_adapter(folder, make_tiny_base(), recipe, out)
    said = capsys.readouterr().err
    assert f"step 4: the {what} is not finite, so the step is skipped (2 in a row)" in said
    assert f"step 7: the {what} is not finite, so the step is skipped (1 in a row)" in said
    assert "3 of 12 steps were skipped, their loss or gradient not being finite; metrics.jsonl says which" in said
    assert [(row["step"], row["skipped"]) for row in rows(out) if "skipped" in row] == [(3, what), (4, what), (7, what)]
    # the factors, the optimizer and the averages are those of a run whose steps did nothing there
    with monkeypatch.context() as patch:
        poison(patch, what, {3, 4})
        other = tmp_path / "stopped.safetensors"
        train_until(patch, 5, folder, make_tiny_base(), dataclasses.replace(recipe, checkpoint_every=1), other)
    held = checkpoint.load_newest(Run(other).checkpoints, print)
    assert (held.step, held.state["skipped_in_row"]) == (4, 2)
    with monkeypatch.context() as patch:
        poison(patch, what, {3})  # of the resumed run: step 7
        train_adapter(folder, make_tiny_base(), recipe, other)
    assert other.read_bytes() == out.read_bytes()


def test_skipped_steps_change_nothing_that_is_saved(folder, out, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, "gradient", {3, 4})
        train_until(patch, 5, folder, make_tiny_base(), change(checkpoint_every=1, ema_decay=0.9), out)
    before, after = (checkpoint._read(Run(out).checkpoints / f"step-{n:06d}") for n in (3, 4))
    for kind in ("factors", "optimizer"):
        a, b = getattr(before, kind), getattr(after, kind)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_too_many_in_a_row_end_the_run_before_them_and_are_tried_anew(folder, straight, out, monkeypatch, capsys):
    recipe = change(max_skipped_steps=2)
    for _ in range(2):  # the second run goes on, and meets the same
        with monkeypatch.context() as patch:
            begun = 7 if not Run(out).checkpoints.exists() else 1
            poison(patch, "loss", range(begun, begun + 3))
            with pytest.raises(RunError, match=r"the loss of 3 steps in a row, up to step 9, is not finite"):
                train_adapter(folder, make_tiny_base(), recipe, out)
        assert sorted(p.name for p in Run(out).checkpoints.iterdir())[-1] in ("step-000006", "step-000008")
    train_adapter(folder, make_tiny_base(), recipe, out)
    assert [row["step"] for row in rows(out)] == list(range(1, 13))


def test_more_steps_go_on_from_a_finished_run(folder, out, tmp_path, capsys):
    whole = tmp_path / "whole.safetensors"
    recipe = change(schedule="constant")
    train_adapter(folder, make_tiny_base(), recipe, whole)
    train_adapter(folder, make_tiny_base(), dataclasses.replace(recipe, steps=6), out)
    with pytest.raises(RunError, match=r"learning_rate 0\.01 -> 0\.02"):
        train_adapter(folder, make_tiny_base(), dataclasses.replace(recipe, learning_rate=0.02), out)
    capsys.readouterr()
    train_adapter(folder, make_tiny_base(), recipe, out)
    assert "goes on from 6 to 12 steps\n" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    with pytest.raises(RunError, match="steps 12 -> 6"):
        train_adapter(folder, make_tiny_base(), dataclasses.replace(recipe, steps=6), out)
    train_adapter(folder, make_tiny_base(), dataclasses.replace(recipe, steps=14, schedule="constant"), out)
    assert len(rows(out)) == 14


def test_a_schedule_that_ends_later_is_said(folder, out, capsys):
    train_adapter(folder, make_tiny_base(), change(steps=4), out)
    train_adapter(folder, make_tiny_base(), change(steps=6), out)
    assert "the learning rate so far was that of 4, from here it is that of 6" in capsys.readouterr().err


def test_diverging_run_stops_by_itself(folder, out):
    with pytest.raises(RunError, match="not finite"):
        train_adapter(folder, make_tiny_base(), change(steps=60, learning_rate=1.0, weight_decay=0, alpha=1e30), out)


def test_thread_count_is_taken_up_again(folder, straight, out, monkeypatch, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with monkeypatch.context() as patch:
            stop_at(patch, "rate_at", 6)
            with pytest.raises(Stop):
                train_adapter(folder, make_tiny_base(), RECIPE, out)
        torch.set_num_threads(2)
        seen = []
        monkeypatch.setattr(
            loop, "rate_at", lambda *a, f=loop.rate_at, **k: seen.append(torch.get_num_threads()) or f(*a, **k)
        )
        train_adapter(folder, make_tiny_base(), RECIPE, out)
        assert set(seen) == {1}
        assert "using 1 threads as before" in capsys.readouterr().err
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_second_run_on_the_same_folder_is_refused(folder, out):
    run = Run(out)
    with run.locked(), pytest.raises(RunError, match=rf"in use by another training run \(pid {os.getpid()}\)"):
        train_adapter(folder, make_tiny_base(), RECIPE, out)
    train_adapter(folder, make_tiny_base(), change(steps=1, warmup_steps=0), out)


@pytest.mark.parametrize(
    "name", ["lora.txt", "/proc/nowhere/lora.safetensors", "file/lora.safetensors", "folder.safetensors"]
)
def test_unwritable_output_is_found_before_any_work(folder, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    before = snapshot(tmp_path)
    monkeypatch.setattr(loop, "gather", lambda *a: pytest.fail("worked first"))
    with pytest.raises(RunError) as error:
        train_adapter(folder, make_tiny_base(), RECIPE, tmp_path / name)
    assert Path(name).name in str(error.value)
    assert "\n" not in str(error.value)
    assert snapshot(tmp_path) == before


def test_bad_folder_leaves_nothing(tmp_path):
    with pytest.raises(DataError):
        train_adapter(tmp_path / "nothing", make_tiny_base(), RECIPE, tmp_path / "new" / "lora.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_output_inside_the_data_is_refused(tmp_path):
    folder = make_folder(tmp_path / "data", 2)
    with pytest.raises(RunError, match="data folder"):
        train_adapter(folder, make_tiny_base(), RECIPE, folder / "sub" / "lora.safetensors")


@pytest.mark.parametrize("preview", [(), ("ink",)])
def test_parts_that_are_done_leave_memory(folder, out, monkeypatch, capsys, preview):
    parts = {}

    def load(name, **options):
        base = make_tiny_base()
        parts.update({part: weakref.ref(module) for part, module in base.modules.items()})
        return base

    fit, alive = loop.fit, set()

    def fit_and_look(*args):
        gc.collect()
        alive.update(part for part, module in parts.items() if module() is not None)
        fit(*args)

    monkeypatch.setattr(loop, "load_base", load)
    monkeypatch.setattr(loop, "fit", fit_and_look)
    assert run_training(folder, change(steps=2, preview=preview), out) == out
    assert alive == ({"unet", "vae"} if preview else {"unet"})
    said = capsys.readouterr().err
    assert "6 pictures, 2 steps of 2 (0.667 epochs)" in said
    assert "trainable parameters" in said


def test_other_use_of_accelerate_in_the_process_changes_nothing(folder, straight, out):
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    train_adapter(folder, make_tiny_base(), RECIPE, out)
    assert sha256(out) == sha256(straight)


def test_files_that_a_killed_run_left_half_written_go(folder, out):
    run = Run(out)
    run.folder.mkdir()
    (run.folder / ".metrics.jsonl.tmp-1").write_text("half")
    train_adapter(folder, make_tiny_base(), change(steps=2), out)
    assert not list(out.parent.rglob("*.tmp-*"))


@pytest.mark.parametrize("text_encoder", [False, True])
def test_previews_show_the_lora_and_change_nothing(folder, out, tmp_path, text_encoder):
    plain = tmp_path / "plain.safetensors"
    train_adapter(folder, make_tiny_base(), change(steps=6, text_encoder=text_encoder), plain)
    recipe = change(steps=6, text_encoder=text_encoder, preview=("a red cat", "ink"), preview_every=4)
    train_adapter(folder, make_tiny_base(), recipe, out)
    assert sha256(out) == sha256(plain)
    names = [f"step-{step:06d}-{i}.png" for step in (4, 6) for i in range(2)]
    paths = sorted(Run(out).previews.iterdir())
    assert [p.name for p in paths] == names
    pictures = {p.name: Image.open(p) for p in paths}
    assert {image.size for image in pictures.values()} == {(64, 64)}
    assert len({image.tobytes() for image in pictures.values()}) == 4  # by prompt, seed and step
    assert "red cat" not in json.dumps(read_adapter(out).card.settings)


def test_accumulation_equals_the_larger_batch(folder, tmp_path):
    one = train_adapter(folder, make_tiny_base(), change(batch_size=4), tmp_path / "one.safetensors")
    two = train_adapter(folder, make_tiny_base(), change(batch_size=2, accumulation=2), tmp_path / "two.safetensors")
    assert [r["loss"] for r in rows(tmp_path / "one.safetensors")] == pytest.approx(
        [r["loss"] for r in rows(tmp_path / "two.safetensors")], rel=1e-4
    )
    for path in one.deltas:
        torch.testing.assert_close(one.deltas[path].weight(), two.deltas[path].weight(), rtol=1e-3, atol=1e-4)


def test_bf16_base_trains_float32_factors(folder, out):
    adapter = train_adapter(folder, make_tiny_base(dtype=torch.bfloat16), RECIPE, out)
    assert adapter.card.settings["precision"] == "bf16"  # what the base is, not what the recipe said
    assert {d.down.dtype for d in adapter.deltas.values()} == {torch.float32}
    assert all(float(d.weight().abs().max()) > 0 for d in adapter.deltas.values())


def test_fp16_without_a_gpu_is_refused(folder, out):
    with pytest.raises(RunError, match="use bf16 or fp32"):
        train_adapter(folder, make_tiny_base(dtype=torch.float16), change(precision="fp16"), out)


def test_several_buckets_resume_to_the_bit_and_reach_the_unet_at_their_sizes(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i, size in enumerate([(64, 64), (96, 48), (48, 96), (64, 64), (97, 49), (66, 64), (95, 50)]):
        Image.new("RGB", size, (40 * i, 90, 200 - 20 * i)).save(data / f"{i}.png")
    base, seen = make_tiny_base(), set()
    base.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.add(tuple((args[0] if args else kwargs["sample"]).shape)), with_kwargs=True
    )
    recipe = change(
        buckets=True, small_buckets=True, trigger="x", accumulation=2, checkpoint_every=3, crop="random", crops=2
    )
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train_adapter(data, base, recipe, whole)
    assert {shape[0] for shape in seen} == {2}
    assert {shape[2:] for shape in seen} == {(8, 8), (6, 10), (10, 6)}
    said = capsys.readouterr().err
    assert "bucket 64 x 64 px: 3 pictures, 1.0% cut away on average, 3.0% at most (5.png); its 3 images" in said
    assert "bucket 80 x 48 px: 3 pictures" in said
    for calls in (6, 4):  # dies in its 6th, then 4th step: 7 pictures in steps of 4, so within an epoch
        train_until(monkeypatch, calls, data, make_tiny_base(), recipe, parts)
    train_adapter(data, make_tiny_base(), recipe, parts)
    assert parts.read_bytes() == whole.read_bytes()
    assert rows(parts) == rows(whole)
    with pytest.raises(RunError, match="buckets true -> false"):
        train_adapter(data, make_tiny_base(), dataclasses.replace(recipe, buckets=False, small_buckets=False), parts)


def test_caption_variants_train_and_are_said(tmp_path, capsys):
    data = make_folder(tmp_path / "data", 3)
    (data / "0.txt").write_text("a cat, ink, {red|blue}\nb, c, d")
    values = {"caption_variants": 4, "shuffle_tags": True, "wildcards": True, "caption_lines": True}
    files = []
    for text_encoder in (False, True):
        recipe = change(steps=2, text_encoder=text_encoder, **values)
        train_adapter(data, make_tiny_base(), recipe, tmp_path / f"{text_encoder}.safetensors")
        files.append(rows(tmp_path / f"{text_encoder}.safetensors"))
    assert "16 wordings of 3 captions" in capsys.readouterr().err
    assert files[0][0]["loss"] == pytest.approx(files[1][0]["loss"], rel=1e-5)
    train_adapter(data, make_tiny_base(), change(steps=2, trigger="zz"), tmp_path / "plain.safetensors")
    assert rows(tmp_path / "plain.safetensors")[0]["loss"] != files[0][0]["loss"]

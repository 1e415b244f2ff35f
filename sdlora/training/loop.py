"""Training a LoRA: from a base, a recipe and a folder of pictures to an adapter, going on where a run stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapter.delta import Adapter
from ..adapter.file import read_adapter, write_adapter
from ..adapter.layers import LoraLayers
from ..bases.family import Base, load_base, pick_device
from ..bases.fast_layers import fast_layers
from ..bases.quantisation import check_quantise, copy_tree, quantise_base
from ..bases.text import Text
from ..config import Recipe
from ..data.cache import Encoded
from ..data.folder import Example
from ..data.material import Material, describe_left_out, gather
from ..errors import RunError
from .adapting import attach_layers, describe_settings, make_card, name_sources
from .averages import Averages
from .checkpoint import Checkpoint, load_newest
from .init_word import InitWord
from .interrupt import interrupted, watch_signals
from .lessons import Lessons
from .objective import Objective, prediction_type_of
from .optim import make_optimizer, rate_at, rates_of, set_rate
from .optimizers import check_optimizer
from .preview import Previews
from .prior import Prior
from .processes import Processes, choose_device, joined, mark_told
from .progress import say
from .recomputation import recomputing
from .record import Record
from .run import BASE, Run, open_run
from .settings import advise, list_settings
from .setup import make_accelerator, release, same_threads
from .shortage import naming_what_to_lower
from .state import State, find_fault
from .step import accumulate, chances_of
from .trackers import check_trackers
from .validation import Validation

_PRECISIONS: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def run_training(
    folder: Path,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    restart: bool = False,
    cache: Path | None = None,
    prepare: Callable[[Base], Base] = lambda base: base,
) -> Path:
    """Loads the recipe's base, says what will happen, and trains; returns `out`.

    `cache` is a folder that keeps encoded pictures and captions between runs. `prepare` may change the base
    that was loaded, such as by merging the LoRAs that the recipe names into it.

    Raises: as `train_adapter`, and BaseModelError where the base cannot be loaded.
    """
    check_trackers(recipe.tracker)
    with joined(device) as processes:
        run = processes.from_main(lambda: open_run(folder, out, restart))
        if not restart:
            run.check_base(recipe)
        material = gather(folder, recipe)
        for line in describe_left_out(material.left_out):
            say(line)
        device = choose_device(device)
        check_quantise(recipe.quantise, pick_device(device))
        say(describe_run(recipe, material.examples, out, processes.count))
        base = partial(_load_prepared, recipe, device, prepare)
        _train(material, _take(base, recipe, device), recipe, run, processes, restart, cache)
    return out


def _load_prepared(recipe: Recipe, device: str, prepare: Callable[[Base], Base]) -> Base:
    return prepare(
        load_base(
            recipe.base,
            device=device,
            precision=recipe.precision,
            prediction=recipe.prediction,
            zero_snr=recipe.zero_terminal_snr,
        )
    )


def train_adapter(
    folder: Path,
    base: Base | Callable[[], Base],
    recipe: Recipe,
    out: Path,
    *,
    restart: bool = False,
    cache: Path | None = None,
    device: str = "auto",
) -> Adapter:
    """Trains a LoRA on a folder of pictures and writes it to `out`, a `.safetensors` file; the base stays as it was.

    Of what loads a base, in place of one, nothing is kept: its parts leave memory once their work is done. It loads on
    `device`, which a base says itself.
    State and metrics go to `<out without suffix>.run/`; the same call goes on where it stopped, and once it is done
    gives the adapter back unchanged. `cache` is a folder that keeps encoded pictures and captions between runs.
    The recipe's precision is taken from the base, which is loaded already.

    Raises: DataError for the folder; RunError where the run cannot start, differs from the one it would go on with, or
    stays without a finite loss; DiskError; RunInterrupted after Ctrl-C, its state saved.
    """
    check_trackers(recipe.tracker)
    with joined(base.device.type if isinstance(base, Base) else device) as processes:
        run = processes.from_main(lambda: open_run(folder, out, restart))
        material = gather(folder, recipe)
        for line in describe_left_out(material.left_out):
            say(line)
        return _train(material, _take(base, recipe, device), recipe, run, processes, restart, cache)


def _take(base: Base | Callable[[], Base], recipe: Recipe, device: str) -> Base:
    """The base as it is trained on: what a LoRA comes on top of is quantised; frozen text encoders are used but once.

    No name of the callers' keeps one that was loaded: parts that training lets go of must leave memory.
    """
    given = isinstance(base, Base)
    kind = base.device.type if isinstance(base, Base) else pick_device(device).type
    with naming_what_to_lower(recipe, kind, "loading the base", training=False):
        loaded = base if isinstance(base, Base) else base()
        parts = tuple(loaded.family.default_targets(recipe.text_encoder))
        return quantise_base(loaded, recipe.quantise, parts, own=not given)


def describe_run(recipe: Recipe, examples: list[Example], out: Path, processes: int = 1) -> str:
    """One line that says what a run will do. Raises: DataError where the validation share leaves nothing."""
    validation = Validation.of(recipe, len(examples))
    shown = sum(validation.learnt([e.repeats for e in examples]))
    held = f" ({len(validation.pictures)} held out)" if validation.pictures else ""
    cut = f" x {recipe.accumulation}" if recipe.accumulation > 1 else ""
    cut += f" x {processes} processes" if processes > 1 else ""
    images = recipe.steps * recipe.images_per_step * processes
    return (
        f"{out}: rank {recipe.rank} on {recipe.base} ({recipe.precision}), {len(examples)} pictures{held}, "
        f"{recipe.steps} steps of {recipe.batch_size}{cut} ({images / shown:.3g} epochs)"
    )


def _train(
    material: Material,
    base: Base,
    recipe: Recipe,
    run: Run,
    processes: Processes,
    restart: bool,
    cache: Path | None = None,
) -> Adapter:
    base = replace(base, modules=dict(base.modules))  # what is released below stays with whoever else holds it
    if processes.split:  # so does what is split
        base.modules["unet"] = copy_tree(base.unet, {})
    recipe = replace(recipe, precision=_PRECISIONS[base.dtype])
    if recipe.precision == "fp16" and base.device.type == "cpu":
        raise RunError("precision fp16 needs a GPU to train; use bf16 or fp32")
    base.check_clip_skip(recipe.clip_skip)
    check_optimizer(recipe.optimizer, base.device)
    validation = Validation.of(recipe, len(material.examples))
    layers = attach_layers(base, recipe)  # here, so that all that is wrong with it shows before minutes are spent
    layers.detach_from_base()
    side_px = recipe.resolution or base.resolution_px
    shown = validation.learnt([e.repeats for e in material.examples])
    lessons = Lessons.plan(material, recipe, side_px, shown, processes.count)
    class_lessons = Lessons.of_prior(material, recipe, side_px, run.folder, processes.count)
    sources = name_sources(base, recipe) | material.settings(recipe)
    origin = {
        **material.origin(),
        BASE: base.fingerprint,
        "LoRA that is continued": sources.get("continued"),
        "number of processes": processes.count if processes.count > 1 else None,
        "splitting of the base": "FSDP" if processes.split else None,
    }
    processes.check_same(list_settings(base, recipe) | origin)
    with run.locked() if processes.main else nullcontext():
        if processes.from_main(lambda: run.start(recipe, origin, restart=restart)):
            say(f"{run.out} is finished already; nothing to do")
            return processes.hand_out(lambda: read_adapter(run.out))
        try:
            checkpoint = processes.hand_out(lambda: load_newest(run.checkpoints, say))
            with same_threads(checkpoint):
                with naming_what_to_lower(recipe, base.device.type, "encoding pictures and captions", training=False):
                    encoded = lessons.encode(base, cache, say, processes)
                    classes = class_lessons.encode(base, cache, say, processes) if class_lessons else None
                    prior = Prior.of(base, classes, recipe, processes.count)
                    word_text = lessons.encode_init_word(base)
                    previews = Previews.of(base, recipe, run.previews, side_px)
                release(base, recipe, draws=processes.main or processes.split is not None)
                if processes.split:
                    say(processes.split.divide(base))
                layers.attach()
                try:
                    for line in ("; ".join([layers.describe(), *describe_settings(recipe)]), *advise(recipe)):
                        say(line)
                    processes.exchange()  # from here on they meet in every step
                    doing = f"training on {recipe.batch_size} pictures at once"
                    with naming_what_to_lower(recipe, base.device.type, doing):
                        fit(base, layers, encoded, recipe, run, previews, checkpoint, processes, prior, word_text)
                    captions = [example.caption for example in material.examples]
                    adapter = layers.adapter(make_card(base, recipe, sources, processes.count, captions))
                finally:
                    layers.detach_from_base()
        except KeyboardInterrupt as stopped:
            number = stopped.args[0] if stopped.args else signal.SIGINT
            raise interrupted("stopped at once; the same command goes on from the last saved step", number) from None
        with processes.agreed():
            if processes.main:
                write_adapter(adapter, run.out)
                run.finish()
        return adapter


def fit(
    base: Base,
    layers: LoraLayers,
    encoded: Encoded,
    recipe: Recipe,
    run: Run,
    previews: Previews,
    checkpoint: Checkpoint | None,
    processes: Processes,
    prior: Prior | None = None,
    word_text: Text | None = None,
) -> None:
    """The training loop: takes the attached layers from the checkpoint, or the start, to the recipe's last step.

    The layers hold what the file is to hold then: the averages, where the recipe or its optimizer averages.
    A step whose loss or gradient is not finite is skipped. Raises: RunError where too many are in a row; RunInterrupted
    after Ctrl-C; the state is saved in both.
    """
    factors = layers.named_factors()
    accelerator = make_accelerator(base, recipe, run.trackers if processes.main else None)
    optimizer = make_optimizer(factors, **rates_of(recipe))
    stepper = accelerator.prepare_optimizer(optimizer, device_placement=False)
    averages = Averages(factors, optimizer, recipe.ema_decay)
    state = State(layers, optimizer, accelerator, run, checkpoint, averages)
    averages.begin()
    objective = Objective(recipe, prediction_type_of(base.scheduler_config), len(base.alphas_cumprod))
    validation = Validation.of(recipe, len(encoded.repeats))
    chances = chances_of(base, encoded, recipe, validation, processes.count)
    word = InitWord.of(layers, word_text, chances, recipe)
    record = Record(base, recipe, encoded, previews, validation, state)
    kept = recomputing(base.modules, recipe.recompute)
    fast = recipe.fast_layers and not processes.split  # what is split has no whole weights
    faster = fast_layers(base.unet) if fast else nullcontext()
    with closing(record), processes.in_step(), watch_signals() as stop, faster, kept:
        if processes.main:
            record.open(run, accelerator)
        for step in range(state.saved, recipe.steps):
            start_s = time.perf_counter()
            if step == recipe.steps_of_init_word:
                optimizer.state.clear()  # AdamW's second moments of the word's small gradients would make huge steps
            rate = set_rate(optimizer, rate_at(step, recipe))
            loss = accumulate(step, base, layers, encoded, objective, chances, accelerator, processes, prior, word)
            loss, asked = processes.average(factors, loss, stop.requested)
            norm = accelerator.clip_grad_norm_(factors.values(), recipe.max_grad_norm)
            # The step's only read from the device; it comes before the update, so a bad one is never made.
            loss_value, norm_value, asked_value = torch.stack((loss, norm, asked)).tolist()
            row: dict[str, Any] = {"step": step + 1, "loss": loss_value, "lr": rate, "grad_norm": norm_value}
            if step < recipe.steps_of_init_word:
                row["learnt"] = "init_word"
            if fault := find_fault(loss_value, norm_value):
                state.skip(step + 1, fault)
                row["skipped"] = fault
            else:
                stepper.step()
                state.skipped_in_row = 0
                if recipe.max_norm:
                    row["limited"] = layers.limit_norms(recipe.max_norm)
                averages.update(step)
            stepper.zero_grad()
            row["seconds"] = round(time.perf_counter() - start_s, 4)
            failed = state.skipped_in_row > recipe.max_skipped_steps
            stopping, last = processes.stops(asked_value, stop.requested), step + 1 == recipe.steps
            due = bool(recipe.checkpoint_every and (step + 1) % recipe.checkpoint_every == 0)
            saving = not failed and (last or stopping or due)
            with processes.agreed() if saving or record.due(step + 1) else nullcontext():
                if processes.main:
                    record.add(row, saving)
                elif processes.split:
                    record.accompany(step + 1)
            if failed:
                if processes.main:
                    record.save(step + 1 - state.skipped_in_row, after_fault=True)
                raise mark_told(RunError(_describe_fault(step + 1, fault, state.skipped_in_row, recipe)))
            if stopping and not last:
                done = f"stopped after step {step + 1} of {recipe.steps}, state saved in {run.folder}"
                raise mark_told(interrupted(f"{done}; run the same command again to go on", stop.number))
        if processes.main:
            record.say_skipped()
    averages.settle()
    if recipe.ema_decay and recipe.max_norm:
        layers.limit_norms(recipe.max_norm)  # a mean of factors may be longer than each of them


def _describe_fault(step: int, fault: str, in_row: int, recipe: Recipe) -> str:
    steps = f"step {step}" if in_row == 1 else f"{in_row} steps in a row, up to step {step},"
    fix = f"a lower learning_rate than {recipe.learning_rate}"
    if recipe.precision == "fp16":
        fix += " or precision bf16"
    return f"the {fault} of {steps} is not finite; the last good state is saved; start over with --restart and {fix}"

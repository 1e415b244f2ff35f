"""Training a LoRA: from a base, a recipe and a folder of pictures to an adapter, going on where a run stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from ..adapter.delta import Adapter, Card
from ..adapter.file import read_adapter, write_adapter
from ..adapter.layers import LoraLayers
from ..bases.family import Base, load_base
from ..bases.text import Text
from ..config import UNDECISIVE, Recipe
from ..data.cache import Encoded, encode_folder
from ..data.folder import Example, digest, scan_folder
from ..errors import RunError, RunInterrupted
from .adapting import attach_layers, describe_settings, name_sources
from .checkpoint import Checkpoint, load_newest
from .draws import Chances, Order
from .interrupt import watch_signals
from .metrics import Metrics
from .objective import add_noise, min_snr_weight, prediction_type_of, target, weighted_error
from .optim import make_optimizer, rate_factor, set_rate
from .preview import Previews
from .progress import Progress, say
from .run import Run, check_out
from .state import State

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
    prepare: Callable[[Base], Base] = lambda base: base,
) -> Path:
    """Loads the recipe's base, says what will happen, and trains; returns `out`.

    `prepare` may change the base that was loaded, such as by merging the LoRAs that the recipe names into it.

    Raises: as `train_adapter`, and BaseModelError where the base cannot be loaded.
    """
    run = _open_run(folder, out, restart)
    examples = scan_folder(folder, recipe.trigger)
    say(describe_run(recipe, examples, out))
    # No name here keeps the base: parts that training lets go of must leave memory.
    _train(examples, prepare(_load_base(recipe, device)), recipe, run, restart)
    return run.out


def _load_base(recipe: Recipe, device: str) -> Base:
    return load_base(
        recipe.base,
        device=device,
        precision=recipe.precision,
        prediction=recipe.prediction,
        zero_snr=recipe.zero_terminal_snr,
    )


def train_adapter(folder: Path, base: Base, recipe: Recipe, out: Path, *, restart: bool = False) -> Adapter:
    """Trains a LoRA on a folder of pictures and writes it to `out`, a `.safetensors` file; the base stays as it was.

    State and metrics go to `<out without suffix>.run/`; the same call goes on where it stopped, and once it is done
    gives the adapter back unchanged. The recipe's precision is taken from the base, which is loaded already.

    Raises: DataError for the folder; RunError where the run cannot start, differs from the one it would go on with, or
    stops being finite; RunInterrupted after Ctrl-C, its state saved.
    """
    run = _open_run(folder, out, restart)
    return _train(scan_folder(folder, recipe.trigger), base, recipe, run, restart)


def describe_run(recipe: Recipe, examples: list[Example], out: Path) -> str:
    """One line that says what a run will do."""
    shown = sum(e.repeats for e in examples)
    cut = f" x {recipe.accumulation}" if recipe.accumulation > 1 else ""
    return (
        f"{out}: rank {recipe.rank} on {recipe.base} ({recipe.precision}), {len(examples)} pictures, "
        f"{recipe.steps} steps of {recipe.batch_size}{cut} ({recipe.steps * recipe.images_per_step / shown:.3g} epochs)"
    )


def _open_run(folder: Path, out: Path, restart: bool) -> Run:
    folder, out = Path(folder), Path(out)
    check_out(out)
    run = Run(out)
    if folder.is_dir() and run.folder.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{out} lies in the data folder, where its previews would count as data; choose another --out")
    if not restart:
        run.check_free()
    return run


def _train(examples: list[Example], base: Base, recipe: Recipe, run: Run, restart: bool) -> Adapter:
    base = replace(base, modules=dict(base.modules))  # what is released below stays with whoever else holds it
    recipe = replace(recipe, precision=_PRECISIONS[base.dtype])
    if recipe.precision == "fp16" and base.device.type == "cpu":
        raise RunError("precision fp16 needs a GPU to train; use bf16 or fp32")
    base.check_clip_skip(recipe.clip_skip)
    layers = attach_layers(base, recipe)  # here, so that all that is wrong with it shows before minutes are spent
    layers.detach_from_base()
    sources = name_sources(base, recipe)
    origin = {
        "pictures or captions": digest(examples),
        "base's weights": base.fingerprint,
        "LoRA that is continued": sources.get("continued"),
    }
    with run.locked():
        if run.start(recipe, origin, restart=restart):
            say(f"{run.out} is finished already; nothing to do")
            return read_adapter(run.out)
        try:
            checkpoint = load_newest(run.checkpoints, say)
            with _same_threads(checkpoint):
                side_px = recipe.resolution or base.resolution_px
                encoded = encode_folder(
                    base,
                    examples,
                    resolution_px=side_px,
                    flip=recipe.flip,
                    text=not recipe.text_encoder,
                    chunks=recipe.max_chunks,
                    clip_skip=recipe.clip_skip,
                )
                previews = Previews.of(base, recipe, run.previews, side_px)
                _release(base, recipe)
                layers.attach()
                try:
                    say("; ".join([layers.describe(), *describe_settings(recipe)]))
                    fit(base, layers, encoded, recipe, run, previews, checkpoint)
                    adapter = layers.adapter(_card(base, recipe, sources))
                finally:
                    layers.detach_from_base()
        except KeyboardInterrupt:
            raise RunInterrupted("stopped at once; the same command goes on from the last saved step") from None
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
) -> None:
    """The training loop: takes the attached layers from the checkpoint, or the start, to the recipe's last step.

    Raises: RunError at a loss or gradient that is not finite; RunInterrupted after Ctrl-C; the state is saved in both.
    """
    factors = layers.named_factors()
    accelerator = _make_accelerator(base, recipe)
    optimizer = make_optimizer(
        factors,
        learning_rate=recipe.learning_rate,
        text_encoder_learning_rate=recipe.text_encoder_rate,
        text_encoder_2_learning_rate=recipe.text_encoder_2_rate,
        lora_plus_ratio=recipe.lora_plus_ratio,
        weight_decay=recipe.weight_decay,
    )
    stepper = accelerator.prepare_optimizer(optimizer, device_placement=False)
    state = State(layers, optimizer, accelerator, run, checkpoint)
    prediction_type = prediction_type_of(base.scheduler_config)
    chances = Chances(
        Order(recipe.seed, encoded.repeats),
        tuple(encoded.mean.shape[2:]),
        len(base.alphas_cumprod),
        recipe.caption_dropout,
        recipe.flip,
    )
    metrics, progress = Metrics(run.metrics, state.saved), Progress(state.saved, recipe.steps)
    with closing(metrics), closing(progress), watch_signals() as stop:
        for step in range(state.saved, recipe.steps):
            start_s = time.perf_counter()
            share = rate_factor(step, schedule=recipe.schedule, warmup_steps=recipe.warmup_steps, steps=recipe.steps)
            rate = set_rate(optimizer, share)
            losses = []
            for micro in range(recipe.accumulation):
                # Everything random is drawn and mixed on the CPU, so that it is the same for every device.
                draws = chances.draw(step, recipe.batch_size, micro, recipe.accumulation)
                place = (draws.mirror, draws.picture)
                x0 = encoded.mean[place] + encoded.std[place] * draws.posterior  # [B, 4, H/8, W/8]
                alpha_bar = base.alphas_cumprod[draws.t]  # [B]
                x_t = _send(add_noise(x0, draws.noise, alpha_bar), base)
                goal = target(x0, draws.noise, alpha_bar, prediction_type).to(base.device, non_blocking=True)
                weight = min_snr_weight(alpha_bar, recipe.min_snr_gamma, prediction_type).to(base.device)
                layers.begin(step, micro)
                with accelerator.accumulate():
                    text = _text(base, encoded, draws.caption, recipe.clip_skip)
                    sizes = encoded.sizes[place].to(base.device, non_blocking=True)
                    prediction = base.predict(x_t, draws.t.to(base.device), text, sizes)
                    loss = weighted_error(prediction, goal, weight)
                    accelerator.backward(loss)
                losses.append(loss.detach())
            layers.end()
            norm = accelerator.clip_grad_norm_(factors.values(), recipe.max_grad_norm)
            # The step's only read from the device; it comes before the update, so a bad one is never made.
            loss_value, norm_value = torch.stack((torch.stack(losses).mean(), norm)).tolist()
            if not state.usable(loss_value, norm_value):
                state.save(step, metrics)
                raise RunError(_not_finite(step + 1, loss_value, recipe))
            stepper.step()
            stepper.zero_grad()
            limited = {"limited": layers.limit_norms(recipe.max_norm)} if recipe.max_norm else {}
            seconds = round(time.perf_counter() - start_s, 4)
            row = {"step": step + 1, "loss": loss_value, "lr": rate, "grad_norm": norm_value, "seconds": seconds}
            metrics.add(row | limited)
            progress.advance(loss_value)
            if previews.due(step + 1, recipe.steps):
                previews.draw(base, step + 1)
            last = step + 1 == recipe.steps
            if last or stop.requested or (recipe.checkpoint_every and (step + 1) % recipe.checkpoint_every == 0):
                state.save(step + 1, metrics)
            if stop.requested and not last:
                raise RunInterrupted(
                    f"stopped after step {step + 1} of {recipe.steps}, state saved in {run.folder}; "
                    "run the same command again to go on"
                )


def _make_accelerator(base: Base, recipe: Recipe) -> Accelerator:
    """accelerate for this run: backward, accumulation, clipping, and the loss scale that fp16 needs; no autocast.

    Raises: RunError where several processes were launched.
    """
    cpu = base.device.type == "cpu"
    mixed = "fp16" if recipe.precision == "fp16" else "no"
    shared = AcceleratorState._shared_state
    if shared and (shared["device"].type, shared["_mixed_precision"]) != (base.device.type, mixed):
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process had other settings
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed, gradient_accumulation_steps=recipe.accumulation)
    if accelerator.num_processes > 1:
        raise RunError(
            f"{accelerator.num_processes} processes were launched, training uses one; start it without a launcher"
        )
    return accelerator


@contextmanager
def _same_threads(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Runs with as many threads as the checkpoint's run had: another number sums in another order, in other bits."""
    before = torch.get_num_threads()
    threads = int(checkpoint.state.get("threads", before)) if checkpoint is not None else before
    if threads != before:
        say(f"using {threads} threads as before, not {before}, so that the result stays the same to the bit")
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _release(base: Base, recipe: Recipe) -> None:
    """Lets go of the parts whose work is done: previews still need the VAE, a trained text encoder stays."""
    if not recipe.preview:
        base.release("vae")
    if not recipe.text_encoder:
        base.release_text_encoders()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


def _send(x: Tensor, base: Base) -> Tensor:
    """x [B, 4, H/8, W/8] as the UNet takes it: its device, dtype and memory layout."""
    return x.to(base.device, base.dtype, non_blocking=True, memory_format=torch.channels_last)


def _text(base: Base, encoded: Encoded, caption: Tensor, clip_skip: int) -> Text:
    """The text of caption rows int64 [B]; through the text encoders where they are trained."""
    if encoded.text is None:
        text = base.encode_text(encoded.ids[caption], clip_skip)
        return text.blank(caption == len(encoded.ids) - 1) if base.zero_blank else text
    return encoded.text[caption].to(base.device, base.dtype, non_blocking=True)


def _card(base: Base, recipe: Recipe, sources: dict[str, Any]) -> Card:
    settings: dict[str, Any] = {k: v for k, v in asdict(recipe).items() if k not in UNDECISIVE}
    settings["base"] = base.name  # the recipe's may be a path, which is nobody's business
    settings |= sources
    if prediction_type_of(base.scheduler_config) == "v_prediction":
        settings["prediction_type"] = "v_prediction"
    return Card(family=base.family.name, base=base.name, trigger=recipe.trigger, settings=settings)


def _not_finite(step: int, loss: float, recipe: Recipe) -> str:
    what = "gradient" if math.isfinite(loss) else "loss"
    fix = f"a lower learning_rate than {recipe.learning_rate}"
    if recipe.precision == "fp16":
        fix += " or precision bf16"
    return f"the {what} of step {step} is not finite; the last good state is saved; start over with --restart and {fix}"

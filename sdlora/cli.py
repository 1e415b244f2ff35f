"""The command line: one table from verb to function, one place that turns errors into a line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .agreement import check_family
from .checkpoint_verbs import add_bake, add_extract, run_bake, run_extract
from .config import FIELDS, Recipe, recipe_from_toml, recipe_to_toml
from .errors import BaseModelError, ConfigError, RunInterrupted, SdloraError
from .file_verbs import (
    add_combine,
    add_diagnose,
    add_inspect,
    add_resize,
    run_combine,
    run_diagnose,
    run_inspect,
    run_resize,
)
from .flags import Parser, add_recipe_flags, read_number, read_whole_number
from .forecast import add_memory_flag, fit_memory, forecast_memory
from .heap import give_large_blocks_back
from .places import check_files, check_folder, check_output, find_cache
from .profiles import parse_stacked
from .screen import print_json, print_line, say, show_name, show_steps
from .sharing_verbs import add_card, add_convert, run_card, run_convert
from .training.processes import count_processes, is_main, is_printed, quiet_unless_main, shared_errors
from .values import parse_lora, suggest
from .weighing import add_balance, add_grid, run_balance, run_grid

if TYPE_CHECKING:
    from .data.folder import Example

_DEVICES = ("auto", "cpu", "cuda", "mps")
_PRECISIONS = ("fp32", "bf16", "fp16")
_BASE = "mini, a diffusers folder, a .safetensors checkpoint, or a hub id (default: mini)"
_PARTS = (
    "after them how they vary: :blocks=down.1=0,mid=0.5 or a vector, :schedule=0@0,1@0.5 (value@t), :start=T, :stop=T, "
    ":mask=FILE.png (docs/combining.md); may be given several times"
)
_METHOD = (
    "how the LoRAs act together: linear (default), np, klora, est, switch, composite, ties or dare, with options as in "
    "np:mu=1; the first LoRA is the style, the second the subject"
)
_LORA = "LoRA file with its weight (default 1) and, after it, another weight for the text encoder's part"


@dataclass(frozen=True)
class Verb:
    """One verb: what it does in a line, its flags, and the function that returns the exit code."""

    summary: str
    add_flags: Callable[[Parser], None]
    run: Callable[[Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 2 for wrong input, 128 and the signal when stopped."""
    # Before anything imports the libraries that read them.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it is installed, other libraries import it too
    try:
        with quiet_unless_main():
            return dispatch(sys.argv[1:] if argv is None else argv)
    except SdloraError as error:
        if is_printed(error):
            say(f"error: {error}")
        return 2
    except RunInterrupted as error:
        if is_printed(error):
            say(str(error))
        return error.exit_code
    except KeyboardInterrupt as error:
        if is_printed(error):
            say("interrupted; nothing to save, run the same command again")
        return 130
    except SystemExit as stop:  # argparse's --help
        return stop.code if isinstance(stop.code, int) else 0


def dispatch(argv: Sequence[str]) -> int:
    """Finds the verb and runs it.

    Raises: ConfigError for a verb or flag that is not known; whatever the verb raises.
    """
    word = argv[0] if argv else ""
    if word in ("-h", "--help", "help"):
        print(overview())
        return 0
    if word == "--version":
        print(f"sdlora {__version__}")
        return 0
    if word not in VERBS:
        known = f"use one of {', '.join(VERBS)}"
        if word.startswith("-"):
            raise ConfigError(f"unknown flag {word}{suggest(word, ['--help', '--version']) or f'; {known}'}")
        raise ConfigError(f"unknown verb {word}{suggest(word, VERBS) or f'; {known}'}" if word else f"no verb; {known}")
    verb = VERBS[word]
    parser = Parser(f"sdlora {word}", f"{verb.summary[0].upper()}{verb.summary[1:]}.")
    verb.add_flags(parser)
    return verb.run(parser.parse(argv[1:]))


def overview() -> str:
    """The text of `sdlora --help`."""
    rows = [f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: sdlora VERB …",
            "",
            "Teaches Stable Diffusion an art style from a folder of captioned pictures,",
            "stacks such LoRAs, and shares each as one .safetensors file.",
            "",
            *rows,
            "",
            "sdlora VERB --help explains a verb; sdlora --version prints the version.",
        ]
    )


# --- demo ---------------------------------------------------------------------------------------------------------


def add_demo(parser: Parser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("demo"), help="folder for the results (demo)")


def run_demo(args: Namespace) -> int:
    check_folder(args.out)
    from .demo import run_demo as run

    run(args.out)
    return 0


# --- check --------------------------------------------------------------------------------------------------------


def add_check(parser: Parser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder of pictures and captions")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--config", metavar="TOML", type=Path, help="recipe, as train will be given it")
    add_memory_flag(parser)
    add_recipe_flags(parser)


def run_check(args: Namespace) -> int:
    from .bases.facts import read_base_facts
    from .data import check
    from .data.buckets import describe_crops, plan_cuts, read_bucketing
    from .data.folder import describe_problems
    from .data.masks import describe_masks, place_crops
    from .data.material import describe_prior, hint_at_skipping, survey_data
    from .data.variants import list_wordings

    recipe = read_recipe(args)
    survey = survey_data(args.data, recipe)
    resolution_px, count, facts = recipe.resolution, None, None
    try:
        facts = read_base_facts(recipe.base, recipe.prediction)
        facts.count_tokens([])
        check_family(recipe, facts.family, recipe.base)
        resolution_px = resolution_px or facts.resolution_px
        count = partial(facts.count_tokens, chunks=recipe.max_chunks)
    except BaseModelError as error:
        check.note_base(survey, recipe.base, str(error))
    cuts = plan_cuts(survey.examples, read_bucketing(recipe, resolution_px)) if resolution_px else None
    classes = check.plan_classes(survey, recipe, resolution_px)
    if cuts and not survey.problems:
        survey.problems += place_crops(recipe, survey.examples, cuts)[1]
        cuts = replace(cuts, repeats=tuple(learnt_repeats(survey.examples, recipe)))
        check.note_short_buckets(survey, cuts, classes, recipe)
    if facts and cuts and cuts.cuts:
        recipe = fit_memory(args.memory, facts.source, recipe, cuts)
    wordings = list_wordings([e.caption for e in survey.examples], recipe)
    report = check.write_report(survey, cuts, count, recipe.steps, recipe.images_per_step, wordings)
    memory_lines = forecast_memory(report, facts.source, recipe, cuts) if facts and cuts and cuts.cuts else []
    check.note_masks(report, survey, recipe.masks)
    report["class_pictures"] = check.report_classes(classes, survey.prior, recipe, resolution_px, count)
    if args.json:
        print_json(report)
    else:
        cut_lines = cuts.describe(recipe.images_per_step) + describe_crops(recipe) if cuts else []
        mask_lines = describe_masks(recipe, list(survey.masks.values()), survey.masks_unused)
        class_lines = describe_prior(classes, recipe) if classes else []
        different = len({e.caption for e in survey.examples})
        for line in check.list_report(report, different, cut_lines, memory_lines, mask_lines, class_lines):
            print_line(line)
    if survey.problems:
        hint = hint_at_skipping(survey, recipe)
        say(f"error: {describe_problems(survey.folder, survey.problems)}{hint}")
        return 2
    return 0


# --- train --------------------------------------------------------------------------------------------------------


def add_train(parser: Parser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder of pictures, each with its caption in a .txt file")
    run = parser.add_argument_group("the run")
    run.add_argument("--out", metavar="FILE", type=Path, help="LoRA to write (default: runs/<folder name>.safetensors)")
    run.add_argument("--config", metavar="TOML", type=Path, help="recipe to start from; flags go before it")
    run.add_argument(
        "--like", metavar="FILE", type=Path, help="repeats the recipe that this LoRA was trained by; flags go before it"
    )
    run.add_argument("--device", default="auto", metavar="|".join(_DEVICES), choices=_DEVICES, help="(default: auto)")
    run.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        help="keeps encoded pictures and captions for later runs (default: $SDLORA_CACHE, else ~/.cache/sdlora; "
        "none for mini, which encodes them in seconds)",
    )
    run.add_argument("--no-cache", action="store_true", help="keeps none and reads none")
    run.add_argument("--restart", action="store_true", help="start over instead of going on")
    add_memory_flag(run)
    run.add_argument("--dry-run", action="store_true", help="print what would happen and stop")
    add_recipe_flags(parser)


def read_recipe(args: Namespace) -> Recipe:
    """The recipe of a command line: its TOML file, or that of the LoRA it is to be like, with the flags before it."""
    flags = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    like: Path | None = getattr(args, "like", None)
    if like is None:
        return recipe_from_toml(args.config, flags)
    if args.config is not None:
        raise ConfigError(f"--like {like} and --config {args.config} contradict each other; leave one out")
    check_files([like])
    from .training.settings import recipe_like

    recipe, notes = recipe_like(like, flags)
    for note in notes:
        say(note)
    return recipe


def run_train(args: Namespace) -> int:
    give_large_blocks_back()
    with shared_errors(args.device):
        return train(args)


def train(args: Namespace) -> int:
    recipe = read_recipe(args)
    data = Path(args.data)
    out = args.out or Path("runs") / f"{data.resolve().name or 'lora'}.safetensors"
    from .training.trackers import check_trackers

    check_trackers(recipe.tracker)
    if args.dry_run:
        print_plan(data, recipe, out, args.memory, args.device)
        return 0
    from .data.material import class_recipe, gather

    # All that can be wrong shows before torch is imported, a line is printed, or a file is written.
    named = named_files(recipe)
    check_files(named)
    if is_main():
        check_output(out, named)
    material = gather(data, recipe)
    from .bases.facts import read_base_facts

    facts = read_base_facts(recipe.base, recipe.prediction)
    check_family(recipe, facts.family, recipe.base)
    side_px = recipe.resolution or facts.resolution_px
    cuts = material.cut(recipe, side_px, learnt_repeats(material.examples, recipe), count_processes())
    recipe = fit_memory(args.memory, facts.source, recipe, cuts, args.device)
    classes = material.classes(recipe, side_px, out.with_suffix(".run"))
    if classes:
        classes.cut(class_recipe(recipe), side_px, processes=count_processes())
    from .combining.merge import merge_for_good
    from .training.loop import run_training

    prepare = partial(merge_for_good, loras=recipe.merge)
    options = {"device": args.device, "restart": args.restart, "cache": choose_cache(args, recipe), "prepare": prepare}
    print(show_name(run_training(data, recipe, out, **options)))
    return 0


def choose_cache(args: Namespace, recipe: Recipe) -> Path | None:
    """The folder that keeps encoded pictures and captions, or None.

    Raises: ConfigError where one is given and forbidden at once, or where it is a file.
    """
    given: Path | None = args.cache
    if given is not None:
        if args.no_cache:
            raise ConfigError(f"--cache {given} and --no-cache contradict each other; leave one out")
        check_folder(given)
        return given
    return None if args.no_cache or recipe.base == "mini" else find_cache()


def named_files(recipe: Recipe) -> list[Path]:
    """The LoRA files that a recipe continues or merges."""
    continued = [Path(recipe.continue_from)] if recipe.continue_from else []
    return continued + [parse_lora(text).file for text in recipe.merge]


def learnt_repeats(examples: list[Example], recipe: Recipe) -> list[int]:
    """How often each picture counts, 0 where it is held out. Raises: DataError where that leaves none, or all."""
    repeats = [example.repeats for example in examples]
    if not recipe.validation_share or not repeats:
        return repeats
    from .training.validation import Validation

    return Validation.of(recipe, len(repeats)).learnt(repeats)


def print_plan(data: Path, recipe: Recipe, out: Path, memory: str | None, device: str) -> None:
    """Prints what training would do, having checked all that it would check first."""
    from .data.buckets import describe_crops
    from .data.masks import describe_masks
    from .data.material import describe_left_out, gather, plan_prior
    from .data.variants import describe_wordings, list_wordings

    material = gather(data, recipe)
    examples = material.examples
    from .bases.facts import read_base_facts

    check_files(named_files(recipe))
    check_output(out, named_files(recipe))
    facts = read_base_facts(recipe.base, recipe.prediction)
    check_family(recipe, facts.family, recipe.base)
    side_px = recipe.resolution or facts.resolution_px
    together = recipe.images_per_step * count_processes()
    several = f" in {count_processes()} processes" if count_processes() > 1 else ""
    images = recipe.steps * together
    run = out.with_suffix(".run")
    cuts = material.cut(recipe, side_px, learnt_repeats(examples, recipe), count_processes())
    recipe = fit_memory(memory, facts.source, recipe, cuts, device)
    shown = sum(cuts.repeats)
    classes = material.classes(recipe, side_px, run)
    class_lines = plan_prior(classes, recipe, side_px, count_processes()) if classes else []
    wordings = list_wordings([e.caption for e in examples], recipe)
    lines = [
        f"data         {data}: {len(examples)} pictures, {len({e.caption for e in examples})} different captions",
        *(f"             {line}" for line in describe_left_out(material.left_out)),
        *(f"captions     {line}" for line in describe_wordings(wordings, recipe)),
        f"an epoch     {shown} images, with repeats" + (", without those held out" if recipe.validation_share else ""),
        f"resolution   {side_px} x {side_px} px" + (", half of them mirrored" if recipe.flip else ""),
        *(f"cut          {line}" for line in cuts.describe(together) + describe_crops(recipe)),
        *(f"masks        {line}" for line in describe_masks(recipe, material.masks, material.masks_unused)),
        *(f"class        {line}" for line in class_lines),
        f"length       {recipe.steps} steps x {together}{several} = {images} images, {images / shown:.1f} epochs",
        *(f"memory       {line}" for line in forecast_memory({}, facts.source, recipe, cuts)),
        f"writes       {out}",
        f"run folder   {run}" + (" (exists: goes on there if it holds the same run)" if run.exists() else ""),
        "recipe",
        *(f"  {line}" for line in recipe_to_toml(recipe).splitlines()),
    ]
    for line in lines:
        print_line(line)


# --- generate -----------------------------------------------------------------------------------------------------


def add_generate(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "prompt",
        metavar="PROMPT",
        help="what to draw; (word:1.2) stresses, <lora:name:weight> adds a LoRA of --lora-dir",
    )
    add("--lora", metavar="FILE[:W[:TE]]", action="append", default=[], help=f"{_LORA}; {_PARTS}")
    add("--lora-dir", metavar="DIR", type=Path, help="folder of the LoRAs that the prompt names")
    add("--combine", metavar="METHOD", default="linear", help=_METHOD)
    add("--base", default="mini", help=_BASE)
    kinds = ("auto", "epsilon", "v")
    add("--prediction", default="auto", metavar="|".join(kinds), choices=kinds, help="what the base predicts")
    add("--zero-terminal-snr", action=BooleanOptionalAction, help="the base's last step is pure noise")
    add("--negative", metavar="TEXT", default="", help="what to keep away from")
    add("--seed", metavar="S", type=read_whole_number, default=0, help="of the first picture (default: 0)")
    add("--images", metavar="N", type=read_whole_number, default=1, help="pictures, of seeds S, S+1, … (default: 1)")
    add("--steps", metavar="N", type=read_whole_number, default=20, help="sampler steps (default: 20)")
    add("--guidance", metavar="G", type=read_number, default=5.0, help="how closely to follow the prompt (default: 5)")
    add("--clip-skip", metavar="N", type=read_whole_number, default=0, help="last text encoder layers to leave out")
    add("--width", metavar="PX", type=read_whole_number, help="without it: the base's own")
    add("--height", metavar="PX", type=read_whole_number, help="without it: the base's own")
    add("--device", default="auto", metavar="|".join(_DEVICES), choices=_DEVICES, help="(default: auto)")
    add("--precision", default="fp32", metavar="|".join(_PRECISIONS), choices=_PRECISIONS, help="(default: fp32)")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="folder for 00000.png, … (default: out)")
    add("--json", action="store_true", help="print one JSON document")


def run_generate(args: Namespace) -> int:
    loras = [parse_stacked(text) for text in args.lora]
    check_files([spec.file for spec in loras] + [spec.mask for spec in loras if spec.mask])
    check_folder(args.out)
    from .bases.family import load_base
    from .generating.generate import draw_files
    from .generating.stacking import check_stack, gather_stack

    stack = gather_stack(args.prompt, loras, args.lora_dir, args.combine)
    size = (args.width, args.height) if args.width and args.height else None
    check_stack(stack, args.base, args.prediction, size)
    names = ("negative", "seed", "images", "steps", "guidance", "clip_skip", "width", "height", "out")
    options = {name: getattr(args, name) for name in names}
    base = load_base(
        args.base,
        device=args.device,
        precision=args.precision,
        prediction=args.prediction,
        zero_snr=args.zero_terminal_snr,
    )
    rows = draw_files(base, args.prompt, stack, progress=show_steps(), **options)
    if args.json:
        print_json(rows)
    else:
        for row in rows:
            print(show_name(row["file"]))
    return 0


VERBS = {
    "demo": Verb("trains a style and a subject on the built-in base and stacks them", add_demo, run_demo),
    "check": Verb("finds all that training would trip over, before it starts", add_check, run_check),
    "train": Verb("teaches the base the pictures of a folder", add_train, run_train),
    "generate": Verb("draws pictures with any number of LoRAs", add_generate, run_generate),
    "grid": Verb("draws two LoRAs at several weights each, labelled", add_grid, run_grid),
    "balance": Verb("finds the weights at which a style and a subject both show", add_balance, run_balance),
    "combine": Verb("writes several LoRAs, weighted, as one exact file", add_combine, run_combine),
    "bake": Verb("merges LoRAs, weighted, into a checkpoint", add_bake, run_bake),
    "extract": Verb("makes a LoRA of what a fine-tuned checkpoint differs in", add_extract, run_extract),
    "resize": Verb("writes a LoRA with fewer ranks, and says what that costs", add_resize, run_resize),
    "inspect": Verb("says what a LoRA file is", add_inspect, run_inspect),
    "diagnose": Verb("says how far two LoRAs get in each other's way", add_diagnose, run_diagnose),
    "convert": Verb("writes the same LoRA under another tool's names", add_convert, run_convert),
    "card": Verb("writes a LoRA's page, and what interfaces show of it", add_card, run_card),
}

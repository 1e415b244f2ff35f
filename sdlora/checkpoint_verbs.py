"""The verbs that work on whole checkpoints, layer by layer: bake and extract."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BaseModelError, ConfigError
from .file_verbs import add_written, choose_dtype, read_member
from .flags import Parser, read_whole_number
from .places import check_files, check_folder, check_output
from .profiles import StackSpec, parse_stacked
from .screen import Countdown, say, show_name

if TYPE_CHECKING:
    from .bases.stored import StoredBase

_BASE = "mini, a diffusers folder, a .safetensors checkpoint, or a hub id"


def add_bake(parser: Parser) -> None:
    parser.add_argument(
        "loras",
        metavar="FILE[:W[:TE]]",
        nargs="+",
        help="LoRA file with its weight (default 1) and, after it, another weight for the text encoder's part; "
        "then :blocks=… if need be",
    )
    parser.add_argument("--base", required=True, help=f"checkpoint to merge them into; it stays as it is: {_BASE}")
    parser.add_argument(
        "--out",
        metavar="DIR-or-FILE",
        type=Path,
        required=True,
        help="folder to write for a folder, .safetensors file for a file",
    )
    parser.add_argument(
        "--method",
        metavar="METHOD",
        default="linear",
        help="linear (default), np, ties or dare, with options as in np:mu=1; the first LoRA is the style",
    )


def run_bake(args: Namespace) -> int:
    specs = [parse_stacked(text) for text in args.loras]
    check_files([spec.file for spec in specs])
    moving = next((spec for spec in specs if spec.mask or not (spec.profile is None or spec.profile.static)), None)
    if moving is not None:
        raise ConfigError(
            f"{moving.file}: no checkpoint can hold a schedule or a mask; use it when generating (generate --lora)"
        )
    if args.out.suffix == ".safetensors":
        check_output(args.out, [spec.file for spec in specs])
    else:
        check_folder(args.out)
    from .bases.stored import find_stored
    from .combining.baking import check_target

    base = find_stored(args.base)
    check_target(base, args.out)
    return _bake(args, specs, base)


def _bake(args: Namespace, specs: list[StackSpec], base: StoredBase) -> int:
    import torch

    from .bases.empty import make_empty_base
    from .combining.baking import bake, check_bake
    from .combining.plan import Plan

    plan = Plan.of([read_member(spec) for spec in specs], method=args.method)
    check_bake(plan, base, args.out)
    empty = make_empty_base(base.source, torch.float32, "epsilon")  # what it predicts does not matter here
    for line in plan.check(empty):
        say(f"warning: {line}")
    countdown = Countdown("baking", "tensors", first_s=1.0)
    try:
        baked = bake(plan, base, args.out, countdown)
    finally:
        countdown.close()
    if baked.left_out:
        left = baked.left_out
        say(f"note: {len(left)} files with other forms of the weights are left out, {left[0]} for one")
    say(f"{baked.changed} tensors changed, everything else is the base's to the byte")
    print(show_name(args.out))
    return 0


def add_extract(parser: Parser) -> None:
    parser.add_argument("tuned", metavar="TUNED", help=f"the fine-tuned checkpoint: {_BASE}")
    parser.add_argument("--base", required=True, help="the checkpoint that it was tuned from; a file or a folder too")
    parser.add_argument("--rank", metavar="R", type=read_whole_number, required=True, help="ranks of each module")
    parser.add_argument(
        "--conv-rank", metavar="R", type=read_whole_number, help="also takes 3x3 convolutions (LoCon), of this rank"
    )
    parser.add_argument(
        "--targets",
        metavar="NAMES",
        help="kinds of modules or ends of their names, with commas (default: attention,feed-forward,projections)",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="LoRA to write")
    add_written(parser, "fp32")


def run_extract(args: Namespace) -> int:
    targets = tuple(word.strip() for word in args.targets.split(",")) if args.targets else ()
    check_output(args.out, [])
    from .adapter.file import write_adapter
    from .bases.stored import find_stored
    from .combining.extraction import extract

    tuned, base = find_stored(args.tuned), find_stored(args.base)
    for stored in (tuned, base):
        if args.out.exists() and stored.is_file and args.out.samefile(stored.source):
            raise ConfigError(f"{args.out} is read and would be replaced; choose another --out")
    if tuned.source.resolve() == base.source.resolve():
        raise BaseModelError(f"{args.tuned} and {args.base} are the same checkpoint; there is nothing to extract")
    countdown = Countdown("extracting", "modules", first_s=1.0)
    try:
        found = extract(tuned, base, args.rank, args.conv_rank, targets, countdown)
    finally:
        countdown.close()
    write_adapter(found.adapter, args.out, format=args.format, dtype=choose_dtype(args.dtype))
    for line in found.lines():
        say(line)
    print(show_name(args.out))
    return 0

"""The verbs that look for weights: `grid` draws them, `balance` measures them."""

from __future__ import annotations

import math
import shlex
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError
from .flags import Parser, read_number, read_whole_number
from .places import check_files, check_folder
from .profiles import StackSpec, parse_stacked
from .screen import Countdown, print_json, print_line, say, show_name, show_steps
from .values import NUMBER

if TYPE_CHECKING:
    from PIL import Image

    from .bases.family import Base
    from .combining.plan import Member
    from .generating.balance import Trial
    from .generating.stacking import Lora, Stack

GRID_WEIGHTS = "0,0.25,0.5,0.75,1"
BALANCE_WEIGHTS = "0.6,0.8,1,1.2"
_DEVICES = ("auto", "cpu", "cuda", "mps")
_PRECISIONS = ("fp32", "bf16", "fp16")
_DRAWN = ("negative", "seed", "steps", "guidance", "width", "height")
"""Flags that go to the sampler."""


def add_grid(parser: Parser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what to draw; <lora:name:weight> adds a LoRA of --lora-dir")
    add(
        "--lora",
        metavar="FILE[:W[:TE]]",
        action="append",
        default=[],
        help="LoRA file; the first one's weight grows across and the second's down, further ones act in every picture; "
        "a weight W multiplies the list's",
    )
    add("--lora-dir", metavar="DIR", type=Path, help="folder of the LoRAs that the prompt names")
    add("--weights", metavar="LIST", default=GRID_WEIGHTS, help=f"weights of both (default: {GRID_WEIGHTS})")
    add("--weights-down", metavar="LIST", help="other weights of the second (default: those of --weights)")
    add("--combine", metavar="METHOD", default="linear", help="how the LoRAs act together, as generate has it")
    _add_drawing(parser)
    add("--out", metavar="FILE", type=Path, required=True, help="PNG to write")


def add_balance(parser: Parser) -> None:
    add = parser.add_argument
    add("prompts", metavar="PROMPT", nargs="+", help="what to draw, naming the subject's trigger and the style's words")
    add(
        "--lora",
        metavar="FILE[:W[:TE]]",
        action="append",
        default=[],
        help="twice: the style, then the subject; W (default 1) is its full weight, which those searched multiply",
    )
    search = parser.add_argument_group("the search")
    search.add_argument("--seeds", metavar="N", type=read_whole_number, default=4, help="of each prompt (default: 4)")
    search.add_argument(
        "--methods",
        metavar="LIST",
        default="linear",
        help="methods to try, as in linear,np:mu=1,klora (default: linear)",
    )
    search.add_argument(
        "--weights", metavar="LIST", default=BALANCE_WEIGHTS, help=f"of both LoRAs (default: {BALANCE_WEIGHTS})"
    )
    search.add_argument(
        "--refine", metavar="N", type=read_whole_number, default=1, help="rounds around the best (default: 1)"
    )
    seen = parser.add_argument_group("what measures")
    seen.add_argument(
        "--style-pictures", metavar="DIR", type=Path, help="the style (default: the style alone draws it)"
    )
    seen.add_argument("--subject-pictures", metavar="DIR", type=Path, help="the subject (default: as for the style)")
    seen.add_argument("--clip", metavar="MODEL", help="CLIP, a folder or hub id, for the style; mini has its own judge")
    seen.add_argument("--dino", metavar="MODEL", help="DINO, a folder or hub id, for the subject")
    _add_drawing(parser)
    add("--out", metavar="DIR", type=Path, default=Path("balance"), help="folder for the results (default: balance)")
    add("--json", action="store_true", help="print one JSON document")


def _add_drawing(parser: Parser) -> None:
    add = parser.add_argument_group("how it is drawn").add_argument
    add(
        "--base",
        default="mini",
        help="mini, a diffusers folder, a .safetensors checkpoint, or a hub id (default: mini)",
    )
    kinds = ("auto", "epsilon", "v")
    add("--prediction", default="auto", metavar="|".join(kinds), choices=kinds, help="what the base predicts")
    add("--zero-terminal-snr", action=BooleanOptionalAction, help="the base's last step is pure noise")
    add("--negative", metavar="TEXT", default="", help="what to keep away from")
    add("--seed", metavar="S", type=read_whole_number, default=0, help="of the first picture (default: 0)")
    add("--steps", metavar="N", type=read_whole_number, default=20, help="sampler steps (default: 20)")
    add("--guidance", metavar="G", type=read_number, default=5.0, help="how closely to follow the prompt (default: 5)")
    add("--width", metavar="PX", type=read_whole_number, help="without it: the base's own")
    add("--height", metavar="PX", type=read_whole_number, help="without it: the base's own")
    add("--device", default="auto", metavar="|".join(_DEVICES), choices=_DEVICES, help="(default: auto)")
    add("--precision", default="fp32", metavar="|".join(_PRECISIONS), choices=_PRECISIONS, help="(default: fp32)")


def run_grid(args: Namespace) -> int:
    specs = [parse_stacked(text) for text in args.lora]
    check_files([spec.file for spec in specs] + [spec.mask for spec in specs if spec.mask])
    weights = read_weights("--weights", args.weights)
    down = weights if args.weights_down is None else read_weights("--weights-down", args.weights_down)
    if args.out.suffix.lower() != ".png":
        raise ConfigError(f"{args.out} does not end in .png; name the picture to write")
    if args.out.is_dir():
        raise ConfigError(f"{args.out} is a folder; name the picture to write")
    check_folder(args.out.parent, args.out)
    from .generating.grid import weight_grid
    from .generating.png import make_folder, write_png

    stack = _gather(args, args.prompt, specs, args.lora_dir, [args.combine])
    if len(stack.loras) < 2:
        raise ConfigError(f"a grid is of two LoRAs, and {len(stack.loras)} is given; give --lora FILE twice")
    members = [replace(member, name=str(lora.path)) for lora, member in _pair_up(stack)]
    sheet = weight_grid(
        _load(args),
        stack.prompt,
        members[0],
        members[1],
        names=(stack.loras[0].path.stem, stack.loras[1].path.stem),
        weights=weights,
        weights_down=down,
        others=members[2:],
        method=args.combine,
        progress=show_steps(),
        **{name: getattr(args, name) for name in _DRAWN},
    )
    make_folder(args.out.parent)
    write_png(sheet, args.out)
    print(show_name(args.out))
    return 0


def run_balance(args: Namespace) -> int:
    specs = [parse_stacked(text) for text in args.lora]
    if len(specs) != 2:
        raise ConfigError(f"balance weighs two LoRAs, and {len(specs)} given; give --lora STYLE --lora SUBJECT")
    check_files([spec.file for spec in specs] + [spec.mask for spec in specs if spec.mask])
    weights, methods = read_weights("--weights", args.weights), read_methods(args.methods)
    if args.refine < 0:
        raise ConfigError(f"refine {args.refine} is out of range; use 0 (the list alone) or more")
    check_folder(args.out)
    from .bases.facts import read_base_facts
    from .bases.family import pick_device
    from .generating.balance import Scene, check_weights, search_balance
    from .generating.features import check_features, load_features
    from .generating.infotext import parse_prompt
    from .generating.png import make_folder
    from .generating.recommendation import describe_balance, list_balance, note_axes, write_balance

    check_weights(weights)
    for prompt in args.prompts:
        if parse_prompt(prompt)[1]:
            raise ConfigError(f"{prompt!r} names a LoRA; balance takes its two by --lora alone")
    scene = Scene(tuple(args.prompts), args.seeds, **{name: getattr(args, name) for name in _DRAWN})
    stack = _gather(args, args.prompts[0], specs, None, methods)
    family = read_base_facts(args.base, args.prediction).family
    check_features(family, args.clip, args.dino)
    pictures = {
        name: None if folder is None else read_pictures(folder)
        for name, folder in (("style_pictures", args.style_pictures), ("subject_pictures", args.subject_pictures))
    }
    features = load_features(family, args.clip, args.dino, pick_device(args.device))
    notes = _note_triggers(args.prompts, stack)
    members = [member for _, member in _pair_up(stack)]
    base, countdown = _load(args), Countdown()
    try:
        found = search_balance(
            base,
            members[0],
            members[1],
            scene,
            features,
            methods=methods,
            weights=weights,
            refine=args.refine,
            report=countdown,
            **pictures,
        )
    finally:
        countdown.close()
    notes += note_axes(found)
    document = {
        "base": args.base,
        "references": {
            "style": str(args.style_pictures or "its own pictures"),
            "subject": str(args.subject_pictures or "its own pictures"),
        },
        **describe_balance(scene, stack.loras, found, features.name),
        "generate": shlex.join(_command(args, stack, found.recommended)),
        "warnings": notes,
    }
    make_folder(args.out)
    document["files"] = write_balance(args.out, scene, stack.loras, found, document)
    for note in notes:
        say(f"warning: {note}")
    if args.json:
        print_json(document)
    else:
        for line in list_balance(document, found):
            print_line(line)
    return 0


def read_weights(flag: str, text: str) -> list[float]:
    """The numbers of a list such as 0,0.5,1, each once. Raises: ConfigError."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if not NUMBER.fullmatch(word) or not math.isfinite(float(word)):
            raise ConfigError(f"{flag} has {word!r}, which is no finite number; write a list such as 0.5,0.75,1")
        found.append(float(word))
    if not found:
        raise ConfigError(f"{flag} is an empty list; write one such as 0.5,0.75,1")
    return list(dict.fromkeys(found))


def read_methods(text: str) -> list[str]:
    """Methods with their options, of a list such as linear,np:mu=1,klora, each once.

    A word with an equals sign and no colon goes on with the options before it: dare:density=0.5,seed=1.
    Raises: ConfigError.
    """
    from .combining.methods import describe_method, make_method

    words: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if words and "=" in word and ":" not in word:
            words[-1] += f",{word}"
        else:
            words.append(word)
    if not words:
        raise ConfigError("--methods is an empty list; write one such as linear,klora")
    made = {describe_method(make_method(word)): word for word in reversed(words)}
    return [word for word in dict.fromkeys(words) if word in made.values()]


def read_pictures(folder: Path) -> list[Image.Image]:
    """The pictures of a folder, captions or none. Raises: DataError."""
    from .data.folder import scan_folder
    from .data.picture import read_picture

    return [read_picture(example.path) for example in scan_folder(folder, "picture")]


def _gather(
    args: Namespace, prompt: str, specs: Sequence[StackSpec], lora_dir: Path | None, methods: Sequence[str]
) -> Stack:
    """The LoRAs read and checked against the base, and each method against them, before any model loads."""
    from .generating.stacking import check_stack, gather_stack

    size = (args.width, args.height) if args.width and args.height else None
    stacks = [gather_stack(prompt, specs, lora_dir, method) for method in methods]
    check_stack(stacks[0], args.base, args.prediction, size)
    return stacks[0]


def _pair_up(stack: Stack) -> list[tuple[Lora, Member]]:
    """Each LoRA of the command with its member of the plan, in the order given."""
    members = stack.plan.by_place
    return [(lora, members[place]) for place, lora in enumerate(stack.loras)]


def _load(args: Namespace) -> Base:
    from .bases.family import load_base

    return load_base(
        args.base,
        device=args.device,
        precision=args.precision,
        prediction=args.prediction,
        zero_snr=args.zero_terminal_snr,
    )


def _note_triggers(prompts: Sequence[str], stack: Stack) -> list[str]:
    """A line for each LoRA whose trigger a prompt does not name."""
    notes = []
    for lora in stack.loras:
        trigger = lora.adapter.card.trigger or ""
        missing = [prompt for prompt in prompts if trigger.lower() not in prompt.lower()]
        if missing:
            notes.append(f"{missing[0]!r} does not name {trigger!r}, the trigger of {lora.path.name}")
    return notes


def _command(args: Namespace, stack: Stack, trial: Trial) -> list[str]:
    """The command line that draws with a trial's weights."""
    words = ["sdlora", "generate", args.prompts[0]]
    for lora, weight in zip(stack.loras, (trial.style_weight, trial.subject_weight), strict=True):
        te_weight = lora.te_weight * weight / lora.weight if lora.weight else lora.te_weight
        parts = [str(lora.path), f"{weight:g}", *([f"{te_weight:g}"] if lora.te_weight != lora.weight else [])]
        parts += lora.profile.parts() if lora.profile else []
        parts += [f"mask={lora.mask}"] if lora.mask else []
        words += ["--lora", ":".join(parts)]
    if trial.method != "linear":
        words += ["--combine", trial.method]
    usual = {
        "base": "mini", "prediction": "auto", "negative": "", "steps": 20, "guidance": 5.0, "width": None,
        "height": None, "precision": "fp32",
    }  # fmt: skip
    for name, default in usual.items():
        value = getattr(args, name)
        if value != default:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    if args.zero_terminal_snr is not None:
        words += ["--zero-terminal-snr" if args.zero_terminal_snr else "--no-zero-terminal-snr"]
    return words

"""The verbs that work on LoRA files alone: combine, resize, inspect, diagnose."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .flags import Parser, read_number, read_whole_number
from .places import check_files, check_folder, check_output
from .profiles import StackSpec, parse_stacked
from .screen import Countdown, print_json, print_line, say, show_name

if TYPE_CHECKING:
    import torch

    from .adapter.delta import Adapter
    from .combining.plan import Member

_FORMATS = ("kohya", "diffusers", "peft")
_DTYPES = ("fp32", "fp16", "bf16")
_LORA = "LoRA file with its weight (default 1) and, after it, another weight for the text encoder's part"


def add_combine(parser: Parser) -> None:
    parser.add_argument("loras", metavar="FILE[:W[:TE]]", nargs="+", help=f"{_LORA}; then :blocks=… if need be")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="LoRA to write")
    parser.add_argument(
        "--method",
        metavar="METHOD",
        default="linear",
        help="linear (default), np, ties or dare, with options as in np:mu=1, or zip, which learns on a base; "
        "the first LoRA is the style",
    )
    parser.add_argument(
        "--rank",
        metavar="R",
        type=read_whole_number,
        help="ranks to keep of each module, by SVD; prints what that loses (default: all, exact)",
    )
    parser.add_argument(
        "--format",
        default="kohya",
        metavar="|".join(_FORMATS),
        choices=_FORMATS,
        help="names to write (default: kohya)",
    )
    learnt = parser.add_argument_group("zip")
    learnt.add_argument("--base", help="what it learns on: mini, a folder, a .safetensors checkpoint, or a hub id")
    learnt.add_argument("--style-prompt", metavar="TEXT", help="what the style answers to (default: its trigger)")
    learnt.add_argument("--subject-prompt", metavar="TEXT", help="what the subject answers to (default: its trigger)")
    learnt.add_argument("--zip-steps", metavar="N", type=read_whole_number, help="steps to learn (default: 100)")


def run_combine(args: Namespace) -> int:
    specs = [parse_stacked(text) for text in args.loras]
    files = [spec.file for spec in specs]
    check_files(files)
    check_output(args.out, files)
    masked = next((spec for spec in specs if spec.mask), None)
    if masked is not None:
        raise ConfigError(
            f"{masked.file}: no file can hold a mask; use it when generating (generate --lora FILE:mask=…)"
        )
    zips = args.method == "zip"
    learnt = {"--base": args.base, "--style-prompt": args.style_prompt, "--subject-prompt": args.subject_prompt}
    given = [flag for flag, value in {**learnt, "--zip-steps": args.zip_steps}.items() if value is not None]
    if given and not zips:
        raise ConfigError(f"{given[0]} is for --method zip, and the method is {args.method}; leave it out")
    from .adapter.file import write_adapter
    from .adapter.truncation import Cost
    from .combining.stack import combine

    cost = Cost()
    if zips:
        both = zip_files(args, specs)
        if args.rank is not None:
            both = combine([(both, 1.0)], rank=args.rank, cost=cost)
    else:
        from .combining.methods import make_method

        method = make_method(args.method)
        countdown = Countdown("combining", "modules", first_s=1.0)
        try:
            both = combine([read_member(spec) for spec in specs], method, args.rank, cost, countdown)
        finally:
            countdown.close()
    write_adapter(both, args.out, format=args.format)
    if args.rank is not None:
        for line in cost.lines():
            say(line)
    print(show_name(args.out))
    return 0


def read_member(spec: StackSpec) -> Member:
    """A LoRA of a command line, read."""
    from .adapter.file import read_adapter
    from .combining.plan import Member

    return Member(read_adapter(spec.file), spec.weight, spec.te_weight, str(spec.file), profile=spec.profile)


def zip_files(args: Namespace, specs: list[StackSpec]) -> Adapter:
    """The pair as ZipLoRA learns it on a base.

    Raises: ConfigError, AdapterFileError; before the base is loaded where that can be.
    """
    if len(specs) != 2:
        raise ConfigError(f"method zip is for two LoRAs, the style first and the subject second, not for {len(specs)}")
    if args.base is None:
        raise ConfigError("method zip learns on a base; say which (--base mini)")
    members = [read_member(spec) for spec in specs]
    prompts = []
    for member, name, said in zip(members, ("style", "subject"), (args.style_prompt, args.subject_prompt), strict=True):
        prompt = member.adapter.card.trigger if said is None else said
        if not prompt.strip():
            raise ConfigError(f"{member.name} names no trigger; say what the {name} answers to (--{name}-prompt TEXT)")
        prompts.append(prompt)
    from .bases.family import load_base
    from .combining.ziplora import zip_loras

    steps = 100 if args.zip_steps is None else args.zip_steps
    count = iter(range(1, steps + 1))

    def report(loss: float) -> None:
        step = next(count)
        if step == 1 or step % 10 == 0 or step == steps:
            say(f"step {step}/{steps} · loss {loss:.4f}")

    base = load_base(args.base)
    return zip_loras(base, members[0], members[1], prompts[0], prompts[1], steps=steps, report=report)


def add_diagnose(parser: Parser) -> None:
    parser.add_argument("style", metavar="STYLE[:W[:TE]]", help="the style's LoRA file, with its weight (default 1)")
    parser.add_argument("subject", metavar="SUBJECT[:W[:TE]]", help="the subject's")
    parser.add_argument("--map", metavar="FILE", type=Path, help="picture (PNG) of the figures by block")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run_diagnose(args: Namespace) -> int:
    specs = [parse_stacked(text) for text in (args.style, args.subject)]
    check_files([spec.file for spec in specs])
    if args.map is not None:
        if args.map.suffix.lower() != ".png" or args.map.is_dir():
            raise ConfigError(f"--map {args.map} is no .png file; name the picture to write")
        check_folder(args.map.parent, args.map)
    from .combining.diagnose import diagnose, list_diagnosis

    style, subject = (read_member(spec) for spec in specs)
    found = diagnose(style, subject)
    names = [spec.file.name for spec in specs]
    if args.map is not None and found.layers:
        from .generating.heatmap import draw_diagnosis
        from .generating.png import write_png

        write_png(draw_diagnosis(found, *(Path(name).stem for name in names)), args.map)
    if args.json:
        print_json(found.to_json())
    else:
        for line in list_diagnosis(found, *names):
            print_line(line)
    return 0


def add_resize(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="LoRA to read")
    keep = parser.add_argument_group("how many ranks of each module stay: one of these")
    keep.add_argument("--rank", metavar="R", type=read_whole_number, help="so many at most")
    keep.add_argument(
        "--error", metavar="SHARE", type=read_number, help="as few as change ΔW by this share of its norm at most"
    )
    keep.add_argument(
        "--energy", metavar="SHARE", type=read_number, help="as few as hold this share of ΔW's squared norm at least"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="LoRA to write")
    add_written(parser, "FILE's own")


def run_resize(args: Namespace) -> int:
    check_files([args.file])
    check_output(args.out, [args.file])
    from .adapter.delta import Dora
    from .adapter.file import read_adapter, write_adapter
    from .adapter.resizing import resize
    from .adapter.truncation import Cost, Keep

    keep, cost = Keep(args.rank, args.error, args.energy), Cost()
    adapter = read_adapter(args.file)
    countdown = Countdown("resizing", "modules", first_s=1.0)
    try:
        smaller = resize(adapter, keep, cost, countdown)
    finally:
        countdown.close()
    write_adapter(smaller, args.out, format=args.format, dtype=choose_dtype(args.dtype, adapter))
    for line in cost.lines():
        say(line)
    if any(isinstance(delta, Dora) for delta in adapter.deltas.values()):
        say("note: of DoRA modules, that is the error of their low-rank part; their lengths stay")
    print(show_name(args.out))
    return 0


def add_written(parser: Parser, dtype: str) -> None:
    """The flags that say how a LoRA file is written."""
    parser.add_argument(
        "--format",
        default="kohya",
        metavar="|".join(_FORMATS),
        choices=_FORMATS,
        help="names to write (default: kohya)",
    )
    parser.add_argument(
        "--dtype",
        metavar="|".join(_DTYPES),
        choices=_DTYPES,
        help=f"number format of the factors (default: {dtype})",
    )


def choose_dtype(name: str | None, adapter: Adapter | None = None) -> torch.dtype:
    """The dtype of factors that a flag names; without it that of the adapter's, and float32 for others."""
    import torch

    from .adapter.file import WRITTEN_DTYPES

    if name is not None:
        return dict(zip(_DTYPES, WRITTEN_DTYPES, strict=True))[name]
    own = {value.dtype for delta in (adapter.deltas.values() if adapter else ()) for value in list_factors(delta)}
    return own.pop() if len(own) == 1 and own <= set(WRITTEN_DTYPES) else torch.float32


def list_factors(delta: Any) -> list[torch.Tensor]:
    """The tensors of any kind of change that are its factors: all but a DoRA's lengths, which are always float32."""
    import torch

    from .adapter.delta import Dora

    kind = delta.inner if isinstance(delta, Dora) else delta
    return [value for value in vars(kind).values() if isinstance(value, torch.Tensor)]


def add_inspect(parser: Parser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="LoRA files")
    parser.add_argument(
        "--full", action="store_true", help="energy and hashes of files above 200 MB too, and whether they hold NaN"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run_inspect(args: Namespace) -> int:
    check_files(args.files)
    from .adapter.summary import list_summary, summarize

    found = [summarize(file, args.full) for file in args.files]
    if args.json:
        print_json(found)
    else:
        for one in found:
            for line in list_summary(one):
                print_line(line)
    return 0

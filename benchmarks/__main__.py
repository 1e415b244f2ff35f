"""How fast training is, beside the plain loop: `python -m benchmarks` writes results/training-DATE.{json,md}.

Each case runs in a process of its own, ours and the plain loop in turns. Bases but mini are the real architectures
under random weights, made on the spot: speed hangs on no weight. Seconds a step are medians; memory is what the steps
held at most beyond what was held before the first, so weights that are packed for the CPU count, the weights do not.
The share of the machine's limit is the step's floating-point operations (forward and input gradient of the frozen
UNet, counted on meta tensors) over its seconds, of the fastest matrix product or convolution measured in the same run.
The plain loop's pictures and text are made of random numbers, so it has no start-up to speak of. SDXL is measured with
--work sdxl-512 or sdxl-1024: it wants 16 GiB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.training import STARTED, Case

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
WORK = {
    "mini": ("mini", 128),
    "sd15-256": ("sd1", 256),
    "sd15-512": ("sd1", 512),
    "sdxl-512": ("sdxl", 512),
    "sdxl-1024": ("sdxl", 1024),
}
LOOPS = ("sdlora", "sdlora without fast layers", "plain")
MIB = 2**20


def write_base(family: str, place: Path) -> str:
    """The name of the family's base, made where it is not there yet."""
    if family == "mini":
        return "mini"
    path = place / f"{family}.safetensors"
    if not path.exists():
        import torch

        from benchmarks.full_size import make_parts
        from sdlora.bases.checkpoint_writer import write_checkpoint

        place.mkdir(parents=True, exist_ok=True)
        write_checkpoint(make_parts(family, torch.float16), path, family, torch.float16, prediction="epsilon")
    return str(path)


def count_flops(family: str, side_px: int) -> float:
    """Floating-point operations of a training step of one picture: the frozen UNet forward and back to its input."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdlora.bases.architecture import make_part, read_family
    from sdlora.bases.source import MINI_FOLDER

    if family == "mini":
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(json.loads((MINI_FOLDER / "unet" / "config.json").read_text()))
    else:
        unet = make_part(family, "unet", read_family(family)["unet"])
    unet.requires_grad_(False).to("meta")
    x = torch.empty(1, 4, side_px // 8, side_px // 8, device="meta", requires_grad=True)
    text = torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")
    more = None
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        more = {"text_embeds": torch.empty(1, width, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
    with FlopCounterMode(display=False) as counter:
        said = unet(x, torch.zeros(1, device="meta"), encoder_hidden_states=text, added_cond_kwargs=more).sample
        said.sum().backward()
    return float(counter.get_total_flops())


def measure_ceiling() -> dict[str, float]:
    """FLOP/s of the fastest of a few bfloat16 matrix products and 3 x 3 convolutions, on this machine now."""
    import torch
    import torch.nn.functional as F

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"

    def clock(call: Any, flops: float) -> float:
        best = float("inf")
        for _ in range(12):
            began_s = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began_s)
        return flops / best

    def matrix(n: int) -> float:
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        return clock(lambda: a @ b, 2 * n**3)

    def convolution(channels: int, side: int) -> float:
        x = torch.randn(1, channels, side, side, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=device).bfloat16()
        w = w.contiguous(memory_format=torch.channels_last)
        return clock(lambda: F.conv2d(x, w, padding=1), 18 * channels**2 * side**2)

    return {
        "matrix product": max(matrix(n) for n in ((4096, 8192) if gpu else (1024, 2048))),
        "convolution": max(convolution(320, 32), convolution(640, 32)),
    }


def run_case(case: Case) -> dict[str, Any] | None:
    """What a case took, in a process of its own; None, and a line on stderr, where it failed."""
    environment = os.environ | {STARTED: str(time.time())}
    command = [sys.executable, "-m", "benchmarks.training", json.dumps(asdict(case))]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        print(f"{case.work}, {case.loop}: exit code {run.returncode}: {run.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def describe_machine() -> dict[str, str]:
    import diffusers
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = f"{len(models)} x {models[0].partition(': ')[2]}" if models else name
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "cpu": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "AMX": "yes" if torch.cpu._is_amx_tile_supported() else "no",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit.strip() or "unknown",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def summarize(case: Case, runs: list[dict[str, Any]], flops: float, ceiling: float) -> dict[str, Any]:
    """A row: the median over all counted steps of all rounds, and where they spread from and to."""
    seconds = [s for run in runs for s in run["seconds"]]
    step_s = statistics.median(seconds)
    return asdict(case) | {
        "base": case.family,
        "work": case.work,
        "seconds a step": step_s,
        "from": min(seconds),
        "to": max(seconds),
        "CPU seconds a step": statistics.median(run["cpu_seconds"] for run in runs),
        "pictures a second": case.batch_size / step_s,
        "peak MiB": max(run["peak_bytes"] for run in runs) / MIB,
        "seconds to the first step": statistics.median(run["start_seconds"] for run in runs),
        "share of the limit": flops * case.batch_size / step_s / ceiling,
        "on": runs[0]["on"],
    }


def render(result: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    ceiling = ", ".join(f"{key} {value / 1e9:,.0f} GFLOP/s" for key, value in result["ceiling"].items())
    lines = [
        f"# Training speed, {result['date']}",
        "",
        f"By `python -m benchmarks {result['command']}`; what each column is says `python -m benchmarks --help`.",
        "",
        f"Machine: {machine}. Measured ceiling: {ceiling}.",
        "",
        "| work | batch | rank | loop | s a step (from, to) | times plain's speed | CPU s | pictures/s | peak MiB "
        "| to first step | of the limit |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    plain = {
        (r["work"], r["batch_size"], r["rank"]): r["seconds a step"] for r in result["rows"] if r["loop"] == "plain"
    }
    for r in result["rows"]:
        beside = plain.get((r["work"], r["batch_size"], r["rank"]))
        cells = [
            r["work"],
            r["batch_size"],
            r["rank"],
            r["loop"],
            f"{r['seconds a step']:.3f} ({r['from']:.3f}, {r['to']:.3f})",
            f"{beside / r['seconds a step']:.2f}" if beside else "–",
            f"{r['CPU seconds a step']:.2f}",
            f"{r['pictures a second']:.2f}",
            f"{r['peak MiB']:.0f}",
            f"{r['seconds to the first step']:.1f} s",
            f"{100 * r['share of the limit']:.1f} %",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if result["machine"]["gpu"] == "none":
        lines += ["", "On a GPU: not measured."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--work", nargs="+", choices=WORK, default=["mini", "sd15-256"], metavar="WORK", help=", ".join(WORK)
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="pictures a step (default: 1; mini: 8)")
    parser.add_argument("--rank", nargs="+", type=int, default=[8])
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS), metavar="LOOP", help=", ".join(LOOPS))
    parser.add_argument("--steps", type=int, default=8, help="steps of each run, the first two not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each case, in turns")
    parser.add_argument("--place", type=Path, default=ROOT / "runs" / "benchmarks", help="where bases are kept")
    parser.add_argument("--out", type=Path, help="default: results/training-DATE.json")
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("--steps must be 4 or more: the first two are not counted")
    ceiling, date = measure_ceiling(), datetime.date.today().isoformat()
    result: dict[str, Any] = {"date": date, "command": " ".join(sys.argv[1:]), "machine": describe_machine()}
    result |= {"ceiling": ceiling, "rows": []}
    out = args.out or RESULTS / f"training-{date}.json"
    for work in args.work:
        family, side_px = WORK[work]
        base, flops = write_base(family, args.place), count_flops(family, side_px)
        for batch in [8] if family == "mini" and args.batch == [1] else args.batch:
            for rank in args.rank:
                cases = [Case(loop, family, side_px, batch, rank, args.steps, base) for loop in args.loops]
                runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
                for _ in range(args.rounds):
                    for case in cases:
                        if (found := run_case(case)) is not None:
                            runs[case].append(found)
                            print(f"{case.work}, batch {batch}, {case.loop}: {found}", file=sys.stderr, flush=True)
                rows = [summarize(c, own, flops, max(ceiling.values())) for c, own in runs.items() if own]
                result["rows"] += rows
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                out.with_suffix(".md").write_text(render(result), encoding="utf-8")
    print(out.with_suffix(".md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What stacked LoRAs cost when drawing: `python -m benchmarks.stacking`, which writes results/stacking.{json,md}.

Seconds a picture on the built-in base for the bare base and 1, 2, 4 and 8 LoRAs: ours merged (static methods), ours
moving over the steps (klora, switch, composite), and diffusers' load_lora_weights + set_adapters on a pipeline of the
same base, all in one run, in turns. And what it takes to change the weights. The LoRAs are random, attention, rank 8:
time does not hang on what is in them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import describe_machine
from sdlora.adapter.delta import Adapter, Card, LowRank
from sdlora.bases.family import Base, load_base
from sdlora.bases.sampling import sample
from sdlora.bases.source import MINI_FOLDER
from sdlora.combining.plan import Plan

OUT = Path(__file__).parent / "results" / "stacking.json"
COUNTS = (1, 2, 4, 8)
PROMPT = "a red apple"
STEPS = 20
PICTURES = 4
RANK = 8


def random_lora(base: Base, seed: int) -> Adapter:
    """A LoRA of small random factors on every attention projection of the UNet."""
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Any] = {}
    for name, module in base.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            out, into = module.weight.shape  # type: ignore[misc, union-attr]
            down = torch.randn(RANK, into, generator=generator) * 0.01 / into**0.5
            deltas[f"unet.{name}"] = LowRank(down, torch.randn(out, RANK, generator=generator), float(RANK))
    return Adapter(deltas, Card(family=base.family.name, base=base.name))


def clock(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def ours(base: Base, plan: Plan) -> float:
    """Seconds a picture, the merging or hooking counted too."""

    def draw() -> None:
        with plan.applied(base, STEPS) as stacked:
            sample(stacked, [PROMPT] * PICTURES, seeds=list(range(PICTURES)), steps=STEPS)

    return clock(draw) / PICTURES


def make_cases(base: Base, loras: list[Adapter]) -> dict[str, Callable[[], float]]:
    """What is measured by its name."""
    cases: dict[str, Callable[[], float]] = {"ours, bare base": lambda: ours(base, Plan.of([]))}
    for count in COUNTS:
        stack = [(lora, 0.5) for lora in loras[:count]]
        cases[f"ours, {count} merged"] = lambda stack=stack: ours(base, Plan.of(stack))  # type: ignore[misc]
    for method, count in (("klora", 2), ("switch", 2), ("switch", 8), ("composite", 2)):
        stack = [(lora, 0.5) for lora in loras[:count]]
        plan = Plan.of(stack, method=method)
        cases[f"ours, {count} by {method}"] = lambda plan=plan: ours(base, plan)  # type: ignore[misc]
    return cases


def make_peer_cases(
    loras: list[Adapter], dtype: torch.dtype
) -> tuple[dict[str, Callable[[], float]], Callable[[float], None]]:
    """diffusers on the same base: a pipeline that holds all the LoRAs, some of them active; and a change of weights."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, torch_dtype=dtype, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)

    def draw() -> float:
        generators = [torch.Generator().manual_seed(i) for i in range(PICTURES)]
        call = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "generator": generators}
        return clock(lambda: pipeline([PROMPT] * PICTURES, **call)) / PICTURES

    bare = draw
    cases: dict[str, Callable[[], float]] = {}
    loaded = [0]

    def stacked(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            for i in range(loaded[0], count):
                file = Path(folder) / f"{i}.safetensors"
                loras[i].save(str(file))
                pipeline.load_lora_weights(str(file), adapter_name=f"lora{i}")
        loaded[0] = max(loaded[0], count)
        names = [f"lora{i}" for i in range(count)]
        pipeline.set_adapters(names, adapter_weights=[0.5] * count)
        pipeline.enable_lora()
        return draw()

    def without() -> float:
        if loaded[0]:
            pipeline.unload_lora_weights()
            loaded[0] = 0
        return bare()

    cases["diffusers, bare base"] = without
    for count in COUNTS:
        cases[f"diffusers, {count} by set_adapters"] = lambda count=count: stacked(count)  # type: ignore[misc]

    def change(weight: float) -> None:
        names = [f"lora{i}" for i in range(loaded[0])]
        pipeline.set_adapters(names, adapter_weights=[weight] * len(names))

    return cases, change


def measure_changes(base: Base, loras: list[Adapter], peer: Callable[[float], None]) -> dict[str, float]:
    """Seconds to go from one set of weights to another, with the adapters in memory; ours merges them, the peer's
    slows every step instead.
    """

    def change(weight: float) -> None:
        with Plan.of([(lora, weight) for lora in loras]).applied(base):
            pass

    def time(work: Callable[[float], None]) -> float:
        return statistics.median([clock(lambda weight=i / 10: work(weight)) for i in range(1, 8)])  # type: ignore[misc]

    return {
        f"ours, new weights for {len(loras)}": time(change),
        f"diffusers, new weights for {len(loras)}": time(peer),
    }


def write_table(result: dict[str, Any], path: Path) -> None:
    lines = [
        "# What stacked LoRAs cost when drawing",
        "",
        f"`python -m benchmarks.stacking`, {result['date']}: {result['hardware']}, torch {result['torch']}, "
        f"{result['threads']} threads, {result['precision']}; `mini`, {STEPS} steps, guidance 5, {PICTURES} pictures "
        f"at once, attention LoRAs of rank {RANK}; {result['rounds']} rounds in turns. What other work on the "
        "machine adds is in the median and not in the fastest round, which the last column compares.",
        "",
        "| what | seconds a picture, fastest | median | spread | fastest, of its own bare base |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["seconds a picture"].items():
        bare = result["seconds a picture"][f"{name.partition(',')[0]}, bare base"]["fastest"]
        of_bare = f"{row['fastest'] / bare:.3f}"
        lines.append(f"| {name} | {row['fastest']:.3f} | {row['median']:.3f} | {row['spread']:.3f} | {of_bare} |")
    lines += ["", "| change of weights | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds:.4f} |" for name, seconds in result["changes"].items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stacking", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--hardware", help="what the table calls the machine; without it: its processor")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    base = load_base("mini", precision=args.precision)
    loras = [random_lora(base, seed) for seed in range(max(COUNTS))]
    peer_cases, peer_change = make_peer_cases(loras, base.dtype)
    cases = make_cases(base, loras) | peer_cases
    for call in cases.values():
        call()  # warm
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, call in cases.items():
            times[name].append(call())
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": args.hardware or describe_machine()["cpu"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": args.precision,
        "rounds": args.rounds,
        "seconds a picture": {
            name: {"fastest": min(found), "median": statistics.median(found), "spread": max(found) - min(found)}
            for name, found in times.items()
        },
        "changes": measure_changes(base, loras, peer_change),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(result, args.out.with_suffix(".md"))
    print(args.out.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    main()

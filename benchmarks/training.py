"""One measured training run in a process of its own: `python -m benchmarks.training '{"loop": "sdlora", …}'`.

`python -m benchmarks` runs these and makes the table; see there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STARTED = "SDLORA_BENCHMARK_STARTED"
"""Environment variable: when the process was started, seconds since the epoch."""
WARM_STEPS = 2
"""First steps that are not counted: memory is found, weights are packed and kernels are chosen in them."""
PICTURES = 8


@dataclass(frozen=True)
class Case:
    """What is trained, how, and by whose loop."""

    loop: str
    """`sdlora`, `sdlora without fast layers`, or `plain`: `benchmarks.plain_loop`."""
    family: str
    side_px: int
    batch_size: int
    rank: int
    steps: int
    base: str
    """`mini`, or the path of a checkpoint of the family."""
    precision: str = "bf16"

    @property
    def work(self) -> str:
        return {"mini": "mini", "sd1": "SD 1.5", "sdxl": "SDXL"}[self.family] + f" {self.side_px} px"


@dataclass
class Found:
    """What a run took."""

    seconds: list[float]
    """Of each counted step."""
    cpu_seconds: float
    """Of one step, in all threads together."""
    peak_bytes: int
    """What the steps held at most beyond what was held before the first: on a CPU of the process, else of the GPU."""
    start_seconds: float
    """From the start of the process to the end of the first step."""
    on: str


class Meter:
    """Memory and processor time of the steps; `begin` before the first, `step` after each."""

    def __init__(self) -> None:
        self.steps = 0
        self.first_s = self.cpu_s = 0.0
        self.before = 0

    def begin(self) -> None:
        import gc

        gc.collect()
        give_memory_back()
        forget_peak()
        self.before = resident_bytes()

    def step(self) -> None:
        self.steps += 1
        if self.steps == 1:
            self.first_s = time.time() - float(os.environ[STARTED])
        if self.steps == WARM_STEPS:
            self.cpu_s = time.process_time()

    def found(self, seconds: list[float]) -> Found:
        import torch

        cpu_s = (time.process_time() - self.cpu_s) / (self.steps - WARM_STEPS)
        gpu = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
        return Found(seconds[WARM_STEPS:], cpu_s, peak_bytes() - self.before, self.first_s, name)


def resident_bytes() -> int:
    """What the process holds now: on a GPU what torch's allocator has, else the resident set."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak_bytes() -> int:
    """The most since `forget_peak`."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def give_memory_back() -> None:
    """Free memory goes back to the system where glibc is asked to, so that what the steps take is seen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def run_ours(case: Case) -> Found:
    """Our own training, as `sdlora train` does it, on pictures of noise."""
    from benchmarks.presets import write_pictures
    from sdlora.config import make_recipe
    from sdlora.training import loop

    meter = Meter()
    recipe = make_recipe(
        {
            "base": case.base,
            "steps": case.steps,
            "batch_size": case.batch_size,
            "rank": case.rank,
            "resolution": case.side_px,
            "precision": case.precision,
            "checkpoint_every": 0,
            "flip": False,
            "caption_dropout": 0.0,
            "fast_layers": case.loop != "sdlora without fast layers",
        }
    )
    fit, accumulate = loop.fit, loop.accumulate

    def watch_fit(*args: Any) -> None:
        meter.begin()
        fit(*args)

    def watch_step(*args: Any) -> Any:
        if args[0]:
            meter.step()  # of the step before
        return accumulate(*args)

    with _patched(loop, fit=watch_fit, accumulate=watch_step), tempfile.TemporaryDirectory() as place:
        data, out = Path(place) / "data", Path(place) / "out.safetensors"
        write_pictures(data, case.side_px)
        for picture in sorted(data.glob("*.png")):  # all square: the plain loop has no buckets either
            _square(picture, case.side_px)
        loop.run_training(data, recipe, out)
        meter.step()
        rows = (out.with_suffix(".run") / "metrics.jsonl").read_text("utf-8").splitlines()
    return meter.found([json.loads(row)["seconds"] for row in rows])


def run_plain(case: Case) -> Found:
    """The plain loop on diffusers' own UNet of the same architecture, with latents and text made before."""
    import torch

    from benchmarks.plain_loop import train_plainly

    generator = torch.Generator().manual_seed(0)
    unet = load_plain_unet(case)
    config = unet.config
    more = {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[case.side_px, case.side_px, 0, 0, case.side_px, case.side_px]], dtype=torch.float32)
        more = {"text_embeds": torch.randn(PICTURES, width), "time_ids": sizes.expand(PICTURES, -1)}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    meter = Meter()
    meter.begin()
    seconds = train_plainly(
        unet,
        steps=case.steps,
        batch_size=case.batch_size,
        rank=case.rank,
        latents=torch.randn(PICTURES, 4, case.side_px // 8, case.side_px // 8, generator=generator),
        text=torch.randn(PICTURES, 77, config.cross_attention_dim, generator=generator).bfloat16(),
        alphas_cumprod=(1 - betas).cumprod(0),
        more=more,
        after_step=meter.step,
    )
    return meter.found(seconds)


def load_plain_unet(case: Case) -> Any:
    """diffusers' UNet in bfloat16 and its default layout, nothing of it sped up."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.family == "mini":
        from diffusers import UNet2DConditionModel

        from sdlora.bases.source import MINI_FOLDER

        return UNet2DConditionModel.from_pretrained(MINI_FOLDER / "unet", torch_dtype=torch.bfloat16).to(device)
    from benchmarks.full_size import make_parts

    return make_parts(case.family, torch.bfloat16, ["unet"])["unet"].to(device)


class _patched:
    """Other functions in a module's place for a while."""

    def __init__(self, module: Any, **functions: Callable[..., Any]) -> None:
        self.module, self.functions = module, functions
        self.before = {name: getattr(module, name) for name in functions}

    def __enter__(self) -> None:
        for name, function in self.functions.items():
            setattr(self.module, name, function)

    def __exit__(self, *_: object) -> None:
        for name, function in self.before.items():
            setattr(self.module, name, function)


def _square(picture: Path, side_px: int) -> None:
    from PIL import Image

    with Image.open(picture) as opened:
        opened.resize((side_px, side_px)).save(picture, compress_level=1)


def main() -> int:
    case = Case(**json.loads(sys.argv[1]))
    if case.loop == "sdlora":  # as `sdlora train` does
        from sdlora.heap import give_large_blocks_back

        give_large_blocks_back()
    found = run_plain(case) if case.loop == "plain" else run_ours(case)
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Kills runs for as long as it is told: `python -m tests.soak --kills 1000`.

The same faults as `tests/faults`, more of them: runs killed with SIGKILL at random moments, half of them while a state
is saved, alternately of a plain recipe and of one with all that a resumed run must take up; a run killed before each of
its calls to the disk and in the middle of each write. Every run must end in the bytes of one that was left alone.
`--peer` kills accelerate's own checkpoints instead, which are saved one after the other with a limit of one.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from kills import Figures, Killer, make_context

ROUND = 20
"""Kills of one recipe before it is the other's turn."""
PEER_PARAMETERS = 1_000_000


def soak(kills: int, seed: int, every_call: bool) -> Figures:
    """Kills runs at random moments, and one at every call; prints what came of it as it goes."""
    total, context = Figures(), make_context()
    with tempfile.TemporaryDirectory() as folder:
        if every_call:
            found, kinds = Killer(Path(folder) / "short", "short", context).kill_at_every_call()
            print(f"every one of {len(kinds)} calls to the disk, and the middle of each write: {found}", flush=True)
            total = _add(total, found)
        killers = [Killer(Path(folder) / name, name, context) for name in ("plain", "rich")]
        done = number = 0
        while done < kills:
            found = killers[number % 2].kill_at_random(min(ROUND, kills - done), seed + number)
            done, number, total = done + found.kills, number + 1, _add(total, found)
            print(f"{done} of {kills} random kills: {total}", flush=True)
    return total


def _add(a: Figures, b: Figures) -> Figures:
    names = [f.name for f in dataclasses.fields(Figures)]
    return Figures(**{name: getattr(a, name) + getattr(b, name) for name in names})


def save_as_peer(folder: Path, begun: Any) -> None:
    """accelerate's own checkpoints, one after the other, the newest kept: a million numbers and their AdamW."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    torch.set_num_threads(1)
    accelerator, model, optimizer = _make_peer(Accelerator, ProjectConfiguration, folder)
    begun.set()
    while True:
        model(torch.ones(1, 1000)).sum().backward()
        optimizer.step()
        accelerator.save_state()


def load_as_peer(folder: Path, told: Any) -> None:
    """Tries to go on from the newest of them that loads; tells whether one did."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator, _, _ = _make_peer(Accelerator, ProjectConfiguration, folder)
    places = sorted((folder / "checkpoints").glob("checkpoint_*"), key=lambda p: int(p.name[11:]), reverse=True)
    for place in places:
        try:
            accelerator.load_state(str(place))
        except Exception:  # whatever it says of a folder that is not whole
            continue
        told.put(True)
        return
    told.put(False)


def _make_peer(accelerator_kind: Any, configuration: Any, folder: Path) -> Any:
    import torch

    project = configuration(str(folder), automatic_checkpoint_naming=True, total_limit=1)
    accelerator = accelerator_kind(cpu=True, project_config=project)
    model = torch.nn.Linear(1000, PEER_PARAMETERS // 1000)
    return (accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters())))


def soak_peer(tries: int, seed: int) -> int:
    """Kills accelerate while it saves; returns after how many kills nothing could be loaded."""
    chance, context, lost = random.Random(seed), make_context(), 0
    for number in range(tries):
        with tempfile.TemporaryDirectory() as folder:
            begun, told = context.Event(), context.Queue()
            process = context.Process(target=save_as_peer, args=(Path(folder), begun))
            process.start()
            begun.wait(120)
            process.join(2 + chance.uniform(0, 1))  # some saves are done by then
            process.kill()
            process.join()
            loader = context.Process(target=load_as_peer, args=(Path(folder), told))
            loader.start()
            lost += not told.get(timeout=120)
            loader.join()
        print(f"accelerate, {number + 1} of {tries} kills: nothing to load after {lost}", flush=True)
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="random kills (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-calls", action="store_true", help="leaves out the kills at every call to the disk")
    parser.add_argument("--peer", type=int, metavar="KILLS", default=0, help="kills of accelerate, and nothing of ours")
    args = parser.parse_args()
    began_s = time.perf_counter()
    if args.peer:
        print(f"accelerate: nothing could be loaded after {soak_peer(args.peer, args.seed)} of {args.peer} kills")
        return 0
    found = soak(args.kills, args.seed, not args.no_calls)
    print(
        f"{found.kills} kills, {found.in_save} of them in a save, {found.runs} runs that ended: {found.lost} lost, "
        f"{found.different} different; {time.perf_counter() - began_s:.0f} s"
    )
    return int(bool(found.lost or found.different))


if __name__ == "__main__":
    sys.exit(main())

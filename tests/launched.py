"""Several processes as a launcher starts them, on the CPU, with what each printed; forked, so that they start fast."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PRELOADED = ["torch", "diffusers", "transformers", "accelerate", "sdlora.cli", "sdlora.training.loop", __name__]


@dataclass
class Ended:
    """One process that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def get_context():
    """Processes are forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(
    folder: Path,
    *argvs: list[str],
    module: str = "sdlora.cli",
    disks: Sequence[Path] = (),
    more: Mapping[str, str] | None = None,
) -> list:
    """Starts a command line in each process; they find each other as torchrun's do. Ends with `finish`.

    With `disks` each is the first of a machine of its own, as far as it can tell, and works in that folder. `more` is
    what else their environment holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context, processes = get_context(), []
    for rank, argv in enumerate(argvs):
        found = {"RANK": rank, "WORLD_SIZE": len(argvs)}
        found |= {"LOCAL_RANK": 0 if disks else rank, "LOCAL_WORLD_SIZE": 1 if disks else len(argvs)}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {k: str(v) for k, v in found.items()} if len(argvs) > 1 else {}
        environment |= dict(more or {})
        environment["SDLORA_CACHE"] = os.environ["SDLORA_CACHE"]
        where = disks[rank] if disks else Path.cwd()
        process = context.Process(target=_run, args=(folder / str(rank), environment, argv, module, where))
        process.start()
        processes.append(process)
    return processes


def finish(folder: Path, processes: list, timeout_s: float = 300) -> list[Ended]:
    """Waits for the processes; kills what does not end in time."""
    end_s = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0, end_s - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    read = [[(folder / f"{rank}.{end}").read_text("utf-8") for end in ("out", "err")] for rank in range(len(processes))]
    return [Ended(process.exitcode, *texts) for process, texts in zip(processes, read, strict=True)]


def launch(
    folder: Path,
    *argvs: list[str],
    module: str = "sdlora.cli",
    disks: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Runs a command line in each process to its end."""
    return finish(folder, start(folder, *argvs, module=module, disks=disks, more=environment))


def _run(place: Path, environment: dict[str, str], argv: list[str], module: str, where: Path) -> None:
    import importlib

    import torch

    for number, end in ((1, "out"), (2, "err")):
        opened = os.open(f"{place}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(where)
    torch.set_num_threads(1)
    code = importlib.import_module(module).main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)

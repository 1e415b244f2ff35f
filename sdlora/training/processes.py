"""Several processes that train one LoRA: who is who, and how they stay together; accelerate carries what they tell.

Importing this imports no torch: a process learns from its environment alone how many were launched.
Whatever one process tells the others before the first step goes through `exchange`, errors too. So a process that fails
meets the others where they next wait for it, and all of them end with its error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..errors import RunError, RunInterrupted, SdloraError
from .splitting import Split

if TYPE_CHECKING:
    from torch import Tensor

_Value = TypeVar("_Value")
_Error = TypeVar("_Error", bound=BaseException)
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun and the MPIs, which accelerate's launcher starts, put a process's number and how many there are."""
_PATIENCE = timedelta(days=1)
"""How long processes wait for one that encodes, draws or saves; one that died is the launcher's to see."""
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def count_processes() -> int:
    """How many processes were launched together, 1 where none was."""
    return max(1, _read_number(_COUNTS, 1))


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return count_processes() == 1 or _read_number(_RANKS, 0) == 0


@contextlib.contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Nothing is printed here but by the main process; what ends in a traceback is printed outside of it."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


@dataclass
class Processes:
    """The processes of one run; one alone is the usual case, in which nothing here does anything."""

    count: int = 1
    index: int = 0
    local: int = 0
    """Its number on its own machine."""
    split: Split | None = None
    """How the base is split between them; None where each holds all of it."""

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.index == 0

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Meets the other processes that were launched; gives each its GPU, where `device` is none of the CPU's.

        Raises: RunError for a way of launching that is not supported.
        """
        for variable, name in _REFUSED.items():
            if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
                raise RunError(
                    f"{variable} = {os.environ[variable]}: {name} is not supported, a LoRA's factors are small; "
                    "launch plain processes, as configs/accelerate/two-gpus.yaml does, or split the base, as "
                    "two-gpus-fsdp.yaml does"
                )
        split = Split.read(count_processes())
        if count_processes() == 1:
            return cls()
        from accelerate import PartialState

        from ..bases.family import pick_device

        cpu = pick_device(choose_device(device)).type == "cpu"
        if split and split.offload and cpu:
            raise RunError(
                "fsdp_offload_params: true keeps the base in the CPU's memory for a GPU, and this runs on the CPU; "
                "set it to false"
            )
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        if state.num_processes != count_processes():
            raise RunError(
                f"{count_processes()} processes were launched that cannot meet on {state.device}; "
                "use accelerate launch --multi_gpu or torchrun, with --device cpu where there is no GPU"
            )
        return cls(state.num_processes, state.process_index, state.local_process_index, split)

    def part(self, micro: int) -> int:
        """Which part of a step's pictures this process's pass `micro` has, of passes times processes."""
        return micro * self.count + self.index

    def exchange(self, value: _Value = None, error: BaseException | None = None) -> list[_Value]:  # type: ignore[assignment]
        """Every process's value, in their order; waits for all of them.

        Raises: the first process's error that has one, in all of them.
        """
        if self.count == 1:
            if error is not None:
                raise error
            return [value]
        from accelerate.utils import gather_object

        with self._noticing("where the processes meet"):
            told = gather_object([(value, error)])
        for index, (_, other) in enumerate(told):
            if other is not None:
                raise mark_told(type(other)(f"process {index}: {other}") if index else other) from None
        return [value for value, _ in told]

    def from_main(self, work: Callable[[], _Value]) -> _Value:
        """What `work` returns in the main process, which alone does it. Raises: what it raises, in all processes."""
        return self.exchange(work() if self.main else None)[0]  # type: ignore[return-value]

    def hand_out(self, work: Callable[[], _Value]) -> _Value:
        """As `from_main`, for what is too large to gather."""
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        box = [work() if self.main else None]
        self.exchange()
        with self._noticing("where the processes meet"):
            return broadcast_object_list(box)[0]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], _Value]) -> _Value:
        """What `work` returns, done by one process of each machine before the others do it."""
        value = work() if self.local == 0 else None
        self.exchange()
        return work() if value is None else value

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """The training steps, in which the processes meet at their end alone: an error in here cannot be told."""
        try:
            yield
        except (SdloraError, RunInterrupted) as error:
            if "told" not in error.__dict__:
                error.__dict__["alone"] = True
            raise

    def stops(self, asked: float, requested: bool) -> bool:
        """Whether the run stops after this step: at once where one process trains, else when all know of it."""
        return asked > 0 or (self.count == 1 and requested)

    @contextlib.contextmanager
    def _noticing(self, where: str) -> Iterator[None]:
        """Raises: RunError where another process is gone; the backends raise RuntimeErrors of their own words."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:100]
            lost = f"process {self.index} lost another one {where} ({reason})"
            gone = mark_told(RunError(f"{lost}; the same command goes on from the last saved step"))
            gone.__dict__["lost"] = True
            raise gone from None

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Finds a process that would train something else, such as from a folder of its machine that differs.

        Raises: RunError, naming the first difference.
        """
        for index, other in enumerate(self.exchange(dict(what))):
            for key in what:
                if other[key] != what[key]:
                    raise RunError(
                        f"process {index} differs from process {self.index} in: {key}; give all of them the same"
                    )

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Goes on where no process failed in here. Raises: in all of them what was raised in one."""
        try:
            yield
        except (SdloraError, RunInterrupted) as error:
            self.exchange(error=error)
        else:
            self.exchange()

    def average(self, factors: Mapping[str, Tensor], loss: Tensor, stop: bool) -> tuple[Tensor, Tensor]:
        """Makes every gradient the processes' mean; returns the mean loss, and above 0 where any process is to stop.

        All of it is one message: each process gets the same bits, and so makes the same step.
        Raises: RunError where another process is gone.
        """
        import torch

        if self.count == 1:
            return loss, torch.zeros_like(loss)
        from accelerate.utils import reduce

        held = [factor.grad for factor in factors.values() if factor.grad is not None]
        numbers = torch.stack([loss.float(), torch.full_like(loss, float(stop), dtype=torch.float32)])
        message = torch.cat([numbers, *(grad.flatten() for grad in held)])
        with self._noticing("in the middle of a step"):
            mean = reduce(message, "mean")  # type: ignore[no-untyped-call]
        parts = mean[2:].split([grad.numel() for grad in held])
        for grad, part in zip(held, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return mean[0], mean[1]


def mark_told(error: _Error) -> _Error:
    """The error, known to every process, so that the main one alone prints it."""
    error.__dict__["told"] = True
    return error


def is_printed(error: BaseException) -> bool:
    """Whether this process prints an error that ends it: the main one does, and any other what it alone knows."""
    return is_main() or "alone" in error.__dict__


def choose_device(device: str) -> str:
    """The device to load for: what was asked for, or the CPU where the launcher was told to use no other."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return "cpu" if device == "auto" and forced else device


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes of a run, of which the main one prints. Raises: in all of them an error that one of them raises."""
    with quiet_unless_main():
        processes = Processes.join(device)
        try:
            with processes.split.hidden() if processes.split else contextlib.nullcontext():
                yield processes
        except (SdloraError, RunInterrupted) as error:
            if not {"told", "alone"} & error.__dict__.keys():
                processes.exchange(error=error)
            raise


@contextlib.contextmanager
def shared_errors(device: str) -> Iterator[None]:
    """A whole command in several processes: tells the others of an error that comes before they met, then parts."""
    try:
        yield
    except (SdloraError, RunInterrupted) as error:
        known = error
        if count_processes() > 1 and not {"told", "alone"} & error.__dict__.keys():
            try:
                with quiet_unless_main():
                    Processes.join(device).exchange(error=error)
            except (SdloraError, RunInterrupted) as shared:
                known = shared
        if "told" in known.__dict__ and "lost" not in known.__dict__:
            leave()  # where one is gone, or in the middle of a step, this would wait for it
        raise known from None
    leave()


def leave() -> None:
    """Lets go of the other processes, at the end of a command."""
    if count_processes() > 1:
        from accelerate import PartialState

        if PartialState._shared_state:
            PartialState().destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends this process with an exit code; one of several at once, without taking the interpreter down first.

    The backends' threads outlive it, and one that then lets go of a tensor aborts a run that is done and saved: 3 of 60
    did on a busy machine. Source: pytorch/pytorch, pull request 179291.
    """
    if count_processes() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _read_number(variables: tuple[str, ...], otherwise: int) -> int:
    for variable in variables:
        if os.environ.get(variable, "").isdecimal():
            return int(os.environ[variable])
    return otherwise

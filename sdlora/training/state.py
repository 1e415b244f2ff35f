"""What of a running training is saved and taken up again."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from ..adapter.layers import LoraLayers
from .averages import Averages
from .checkpoint import Checkpoint, save_checkpoint
from .metrics import Metrics, draw_loss
from .optim import flatten_state, restore_state
from .progress import say
from .run import Run

_AVERAGE = "average/"
"""How the names of running means begin, beside the optimizer's state."""


class State:
    """What of a run is saved: the factors, the optimizer and a few numbers."""

    def __init__(
        self,
        layers: LoraLayers,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        run: Run,
        checkpoint: Checkpoint | None,
        averages: Averages,
    ) -> None:
        self.layers, self.optimizer, self.run, self.averages = layers, optimizer, run, averages
        self.scaler = accelerator.scaler  # of the loss, in fp16 only
        self.saved = 0
        """Steps that the newest checkpoint holds."""
        self.skipped_in_row = 0
        """How many steps just now were skipped, one after the other."""
        if checkpoint is not None:
            layers.load_factors(checkpoint.factors)
            averages.load({k[len(_AVERAGE) :]: v for k, v in checkpoint.optimizer.items() if k.startswith(_AVERAGE)})
            restore_state(optimizer, {k: v for k, v in checkpoint.optimizer.items() if not k.startswith(_AVERAGE)})
            if self.scaler is not None and checkpoint.state.get("loss_scaler"):
                self.scaler.load_state_dict(checkpoint.state["loss_scaler"])
            self.skipped_in_row = int(checkpoint.state.get("skipped_in_row", 0))
            self.saved = checkpoint.step
            say(f"going on after step {self.saved}")

    def save(self, step: int, metrics: Metrics, after_fault: bool = False) -> None:
        """Saves the state after `step` steps, unless it or a later one is saved already, or it is not finite itself.

        `after_fault` says that steps behind it were skipped until the run gave up: whoever goes on tries them anew.
        """
        factors = {name: factor.detach().cpu() for name, factor in self.layers.named_factors().items()}
        if step <= self.saved:
            return
        if not all(bool(factor.isfinite().all()) for factor in factors.values()):
            say(f"step {step}: the factors are not finite, so this state is not saved; that of step {self.saved} stays")
            return
        metrics.sync()
        values = {
            "threads": torch.get_num_threads(),
            "skipped_in_row": 0 if after_fault else self.skipped_in_row,
            "loss_scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }
        averages = {f"{_AVERAGE}{name}": value for name, value in self.averages.values.items()}
        # copies: the state of some optimizers shares tables between factors, which a file cannot
        held = {name: value.to("cpu", copy=True) for name, value in flatten_state(self.optimizer).items()}
        optimizer = held | {name: value.cpu() for name, value in averages.items()}
        save_checkpoint(self.run.checkpoints, Checkpoint(step, factors, optimizer, values))
        draw_loss(metrics.rows, self.run.loss)
        self.saved = step

    def skip(self, step: int, what: str) -> None:
        """Counts a step that is not made since its loss or gradient is not finite, and says so.

        In fp16 an overflowing gradient is how the scale of the loss is found: that scales down, and is no fault.
        """
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            self.scaler.update()
            if what == GRADIENT and scale >= 1:
                return
        self.skipped_in_row += 1
        say(f"step {step}: the {what} is not finite, so the step is skipped ({self.skipped_in_row} in a row)")


LOSS, GRADIENT = "loss", "gradient"


def find_fault(loss: float, norm: float) -> str:
    """Which of a step's loss and its gradients' norm is not finite; empty where both are."""
    return LOSS if not math.isfinite(loss) else "" if math.isfinite(norm) else GRADIENT

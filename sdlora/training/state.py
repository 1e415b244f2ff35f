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
        if checkpoint is not None:
            layers.load_factors(checkpoint.factors)
            averages.load({k[len(_AVERAGE) :]: v for k, v in checkpoint.optimizer.items() if k.startswith(_AVERAGE)})
            restore_state(optimizer, {k: v for k, v in checkpoint.optimizer.items() if not k.startswith(_AVERAGE)})
            if self.scaler is not None and checkpoint.state.get("loss_scaler"):
                self.scaler.load_state_dict(checkpoint.state["loss_scaler"])
            self.saved = checkpoint.step
            say(f"going on after step {self.saved}")

    def save(self, step: int, metrics: Metrics) -> None:
        """Saves the state after `step` steps, unless it is saved already or is not finite itself."""
        factors = {name: factor.detach().cpu() for name, factor in self.layers.named_factors().items()}
        if step == self.saved or not all(bool(factor.isfinite().all()) for factor in factors.values()):
            return
        metrics.sync()
        values = {
            "threads": torch.get_num_threads(),
            "loss_scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }
        averages = {f"{_AVERAGE}{name}": value for name, value in self.averages.values.items()}
        # copies: the state of some optimizers shares tables between factors, which a file cannot
        held = {name: value.to("cpu", copy=True) for name, value in flatten_state(self.optimizer).items()}
        optimizer = held | {name: value.cpu() for name, value in averages.items()}
        save_checkpoint(self.run.checkpoints, Checkpoint(step, factors, optimizer, values))
        draw_loss(metrics.rows, self.run.loss)
        self.saved = step

    def usable(self, loss: float, norm: float) -> bool:
        """Whether a step may be made; in fp16 a gradient that overflows is skipped, and the loss scaled down."""
        overflow_is_handled = self.scaler is not None and self.scaler.get_scale() >= 1
        return math.isfinite(loss) and (math.isfinite(norm) or overflow_is_handled)

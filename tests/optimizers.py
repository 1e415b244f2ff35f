"""Stand-ins for packages of optimizers, so that what is done for them is held without them."""

from __future__ import annotations

import types

import torch


class ScheduleFree(torch.optim.Optimizer):
    """Steps at y, averages at x, as the real one: p is y while it trains and x after `eval`."""

    def __init__(self, groups, lr=1.0, weight_decay=0.0):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "train_mode": False, "k": 0, "beta": 0.9})

    def _switch(self, train, share):
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], share(group["beta"]))
                group["train_mode"] = train

    def eval(self):
        self._switch(False, lambda beta: 1 - 1 / beta)

    def train(self):
        self._switch(True, lambda beta: 1 - beta)

    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "not in train mode"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"] = p.detach().clone()
                share = 1 / group["k"]
                p.data.lerp_(state["z"], share)
                p.data.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                state["z"].sub_(p.grad, alpha=group["lr"])


class Prodigy(torch.optim.Optimizer):
    """Plain descent with a growing d in its groups and numbers in its state."""

    def __init__(self, groups, lr=1.0, **options):
        print("a line that nobody wants to read")
        self.options = options
        super().__init__(groups, {"lr": lr, "weight_decay": options["weight_decay"], "d": 1e-3, "k": 0})

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = min(0.1, group["d"] * 1.1)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    state["s"] = state.get("s", 0) + p.grad
                    p.data.sub_(p.grad, alpha=group["lr"] * group["d"])


def make_module(**contents):
    """A module that holds these."""
    module = types.ModuleType("stand_in")
    vars(module).update(contents)
    return module

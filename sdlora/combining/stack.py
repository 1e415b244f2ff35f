"""Several LoRAs as one: exact, by putting their ranks side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter.delta import Adapter, Card, Delta, LowRank
from ..errors import AdapterFileError, ConfigError
from .plan import Member, Plan, Stacked


def combine(adapters: Stacked) -> Adapter:
    """One adapter whose ΔW is Σ weight · ΔW; a module's rank is the sum of the ranks, and its alpha that rank.

    Each term's weight · alpha / rank goes into `up`, signs too, so nothing is squared or crossed.

    Raises: ConfigError where nothing is left to combine; AdapterFileError where the adapters do not go together.
    """
    plan = Plan.of(adapters)
    if not plan.members:
        raise ConfigError("no LoRA to combine; give at least one")
    families = sorted({m.adapter.card.family for m in plan.members} - {""})
    if len(families) > 1:
        raise AdapterFileError(f"LoRAs of several families do not combine: {', '.join(families)}; combine those of one")
    deltas: dict[str, Delta] = {}
    for path in plan.paths:
        acting = [m for m in plan.members if path in m.adapter.deltas and m.weight_of(path) != 0]
        deltas[path] = _concatenate(path, acting)
    if not deltas:
        raise ConfigError("every weight is 0, so there is nothing to combine; give a weight that is not 0")
    return Adapter(deltas, _combine_cards(plan.members))


def _concatenate(path: str, acting: list[Member]) -> LowRank:
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for member in acting:
        delta = member.adapter.deltas[path]
        if not isinstance(delta, LowRank):
            kind = type(delta).__name__
            raise AdapterFileError(
                f"{member.name}: {path} is {kind}, which has no exact sum of ranks; leave that file out"
            )
        down, up = delta.down.detach().float(), delta.up.detach()
        if downs and (down.shape[1:] != downs[0].shape[1:] or up.shape[0] != ups[0].shape[0]):
            raise AdapterFileError(
                f"{member.name}: {path} has another shape than in {acting[0].name}; combine those of one base"
            )
        downs.append(down)
        # rounded once: the factor and the product are float64
        ups.append((up.reshape(up.shape[0], -1).double() * (member.weight_of(path) * delta.scale)).float())
    down, up = torch.cat(downs), torch.cat(ups, dim=1)  # [R, in, ...], [out, R]
    return LowRank(down, up.reshape(*up.shape, *[1] * (down.dim() - 2)), alpha=float(len(down)))


def _combine_cards(members: tuple[Member, ...]) -> Card:
    cards = [m.adapter.card for m in members]

    def join(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(v for v in values if v))

    settings = {
        "combined": [
            {"trigger": m.adapter.card.trigger, "weight": m.weight, "text_encoder_weight": m.te_weight} for m in members
        ]
    }
    return Card(
        family=join([c.family for c in cards]),
        base=join([c.base for c in cards]),
        trigger=join([c.trigger for c in cards]),
        settings=settings,
    )

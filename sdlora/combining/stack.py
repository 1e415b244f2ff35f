"""Several LoRAs as one: exact, by putting their ranks side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from ..adapter.delta import Adapter, Card, Delta, Dora, shape_of
from ..adapter.truncation import Cost, Keep, make_pair, truncate_dense, truncate_factors
from ..adapter.vector import Vector
from ..errors import AdapterFileError, ConfigError
from .methods import describe_method
from .methods.method import DenseFilling, Filling, Method
from .plan import Member, Plan, Stacked


def combine(
    adapters: Stacked,
    method: str | Method = "linear",
    rank: int | None = None,
    cost: Cost | None = None,
    report: Callable[[int, int, str], None] | None = None,
) -> Adapter:
    """One adapter with the ΔW of a static plan; a module's rank is the sum of the ranks, and its alpha that rank.

    Each term's weight · alpha / rank goes into `up`, signs too, so nothing is squared or crossed. With `rank`, each
    module's ΔW is truncated to that many singular values at most, and `cost` is told what that loses. `report` is
    called with how many modules are done, of how many, and the next one's path.

    Raises: ConfigError where nothing is left to combine, or the method gives no ΔW that a file can hold;
    AdapterFileError where the adapters do not go together.
    """
    plan = Plan.of(adapters, method=method)
    if not plan.members:
        raise ConfigError("no LoRA to combine; give at least one")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank {rank} is out of range; give 1 or more")
    if not plan.is_static:
        raise ConfigError(
            f"method {plan.method.name}, schedules and masks change over the picture, so no file can hold them; "
            f"use them when generating (generate --combine {plan.method.name})"
        )
    families = sorted({m.adapter.card.family for m in plan.members} - {""})
    if len(families) > 1:
        raise AdapterFileError(f"LoRAs of several families do not combine: {', '.join(families)}; combine those of one")
    filling = plan.method.prepare(())
    if isinstance(filling, DenseFilling) and rank is None:
        raise ConfigError(f"method {plan.method.name} gives no low-rank sum; say how many ranks to keep (--rank 32)")
    deltas: dict[str, Delta] = {}
    for i, path in enumerate(paths := plan.paths):
        if report is not None:
            report(i, len(paths), path)
        deltas[path] = _combine_module(plan, filling, path, rank, cost)
    if not deltas:
        raise ConfigError("every weight is 0, so there is nothing to combine; give a weight that is not 0")
    return Adapter(deltas, _combine_cards(plan))


def _combine_module(
    plan: Plan, filling: Filling | DenseFilling, path: str, rank: int | None, cost: Cost | None
) -> Delta:
    members = plan.by_place
    acting = [m for m in plan.members if path in m.adapter.deltas and m.weight_of(path) != 0]
    shapes = {shape_of(m.adapter.deltas[path]): m for m in acting}
    if len(shapes) > 1:
        first, other, *_ = shapes.values()
        raise AdapterFileError(
            f"{other.name}: {path} has another shape than in {first.name}; combine those of one base"
        )
    for member in acting:
        if isinstance(member.adapter.deltas[path], Dora):
            raise AdapterFileError(
                f"{member.name}: {path} is Dora, which has no exact sum of ranks without its base; leave that file out"
            )
    if isinstance(vector := acting[0].adapter.deltas[path], Vector):
        total = plan.delta(path)
        if cost is not None:
            cost.add(path, 0.0, float(total.double().square().sum()))
        return Vector(total, vector.role)
    layer = plan.layer(path)
    gains = [members[place].weight_of(path) for place in layer.places]
    (shape,) = shapes
    if isinstance(filling, DenseFilling):
        found = truncate_dense(filling.delta(layer, gains), Keep(rank))
        if cost is not None:
            cost.add(path, found.lost, found.whole)
        return found.pair(shape)
    m = cast(Filling, filling).middle(layer, gains, None)
    up = layer.up * m if m.dim() == 1 else layer.up @ m  # [out, R]
    if rank is None or rank >= layer.down.shape[0]:
        if cost is not None:
            cost.add(path, 0.0, float(((up.T @ up) * (layer.down @ layer.down.T)).sum()))
        return make_pair(layer.down, up, shape)
    found = truncate_factors(up, layer.down, Keep(rank))
    if cost is not None:
        cost.add(path, found.lost, found.whole)
    return found.pair(shape)


def _combine_cards(plan: Plan) -> Card:
    members = plan.members
    cards = [m.adapter.card for m in members]

    def join(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(v for v in values if v))

    def row(member: Member) -> dict[str, object]:
        te_weight = member.weight if member.te_weight is None else member.te_weight
        return {"trigger": member.adapter.card.trigger, "weight": member.weight, "text_encoder_weight": te_weight}

    settings: dict[str, object] = {"combined": [row(member) for member in members]}
    if plan.method.name != "linear":
        settings["method"] = describe_method(plan.method)
    return Card(
        family=join([c.family for c in cards]),
        base=join([c.base for c in cards]),
        trigger=join([c.trigger for c in cards]),
        settings=settings,
    )


__all__ = ["Cost", "combine"]

"""LoRAs merged into a base before it is trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..adapter.file import file_sha256, read_adapter
from ..bases.family import Base
from ..values import parse_lora
from .plan import Plan


def merge_for_good(base: Base, loras: Sequence[str]) -> Base:
    """The base with LoRAs, as FILE[:WEIGHT[:TE_WEIGHT]], merged into its weights; they are changed for good.

    Raises: AdapterFileError where a file cannot be read or does not fit.
    """
    if not loras:
        return base
    plan, merged = _read(base, loras)
    plan.merge_into(base)
    return merged


@contextlib.contextmanager
def merged_for_a_while(base: Base, loras: Sequence[str]) -> Iterator[Base]:
    """Within it, a Base with the LoRAs merged into the weights, which `base` shares; afterwards they are as before.

    Raises: as `merge_for_good`.
    """
    if not loras:
        yield base
        return
    plan, merged = _read(base, loras)
    with plan.applied(base):
        yield merged


def _read(base: Base, loras: Sequence[str]) -> tuple[Plan, Base]:
    """The plan of the LoRAs, and the base as it is called with them in it: another fingerprint, and what they are."""
    specs = [parse_lora(text) for text in loras]
    stack = [(read_adapter(spec.file), spec.weight, spec.te_weight) for spec in specs]
    # Weights and contents, never names or paths: the same LoRAs give the same base wherever they lie.
    rows: list[dict[str, Any]] = [
        {"sha256": file_sha256(spec.file), "weight": spec.weight, "text_encoder_weight": spec.te_weight}
        for spec in specs
    ]
    rows.sort(key=lambda row: json.dumps(row, sort_keys=True))
    address = json.dumps([base.fingerprint, rows], sort_keys=True)
    fingerprint = hashlib.sha256(address.encode()).hexdigest()
    plan = Plan.of(stack, [spec.file.name for spec in specs])
    for line in plan.check(base):
        print(f"warning: {line}", file=sys.stderr)
    return plan, dataclasses.replace(base, fingerprint=fingerprint, extra={**base.extra, "merged": rows})

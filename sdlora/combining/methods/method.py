"""What every method of combining has, and the moment at which it acts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from ...errors import ConfigError
from ..layer import Layer


@dataclass(frozen=True)
class Moment:
    """Where in the noise schedule a prediction is asked for."""

    t: float
    """The fraction of the noise schedule that is done: 0 is pure noise, 1 the finished picture. It comes from the noise
    level itself, so a solver that asks twice a step, or takes other steps, gets the same."""
    steps: int
    """How many solver steps the whole schedule has."""


@dataclass(frozen=True)
class Pass:
    """One of the predictions that are mixed at a moment."""

    acting: frozenset[int] | None = None
    """The adapters that act in it, by their place in the stack; None is all."""
    share: float = 1.0
    """What its prediction counts in the sum."""
    full: bool = False
    """Whether the adapters act with a weight of 1 in it, since their weights are in `share`."""


class Filling(Protocol):
    """A method made ready for one stack of adapters."""

    def middle(self, layer: Layer, gains: Sequence[float], moment: Moment | None) -> Tensor:
        """M of a layer, float64 [R, R], or [R] where it is diagonal; `gains` are the parts' weights at this moment."""
        ...


@runtime_checkable
class DenseFilling(Protocol):
    """A method whose ΔW is no product B_cat · M · A_cat."""

    def delta(self, layer: Layer, gains: Sequence[float]) -> Tensor:
        """ΔW, float64 [out, n]."""
        ...


class Method(Protocol):
    """One way of combining; its dataclass fields are its options."""

    name: ClassVar[str]
    summary: ClassVar[str]
    moves: ClassVar[bool]
    """Whether ΔW, or the passes that are mixed, depend on the moment."""
    pair: ClassVar[bool]
    """Whether it is for exactly two adapters, a style and a subject."""

    def prepare(self, layers: Iterable[Layer]) -> Filling | DenseFilling:
        """The method for one stack, having seen each of its layers once."""
        ...

    def passes(self, weights: Sequence[float], moment: Moment) -> list[Pass]:
        """The predictions to mix at this moment; the weights, one for each place, are those at this moment."""
        ...


class OnePass:
    """A method that asks for one prediction, in which all adapters act."""

    moves: ClassVar[bool] = False
    pair: ClassVar[bool] = False

    def passes(self, weights: Sequence[float], moment: Moment) -> list[Pass]:
        return [Pass()]


def check_option(method: str, name: str, value: float, low: float, high: float) -> None:
    """Raises: ConfigError where a method's option lies outside low..high."""
    if not low <= value <= high:
        raise ConfigError(f"method {method}: {name}={value:g} is out of range; give {low:g} to {high:g}")

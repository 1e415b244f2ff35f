"""The ways in which adapters act together: each fills M of ΔW = B_cat · M · A_cat, or says which passes are mixed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ...errors import ConfigError
from ...values import suggest
from .averages import Dare, Ties
from .linear import Linear
from .method import Method, Moment
from .passes import Composite, Switch
from .projection import NpLora
from .selection import EstLora, KLora

METHODS: dict[str, type[Any]] = {
    kind.name: kind for kind in (Linear, NpLora, KLora, EstLora, Switch, Composite, Ties, Dare)
}

__all__ = ["METHODS", "Method", "Moment", "describe_method", "make_method"]


def describe_method(method: Method) -> str:
    """A method as `make_method` reads it, every option said: `np:mu=0.5`."""
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    options = ",".join(f"{field.name}={getattr(method, field.name):g}" for field in fields)
    return f"{method.name}:{options}" if options else method.name


def list_methods() -> list[str]:
    """A line for each method: its name and what it does."""
    return [f"{name:10}{kind.summary}" for name, kind in METHODS.items()]


def make_method(text: str = "linear") -> Method:
    """Reads METHOD or METHOD:option=value,…, such as `np:mu=1` or `switch:every=2`.

    Raises: ConfigError for a method or an option that is not known, or a value out of its range.
    """
    name, _, rest = text.strip().partition(":")
    if name not in METHODS:
        known = f"; use one of {', '.join(METHODS)}"
        raise ConfigError(f"method {name!r} is not known{suggest(name, METHODS) or known}")
    kind = METHODS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    options: dict[str, float | int] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        key = key.strip()
        if key not in fields or not equals:
            takes = f"takes {', '.join(f'{k}={f.default}' for k, f in fields.items())}" if fields else "takes no option"
            near = suggest(key, fields) if fields and equals else ""
            raise ConfigError(f"method {name}: {item.strip()!r} is no option of it{near or f'; it {takes}'}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        whole = fields[key].type == "int"
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ConfigError(
                f"method {name}: {key}={value} is no {'whole' if whole else 'finite'} number; "
                f"the default is {fields[key].default}"
            )
        options[key] = int(number) if whole else number
    made: Method = kind(**options)
    return made

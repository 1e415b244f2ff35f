"""The kinds of Stable Diffusion there are; a new one is a file of its own and a row here."""

from __future__ import annotations

from .sd import StableDiffusion, mini, sd1, sd2
from .sdxl import sdxl

FAMILIES: dict[str, StableDiffusion] = {family.name: family for family in (mini, sd1, sd2, sdxl)}
"""By name."""

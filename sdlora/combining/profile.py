from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    points: tuple[tuple[float, float], ...]

    def at(self, t: float) -> float:
        import numpy as np

        return float(np.interp(t, [p[0] for p in self.points], [p[1] for p in self.points]))


@dataclass(frozen=True)
class Profile:
    blocks: Any = None
    schedule: Schedule | None = None

    @property
    def static(self) -> bool:
        return self.schedule is None

    def at(self, path: str, t: float | None) -> float:
        return 1.0 if self.schedule is None or t is None or not path.startswith("unet") else self.schedule.at(t)

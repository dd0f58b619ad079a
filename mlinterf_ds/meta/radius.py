"""How far the weights are displaced for the finite difference of Eq. 8."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class RadiusControl:
    """Holds the relative change of phi's gradient near `target` by moving the radius of the difference.

    A small radius drowns in round-off, a large one sees curvature. The best one moves with training, and the relative
    change tracks it.
    """

    radius: float = 1e-3
    target: float = 0.3
    fixed: bool = False  # the radius never moves

    LOW, HIGH = 1e-6, 0.3

    def near(self, change: float) -> bool:
        """Whether this relative change is within a factor of two of the target (always, where the radius cannot move)."""
        return self.fixed or not math.isfinite(change) or 0.5 * self.target < change < 2 * self.target

    def update(self, change: float) -> None:
        """Moves the radius after a difference that changed phi's gradient by this much."""
        if self.fixed or not math.isfinite(change):
            return
        factor = 2.0 if change <= 0 else min(2.0, max(0.5, (self.target / change) ** 0.5))
        self.radius = min(self.HIGH, max(self.LOW, self.radius * factor))

"""The learning rate of each optimizer step."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, total: int, peak: float, schedule: Schedule, warmup: int) -> float:
    """The learning rate of applied step ``step`` (from 0) out of ``total``.

    It climbs over ``warmup`` steps, the first of them included, to ``peak``, then falls to 0 behind the last
    step along a line or half a cosine, or stays.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * ((1 - done) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

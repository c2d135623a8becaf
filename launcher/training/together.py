"""What one rank tells all others, beside numbers."""

from typing import Any

import torch.distributed as dist

from memlaunch.launcher.training.world import World


def gather(value: Any, world: World) -> list[Any]:
    """``value`` of every rank, by rank, on every rank; all must call it."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values

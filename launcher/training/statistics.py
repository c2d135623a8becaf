"""Buffers that a forward pass changes, such as the running statistics of batch norms: alike on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from memlaunch.launcher.training.world import World


@torch.no_grad()
def share(module: nn.Module, world: World) -> None:
    """Behind an optimizer step, give every rank the mean of all running statistics.

    Each rank has seen its part of the batch. Engines leave that alone, or take what the first rank has.
    """
    means = [mean for norm in _norms(module) for mean in _statistics(norm)]
    if world.size == 1 or not means:
        return
    flat = torch.cat([mean.float().flatten() for mean in means])
    dist.all_reduce(flat)
    flat /= world.size
    for mean, shared in zip(means, flat.split([mean.numel() for mean in means]), strict=True):
        mean.copy_(shared.view_as(mean))


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """A pass that changes no buffer in the end."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def _norms(module: nn.Module) -> list[_NormBase]:
    return [norm for norm in module.modules() if isinstance(norm, _NormBase) and norm.track_running_stats]


def _statistics(norm: _NormBase) -> list[Tensor]:
    return [mean for mean in (norm.running_mean, norm.running_var) if mean is not None]

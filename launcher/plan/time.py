"""Seconds that an optimizer step takes, from what it computes, moves and sends; good for a ranking.

A micro-batch takes the time of its arithmetic, of its traffic with the GPU's memory, and of the kernels that
the CPU has to launch, whichever is longer. Collectives take what a ring takes, half of it hidden behind the
backward pass. The shares of the peak rates that real kernels reach are round numbers, the same for all
candidates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memlaunch.launcher.plan.gpus import Gpu

#: Shares of a GPU's rates that are reached.
OF_FLOPS, OF_BANDWIDTH, OF_LINK = 0.5, 0.75, 0.7
#: Seconds to launch a kernel, and to start a collective.
LAUNCH, START = 5e-6, 20e-6
#: The share of communication that computation hides.
HIDDEN = 0.5
#: Bytes a second that a host's memory gives to the optimizer of one rank.
HOST_BANDWIDTH = 10e9


@dataclass(frozen=True)
class Machines:
    """Where the ranks are."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        """Of all machines."""
        return self.nodes * self.per_node

    @property
    def slowest_link(self) -> float:
        """Bytes a second of one rank on the slowest part of a ring through all ranks."""
        return min(self.gpu.link, self.gpu.network * self.per_node) if self.nodes > 1 else self.gpu.link


def step_seconds(
    costs: Mapping[str, Mapping[str, Any]],
    accumulation: int,
    machines: Machines,
    offloaded_bytes: int = 0,
    parameters_offloaded: bool = False,
) -> float:
    """Seconds of one optimizer step.

    Args:
        costs: of ``inner`` micro-batches, of the ``last`` one of a step, and of the optimizer's ``step``, as
            a trace counts them.
        accumulation: micro-batches of a step.
        offloaded_bytes: optimizer state and masters of this rank that live in host memory.
        parameters_offloaded: whether every use of a parameter fetches it from there.
    """
    last, step = costs["last"], costs["step"]
    inner = costs["inner"] if costs["inner"]["kernels"] else last
    seconds = (
        (accumulation - 1) * _seconds(inner, machines) + _seconds(last, machines) + _seconds(step, machines)
    )
    if offloaded_bytes:
        # Gradients go out and weights come back, a quarter of the state each; the host reads and writes all.
        seconds += offloaded_bytes / 2 / (OF_LINK * machines.gpu.pcie) + 2 * offloaded_bytes / HOST_BANDWIDTH
    if parameters_offloaded:
        seconds += 2 * accumulation * offloaded_bytes / 4 / (OF_LINK * machines.gpu.pcie)
    return seconds


def arithmetic_seconds(
    costs: Mapping[str, Mapping[str, Any]], accumulation: int, machines: Machines
) -> float:
    """The part of :func:`step_seconds` that is arithmetic of the passes, which is never less."""
    inner = costs["inner"] if costs["inner"]["kernels"] else costs["last"]
    each, last = (_arithmetic(part, machines.gpu) for part in (inner, costs["last"]))
    return (accumulation - 1) * each + last


def _arithmetic(costs: Mapping[str, Any], gpu: Gpu) -> float:
    return float(
        sum(
            count / (OF_FLOPS * gpu.flops.get(dtype, gpu.flops["float32"]))
            for dtype, count in costs["flops"].items()
        )
    )


def _work(costs: Mapping[str, Any], gpu: Gpu) -> float:
    return _arithmetic(costs, gpu) + float(costs["bytes_moved"]) / (OF_BANDWIDTH * gpu.memory_bandwidth)


def _seconds(costs: Mapping[str, Any], machines: Machines) -> float:
    busy = max(_work(costs, machines.gpu), costs["kernels"] * LAUNCH)
    sending = sum(
        collective_seconds(kind, entry["calls"], entry["bytes"], machines)
        for kind, entry in costs["collectives"].items()
    )
    return float(busy + max(sending * (1 - HIDDEN), sending - busy))


def collective_seconds(kind: str, calls: float, size: float, machines: Machines) -> float:
    """Seconds of ``calls`` collectives over ``size`` bytes in all, on a ring through all ranks.

    Every rank sends (n - 1) / n of the whole, and twice that for an all-reduce: Patarasuk & Yuan, Bandwidth
    optimal all-reduce algorithms for clusters of workstations (JPDC 2009), section 3.
    """
    ranks = machines.ranks
    if ranks == 1:
        return 0.0
    rounds = 2 if kind == "all_reduce" else 1
    return calls * START + rounds * (ranks - 1) / ranks * size / (OF_LINK * machines.slowest_link)

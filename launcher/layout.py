"""Which machines a job runs on, and how many ranks each of them has."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memlaunch.launcher import hostfile
from memlaunch.launcher.hostfile import Host
from memlaunch.launcher.paths import beside
from memlaunch.launcher.translate import slurm

if TYPE_CHECKING:
    from memlaunch.launcher.job import ClusterSection


@dataclass(frozen=True)
class Layout:
    """The ranks of a run, by machine.

    Attributes:
        nodes: machines.
        per_node: ranks of each; None where the hosts differ.
        hosts: which machines, where a hostfile says so.
    """

    nodes: int
    per_node: int | None
    hosts: tuple[Host, ...] = ()

    @property
    def ranks(self) -> int:
        """Of all machines."""
        return sum(len(host.slots) for host in self.hosts) or self.nodes * self.largest

    @property
    def largest(self) -> int:
        """The most ranks that share a machine."""
        return self.per_node or max(len(host.slots) for host in self.hosts)


def of(cluster: "ClusterSection", base: Path) -> Layout:
    """The layout of a job: the slots of its hostfile; else what it asks for; else the GPUs of this machine.

    Raises:
        UserError: the hostfile cannot be read.
        ValueError: ``include`` or ``exclude`` names what is not in it, or leaves nothing.
    """
    if cluster.hostfile is not None:
        listed = hostfile.read(beside(cluster.hostfile, base), cluster.hostfile)
        hosts = hostfile.select(listed, cluster.include or "", cluster.exclude or "")
        slots = {len(host.slots) for host in hosts}
        return Layout(len(hosts), slots.pop() if len(slots) == 1 else None, hosts)
    return Layout(cluster.nodes or 1, cluster.gpus_per_node or _default(cluster))


def _default(cluster: "ClusterSection") -> int:
    """Ranks of a machine, where the job does not say."""
    if cluster.device == "cpu":
        return 1
    if cluster.launcher == "slurm":  # this machine is a login node
        return slurm.gpus_in(cluster.slurm.gres or "") or 1
    return max(1, gpus())


def gpus() -> int:
    """NVIDIA GPUs of this machine that CUDA_VISIBLE_DEVICES leaves."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    names = [name.strip() for name in visible.split(",")]
    shown = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(count, shown)

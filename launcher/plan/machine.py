"""What a job is planned for: a GPU that is named, one of this machine, or the CPU."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import layout, slurm_job
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.plan import gpus
from memlaunch.launcher.plan.gpus import CPU, Gpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from memlaunch.launcher.resolve import ResolvedJob

#: Operations and bytes a second of one thread of a CPU; round numbers, good for a ranking.
FLOPS, BANDWIDTH = 100e9, 40e9
#: Bytes a second between processes of one machine, and between machines.
BETWEEN_PROCESSES, BETWEEN_MACHINES = 2e9, 1e9

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: Where the kernel says how much memory a group of processes may use, of both versions of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def of(resolved: "ResolvedJob", name: str | None = None) -> Gpu:
    """What each rank of the job will have: the GPU called ``name``, else ``cluster.gpu``, else what is here.

    Raises:
        UserError: the catalogue has no GPU of that name; or none is named, and the ranks run elsewhere.
    """
    cluster = resolved.job.cluster
    if name or cluster.gpu:
        return gpus.find(name or cluster.gpu or "")
    if cluster.device == "cpu":
        return cpu(resolved)
    from_login_node = cluster.launcher == "slurm" and not slurm_job.inside()
    here = None if from_login_node else gpu_here()
    if here is not None:
        return here
    if from_login_node or cluster.device == "cuda" or cluster.hostfile is not None:
        raise UserError(
            "nothing says which GPU the job is to be planned for, and this machine has none",
            "set `cluster.gpu` to its name, such as `H100-80GB`; on CPUs, set `cluster.device` to `cpu`",
        )
    return cpu(resolved)


def gpu_here() -> Gpu | None:
    """The first GPU of this machine that CUDA_VISIBLE_DEVICES leaves, with the memory that it has.

    One that the catalogue does not know counts as the one there that is nearest to it.
    """
    if not layout.gpus():
        return None
    import pynvml

    pynvml.nvmlInit()
    try:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        named: Callable[[str], Any] = pynvml.nvmlDeviceGetHandleByUUID
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdecimal() else named(first)
        name, memory = (
            str(pynvml.nvmlDeviceGetName(handle)),
            int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return described(name, memory, major + minor / 10)


def described(name: str, memory_bytes: int, capability: float) -> Gpu:
    """A GPU as the driver describes it; its rates are those of the catalogue."""
    try:
        found = gpus.find(name)
        # The driver counts a little that it keeps for itself.
        near = abs(memory_bytes - found.memory_bytes) < 0.02 * memory_bytes
        return found if near else replace(found, memory_bytes=memory_bytes)
    except UserError:
        known = gpus.catalogue().values()
        like = min(known, key=lambda g: (abs(g.capability - capability), abs(g.memory_bytes - memory_bytes)))
        return replace(like, name=name, memory_bytes=memory_bytes, capability=capability)


def cpu(resolved: "ResolvedJob") -> Gpu:
    """The share of a rank of a machine without GPUs: of this one, or of what is asked of SLURM."""
    ranks, threads = resolved.layout.largest, resolved.threads_per_rank
    asked = resolved.job.cluster.slurm.mem
    memory = slurm_bytes(asked) if asked is not None else memory_here()
    return Gpu(
        name=CPU,
        capability=0.0,
        memory_bytes=memory // ranks,
        flops={"float32": threads * FLOPS},
        memory_bandwidth=threads * BANDWIDTH,
        link=BETWEEN_PROCESSES,
        pcie=threads * BANDWIDTH,
        network=BETWEEN_MACHINES,
    )


def host_memory(resolved: "ResolvedJob", gpu: Gpu) -> int | None:
    """Bytes of the memory of each machine: what is asked of SLURM, or of this one if it has such a GPU.

    None where nothing tells; on CPUs too, where the memory that is planned is the machine's own.
    """
    cluster = resolved.job.cluster
    if gpu.name == CPU:
        return None
    if cluster.launcher == "slurm" and not slurm_job.inside():
        asked = slurm_bytes(cluster.slurm.mem or "0", otherwise=0)  # 0 asks for all that there is
        return asked or None
    return memory_here() if cluster.hostfile is None and gpu == gpu_here() else None


def memory_here() -> int:
    """Bytes of memory that processes of this machine may use: all of it, or what their control group may."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for path in _LIMITS:
        if path.exists() and (text := path.read_text(encoding="ascii").strip()).isdecimal():
            total = min(total, int(text))
    return total


def slurm_bytes(mem: str, otherwise: int | None = None) -> int:
    """Bytes of ``--mem`` of sbatch: megabytes, or with a unit; for 0 ``otherwise``, or all that there is."""
    found = re.match(r"(\d+)\s*([KMGT]?)", mem, re.IGNORECASE)
    assert found is not None, "the job file takes nothing else"
    return int(found[1]) * _UNITS[found[2].upper() or "M"] or (
        memory_here() if otherwise is None else otherwise
    )

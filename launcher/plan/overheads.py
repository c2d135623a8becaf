"""GPU memory that a trace of a job's operators cannot see, one row a cause.

No row has been fitted on a GPU yet: `python benchmarks/memory.py --device cuda` prints what they are to be
held against. Kernel workspaces that depend on the shapes of tensors are counted in the trace itself, at the
moment they are taken: see :func:`memlaunch.launcher.plan.trace.cuda.workspaces`.
"""

from collections.abc import Callable
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Circumstances:
    """What the overheads depend on.

    Attributes:
        capability: the compute capability of the GPU, such as 9.0.
        world_size: ranks.
        nodes: machines.
    """

    capability: float
    world_size: int
    nodes: int


@dataclass(frozen=True)
class Overhead:
    """One cause.

    Attributes:
        size: circumstances -> bytes of one GPU.
        reserved: whether it comes from the caching allocator, and so is part of
            ``torch.cuda.max_memory_reserved()``.
        source: where the figure is from.
        fitted: whether it was fitted to measurements on a GPU.
    """

    cause: str
    size: Callable[[Circumstances], int]
    reserved: bool
    source: str
    fitted: bool = False


def _cublas(at: Circumstances) -> int:
    # One for each thread that multiplies: the one of the forward pass and the one of the backward pass.
    return 2 * (32 * MIB if at.capability >= 9 else 8_519_680)


def _nccl(at: Circumstances) -> int:
    if at.world_size == 1:
        return 0
    return 600 * MIB + (200 * MIB if at.nodes > 1 else 0)


OVERHEADS: tuple[Overhead, ...] = (
    Overhead(
        "CUDA context",
        lambda at: (600 if at.capability >= 9 else 450) * MIB,
        reserved=False,
        source="nvidia-smi beside an empty process: 300 to 600 MiB, more with more kernels loaded",
    ),
    Overhead(
        "cuBLAS workspaces",
        _cublas,
        reserved=True,
        source="torch, aten/src/ATen/cuda/CublasHandlePool.cpp: `:4096:2:16:8` KiB, on Hopper 8 x 4096 KiB, "
        "a handle and stream; cublasLt shares them",
    ),
    Overhead(
        "NCCL buffers",
        _nccl,
        reserved=False,
        source="NVIDIA/nccl issue 964: 544 to 688 MB for a group on A100; more channels between machines",
    ),
)


def reserved(at: Circumstances) -> int:
    """Bytes of what comes from the caching allocator."""
    return sum(row.size(at) for row in OVERHEADS if row.reserved)


def outside(at: Circumstances) -> int:
    """Bytes of what is beside the caching allocator."""
    return sum(row.size(at) for row in OVERHEADS if not row.reserved)

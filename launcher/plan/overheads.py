"""GPU memory that a trace of a job's operators cannot see, one row a cause.

No row has been fitted on a GPU: each is what its source says, and where that is a range, its upper half.
`python benchmarks/memory.py --device cuda` prints what they are to be held against. Kernel workspaces that
depend on the shapes of tensors are counted in the trace itself, at the moment they are taken: see
:func:`memlaunch.launcher.plan.trace.cuda.workspaces`.
"""

from collections.abc import Callable
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Circumstances:
    """What the overheads depend on.

    Attributes:
        capability: the compute capability of the GPU, such as 9.0; 0 for a CPU.
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


def _context(at: Circumstances) -> int:
    if not at.capability:
        return 0
    return (600 if at.capability >= 9 else 450) * MIB


def _libraries(at: Circumstances) -> int:
    return 0 if at.capability else 450 * MIB


def _cublas(at: Circumstances) -> int:
    if not at.capability:
        return 0
    # One for each thread that multiplies: the one of the forward pass and the one of the backward pass.
    return 2 * (32 * MIB if at.capability >= 9 else 8_519_680)


def _nccl(at: Circumstances) -> int:
    if at.world_size == 1 or not at.capability:
        return 0
    return (544 if at.world_size == 2 else 688) * MIB + (200 * MIB if at.nodes > 1 else 0)


OVERHEADS: tuple[Overhead, ...] = (
    Overhead(
        "CUDA context",
        _context,
        reserved=False,
        source="pytorch/pytorch issues 107667 and 109888: 300 to 400 MB since kernels are loaded as they are "
        "used; the rest is room for those kernels, and a guess",
    ),
    Overhead(
        "libraries",
        _libraries,
        reserved=False,
        source="on a CPU: the resident memory of a rank that has loaded torch and transformers, 275 MiB, and "
        "DeepSpeed, 410 MiB in all",
    ),
    Overhead(
        "cuBLAS workspaces",
        _cublas,
        reserved=True,
        source="torch, aten/src/ATen/cuda/CublasHandlePool.cpp (pytorch/pytorch pull request 89027): "
        "`:4096:2:16:8` KiB, on Hopper 32 MiB, a handle and stream, which cublasLt shares; some versions "
        "take 32 MiB on Blackwell too (pull request 182669)",
    ),
    Overhead(
        "NCCL buffers",
        _nccl,
        reserved=False,
        source="NVIDIA/nccl issue 964: 544 MB for a group of two A100, 688 MB for a larger one; 200 MiB more "
        "between machines are a guess",
    ),
)


def reserved(at: Circumstances) -> int:
    """Bytes of what comes from the caching allocator."""
    return sum(row.size(at) for row in OVERHEADS if row.reserved)


def outside(at: Circumstances) -> int:
    """Bytes of what is beside the caching allocator."""
    return sum(row.size(at) for row in OVERHEADS if not row.reserved)

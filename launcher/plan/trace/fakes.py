"""What libraries need to run on tensors without data, as one rank among ranks that are not there.

All of it changes the libraries themselves: only for a process that does nothing else.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from memlaunch.launcher.plan.trace.recorder import StandIn
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.world import World

aten = torch.ops.aten


def join(world_size: int) -> World:
    """Rank 0 of ``world_size`` ranks, of which the others do not exist: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # read by DeepSpeed, and never opened
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    return World(0, 0, world_size, torch.device("cpu"))


def stand_ins(mask_is_whole: bool) -> dict[Any, StandIn]:
    """Operators whose result depends on data, by what they would give in a step like any other.

    Args:
        mask_is_whole: what a model finds that asks whether its attention mask holds no padding.
    """

    def scalar(func: Any, tensor: torch.Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return mask_is_whole
        if tensor.dtype == torch.uint8:
            return 0  # an overflow, as DeepSpeed counts them
        return 1.0 if tensor.dtype.is_floating_point else 1

    def nonzero(func: Any, tensor: torch.Tensor) -> torch.Tensor:
        shape = tensor.numel(), tensor.dim()
        return torch.empty(shape, dtype=torch.int64, device=tensor.device)

    def empty(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _Reducer.rebuilding and kwargs.get("dtype") == torch.int32:
            with _disable_current_modes():  # the order of the buckets, which the reducer reads
                return torch.empty(*args, dtype=torch.int32)
        made: torch.Tensor = func(*args, **kwargs)
        return made

    def in_place(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """For tensors with data, backward formulas write into the zeros that they have just made."""
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            result: torch.Tensor = func(*args, **kwargs)
            return result
        written: torch.Tensor = in_places[func](*args, **kwargs)
        return written

    in_places = {
        aten.scatter_add.default: aten.scatter_add_.default,
        aten.scatter.src: aten.scatter_.src,
        aten.index_put.default: aten.index_put_.default,
        aten.index_add.default: aten.index_add_.default,
        aten.masked_scatter.default: aten.masked_scatter_.default,
    }
    return {
        **dict.fromkeys(in_places, in_place),
        aten._local_scalar_dense.default: scalar,
        aten.nonzero.default: nonzero,
        aten.empty.memory_format: empty,
    }


def workspaces() -> dict[Any, Callable[..., int]]:
    """Operator -> bytes that it takes on a CPU while it runs.

    Sums of 16-bit numbers are made in fp32. gloo gathers into a tensor of its own, as large as the outputs,
    and scatters sums out of a copy of the inputs (torch's ProcessGroupGloo.cpp); NCCL does neither.
    """

    def summed(args: Any, kwargs: Any, out: torch.Tensor) -> int:
        narrow = args[0].dtype in (torch.float16, torch.bfloat16)
        return 4 * args[0].numel() if narrow else 0

    def gathered(args: Any, kwargs: Any, out: Any) -> int:
        return _bytes(args[0])

    def copied(args: Any, kwargs: Any, out: Any) -> int:
        return _bytes(args[1])

    c10d = torch.ops.c10d
    return {
        aten.scatter_add.default: summed,
        aten.scatter_add_.default: summed,
        c10d.allgather_.default: gathered,
        c10d._allgather_base_.default: gathered,
        c10d.allgather_into_tensor_coalesced_.default: gathered,
        c10d._reduce_scatter_base_.default: copied,
        c10d.reduce_scatter_tensor_coalesced_.default: copied,
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(tensors))


def prepare_libraries() -> None:
    """Let torch, transformers, DeepSpeed and bitsandbytes work on fake tensors."""
    import torch.nn.parallel.distributed as ddp
    from transformers.utils import import_utils

    nn.Module._apply = _apply  # type: ignore[method-assign]
    # What transformers leaves out while it is traced, a run does not.
    import_utils.is_fake_tensor = lambda x: False
    vars(ddp)["_verify_param_shape_across_processes"] = _nothing


def prepare_deepspeed() -> None:
    """The same for DeepSpeed, whose ranks are not there to agree."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    import deepspeed.runtime.zero.stage3 as stage3
    import deepspeed.runtime.zero.utils as utils
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    for module in (coordinator, stage3, utils):
        for name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if hasattr(module, name):
                setattr(module, name, _nothing)
    CPU_Accelerator.is_fp16_supported = _true


def prepare_fsdp() -> None:
    """The same for FSDP2, whose mesh is made by looking at the numbers of the ranks."""
    from memlaunch.launcher.training import fsdp_engine

    create = vars(fsdp_engine)["init_device_mesh"]

    def create_with_values(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return create(*args, **kwargs)

    vars(fsdp_engine)["init_device_mesh"] = create_with_values


def prepare_bitsandbytes() -> None:
    """The same for bitsandbytes, which makes its quantisation maps by looking at values."""
    import bitsandbytes.functional as functional

    create = functional.create_dynamic_map

    def create_from_values(*args: Any, **kwargs: Any) -> torch.Tensor:
        with _disable_current_modes():
            made: torch.Tensor = create(*args, **kwargs)  # type: ignore[no-untyped-call]
        return torch.empty(made.shape, dtype=made.dtype)

    functional.create_dynamic_map = create_from_values


def python_kernels() -> dict[Any, Callable[..., Any]]:
    """The operators of bitsandbytes whose kernel for a CPU is Python: it makes tensors of its own."""
    import bitsandbytes.backends.cpu.ops as kernels

    ours = torch.ops.bitsandbytes
    return {
        ours.optimizer_update_8bit_blockwise.default: kernels._optimizer_update_8bit_blockwise_cpu,
        ours.optimizer_update_32bit.default: kernels._optimizer_update_32bit_cpu,
    }


def prepare_ddp(engine: Engine) -> None:
    """Let DDP take what it sends for reduced; does nothing to other engines."""
    replica = getattr(engine, "_replica", None)
    if isinstance(replica, DistributedDataParallel):
        replica.register_comm_hook(None, _reduced_at_once)
        vars(replica)["reducer"] = _Reducer(replica.reducer)


def _apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """``nn.Module._apply``, which for fake tensors would swap a parameter with another one."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                new = change(parameter)
            if new is not parameter:
                parameter.data = new
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


class _Reducer:
    """DDP's reducer; says when it rebuilds its buckets, for which it needs integers with values."""

    rebuilding = False

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        _Reducer.rebuilding = True
        try:
            return bool(self._reducer._rebuild_buckets())
        finally:
            _Reducer.rebuilding = False


def _reduced_at_once(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch wants to see this type
) -> torch.futures.Future[torch.Tensor]:
    dist.all_reduce(bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _true(accelerator: Any) -> bool:
    return True

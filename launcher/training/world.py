"""The ranks of a run: who this one is, on which device, and how the ranks talk."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from memlaunch.launcher import layout
from memlaunch.launcher.training.errors import JobMismatch, LaunchFailed
from memlaunch.strategies.technique import Device


@dataclass(frozen=True)
class World:
    """This rank among the others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.device.type == "cuda" else "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return list(tensor.tolist())


def join(asked: Device) -> World:
    """Meet the other ranks through the rendezvous in the environment.

    Raises:
        JobMismatch: this rank has no GPU that torch can use, although the job or the machine says so.
        LaunchFailed: the ranks found different devices.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if asked == "cuda" and gpus <= local_rank:
        raise JobMismatch(
            "cluster.device",
            f"rank {rank} needs GPU {local_rank} of its machine, which has {gpus}",
            "lower `cluster.gpus_per_node`, or look at CUDA_VISIBLE_DEVICES and the driver",
        )
    if asked == "auto" and not gpus and layout.gpus():
        raise JobMismatch(
            "cluster.device",
            f"this machine has GPUs, and torch {torch.__version__} can use none of them",
            "install a build of torch for CUDA that suits the driver, or set `cluster.device` to `cpu`",
        )
    use_gpu = asked == "cuda" or (asked == "auto" and gpus > local_rank)
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    # Both back ends, so that ranks whose devices differ can still find that out.
    dist.init_process_group(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", rank=rank, world_size=size)
    votes = torch.tensor([int(use_gpu)])
    dist.all_reduce(votes)
    if votes.item() not in (0, size):
        raise LaunchFailed(
            f"{int(votes.item())} of {size} ranks have a GPU and the others have none",
            "give every rank a GPU, or set `cluster.device` to `cpu`",
        )
    return World(rank, local_rank, size, device)


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

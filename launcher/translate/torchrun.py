"""A resolved job under torchrun: one on this machine, or one on each host of a hostfile, over ssh."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memlaunch.launcher.translate import hosts
from memlaunch.launcher.translate.shell import Raw

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

#: What every rank starts with.
RANK = "memlaunch.launcher.rank"


def files(resolved: "ResolvedJob", python: str) -> dict[str, str]:
    """``command.sh``, ``node.sh`` and, for several hosts, ``hostfile``."""
    if not resolved.hosts:
        return hosts.on_this_machine(resolved, python, standalone(python, resolved.world_size))
    command = meeting(
        python,
        nodes=len(resolved.hosts),
        node=Raw('"$1"'),
        address=Raw('"$2"'),
        port=Raw('"$3"'),
        ranks=hosts.slots(resolved.hosts),
    )
    return hosts.on_each(resolved, python, command)


def standalone(python: str, ranks: int) -> list[str]:
    """``ranks`` ranks on one machine, at a port that torchrun finds."""
    return [
        *(python, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"),
        *(f"--nproc-per-node={ranks}", "-m", RANK),
    ]


def meeting(python: str, *, nodes: int, node: Raw, address: Raw, port: Raw, ranks: str) -> Sequence[str]:
    """``ranks`` ranks on this one of ``nodes`` machines, which meet at ``address`` and ``port``."""
    return [
        *(python, "-m", "torch.distributed.run", f"--nnodes={nodes}"),
        *(Raw(f"--node-rank={node}"), Raw(f"--master-addr={address}"), Raw(f"--master-port={port}")),
        *(Raw(f"--nproc-per-node={ranks}"), "-m", RANK),
    ]

"""The scripts of a run on this machine, and on the hosts of a hostfile."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from memlaunch.launcher import hostfile
from memlaunch.launcher.hostfile import Host
from memlaunch.launcher.translate import shell
from memlaunch.launcher.translate.shell import Raw

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

#: Starts ``node.sh`` on this machine.
NODE = ("bash", Raw('"$MEMLAUNCH_RUN_DIR/launch/node.sh"'))


def on_this_machine(resolved: "ResolvedJob", python: str, command: Sequence[str]) -> dict[str, str]:
    """``command.sh`` and ``node.sh``, which runs ``command``."""
    return {
        "command.sh": shell.start_script(
            about=about(resolved), python=python, body=[f"exec {shell.join([*attempts(python), *NODE])}"]
        ),
        "node.sh": node(resolved, [*guard(python), *command]),
    }


def on_each(resolved: "ResolvedJob", python: str, command: Sequence[str]) -> dict[str, str]:
    """``command.sh``, ``node.sh`` and ``hostfile``: ``command`` on each host at once.

    It finds the number of its host in ``$1``, and where the ranks meet in ``$2`` and ``$3``.
    """
    cluster = resolved.job.cluster
    start = [
        *attempts(python),
        *(python, "-m", "memlaunch.launcher.fanout"),
        *(f"--pass-env={name}" for name in cluster.pass_env),
        *(f"--ssh-option={option}" for option in cluster.ssh_options),
        Raw('"$MEMLAUNCH_RUN_DIR/launch/hostfile"'),
        Raw('"$MEMLAUNCH_RUN_DIR/launch/node.sh"'),
    ]
    return {
        "command.sh": shell.start_script(
            about=about(resolved), python=python, body=[f"exec {shell.join(start)}"]
        ),
        "node.sh": node(resolved, [*guard(python), "--leash", *command]),
        "hostfile": hostfile.render(resolved.hosts),
    }


def node(
    resolved: "ResolvedJob", command: Sequence[str], more: Mapping[str, str] = MappingProxyType({})
) -> str:
    """``node.sh``, which runs ``command`` with the environment of the job, and ``more`` of ours."""
    cluster = resolved.job.cluster
    return shell.node_script(
        about=f"What each machine runs. {about(resolved)}",
        command=command,
        env={**cluster.env, "OMP_NUM_THREADS": str(resolved.threads_per_rank), **more},
        setup=cluster.setup,
        before=_by_host(resolved.hosts),
    )


def attempts(python: str) -> list[str]:
    """What stands before a command that starts all ranks of a run, to start them again where that helps."""
    return [python, "-m", "memlaunch.launcher.attempts"]


def guard(python: str) -> list[str]:
    """What stands before a command that is to leave no process behind."""
    return [python, "-m", "memlaunch.launcher.node"]


def about(resolved: "ResolvedJob") -> str:
    """What the run is, in a line."""
    ranks = "1 rank" if resolved.world_size == 1 else f"{resolved.world_size} ranks"
    nodes = "1 machine" if resolved.layout.nodes == 1 else f"{resolved.layout.nodes} machines"
    return f"{resolved.job.name}: {ranks} on {nodes}."


def slots(hosts: Sequence[Host]) -> str:
    """How many ranks the host of number ``$1`` runs, as bash takes it."""
    counts = {len(host.slots) for host in hosts}
    return str(counts.pop()) if len(counts) == 1 else '"${memlaunch_slots[$1]}"'


def _by_host(hosts: Sequence[Host]) -> list[str]:
    """What differs between the hosts, by the number of the host, ``$1``: slots, and the GPUs to see.

    Where a filter chose among the GPUs of a host, its ranks see those alone.
    """
    lines = []
    if len({len(host.slots) for host in hosts}) > 1:
        lines += [f"memlaunch_slots=({' '.join(str(len(host.slots)) for host in hosts)})"]
    if any(host.slots != tuple(range(len(host.slots))) for host in hosts):
        devices = " ".join(",".join(map(str, host.slots)) for host in hosts)
        lines += [f"memlaunch_devices=({devices})"]
        lines += ['export CUDA_VISIBLE_DEVICES="${memlaunch_devices[$1]}"']
    return lines

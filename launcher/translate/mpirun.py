"""A resolved job under MPI: the command line of Open MPI's mpirun, and of MPICH's and its relatives'."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from memlaunch.launcher.hostfile import Host, is_host_name, render
from memlaunch.launcher.translate import hosts as scripts
from memlaunch.launcher.translate import shell
from memlaunch.launcher.translate.shell import Raw
from memlaunch.launcher.translate.torchrun import RANK

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

Kind = Literal["openmpi", "mpich"]

#: How each tells ``--version``, as patterns of bash.
VERSIONS: dict[Kind, str] = {
    "openmpi": '*"Open MPI"*|*OpenRTE*',
    "mpich": '*HYDRA*|*MPICH*|*"Intel(R) MPI"*',
}

#: Words of a command line that an array of bash holds: the variables that are set, as each wants them.
_PASSED = Raw('"${pass[@]}"')


def files(resolved: "ResolvedJob", python: str) -> dict[str, str]:
    """``command.sh``, ``node.sh`` and, where the job names hosts, ``hostfile``."""
    cluster = resolved.job.cluster
    starts = {
        kind: argv(
            kind,
            scripts.NODE,
            ranks=resolved.world_size,
            per_node=resolved.layout.per_node,
            hosts=resolved.hosts,
            options=[_PASSED, *cluster.mpi_options],
        )
        for kind in VERSIONS
    }
    body = [
        *cluster.setup,
        'case "$(mpirun --version 2>&1)" in',
        *(
            line
            for kind, pattern in VERSIONS.items()
            for line in (
                f"    {pattern})",
                *(f"        {line}" for line in _passed(kind, cluster.pass_env)),
                f"        exec {shell.join([*scripts.attempts(python), *starts[kind]])} ;;",
            )
        ),
        "esac",
        'echo "error: mpirun is neither Open MPI nor MPICH, or is not installed here" >&2',
        'echo "hint: install one of them, or load its module in cluster.setup" >&2',
        "exit 4",
    ]
    listed = {"hostfile": render(resolved.hosts)} if resolved.hosts else {}
    return {
        "command.sh": shell.start_script(about=scripts.about(resolved), python=python, body=body),
        "node.sh": scripts.node(resolved, [python, "-m", RANK]),
        **listed,
    }


def _passed(kind: Kind, names: Sequence[str]) -> list[str]:
    """Lines of bash that put the variables ``names`` that are set into ``pass``."""
    if kind == "openmpi":
        add = 'pass+=(-x "$name")'
    else:
        add = 'if ((${#pass[@]})); then pass[1]+=",$name"; else pass=(-genvlist "$name"); fi'
    lines = ["pass=()"]
    if names:
        lines += [f"for name in {shell.join(names)}; do", f'    if [[ -v "$name" ]]; then {add}; fi', "done"]
    elif kind == "mpich":
        lines = ["pass=(-genvnone)"]
    return lines


def argv(
    kind: Kind,
    command: Sequence[str],
    *,
    ranks: int,
    per_node: int | None = None,
    hosts: Sequence[Host] = (),
    options: Sequence[str] = (),
) -> list[str]:
    """Starts ``ranks`` processes of ``command``, those of a host side by side.

    MPI hands words on as they are, without a shell, and environment variables by their names: their values
    are those that mpirun itself is started with. SIGUSR2 goes on to the ranks; SIGTERM ends them in seconds.

    Args:
        per_node: ranks of each machine, where they are the same on all.
        hosts: where, with as many ranks as slots; without, MPI decides (this machine, or an allocation).
        options: the user's own options of mpirun.

    Raises:
        ValueError: a host has no name that can be one, or the slots are not ``ranks``.
    """
    for host in hosts:
        if not is_host_name(host.name):
            raise ValueError(f"`{host.name}` is not a host name")
    if hosts and ranks != (slots := sum(len(host.slots) for host in hosts)):
        raise ValueError(f"there are {slots} slots for {ranks} ranks")
    where = ",".join(f"{host.name}:{len(host.slots)}" for host in hosts)
    spread = per_node is not None and not hosts
    if kind == "openmpi":
        return [
            "mpirun",
            *(["--host", where] if where else []),
            *("-np", str(ranks)),
            # Its slots are cores, which on a CPU may be fewer than the ranks.
            *(["--map-by", f"ppr:{per_node}:node:OVERSUBSCRIBE"] if spread else []),
            # Left alone, it ties each rank to one core, and all threads of the rank with it.
            *("--bind-to", "none"),
            # Seconds between asking the ranks to end and killing them, which it waits in full, and twice.
            *("--mca", "odls_base_sigkill_timeout", "3"),
            *options,
            *command,
        ]
    return [
        "mpiexec",
        *(["-hosts", where] if where else []),
        *("-n", str(ranks)),
        *(["-ppn", str(per_node)] if spread else []),
        *("-bind-to", "none"),
        *options,
        *command,
    ]

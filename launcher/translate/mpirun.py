"""Ranks under MPI: the command line of Open MPI's mpirun, and of MPICH's and its relatives'."""

import re
import subprocess
from collections.abc import Sequence
from typing import Literal

from memlaunch.launcher.errors import UserError
from memlaunch.launcher.hostfile import Host, is_host_name

Kind = Literal["openmpi", "mpich"]

#: What says whose mpirun it is.
VERSION = ("mpirun", "--version")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def argv(
    kind: Kind,
    command: Sequence[str],
    *,
    ranks: int,
    hosts: Sequence[Host] = (),
    pass_env: Sequence[str] = (),
    options: Sequence[str] = (),
) -> list[str]:
    """Starts ``ranks`` processes of ``command``, those of a host side by side.

    MPI hands words on as they are, without a shell, and environment variables by their names: their values
    are those that mpirun itself is started with. SIGUSR2 goes on to the ranks; SIGTERM ends them in seconds.

    Args:
        hosts: where, with as many ranks as slots; without, MPI decides (this machine, or an allocation).
        pass_env: names of environment variables; all of them must be set.
        options: the user's own options of mpirun.

    Raises:
        ValueError: a host or a variable has no name that can be one, or the slots are not ``ranks``.
    """
    for host in hosts:
        if not is_host_name(host.name):
            raise ValueError(f"`{host.name}` is not a host name")
    for name in pass_env:
        if not _NAME.fullmatch(name):
            raise ValueError(f"`{name}` is not a name for an environment variable")
    if hosts and ranks != (slots := sum(len(host.slots) for host in hosts)):
        raise ValueError(f"there are {slots} slots for {ranks} ranks")
    where = ",".join(f"{host.name}:{len(host.slots)}" for host in hosts)
    if kind == "openmpi":
        return [
            "mpirun",
            *(["--host", where] if where else []),
            *("-np", str(ranks)),
            # Left alone, it ties each rank to one core, and all threads of the rank with it.
            *("--bind-to", "none"),
            # Seconds between asking the ranks to end and killing them, which it waits in full, and twice.
            *("--mca", "odls_base_sigkill_timeout", "3"),
            *(word for name in pass_env for word in ("-x", name)),
            *options,
            *command,
        ]
    return [
        "mpiexec",
        *(["-hosts", where] if where else []),
        *("-n", str(ranks)),
        *("-bind-to", "none"),
        *("-genvlist", ",".join(pass_env)),
        *options,
        *command,
    ]


def kind_of(version: str) -> Kind:
    """Whose mpirun it is that says ``version`` when it is asked for it.

    Raises:
        ValueError: nobody's that we know.
    """
    if "Open MPI" in version or "OpenRTE" in version:
        return "openmpi"
    if "HYDRA" in version or "Intel(R) MPI" in version or "MPICH" in version:
        return "mpich"
    raise ValueError(f"`{version.strip().partition(chr(10))[0]}` is neither Open MPI nor MPICH")


def installed() -> Kind:
    """Whose mpirun this machine has.

    Raises:
        UserError: it has none, or one that we do not know.
    """
    try:
        done = subprocess.run(VERSION, capture_output=True, text=True, check=False, timeout=30)
        return kind_of(done.stdout + done.stderr)
    except FileNotFoundError:
        raise UserError(
            "`mpirun` is not installed on this machine",
            hint="install Open MPI, or load its module in `cluster.setup`",
        ) from None
    except (ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`mpirun --version`: {error}", hint="Open MPI and MPICH are supported") from None

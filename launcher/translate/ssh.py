"""Programs on other machines, over ssh; pure functions, argv out."""

from collections.abc import Sequence

from memlaunch.launcher.hostfile import is_host_name
from memlaunch.launcher.translate import shell

#: Never a question; a lost machine is noticed within 20 seconds, and no connection outlives its program.
OPTIONS = (
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oControlPath=none",
    "-oClearAllForwardings=yes",
)


def argv(host: str, command: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """Runs ``command`` on ``host``, where each of its words arrives as it is.

    Args:
        options: the user's own options of ssh, which go before ours: ssh takes the first it finds.

    Raises:
        ValueError: ``host`` is no host name.
    """
    _check(host)
    return ["ssh", *options, *OPTIONS, "--", host, f"exec {shell.join(command)}"]


def pdsh_argv(hosts: Sequence[str], command: Sequence[str], timeout: int | None = None) -> list[str]:
    """Runs ``command`` on all ``hosts`` at once, for short questions: pdsh hands on no standard input.

    Its exit status is the largest of the programs'. ``timeout``: seconds after which a program is given up.

    Raises:
        ValueError: one of ``hosts`` is no host name.
    """
    for host in hosts:
        _check(host)
    limit = [] if timeout is None else ["-u", str(timeout)]
    # pdsh replaces %h, %u and %n in the command by host, user and number, and %% by a percent sign.
    text = shell.join(command).replace("%", "%%")
    return ["pdsh", "-S", "-R", "ssh", "-f", str(len(hosts)), *limit, "-w", ",".join(hosts), f"exec {text}"]


def _check(host: str) -> None:
    if not is_host_name(host):
        raise ValueError(f"`{host}` is not a host name")

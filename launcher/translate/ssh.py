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


def _check(host: str) -> None:
    if not is_host_name(host):
        raise ValueError(f"`{host}` is not a host name")

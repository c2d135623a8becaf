"""A port for the ranks to meet at, found on the machine that will listen there.

``python -m memlaunch.launcher.ports [SEED]`` prints it.
"""

import random
import socket
import sys

#: Below the ports that systems hand out by themselves: no connection takes one between search and use.
RANGE = range(20000, 30000)


def find(seed: str | None = None) -> int:
    """A port that nothing listens on; runs of different seeds start looking at different ones.

    Raises:
        OSError: all are taken.
    """
    order = random.Random(seed).sample(RANGE, len(RANGE))  # noqa: S311
    return next(filter(_is_free, order), None) or _none_free()


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        # As those who will listen there: a connection that has just ended does not take the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def _none_free() -> int:
    raise OSError(f"no port from {RANGE.start} to {RANGE.stop - 1} is free")


if __name__ == "__main__":
    print(find(*sys.argv[1:]))

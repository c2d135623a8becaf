"""The same script on every host of a hostfile, over ssh: together they start, and together they end.

``python -m memlaunch.launcher.fanout [--ssh-option X]... [--pass-env NAME]... HOSTFILE SCRIPT`` runs
``bash SCRIPT RANK ADDRESS PORT`` on each host: its number, and where the ranks meet. The script ends in
``memlaunch.launcher.node --leash``. What the hosts print comes out with their names in front.

The first SIGINT or SIGTERM asks every host to stop, the second ends them all at once; so does the end of
this process, however it comes. When one host fails, the others are asked to stop, and ended ``GRACE`` seconds
later; its exit status is that of the whole, which is 128 plus the signal when one came first.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from memlaunch.launcher import hostfile
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.node import HEARTBEAT, TURN, UP
from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir
from memlaunch.launcher.translate import ssh

#: Exit status where a host was not reached, or was lost on the way; ssh's own.
UNREACHABLE = 255

#: Seconds that the other hosts have to stop in when one has failed.
GRACE = 10.0

#: Seconds that an ssh has to end in when its host has been told to end.
LAST_GRACE = 5.0


def run(
    hosts: Sequence[hostfile.Host],
    script: str,
    *,
    environment: Mapping[str, str],
    options: Sequence[str] = (),
    python: str = sys.executable,
) -> int:
    """Run ``script`` on all ``hosts`` to its end: 0, or the exit status of the first that failed.

    Args:
        environment: goes to the ranks over the wire, and is written nowhere.
        options: the user's own options of ssh.
    """
    address = hosts[0].name
    search = [python, "-m", "memlaunch.launcher.ports"]
    found = subprocess.run(ssh.argv(address, search, options), capture_output=True, text=True, check=False)
    if found.returncode:
        _say(address, found.stderr.strip() or f"no free port was found: exit status {found.returncode}")
        return found.returncode
    port = found.stdout.split()[-1]
    nodes = [
        _Node(
            host.name, ssh.argv(host.name, ["bash", script, str(rank), address, port], options), environment
        )
        for rank, host in enumerate(hosts)
    ]
    signals: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    try:
        return _watch(nodes, signals)
    finally:
        for node in nodes:
            node.end()
        deadline = time.monotonic() + LAST_GRACE
        for node in nodes:
            node.close(deadline)


def _watch(nodes: Sequence["_Node"], signals: Sequence[int]) -> int:
    """Until all nodes have ended, or have been given up; the exit status."""
    first: int | None = None
    stopping = False
    deadline = float("inf")
    while any(node.status is None for node in nodes):
        for node in nodes:
            # Once asked to stop, a host may end as it will, and the others take the time they need.
            if (status := node.turn()) and first is None and not signals:
                first = status
                how = "was lost" if node.reached else "was not reached"
                lost = f": it {how}" if status == UNREACHABLE else ""
                _say(node.host, f"ended with exit status {status}{lost}")
                if lost and (folder := os.environ.get(ENVIRONMENT_VARIABLE)):
                    RunDir(Path(folder)).append_event("lost", host=node.host, reached=node.reached)
                deadline = time.monotonic() + GRACE
        if (signals or first is not None) and not stopping:
            stopping = True
            for node in nodes:
                node.tell("stop")
        if len(signals) > 1 or time.monotonic() > deadline:
            break
        time.sleep(TURN)
    return first or (128 + signals[-1] if signals else 0)


class _Node:
    """One host: its ssh, and the thread that prints what comes from it.

    ``reached`` is whether its guard has spoken; ``status`` the exit status, once it has ended.
    """

    def __init__(self, host: str, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self.host = host
        self.status: int | None = None
        self.reached = False
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us alone
        )
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()
        self._spoke = time.monotonic()
        self.tell(json.dumps(dict(environment)))

    def tell(self, words: str) -> None:
        """Send a line; nothing happens if nobody is there."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(words.encode() + b"\n")
            self._process.stdin.flush()
        self._spoke = time.monotonic()

    def turn(self) -> int | None:
        """Give a sign of life if it is time; the exit status, when it is first known."""
        if self.status is not None:
            return None
        if time.monotonic() - self._spoke > HEARTBEAT:
            self.tell("alive")
        code = self._process.poll()
        # An ssh that was killed has lost its host.
        self.status = code if code is None or code >= 0 else UNREACHABLE
        return self.status

    def end(self) -> None:
        """Let go of the leash, so that the guard of the host ends everything there."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self, deadline: float) -> None:
        """Wait for the ssh to end, and end it if the deadline passes."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._printer.join(LAST_GRACE)

    def _print(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == UP:
                self.reached = True
                continue
            _say(self.host, line.decode(errors="replace").rstrip("\n"))


def _say(host: str, text: str) -> None:
    # One write of one line, so that lines of several hosts do not mix.
    os.write(1, f"{host}: {text}\n".encode(errors="replace"))


def main() -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fanout", description="The same script on every host of a hostfile."
    )
    parser.add_argument(
        "--ssh-option",
        action="append",
        default=[],
        metavar="X",
        help="an option of ssh, as --ssh-option=-p22",
    )
    parser.add_argument(
        "--pass-env", action="append", default=[], metavar="NAME", help="a variable for the ranks"
    )
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("script")
    arguments = parser.parse_args()
    environment = {name: os.environ[name] for name in arguments.pass_env if name in os.environ}
    try:
        hosts = hostfile.read(arguments.hostfile)
    except UserError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return run(hosts, arguments.script, environment=environment, options=arguments.ssh_option)


if __name__ == "__main__":
    sys.exit(main())

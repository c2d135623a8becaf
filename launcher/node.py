"""The guard of a node's ranks: no process outlives it, whatever became of them or of those who started them.

``python -m memlaunch.launcher.node [--leash] COMMAND...`` runs COMMAND, ends when it ends with its exit
status, and kills what it left behind. SIGTERM, SIGINT and SIGUSR2 ask the command to stop; SIGHUP, and the
end of whoever started the guard, end everything at once.

With ``--leash``, standard input is held by whoever started the guard from another machine: first it brings a
JSON object of environment variables, then ``alive`` every few seconds, and ``stop`` to ask the command to
stop. Its end, or silence, ends everything at once.
"""

import contextlib
import ctypes
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir

#: Seconds between two signs of life on the leash, and without one until the other end is taken for dead.
HEARTBEAT = 5.0
SILENCE = 45.0

#: What a guard on a leash says first.
UP = b"\x06\n"

#: Seconds between two looks at the command.
TURN = 0.1

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Stopped(Exception):
    """Everything is to end at once."""


def main() -> int:
    """Guard the command of the command line; its exit status, or 128 plus the signal that ended it."""
    leashed = sys.argv[1:2] == ["--leash"]
    command = sys.argv[1 + leashed :]
    with Guard() as guard:
        try:
            leash = _Leash() if leashed else None
            status = guard.run(
                command,
                {**os.environ, **(leash.environment if leash else {})},
                stop=lambda: leash is not None and leash.listen(),
            )
            if status and leash is None:
                _tell("ended by request" if guard.asked else "ended", status=status)
        except Stopped:
            return 128 + signal.SIGHUP
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            return 127
    return status if status >= 0 else 128 - status


def _tell(event: str, **details: Any) -> None:
    """Write into the events of the run, if this is one, how the ranks of this node ended."""
    if folder := os.environ.get(ENVIRONMENT_VARIABLE):
        RunDir(Path(folder)).append_event(event, host=socket.gethostname(), **details)


class Guard:
    """This process as the guard of one command: asks it to stop when asked, and outlives its descendants.

    Attributes:
        asked: whether it has been asked to stop.
        terminated: when SIGTERM came first, on the monotonic clock; None before.
    """

    def __enter__(self) -> "Guard":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the command orphans comes to us, not to the first process
        end_with_parent(signal.SIGHUP)
        self.asked = False
        self.terminated: float | None = None
        self._pass_on = False
        self._end = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGHUP, self._end_now)
        return self

    def __exit__(self, *error: object) -> None:
        end_descendants()

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: str | None = None,
        stop: Callable[[], bool] = lambda: False,
        give_up: Callable[[], int] = lambda: 0,
    ) -> int:
        """Run ``command`` to its end; its exit status, or minus the signal that ended it.

        Args:
            folder: where it runs; default: here.
            stop: looked at all the time; true once when the command is to be asked to stop.
            give_up: looked at all the time; a signal that is to end the command, or 0.

        Raises:
            Stopped: everything is to end, the command too.
            OSError: there is no such program.
        """
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # what is sent to our group reaches the command once, through us
            preexec_fn=lambda: end_with_parent(signal.SIGKILL),
        )
        while process.poll() is None:
            if self._end:
                raise Stopped
            if stop():
                self._ask()
            if self._pass_on:
                self._pass_on = False
                process.terminate()
            if number := give_up():
                process.send_signal(number)
            wait(process, TURN)
        return process.returncode

    def _ask(self, number: int = 0, frame: FrameType | None = None) -> None:
        self.asked = self._pass_on = True
        if number == signal.SIGTERM and self.terminated is None:
            self.terminated = time.monotonic()

    def _end_now(self, number: int, frame: FrameType | None) -> None:
        self._end = True


class _Leash:
    """The other end of standard input."""

    def __init__(self) -> None:
        """Waits for the environment. Raises Stopped: it does not come."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._rest = b""
        self._heard = time.monotonic()
        self._lines: list[bytes] = []
        while not self._lines:
            self._read(TURN)
        self.environment: dict[str, str] = json.loads(self._lines.pop(0))
        os.write(1, UP)

    def listen(self) -> bool:
        """Whether a stop was asked for since the last call. Raises Stopped: nobody is at the other end."""
        self._read(0)
        words, self._lines = self._lines, []
        return b"stop" in words

    def _read(self, timeout: float) -> None:
        if self._selector.select(timeout):
            data = os.read(0, 65536)
            if not data:
                raise Stopped
            self._heard = time.monotonic()
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines += lines
        elif time.monotonic() - self._heard > SILENCE:
            raise Stopped


def wait(process: subprocess.Popen[Any], seconds: float) -> None:
    """Until ``process`` has ended, or for ``seconds``.

    `Popen.wait` with a timeout wakes up every 50 ms to look; the ranks can use that time.
    """
    try:
        end = os.pidfd_open(process.pid)
    except OSError:  # a kernel before 5.3, or one that forbids it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return
    try:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.poll(seconds * 1000)
    finally:
        os.close(end)


def end_descendants() -> None:
    """Kill every descendant of this process, those that appear meanwhile too."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=1)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # orphans are ours to bury
                pass


def end_with_parent(number: int) -> None:
    """Have this process, and the program it becomes, get signal ``number`` when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())

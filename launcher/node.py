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
import selectors
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

#: Seconds between two signs of life on the leash, and without one until the other end is taken for dead.
HEARTBEAT = 5.0
SILENCE = 45.0

#: Seconds between two looks at the command.
TURN = 0.1

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _End(Exception):
    """Everything is to end at once."""


def main() -> int:
    """Guard the command of the command line; its exit status, or 128 plus the signal that ended it."""
    leashed = sys.argv[1:2] == ["--leash"]
    command = sys.argv[1 + leashed :]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the command orphans comes to us, not to the first process
    _prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    asked: list[int] = []
    ended: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, ask)
    signal.signal(signal.SIGHUP, end)
    try:
        leash = _Leash() if leashed else None
        environment = {**os.environ, **(leash.environment if leash else {})}
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # what is sent to our group reaches the command once, through us
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        while process.poll() is None:
            if ended:
                raise _End
            if leash and leash.listen():
                asked.append(signal.SIGTERM)
            if asked:
                asked.clear()
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TURN)
    except _End:
        return 128 + signal.SIGHUP
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    finally:
        _end_children()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


class _Leash:
    """The other end of standard input."""

    def __init__(self) -> None:
        """Waits for the environment. Raises _End: it does not come."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._rest = b""
        self._heard = time.monotonic()
        self._lines: list[bytes] = []
        while not self._lines:
            self._read(TURN)
        self.environment: dict[str, str] = json.loads(self._lines.pop(0))

    def listen(self) -> bool:
        """Whether a stop was asked for since the last call. Raises _End: there is nobody at the other end."""
        self._read(0)
        words, self._lines = self._lines, []
        return b"stop" in words

    def _read(self, timeout: float) -> None:
        if self._selector.select(timeout):
            data = os.read(0, 65536)
            if not data:
                raise _End
            self._heard = time.monotonic()
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines += lines
        elif time.monotonic() - self._heard > SILENCE:
            raise _End


def _end_children() -> None:
    """Kill every descendant, those that appear meanwhile too."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=1)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # orphans are ours to bury
                pass


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())

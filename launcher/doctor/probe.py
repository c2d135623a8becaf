"""The conversation with one node: over ssh, through SLURM, or with a process of this machine."""

import base64
import contextlib
import inspect
import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memlaunch.launcher.doctor import on_node
from memlaunch.launcher.doctor.diagnosis import Lost, Way
from memlaunch.launcher.doctor.on_node import MARK
from memlaunch.launcher.translate import shell, slurm

#: Seconds that a node has to answer.
LIMIT = 60.0

#: Seconds that it has to end when it is told to, or asked by a signal.
PATIENCE = 2.0

#: Seconds after which what runs on a node ends, whatever became of us.
LIFETIME = 600

#: The shell of a node. It reads what it is to do from standard input, where nobody else sees it.
SHELL = ("timeout", "--kill-after=5", str(LIFETIME), "bash")

#: Python runs its first line of standard input, which holds nothing that a shell would obey: where a quote of
#: the user's is left open, the shell reads on.
_BOOT = "import base64, sys; exec(base64.b64decode(sys.stdin.readline()))"


@dataclass(frozen=True)
class Place:
    """A node: its name, what runs a shell there, and what its ranks find in their environment."""

    name: str
    argv: Sequence[str]
    over: Way
    environment: Mapping[str, str] = field(default_factory=dict)


def script(python: str, environment: Mapping[str, str], setup: Sequence[str]) -> str:
    """What the shell of a node reads: the user's ``setup``, then Python, which reads on.

    It says how far it came: ``shell``, ``setup``.
    """
    return "\n".join(
        [
            _say("shell"),
            "set -e",
            *(["{ :", *setup, "} </dev/null"] if setup else []),
            *shell.exports(environment),
            _say("setup"),
            f"exec {shell.join([python, '-u', '-c', _BOOT])}",
            base64.b64encode(inspect.getsource(on_node).encode()).decode(),
            "",
        ]
    )


def _say(stage: str) -> str:
    return f"echo {shlex.quote(MARK + json.dumps({'at': stage}))}"


def outside_job() -> dict[str, str]:
    """This process's environment, less what tells the commands of SLURM in which job it is."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == slurm.KEPT or not name.startswith(slurm.INHERITED)
    }


class Probe:
    """The conversation with a node."""

    def __init__(self, place: Place, text: str) -> None:
        self.place = place
        self.stage: str | None = None
        self._text = text
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._words: deque[bytes] = deque(maxlen=50)
        self._readers: list[threading.Thread] = []

    def open(self, limit: float) -> None:
        """Wait until Python listens there. Raises Lost."""
        self._process = subprocess.Popen(
            self.place.argv,
            env=outside_job() if self.place.over == "srun" else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes to us alone
        )
        for reader in (self._read, self._overhear):
            self._readers.append(threading.Thread(target=reader, args=(self._process,), daemon=True))
            self._readers[-1].start()
        deadline = time.monotonic() + limit
        self._send(self._text)
        while self.stage != "python":
            self.stage = self._receive(deadline, limit)["at"]

    def ask(self, do: str, limit: float = LIMIT, **arguments: Any) -> dict[str, Any]:
        """The answer of ``on_node.QUESTIONS[do]``. Raises Lost."""
        deadline = time.monotonic() + limit
        self._send(json.dumps({"do": do, **arguments}) + "\n")
        return self._receive(deadline, limit)

    def let_go(self) -> None:
        """Tell what runs there to end."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end(self, number: signal.Signals, deadline: float) -> None:
        """Wait until ``deadline`` for the end of what reaches the node, then send it a signal."""
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.send_signal(number)

    def _send(self, text: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, and the answer will say so
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def _receive(self, deadline: float, limit: float) -> dict[str, Any]:
        assert self._process is not None
        status = None
        try:
            answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            if answer is not None:
                return answer
            status = self._process.wait(2)
            self._readers[-1].join(2)
        except (queue.Empty, subprocess.TimeoutExpired):
            pass
        words = b"".join(self._words).decode(errors="replace")
        raise Lost(self.stage, status, words, limit)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            _, mark, answer = line.decode(errors="replace").partition(MARK)
            if mark:
                self._answers.put(json.loads(answer))
        self._answers.put(None)

    def _overhear(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._words.extend(process.stderr)


def close(probes: Sequence[Probe]) -> None:
    """End all conversations."""
    for probe in probes:
        probe.let_go()
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE
        for probe in probes:
            probe.end(number, deadline)

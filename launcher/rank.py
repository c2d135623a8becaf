"""What every launcher starts for every rank: the rank's log, its guard, and who says how it ended.

The work is done in a process below this one: the worker that trains, or the script of the user. Where that is
killed without a word, this process writes it into ``events.jsonl``, because launchers do not pass statuses
on: torchrun ends with 1 whatever happened.
"""

import contextlib
import json
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from memlaunch.launcher.errors import EXIT_FAILED, EXIT_LAUNCH, EXIT_STOPPED
from memlaunch.launcher.node import Guard, Stopped
from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir, read_lines

WORKER = "memlaunch.launcher.worker"

#: Seconds between two looks at whether the ranks hang, and between the two signals that end one that does.
HANG_TURN = 2.0
HUNG = (
    "made no step for too long, and was ended",
    "the stacks of its threads are in its log; `cluster.hang_timeout` is the limit",
)

#: Seconds after SIGTERM in which mpirun leaves us be; then it kills us, and what we guard would stay.
PATIENCE = 2.0


def main() -> int:
    """Run the rank to its end; its exit status, or 128 plus the signal that ended it."""
    folder = RunDir(Path(os.environ[ENVIRONMENT_VARIABLE]))
    with Guard() as guard, contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        meeting = None
        if "RANK" not in environment:
            from memlaunch.launcher.mpi import CannotMeet, Meeting

            try:
                meeting = stack.enter_context(Meeting())
            except CannotMeet as error:
                if error.rank == 0:
                    _say_failed(folder, 0, EXIT_LAUNCH, str(error), error.hint)
                return EXIT_LAUNCH
            environment = meeting.environment
        status = _run(folder, guard, environment, PATIENCE if meeting is not None else math.inf)
        if meeting is not None:
            meeting.whole = status == 0
    return status if status >= 0 else 128 - status


def _run(folder: RunDir, guard: Guard, environment: dict[str, str], patience: float) -> int:
    """Run the work of the rank; its exit status, or minus the signal that ended it.

    ``patience``: seconds from SIGTERM until it is killed.
    """
    rank = int(environment["RANK"])
    _log_to(folder.rank_log(rank))
    since = folder.events.stat().st_size if folder.events.exists() else 0
    script = json.loads(folder.resolved.read_text(encoding="utf-8")).get("script")
    python = [sys.executable, "-u"]  # what it prints is in the log at once
    command = [*python, "-m", WORKER]
    if script is not None:
        command = [*python, script["path"], *script["args"]]
        if rank == 0:
            size = int(environment["WORLD_SIZE"])
            folder.append_event("started", script=script["path"], world_size=size)
    verdict = _Verdict(guard, folder, since, patience)
    try:
        status = guard.run(
            command,
            {**environment, "PYTHONFAULTHANDLER": "1"},
            folder=script and script["folder"],
            give_up=verdict,
        )
    except Stopped:
        return -signal.SIGHUP
    if status not in (0, EXIT_STOPPED) and not guard.asked and rank not in _failed(folder, since):
        how, hint = HUNG if verdict.hangs else _how(status)
        _say_failed(folder, rank, EXIT_FAILED, how, hint, status=status)
    elif not status and rank == 0 and script is not None:
        folder.append_event("finished")
    return status


class _Verdict:
    """Whether the work is to be ended, and with what signal.

    ``hangs`` is whether that was because the ranks made no step for too long.
    """

    def __init__(self, guard: Guard, folder: RunDir, since: int, patience: float) -> None:
        self.hangs = False
        self._guard = guard
        self._folder = folder
        self._since = since
        self._patience = patience
        self._looked = time.monotonic()

    def __call__(self) -> int:
        now = time.monotonic()
        if self._guard.terminated is not None and now - self._guard.terminated > self._patience:
            return signal.SIGKILL
        if self._guard.asked:  # it may wait for ever for a rank that has failed
            return signal.SIGKILL if _failed(self._folder, self._since) else 0
        if now - self._looked < HANG_TURN:
            return 0
        self._looked = now
        if self.hangs:
            return signal.SIGKILL
        self.hangs = self._folder.hang.exists()
        return signal.SIGABRT if self.hangs else 0  # Python then writes down the stacks of all threads


def _failed(folder: RunDir, since: int) -> set[int]:
    """The ranks that have said that they failed, behind byte ``since`` of the events."""
    return {event["rank"] for event, _ in read_lines(folder.events, since) if event["event"] == "failed"}


def _say_failed(folder: RunDir, rank: int, code: int, message: str, hint: str, **more: Any) -> None:
    host = socket.gethostname()
    folder.append_event("failed", rank=rank, host=host, exit_code=code, message=message, hint=hint, **more)


def _how(status: int) -> tuple[str, str]:
    """(how the work ended, a hint) for its exit status, or minus the signal that ended it."""
    if status >= 0:
        return f"ended with exit status {status}", "its last words are in the log"
    if status == -signal.SIGKILL:
        hint = "the kernel does that where the memory of the machine runs out; see `dmesg`"
    else:
        hint = "its last words are in the log"
    return f"killed by signal {-status} ({signal.strsignal(-status)})", hint


def _log_to(path: Path) -> None:
    """Send what this process prints, and those below it, to ``path``."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


if __name__ == "__main__":
    sys.exit(main())

"""Starts the ranks of a run, and starts them again where that helps; ends with the exit code of the run.

``python -m memlaunch.launcher.attempts [--requeue] COMMAND...`` runs COMMAND, which starts all ranks of the
run in ``MEMLAUNCH_RUN_DIR``. When the ranks fail, or make no step for ``cluster.hang_timeout`` seconds, it is
run again, up to ``cluster.max_restarts`` times; the ranks go on from their last checkpoint.

The first SIGTERM, SIGINT or SIGHUP asks the ranks to stop, the second ends them at once. With ``--requeue``,
a job of SLURM whose ranks were asked to stop by the system goes back into the queue.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from memlaunch.launcher import outcome, slurm_job
from memlaunch.launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED
from memlaunch.launcher.node import end_descendants, end_with_parent, wait
from memlaunch.launcher.outcome import Outcome
from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir, read_lines

#: Seconds between two looks at the command.
TURN = 0.2

#: Seconds that the ranks have to stop in where nobody is left to ask twice.
GRACE = 60.0

#: Seconds in which ranks that hang are to have written down where.
LAST_WORDS = 30.0


def main() -> int:
    """Run the command of the command line until it need not be run again; the exit code of the run."""
    requeue = sys.argv[1:2] == ["--requeue"]
    command = sys.argv[1 + requeue :]
    folder = RunDir(Path(os.environ[ENVIRONMENT_VARIABLE]))
    cluster = json.loads(folder.resolved.read_text(encoding="utf-8"))["cluster"]
    # mpirun hands on SIGUSR2, and takes SIGTERM as the end.
    stop = signal.SIGUSR2 if cluster["launcher"] == "mpirun" else signal.SIGTERM
    requests = _Requests()
    failed_at = None
    for left in range(cluster["max_restarts"], -1, -1):
        ended = _attempt(command, folder, requests, stop, cluster["hang_timeout"])
        step = folder.last_step()
        if ended.code != EXIT_FAILED or requests.count:
            break
        if step == failed_at:
            folder.append_event("repeated", step=step, left=left)
            break
        failed_at = step
        if left:
            because = outcome.summary(ended)
            folder.append_event("restarted", step=step, left=left - 1, because=because)
            print(f"{because}; restarting from the last checkpoint", file=sys.stderr)
    if requests.count > 1:
        return EXIT_INTERRUPTED
    if requests.count and ended.code:
        return EXIT_STOPPED
    if ended.code == EXIT_STOPPED:
        if requeue and ended.preempted:
            slurm_job.requeue(os.environ["SLURM_JOB_ID"])
    elif ended.code:
        print(outcome.explain(ended, folder), file=sys.stderr)
    return ended.code


def _attempt(
    command: Sequence[str],
    folder: RunDir,
    requests: "_Requests",
    stop: signal.Signals,
    hang_timeout: float | None,
) -> Outcome:
    """Run ``command`` once; how the ranks ended."""
    since = folder.events.stat().st_size if folder.events.exists() else 0
    folder.hang.unlink(missing_ok=True)
    progress = _Progress(folder, since)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )
    handed_on = killed = False
    deadline = float("inf")
    while process.poll() is None:
        if requests.count and not handed_on:
            handed_on = True
            process.send_signal(stop)
            if requests.orphaned:
                deadline = time.monotonic() + GRACE
        if (
            hang_timeout is not None
            and progress.seconds_without() > hang_timeout
            and not folder.hang.exists()
        ):
            folder.append_event("hung", step=folder.last_step(), seconds=hang_timeout)
            folder.hang.touch()
            deadline = time.monotonic() + LAST_WORDS
        if requests.count > 1 or time.monotonic() > deadline:
            killed = True
            process.kill()
            end_descendants()
        wait(process, TURN)
    return outcome.of(folder, 1 if killed else process.returncode, since)


class _Progress:
    """How long a run has made none, from when its ranks train."""

    def __init__(self, folder: RunDir, since: int) -> None:
        self._folder = folder
        self._since = since
        self._trains = False
        self._sizes: list[int] = []
        self._changed = time.monotonic()

    def seconds_without(self) -> float:
        """Seconds since the ranks last wrote a step or an event; 0 before they train."""
        files = (self._folder.metrics, self._folder.events)
        sizes = [path.stat().st_size if path.exists() else 0 for path in files]
        if sizes != self._sizes:
            self._sizes = sizes
            self._changed = time.monotonic()
            events = [event["event"] for event, _ in read_lines(self._folder.events, self._since)]
            self._trains = "started" in events and "finished" not in events
        return time.monotonic() - self._changed if self._trains else 0.0


class _Requests:
    """Counts SIGTERM, SIGINT and SIGHUP.

    ``orphaned`` is whether they came because whoever started this process has ended.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    @property
    def orphaned(self) -> bool:
        return os.getppid() != self._parent

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


if __name__ == "__main__":
    sys.exit(main())

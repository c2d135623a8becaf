"""Starts a run, shows how it goes, and turns how it ended into an exit code."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import errors, rundir, translate
from memlaunch.launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LAUNCH, EXIT_STOPPED
from memlaunch.launcher.monitor import Monitor

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.source import Document

#: Lines of a log shown when a run fails.
TAIL = 15


def run(resolved: "ResolvedJob", document: "Document") -> int:
    """Train the job in ``document`` in a new run folder, whose path is printed last; the exit code."""
    folder = rundir.create(Path(resolved.job.output.dir), resolved.job.name)
    folder.place({**translate.files(resolved), folder.job.name: document.text})
    code = follow(["bash", str(folder.command)], folder, document)
    print(folder.path)
    return code


def follow(argv: list[str], folder: rundir.RunDir, document: "Document") -> int:
    """Run ``argv``, which starts the ranks of the run in ``folder``, to its end; the exit code.

    A mistake in the job that only a rank can find is shown where it stands in ``document``.

    The first SIGINT, SIGTERM or SIGHUP asks the ranks to end, the second ends them at once.
    """
    environment = {**os.environ, rundir.ENVIRONMENT_VARIABLE: str(folder.path)}
    with folder.launcher_log.open("wb") as log:
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us alone
        )
        with _Interrupts(process) as interrupts, Monitor(folder) as monitor:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                monitor.update()
            monitor.update()
    failure = monitor.failure
    if interrupts.count and (process.returncode or failure):
        folder.append_event("stopped", signals=interrupts.count)
        return EXIT_STOPPED if interrupts.count == 1 else EXIT_INTERRUPTED
    if process.returncode == 0 and failure is None:
        return 0
    print(_explanation(folder, document, failure), file=sys.stderr)
    if failure is not None:
        return int(failure["exit_code"])
    return EXIT_FAILED if folder.rank_log(0).exists() else EXIT_LAUNCH


class _Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP, and passes them on to ``process``."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.count = 0
        self._process = process
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._process.poll() is None:
            self._end_all()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            print("stopping; once more to end at once", file=sys.stderr)
            self._process.terminate()
        else:
            self._end_all()

    def _end_all(self) -> None:
        """Kill the launcher and every rank; each rank is a session of its own, so by their parentage."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def _explanation(folder: rundir.RunDir, document: "Document", failure: dict[str, Any] | None) -> str:
    """What ended the run: a rank that was killed, the words of the first that failed, or the last log lines.

    The others see a killed rank as a broken connection, and may say so before anyone else.
    """
    killed = _killed(folder.launcher_log) if failure is None or "key" not in failure else None
    if killed is not None:
        rank, number = killed
        hint = "the kernel does that where the memory of the machine runs out; see `dmesg`"
        lines = [f"rank {rank}: error: killed by signal {number}", f"hint: {hint}"]
        return "\n".join([*lines, _tail(folder.rank_log(rank))])
    if failure is None:
        tails = [_tail(log) for log in (folder.rank_log(0), folder.launcher_log) if log.exists()]
        return "\n".join(["error: the ranks ended without saying why", *tails])
    log = f"log: {folder.rank_log(failure['rank'])}"
    if "key" not in failure:
        return f"rank {failure['rank']}: error: {failure['message']}\nhint: {failure['hint']}\n{log}"
    problem = document.finding(failure["key"], failure["message"], failure["hint"])
    return f"{errors.render(problem, errors.wants_colour())}\n{log}"


def _killed(log: Path) -> tuple[int, int] | None:
    """(rank, signal) of a rank that torchrun reports as killed; those that it ended itself are none."""
    report = re.compile(r"rank +: (\d+) .*\n +exitcode +: -(\d+) ")
    found = report.findall(log.read_text(encoding="utf-8", errors="replace"))
    return next(((int(rank), int(number)) for rank, number in found if int(number) != signal.SIGTERM), None)


def _tail(log: Path) -> str:
    if not log.exists():
        return f"it wrote no {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"the last lines of {log}:", *(f"  {line}" for line in lines)])

"""Starts a run, shows how it goes, and turns how it ended into an exit code."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import entry, outcome, resume, rundir, slurm_job, translate
from memlaunch.launcher.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from memlaunch.launcher.monitor import Monitor, next_command, summary
from memlaunch.launcher.node import end_with_parent, wait
from memlaunch.launcher.outcome import Outcome
from memlaunch.launcher.rundir import read_lines
from memlaunch.launcher.translate import slurm

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.rundir import RunDir
    from memlaunch.launcher.source import Document

#: Seconds between two looks at a run, and between two questions to SLURM.
TURN = 0.2
SLURM_TURN = 2.0

#: Seconds that the ranks of a SLURM job have to stop in, before the job is cancelled.
GRACE = 60.0


def run(
    resolved: "ResolvedJob",
    document: "Document",
    *,
    wait: bool = False,
    go_on: str = "never",
    force: bool = False,
) -> int:
    """Train the job in ``document`` in a run folder, whose path is printed last; the exit code.

    Args:
        wait: a job that goes to SLURM is followed to its end.
        go_on, force: as for :func:`memlaunch.launcher.resume.prepare`; the run folder is a new one where that
            finds none.
    """
    by_slurm = resolved.job.cluster.launcher == "slurm"
    if stands_by(resolved):
        print("the first task of the step starts the ranks", file=sys.stderr)
        return 0
    if (script := resolved.job.script) is not None:
        print(f"every rank runs {shlex.join([script.path, *script.args])}", file=sys.stderr)
    if (name := resolved.job.model.entry) is not None:
        place = entry.parse(name, Path.cwd())
        print(f"every rank runs `{place.function}` of {place.file}", file=sys.stderr)
    resumed = resume.prepare(resolved, document, go_on, force)
    folder = resumed.folder if resumed is not None else create(resolved, document)
    if resumed is not None and resumed.done:
        print("the run has come to its end already", file=sys.stderr)
        code = 0
    elif by_slurm and not slurm_job.inside():
        code = submit(folder, document, wait=wait)
    else:
        code = follow(["bash", str(folder.command)], folder, document)
    if by_slurm and not slurm_job.inside() and not wait:
        print(next_command("status", str(folder.path)), file=sys.stderr)
    elif code != EXIT_INTERRUPTED:
        if script is None or folder.metrics.exists():  # a script that says nothing need not wait for pictures
            _report(folder)
        if not code and (told := _memory(folder)) is not None:
            print(told, file=sys.stderr)
        print(summary(folder, code, document.name), file=sys.stderr)
    print(folder.path)
    return code


def stands_by(resolved: "ResolvedJob") -> bool:
    """Whether this is one of the tasks of a step of SLURM of which the first starts the ranks."""
    return resolved.job.cluster.launcher == "slurm" and slurm_job.inside() and not slurm_job.is_first_task()


def _report(folder: "RunDir") -> None:
    """Leave a report in the run folder; a run is not worse for the lack of one."""
    from memlaunch.launcher import report

    try:
        report.write([folder.path], ended=True)
    except Exception as error:
        print(f"warning: there is no report: {' '.join(str(error).split())}", file=sys.stderr)


def _memory(folder: "RunDir") -> str | None:
    """What the plan said of the peak memory of a rank, and what it was; None where nobody says anything."""
    plan = json.loads(folder.plan.read_text(encoding="utf-8")) if folder.plan.exists() else {}
    peaks = [line.get("peak_memory_bytes") for line, _ in read_lines(folder.metrics)]
    predicted, measured = plan.get("peak_allocated_bytes"), max(filter(None, peaks), default=None)
    if predicted is None and measured is None:
        return None
    from memlaunch.launcher.plan.report import gib

    words = [] if predicted is None else [f"{gib(predicted)} predicted"]
    words.append("none measured, a CPU cannot tell" if measured is None else f"{gib(measured)} measured")
    return f"peak memory of a rank: {', '.join(words)}"


def attempt(folder: "RunDir") -> tuple[Outcome, int]:
    """Start the ranks of ``folder`` as a run would and follow them to their end, without a word about it.

    How they ended, and how many signals asked for it.

    Raises:
        UserError: SLURM does not take the job.
    """
    cluster = json.loads(folder.resolved.read_text(encoding="utf-8"))["cluster"]
    if cluster["launcher"] == "slurm" and not slurm_job.inside():
        ended, interrupts = _followed_job(slurm_job.submit(folder), folder, 0)
        return ended or Outcome(EXIT_STOPPED), interrupts
    return _followed(["bash", str(folder.command)], folder)


def create(resolved: "ResolvedJob", document: "Document") -> "RunDir":
    """A new run folder for the job, with all that it is started with."""
    folder = rundir.create(Path(resolved.job.output.dir), resolved.job.name)
    folder.place({**translate.files(resolved), folder.job.name: document.text})
    return folder


def submit(folder: "RunDir", document: "Document | None" = None, *, wait: bool = False) -> int:
    """Submit the run in ``folder`` to SLURM, and follow it where ``wait`` is true; the exit code.

    Raises:
        UserError: SLURM does not take the job.
    """
    since = folder.events.stat().st_size if folder.events.exists() else 0
    job = slurm_job.submit(folder)
    print(f"submitted as job {job}", file=sys.stderr)
    return follow_job(job, folder, document, since) if wait else 0


def submit_array(
    jobs: "Sequence[tuple[ResolvedJob, Document]]", python: str = sys.executable
) -> "list[RunDir]":
    """Submit ``jobs``, which ask for the same of SLURM, as one array; their run folders.

    Raises:
        UserError: they ask for different things, or SLURM does not take them.
    """
    (first, _), *others = jobs
    for resolved, document in others:
        if resolved.job.cluster != first.job.cluster:
            raise UserError(
                f"{document.name}: an array asks SLURM for one thing, and this `cluster` is not that of "
                f"{jobs[0][1].name}",
                "submit it on its own",
            )
    folders = [create(*job) for job in jobs]
    script = slurm.array(first, [str(folder.path) for folder in folders], python)
    folders[0].place({"job.sbatch": script})
    number = slurm_job.submit(folders[0], array=folders)
    print(f"submitted as job {number}, an array of {len(folders)}", file=sys.stderr)
    return folders


def follow(argv: list[str], folder: "RunDir", document: "Document | None") -> int:
    """Run ``argv``, which starts the ranks of the run in ``folder``, to its end; the exit code.

    A mistake in the job that only a rank can find is shown where it stands in ``document``.

    The first SIGINT, SIGTERM or SIGHUP asks the ranks to stop, the second ends them at once.
    """
    return _conclude(*_followed(argv, folder), folder, document)


def _followed(argv: list[str], folder: "RunDir") -> tuple[Outcome, int]:
    """How the ranks that ``argv`` starts ended, and how many signals asked for it."""
    environment = {**os.environ, rundir.ENVIRONMENT_VARIABLE: str(folder.path)}
    since = folder.events.stat().st_size if folder.events.exists() else 0
    folder.launched_here()
    with folder.launcher_log.open("ab") as log:
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us alone
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),
        )
        with contextlib.ExitStack() as stack:
            stack.callback(_end_all, process)
            ask = _Interrupts(
                lambda: folder.ask_to_stop(lambda: process.terminate()), lambda: _end_all(process)
            )
            interrupts = stack.enter_context(ask)
            monitor = stack.enter_context(Monitor(folder))
            while process.poll() is None:
                wait(process, TURN)
                monitor.update()
            monitor.update()
    return outcome.of(folder, process.returncode, since), interrupts.count


def follow_job(job: str, folder: "RunDir", document: "Document | None", since: int) -> int:
    """Follow the SLURM job of a run to its end; the exit code.

    ``since``: byte of the events behind which those of this job stand.

    The first SIGINT, SIGTERM or SIGHUP asks the ranks to stop, the second cancels the job.
    """
    ended, interrupts = _followed_job(job, folder, since)
    return EXIT_STOPPED if ended is None else _conclude(ended, interrupts, folder, document)


def _followed_job(job: str, folder: "RunDir", since: int) -> tuple[Outcome | None, int]:
    """How the ranks of a SLURM job ended, None where SLURM took it away; how many signals asked for it."""
    state: str | None = None
    asked = looked = float("-inf")
    with (
        _Interrupts(
            lambda: folder.ask_to_stop(lambda: slurm_job.ask_to_stop(job)), lambda: slurm_job.end(job)
        ) as interrupts,
        Monitor(folder) as monitor,
    ):
        while True:
            monitor.update()
            now = time.monotonic()
            if interrupts.count and asked == float("-inf"):
                asked = now
            if asked > 0 and now - asked > GRACE:
                asked = now
                slurm_job.end(job)
            if now - looked > SLURM_TURN:
                looked = now
                before, state = state, slurm_job.state(job)
                if state != before:
                    monitor.say(f"job {job}: {(state or 'forgotten by SLURM').lower()}")
                if state is None or state in slurm_job.ENDED:
                    break
            time.sleep(TURN)
        monitor.update()
    if state in slurm_job.TAKEN_AWAY and not interrupts.count:
        print(f"SLURM ended the job: {state.lower()}", file=sys.stderr)
        return None, 0
    return outcome.of(folder, 0 if state in (None, "COMPLETED") else 1, since), interrupts.count


def _conclude(ended: Outcome, interrupts: int, folder: "RunDir", document: "Document | None") -> int:
    """Say how the run ended; the exit code."""
    stopped = ended.code == EXIT_STOPPED or (interrupts and ended.code)
    if stopped and [e["event"] for e, _ in read_lines(folder.events)][-1:] not in (
        ["stopped"],
        ["preempted"],
    ):
        folder.append_event("stopped", signals=interrupts)
    if interrupts and ended.code:
        return EXIT_STOPPED if interrupts == 1 else EXIT_INTERRUPTED
    if ended.code not in (0, EXIT_STOPPED):
        print(outcome.explain(ended, folder, document), file=sys.stderr)
    return ended.code


class _Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP: the first does ``ask``, those behind it do ``end``."""

    def __init__(self, ask: Callable[[], Any], end: Callable[[], Any]) -> None:
        self.count = 0
        self._ask = ask
        self._end = end
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            print("stopping; once more to end at once", file=sys.stderr)
            self._ask()
        else:
            self._end()


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a launcher that runs, and every rank; each is a session of its own, so by their parentage."""
    import psutil

    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

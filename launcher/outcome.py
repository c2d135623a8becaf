"""How a run ended: what its events say, in an exit code and in words."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import errors
from memlaunch.launcher.errors import EXIT_FAILED, EXIT_LAUNCH, EXIT_STOPPED
from memlaunch.launcher.rundir import RunDir, read_lines

if TYPE_CHECKING:
    from memlaunch.launcher.source import Document

#: Lines of a log shown when a run fails.
TAIL = 15

Event = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a run ended.

    Attributes:
        code: the exit code.
        failure: the event of the rank that failed first, where one said so.
        lost: the event of a host that was not reached, or was lost.
        preempted: whether it was the system that asked them to stop.
    """

    code: int
    failure: Event | None = None
    lost: Event | None = None
    preempted: bool = False


def of(folder: RunDir, status: int, since: int = 0) -> Outcome:
    """The outcome of the run in ``folder``, whose launcher ended with ``status``.

    Args:
        since: byte of the events behind which those of this launch stand.
    """
    events = _last_attempt([event for event, _ in read_lines(folder.events, since)])
    kinds = {event["event"] for event in events}
    failure = culprit([event for event in events if event["event"] == "failed"])
    lost = next((event for event in events if event["event"] == "lost"), None)
    if failure is not None:
        return Outcome(int(failure["exit_code"]), failure, lost)
    if status == 0 or ("finished" in kinds and not lost):
        return Outcome(0)
    # Ranks that do not train yet end at a request without a word of their own.
    at_once = "ended by request" in kinds and "ended" not in kinds
    if kinds & {"stopped", "preempted"} or folder.stop.exists() or at_once:
        by_hand = "stopped" in kinds or folder.stop.exists()
        return Outcome(EXIT_STOPPED, preempted=not by_hand)
    began = "started" in kinds and (lost is None or lost["reached"])
    return Outcome(EXIT_FAILED if began else EXIT_LAUNCH, lost=lost)


def _last_attempt(events: list[Event]) -> list[Event]:
    again = [number for number, event in enumerate(events) if event["event"] == "restarted"]
    return events[again[-1] :] if again else events


def culprit(failures: list[Event]) -> Event | None:
    """The failure that the others followed from.

    They see a rank that is gone as a broken connection, and may say so before anyone can speak for it.
    """
    by_job = (failure for failure in failures if "key" in failure)
    gone = (failure for failure in failures if "status" in failure)
    return next(by_job, None) or next(gone, None) or next(iter(failures), None)


def explain(outcome: Outcome, folder: RunDir, document: "Document | None" = None) -> str:
    """What ended the run, for people: who, how, what to do, and the last words of the log.

    Args:
        document: the job file, in which a mistake that a rank found is shown.
    """
    failure = outcome.failure
    if failure is None:
        return _without_a_word(outcome, folder)
    log = folder.rank_log(failure["rank"])
    if "key" in failure:
        if document is None:
            return f"error: {failure['message']}\nhint: {failure['hint']}\nlog: {log}"
        problem = document.finding(failure["key"], failure["message"], failure["hint"])
        return f"{errors.render(problem, errors.wants_colour())}\nlog: {log}"
    said = (
        f"rank {failure['rank']} on {failure['host']}: error: {failure['message']}\nhint: {failure['hint']}"
    )
    return f"{said}\n{tail(log)}" if "status" in failure else f"{said}\nlog: {log}"


def summary(outcome: Outcome) -> str:
    """What ended the run, in a line."""
    if (failure := outcome.failure) is not None:
        return f"rank {failure['rank']} on {failure['host']}: {failure['message']}"
    if outcome.lost is not None:
        return f"{outcome.lost['host']} was lost"
    return "the ranks ended without saying why"


def tail(log: Path, lines: int = TAIL) -> str:
    """The end of ``log``, under a line that names it."""
    if not log.exists():
        return f"it wrote no {log}"
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join([f"the last lines of {log}:", *(f"  {line}" for line in text)])


def _without_a_word(outcome: Outcome, folder: RunDir) -> str:
    said = "error: the ranks ended without saying why"
    if outcome.lost is not None:
        how = "was lost on the way" if outcome.lost["reached"] else "was not reached"
        said = f"error: {outcome.lost['host']} {how}\nhint: `memlaunch doctor` looks at every host"
    elif outcome.code == EXIT_LAUNCH:
        said = "error: the ranks did not start"
    logs = [folder.rank_log(0), folder.launcher_log, *sorted(folder.logs.glob("slurm-*.log"))[-1:]]
    return "\n".join([said, *(tail(log, 2 * TAIL) for log in logs if log.exists())])

"""Whether a job fits, tried on the machines that it is for: ``memlaunch plan --probe``.

The ranks start as they do in a run, make two optimizer steps on the largest micro-batch of the job's data,
and end. Where a rank is out of memory, all end, and the next smaller micro-batch is tried in new processes;
the global batch stays. Nothing is left behind: the folder of a probe is removed with all that is in it.
"""

import contextlib
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import launch, outcome, rundir, translate
from memlaunch.launcher.errors import EXIT_INTERRUPTED, EXIT_MEMORY, EXIT_STOPPED, UserError
from memlaunch.launcher.job import batch_of
from memlaunch.launcher.plan import machine, memory
from memlaunch.launcher.plan.report import gib
from memlaunch.launcher.rundir import RunDir, read_lines

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.source import Document

#: The folder of probes, beside those of the runs.
FOLDER = ".probes"


@dataclass(frozen=True)
class Ended:
    """How one attempt ended.

    Attributes:
        measured: the event ``probed``, less its name and time; None where a rank was out of memory.
        failure: what that rank said.
    """

    measured: dict[str, Any] | None
    failure: str | None = None


def probe(resolved: "ResolvedJob", document: "Document") -> dict[str, Any]:
    """Try a job in which nothing is open, with smaller and smaller micro-batches until it fits.

    ``fits``; ``micro_batch_size`` and ``gradient_accumulation_steps`` of the last attempt; ``attempts``, each
    with its sizes, whether it fits, what was measured (null where it does not fit), what was predicted, and
    what the rank that was out of memory said.

    Raises:
        UserError: the ranks did not start, or failed for another reason than memory.
    """
    assert not resolved.open
    gpu = machine.of(resolved)
    attempts: list[dict[str, Any]] = []
    for tried in smaller(resolved):
        plan = memory.plan(document, tried, gpu)
        ended = attempt(tried, document)
        attempts.append(
            {
                "micro_batch_size": tried.job.training.micro_batch_size,
                "gradient_accumulation_steps": tried.job.training.gradient_accumulation_steps,
                "fits": ended.measured is not None,
                "measured": ended.measured,
                "predicted": {
                    "fits": plan["fits"],
                    "peak_allocated_bytes": plan["peak_allocated_bytes"],
                    "peak_reserved_bytes": plan["peak_reserved_bytes"],
                    "memory_bytes": plan["candidates"][0]["memory_bytes"],
                    "step_seconds": plan["step_seconds"],
                },
                "failure": ended.failure,
            }
        )
        if ended.measured is not None:
            break
    last = attempts[-1]
    sizes = {key: last[key] for key in ("micro_batch_size", "gradient_accumulation_steps")}
    return {"fits": last["fits"], **sizes, "attempts": attempts}


def smaller(resolved: "ResolvedJob") -> "Iterator[ResolvedJob]":
    """The job, and with every smaller micro-batch that fills the same global batch, the largest first."""
    yield resolved
    size = resolved.job.training.micro_batch_size
    if not isinstance(size, int):
        return  # a budget of tokens decides
    share = resolved.batch.micro_batch_size * resolved.batch.gradient_accumulation_steps
    for less in range(size - 1, 0, -1):
        if share % less == 0:
            changes = {"micro_batch_size": less, "gradient_accumulation_steps": share // less}
            training = resolved.job.training.model_copy(update=changes)
            job = resolved.job.model_copy(update={"training": training})
            yield replace(resolved, job=job, batch=batch_of(job, resolved.world_size))


def attempt(resolved: "ResolvedJob", document: "Document") -> Ended:
    """Try the job once.

    Raises:
        UserError: as :func:`probe`.
    """
    with _folder(Path(resolved.job.output.dir)) as folder:
        once = {"max_restarts": 0, "hang_timeout": None}
        cluster = resolved.job.cluster.model_copy(update=once)
        tried = replace(resolved, job=resolved.job.model_copy(update={"cluster": cluster}))
        folder.place({**translate.files(tried), folder.job.name: document.text})
        folder.probe.touch()
        ended, interrupts = launch.attempt(folder)
        events = [event for event, _ in read_lines(folder.events)]
        if interrupts:
            raise UserError("the probe was stopped", exit_code=_stopped(interrupts))
        for event in events:
            if event["event"] == "failed" and _out_of_memory(event):
                return Ended(None, f"rank {event['rank']} on {event['host']}: {event['message']}")
        if ended.code:
            raise _failed(ended, folder, document)
        probed = next(event for event in events if event["event"] == "probed")
        return Ended({key: value for key, value in probed.items() if key not in ("event", "time")})


def text(probed: dict[str, Any]) -> str:
    """A probe for people, a line for each attempt."""
    lines = []
    for one in probed["attempts"]:
        measured, predicted = one["measured"], one["predicted"]
        size = one["micro_batch_size"]
        what = "the job" if size is None else f"{size} x {one['gradient_accumulation_steps']} accumulation"
        if measured is None:
            lines.append(
                f"{what}: out of memory ({one['failure']}); {gib(predicted['memory_bytes'])} predicted"
            )
        elif measured["peak_allocated_bytes"] is None:
            lines.append(
                f"{what}: fits; a process had {gib(measured['peak_process_bytes'])} at most, "
                f"{gib(predicted['memory_bytes'])} predicted"
            )
        else:
            lines.append(
                f"{what}: fits; {gib(measured['peak_allocated_bytes'])} allocated, "
                f"{gib(predicted['peak_allocated_bytes'])} predicted; "
                f"{gib(measured['peak_reserved_bytes'])} reserved, "
                f"{gib(predicted['peak_reserved_bytes'])} predicted"
            )
    return "\n".join(["probed:", *(f"  {line}" for line in lines)])


@contextlib.contextmanager
def _folder(output: Path) -> Iterator[RunDir]:
    """A run folder that is gone behind this, with the folders above it that were made for it."""
    missing = [path for path in (output, *output.parents) if not path.exists()]
    folder = rundir.create(output, FOLDER)
    try:
        yield folder
    finally:
        shutil.rmtree(folder.path)
        for path in (output / FOLDER, *missing):
            with contextlib.suppress(OSError):  # another probe is in it
                path.rmdir()


def _out_of_memory(failure: dict[str, Any]) -> bool:
    """Whether a rank failed for lack of memory; the kernel kills where a machine has none left."""
    return failure["exit_code"] == EXIT_MEMORY or failure.get("status") == -signal.SIGKILL


def _failed(ended: outcome.Outcome, folder: RunDir, document: "Document") -> UserError:
    failure = ended.failure
    if failure is not None and "key" in failure:
        return UserError(problems=[document.finding(failure["key"], failure["message"], failure["hint"])])
    hint = None if failure is None else failure["hint"]
    log = folder.rank_log(0 if failure is None else failure["rank"])
    print(outcome.tail(log if log.exists() else folder.launcher_log), file=sys.stderr)
    return UserError(f"the probe failed: {outcome.summary(ended)}", hint, exit_code=ended.code)


def _stopped(interrupts: int) -> int:
    return EXIT_STOPPED if interrupts == 1 else EXIT_INTERRUPTED

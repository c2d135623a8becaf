"""A run as SLURM knows it: submitted, asked for, and stopped."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from memlaunch.launcher.errors import EXIT_LAUNCH, UserError
from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir, read_lines

#: States that a job does not leave again by itself.
ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)

#: Those of a job that did not end by itself.
TAKEN_AWAY = frozenset(["CANCELLED", "DEADLINE", "PREEMPTED", "REVOKED", "TIMEOUT"])

#: Seconds that a command of SLURM may take.
LIMIT = 60


def inside(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in an allocation."""
    return "SLURM_JOB_ID" in environment


def is_first_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of those that ``srun`` may have started it with."""
    return environment.get("SLURM_PROCID", "0") == "0"


def submit(folder: RunDir, array: Sequence[RunDir] = ()) -> str:
    """Submit the job of a run; its number, which goes into the events too.

    Args:
        array: the runs of the tasks, where the job is an array.

    Raises:
        UserError: SLURM does not take it, or is not there.
    """
    argv = ["bash", str(folder.command), "--parsable"]
    environment = {**os.environ, ENVIRONMENT_VARIABLE: str(folder.path), "MEMLAUNCH_SUBMIT": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    # Of several clusters, the name follows the number.
    job = done.stdout.strip().rpartition("\n")[2].partition(";")[0]
    if done.returncode or not re.fullmatch(r"\d+", job):
        said = [line for line in done.stderr.splitlines() if not line.startswith("run folder: ")]
        raise UserError(
            f"the job was not submitted: {' '.join(said) or done.stdout.strip() or 'sbatch said nothing'}",
            "`cluster.slurm` says what is asked for; `sinfo` shows what there is",
            exit_code=EXIT_LAUNCH,
        )
    for index, task in enumerate(array):
        task.append_event("submitted", job=f"{job}_{index}")
    if not array:
        folder.append_event("submitted", job=job)
    return job


def of(folder: RunDir) -> str | None:
    """The number of the last job that was submitted for a run; None where there was none."""
    jobs = [event["job"] for event, _ in read_lines(folder.events) if event["event"] == "submitted"]
    return jobs[-1] if jobs else None


def state(job: str) -> str | None:
    """The state of a job, such as ``RUNNING``; None where SLURM has forgotten it.

    Raises:
        UserError: SLURM does not answer.
    """
    shown = _ask("scontrol", "show", "job", "--oneliner", job)
    if shown.returncode == 0:
        states = [w.partition("=")[2] for w in shown.stdout.split() if w.startswith("JobState=")]
        return states[0] if states else None
    if "Invalid job id" not in shown.stderr:
        raise UserError(
            f"SLURM does not say what became of job {job}: {shown.stderr.strip()}",
            "try again; `squeue` and `sacct` ask the same",
            exit_code=EXIT_LAUNCH,
        )
    return None


def ask_to_stop(job: str) -> None:
    """Ask the ranks of a job to stop; one that has not begun is cancelled."""
    if state(job) == "PENDING":
        end(job)
    else:
        _ask("scancel", "--quiet", "--signal=TERM", job)


def end(job: str) -> None:
    """Cancel a job."""
    _ask("scancel", "--quiet", job)


def requeue(job: str) -> None:
    """Put a job that runs back into the queue."""
    _ask("scontrol", "requeue", job)


def _ask(*argv: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT)
    except FileNotFoundError:
        raise UserError(
            f"`{argv[0]}` is not installed on this machine",
            "run this on a login node of the cluster",
            exit_code=EXIT_LAUNCH,
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"`{argv[0]}` did not answer within {LIMIT} seconds",
            "try again; `scontrol ping` asks whether SLURM is up",
            exit_code=EXIT_LAUNCH,
        ) from None

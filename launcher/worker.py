"""What every rank starts: it opens its log, meets the other ranks, trains, and says how it ended.

How a rank ended travels through ``events.jsonl`` in the run folder, since launchers do not pass exit statuses
on; the status here is only for them to see that it failed.
"""

import os
import sys
import traceback
from pathlib import Path

from memlaunch.launcher.errors import EXIT_FAILED, EXIT_JOB, EXIT_LAUNCH, EXIT_MEMORY
from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir


def main() -> int:
    """Run this rank; its exit status."""
    folder = RunDir(Path(os.environ[ENVIRONMENT_VARIABLE]))
    rank = int(os.environ.get("RANK", "0"))
    _log_to(folder.rank_log(rank))
    try:
        _train(folder)
    except BaseException as error:
        traceback.print_exc()
        code, details = _explain(error)
        folder.append_event("failed", rank=rank, exit_code=code, **details)
        return code
    return 0


def _train(folder: RunDir) -> None:
    from memlaunch.launcher import resolve
    from memlaunch.launcher.training import session, world

    resolved = resolve.load(folder.resolved)
    session.run(resolved, folder, world.join(resolved.job.cluster.device))
    world.leave()  # only here: after an error the other ranks may never come to leave


def _explain(error: BaseException) -> tuple[int, dict[str, str]]:
    """(exit code, what to write into the event) for an error that ended the rank."""
    message = str(error).strip() or type(error).__name__
    if isinstance(error, ImportError):
        return EXIT_LAUNCH, {"message": message, "hint": "install it where the ranks run"}
    from memlaunch.launcher.training.errors import JobMismatch, LaunchFailed, NotApplicable, TrainingFailed

    if isinstance(error, JobMismatch | NotApplicable):
        return EXIT_JOB, {"key": error.key, "message": message, "hint": error.hint}
    if isinstance(error, LaunchFailed):
        return EXIT_LAUNCH, {"message": message, "hint": error.hint}
    if _out_of_memory(error):
        hint = "lower `training.micro_batch_size`, checkpoint activations, or raise `strategy.zero.stage`"
        return EXIT_MEMORY, {"message": message, "hint": hint}
    if isinstance(error, TrainingFailed):
        return EXIT_FAILED, {"message": message, "hint": error.hint}
    if "loss scale" in message and ("minimum" in message or "smallest" in message):
        hint = "lower `training.learning_rate`, or use bf16; `strategy.precision.min_scale` is the bound"
        return EXIT_FAILED, {"message": message, "hint": hint}
    return EXIT_FAILED, {
        "message": f"{type(error).__name__}: {message}",
        "hint": "its traceback is in the log",
    }


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or on the host; libraries say it in different words."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _log_to(path: Path) -> None:
    """Send what this process and its libraries print to ``path``."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())

"""The work of a rank: it meets the other ranks, trains, and says how it ended.

:mod:`memlaunch.launcher.rank` starts it, and speaks for it where it cannot. How a rank ended travels through
``events.jsonl`` in the run folder; the status here is only for launchers to see that it failed.
"""

import contextlib
import errno
import os
import socket
import sys
import traceback
from pathlib import Path

from memlaunch.launcher.errors import EXIT_FAILED, EXIT_JOB, EXIT_LAUNCH, EXIT_MEMORY, EXIT_STOPPED
from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE, RunDir


def main() -> int:
    """Run this rank; its exit status."""
    folder = RunDir(Path(os.environ[ENVIRONMENT_VARIABLE]))
    rank = int(os.environ.get("RANK", "0"))
    try:
        arrived = _probe(folder) if folder.probe.exists() else _train(folder)
    except BaseException as error:
        traceback.print_exc()
        code, details = _explain(error)
        with contextlib.suppress(OSError):  # a full disk may be what ended it
            folder.append_event("failed", rank=rank, host=socket.gethostname(), exit_code=code, **details)
        return code
    return 0 if arrived else EXIT_STOPPED


def _train(folder: RunDir) -> bool:
    """Train; whether to the end, not only until somebody asked to stop."""
    from memlaunch.launcher import resolve
    from memlaunch.launcher.training import session, world

    resolved = resolve.load_run(folder)
    arrived = session.run(resolved, folder, world.join(resolved.job.cluster.device))
    world.leave()  # only here: after an error the other ranks may never come to leave
    return arrived


def _probe(folder: RunDir) -> bool:
    """Try whether the job fits."""
    from memlaunch.launcher import resolve
    from memlaunch.launcher.plan import probing
    from memlaunch.launcher.training import world

    resolved = resolve.load_run(folder)
    probing.run(resolved, folder, world.join(resolved.job.cluster.device))
    world.leave()
    return True


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
    if any(os.strerror(number) in message for number in (errno.ENOSPC, errno.EDQUOT)):
        return EXIT_FAILED, {"message": message, "hint": "make room, and go on with `--resume auto`"}
    return EXIT_FAILED, {
        "message": f"{type(error).__name__}: {message}",
        "hint": "its traceback is in the log",
    }


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or on the host; libraries say it in different words."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


if __name__ == "__main__":
    sys.exit(main())

"""A job file becomes running ranks.

For code of the user's: :class:`Entry`, a model of their own, and :func:`current_job`, the job that a training
script of their own is a rank of.
"""

from typing import TYPE_CHECKING

from memlaunch.launcher.entry import Entry

if TYPE_CHECKING:
    from os import PathLike

    from memlaunch.launcher.current import CurrentJob

__all__ = ["Entry", "current_job"]


def current_job(path: "str | PathLike[str] | None" = None) -> "CurrentJob":
    """The job that this process is a rank of: its batches, its optimizer, its DeepSpeed config.

    Args:
        path: a job file or a run folder, for a script that is started by hand; without it the run is the one
            that ``memlaunch run`` started this process for.

    Raises:
        NoJob: this is no run of memlaunch, and ``path`` names none.
        UserError: the job has a mistake, or cannot be shared by as many ranks as there are.
    """
    from memlaunch.launcher import current

    return current.job(path)

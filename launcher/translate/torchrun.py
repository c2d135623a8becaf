"""A resolved job as a torchrun command on one machine."""

import shlex
from typing import TYPE_CHECKING

from memlaunch.launcher.rundir import ENVIRONMENT_VARIABLE
from memlaunch.launcher.translate import shell

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

WORKER = "memlaunch.launcher.worker"


def argv(resolved: "ResolvedJob", python: str) -> list[str]:
    """The torchrun command line; the run folder and a free port are found when it starts."""
    return [
        python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes=1",
        f"--nproc-per-node={resolved.world_size}",
        "-m",
        WORKER,
    ]


def command(resolved: "ResolvedJob", python: str) -> str:
    """``command.sh``: runs the job by hand, and is what ``memlaunch run`` runs.

    Every value of the job is quoted; only the ``setup`` lines are the user's own shell.
    """
    cluster = resolved.job.cluster
    exports = {**cluster.env, "OMP_NUM_THREADS": str(resolved.threads_per_rank)}
    run_dir = f'{shlex.quote(python)} -m memlaunch.launcher.rundir "$here" "${{{ENVIRONMENT_VARIABLE}:-}}"'
    lines = [
        "#!/usr/bin/env bash",
        f"# Trains {shell.comment(resolved.job.name)} on {resolved.world_size} rank(s) of this machine.",
        f"# {ENVIRONMENT_VARIABLE} names the run folder; without it a new one is made.",
        "set -e",
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        *cluster.setup,
        *shell.exports(exports),
        f'{ENVIRONMENT_VARIABLE}="$({run_dir})"',
        f"export {ENVIRONMENT_VARIABLE}",
        f'echo "run folder: ${ENVIRONMENT_VARIABLE}" >&2',
        "exec " + shlex.join(argv(resolved, python)),
    ]
    return "\n".join(lines) + "\n"

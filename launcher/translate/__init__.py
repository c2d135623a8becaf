"""A resolved job becomes the files and command lines that run it; pure functions, text out."""

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob


def files(resolved: "ResolvedJob", python: str = sys.executable) -> dict[str, str]:
    """File name -> text of everything that a run of the job, in which nothing is open, is started with.

    Raises:
        ValueError, OSError: the user's template of an sbatch script has a mistake, or cannot be read.
    """
    from memlaunch.launcher.translate import deepspeed, mpirun, slurm, torchrun

    assert not resolved.open
    launchers = {"torchrun": torchrun, "deepspeed": deepspeed, "mpirun": mpirun, "slurm": slurm}
    launcher = launchers[resolved.job.cluster.launcher]
    texts = {"resolved.json": resolved.to_json(), **launcher.files(resolved, python)}
    if resolved.job.strategy.engine == "deepspeed":
        config = deepspeed.config(resolved, for_script=resolved.job.script is not None)
        texts["ds_config.json"] = json.dumps(config, indent=2) + "\n"
    if resolved.plan is not None:
        texts["plan.json"] = json.dumps(resolved.plan, indent=2) + "\n"
    return texts

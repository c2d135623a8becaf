"""Jobs on the test cluster, from the command line on its login node, under each launcher."""

import json
import sys
from pathlib import Path
from typing import Any

from memlaunch.deploy.testbed import Cluster, NodeProcess
from memlaunch.launcher import slurm_job
from memlaunch.launcher.rundir import RunDir, read_lines

LAUNCHERS = ("torchrun", "deepspeed", "mpirun", "slurm")
REVIEWS = Path(__file__).parents[2] / "examples" / "reviews"

#: A script that every rank runs; what it does first is up to each test.
SCRIPT = """
import json, os, pathlib, signal, socket, subprocess, sys, time
rank = int(os.environ["RANK"])
print(f"rank {rank} is up", flush=True)
"""
WAIT = "subprocess.Popen(['setsid', 'sleep', '600'])\ntime.sleep(600)\n"


def two_nodes(cluster: Cluster, launcher: str) -> dict[str, Any]:
    """The section ``cluster`` of a job for two nodes with one rank each."""
    where = {"nodes": 2} if launcher == "slurm" else {"hostfile": str(cluster.hostfile)}
    return {"launcher": launcher, "device": "cpu", "threads_per_rank": 1, **where}


def script_job(cluster: Cluster, folder: Path, launcher: str, body: str, **settings: Any) -> Path:
    """A job file in ``folder`` whose ranks run ``body``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(SCRIPT + body, encoding="utf-8")
    args = settings.pop("args", [])
    job = {"script": {"path": "train.py", "args": args}, "cluster": two_nodes(cluster, launcher) | settings}
    return write(folder, job)


def training_job(folder: Path, tokenizer_folder: Path, cluster: dict[str, Any], **training: Any) -> Path:
    """A job file in ``folder`` that trains a tiny model on real sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (REVIEWS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
    config = {
        "vocab_size": 30522,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    job = {
        "model": {"architecture": "bert", "config": config, "tokenizer": str(tokenizer_folder)},
        "data": {"train": "train.jsonl", "max_length": 24},
        "training": {"global_batch_size": 8, "micro_batch_size": 2, **training},
        "cluster": cluster,
    }
    return write(folder, job)


def write(folder: Path, job: dict[str, Any]) -> Path:
    path = folder / "job.json"
    path.write_text(json.dumps(job, indent=2), encoding="utf-8")
    return path


def memlaunch(
    cluster: Cluster, *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> NodeProcess:
    """Start the command on the login node; its stdout and stderr come together."""
    argv = [sys.executable, "-m", "memlaunch.launcher.cli", *map(str, arguments)]
    return cluster.start(cluster.head, argv, env=env, cwd=cwd)


def run(cluster: Cluster, job: Path, *arguments: object, env: dict[str, str] | None = None) -> NodeProcess:
    """Start ``memlaunch run``, which follows what goes to SLURM too."""
    return memlaunch(cluster, "run", job, "--wait", *arguments, env=env, cwd=job.parent)


def the_run(job: Path) -> RunDir:
    """The only run of ``job``."""
    (folder,) = (job.parent / "runs" / "job").iterdir()
    return RunDir(folder)


def events(folder: RunDir) -> list[str]:
    return [event["event"] for event, _ in read_lines(folder.events)]


def losses(folder: RunDir) -> list[float]:
    return [line["loss"] for line, _ in read_lines(folder.metrics) if "loss" in line]


def logs(folder: RunDir) -> str:
    """All that a run has printed, for the message of a test that fails."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.logs.iterdir()))


def slurm_says(cluster: Cluster, folder: RunDir) -> dict[str, str]:
    """What SLURM tells of the job of a run."""
    argv = ["scontrol", "show", "job", "--oneliner", slurm_job.of(folder) or "none"]
    return dict(word.partition("=")[::2] for word in cluster.on(cluster.head, argv).stdout.split())

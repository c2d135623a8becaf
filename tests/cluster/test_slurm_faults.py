"""Jobs that SLURM takes away go back into the queue, and end as if nothing had been."""

import time
from pathlib import Path
from typing import Any

import pytest

from memlaunch.deploy.testbed import Cluster
from memlaunch.launcher.rundir import RunDir, read_lines
from tests.cluster.jobs import events, logs, memlaunch, slurm_says, training_job, two_nodes
from tests.cluster.test_fanout import nothing_left, wait_until

pytestmark = pytest.mark.cluster

STEPS = 400


def submit(cluster: Cluster, folder: Path, tokenizer: Path, steps: int = STEPS, **settings: Any) -> RunDir:
    """Submit a job with a checkpoint every 20 steps, which may be queued again; its run folder."""
    slurm = {"requeue": True, **settings.pop("slurm", {})}
    cluster_section = two_nodes(cluster, "slurm") | {"slurm": slurm} | settings
    job = training_job(folder, tokenizer, cluster_section, max_steps=steps, learning_rate=1e-3)
    sets = ["--set=output.checkpoint_every_steps=20"]
    with memlaunch(cluster, "submit", job, *sets) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    return RunDir(Path(output.splitlines()[-1]))


def finish(cluster: Cluster, run: RunDir, seconds: float, steps: int = STEPS) -> None:
    """Wait until the job has ended well, with every step told exactly once."""
    wait_until(lambda: slurm_says(cluster, run)["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT"), seconds)
    assert slurm_says(cluster, run)["JobState"] == "COMPLETED", logs(run)
    assert [line["step"] for line, _ in read_lines(run.metrics)] == list(range(1, steps + 1))
    assert events(run)[-1] == "finished"
    assert events(run).count("resumed") >= 1
    nothing_left(cluster, 20)


def trained(run: RunDir, steps: int) -> bool:
    return run.metrics.exists() and run.last_step() >= steps


def test_a_job_that_is_requeued(cluster: Cluster, tmp_path: Path, tokenizer_folder: Path) -> None:
    run = submit(cluster, tmp_path, tokenizer_folder)
    wait_until(lambda: trained(run, 50), 120)
    cluster.on(cluster.head, ["scontrol", "requeue", slurm_says(cluster, run)["JobId"]])
    finish(cluster, run, 300)


def test_a_time_limit_that_is_shorter_than_the_job(
    cluster: Cluster, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """The signal comes up to a minute before it should, and the limit a minute behind it."""
    limit = {"time": "2", "signal": "TERM@30"}
    run = submit(cluster, tmp_path, tokenizer_folder, steps=4000, slurm=limit)
    finish(cluster, run, 900, steps=4000)
    assert "preempted" in events(run)


def test_a_node_that_is_drained(cluster: Cluster, tmp_path: Path, tokenizer_folder: Path) -> None:
    run = submit(cluster, tmp_path, tokenizer_folder, nodes=1, gpus_per_node=2)
    wait_until(lambda: trained(run, 50), 120)
    before = slurm_says(cluster, run)
    node = before["NodeList"]
    drain = ["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"]
    cluster.on(cluster.head, drain)
    time.sleep(1)
    assert slurm_says(cluster, run)["JobState"] == "RUNNING", "a node that is drained lets its jobs end"
    cluster.on(cluster.head, ["scontrol", "requeue", before["JobId"]])
    try:
        finish(cluster, run, 300)
        assert slurm_says(cluster, run)["NodeList"] != node
    finally:
        cluster.on(cluster.head, ["scontrol", "update", f"NodeName={node}", "State=RESUME"])


def test_a_node_that_is_lost(cluster: Cluster, tmp_path: Path, tokenizer_folder: Path) -> None:
    run = submit(cluster, tmp_path, tokenizer_folder)
    wait_until(lambda: trained(run, 50), 120)
    cluster.stop("node2")
    wait_until(lambda: slurm_says(cluster, run)["JobState"] == "PENDING", 120)
    cluster.restore("node2")
    finish(cluster, run, 300)

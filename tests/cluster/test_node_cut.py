"""A node that is cut off takes its run down; the run then goes on, and ends as if nothing had been."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memlaunch.deploy.testbed import Cluster
from memlaunch.launcher.rundir import RunDir, read_lines
from tests.cluster.jobs import logs, memlaunch, the_run, training_job, two_nodes
from tests.cluster.test_fanout import nothing_left, wait_until
from tests.test_kill_matrix import STRATEGIES, mathematics

STEPS = 120
EVERY = 10

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    "strategy",
    [name if name == "ZeRO-2" else pytest.param(name, marks=pytest.mark.hours) for name in STRATEGIES],
)
def test_a_node_that_is_cut_off(
    cluster: Cluster, tmp_path: Path, tokenizer_folder: Path, strategy: str
) -> None:
    whole = write(cluster, tmp_path / "whole", tokenizer_folder, strategy)
    assert run(cluster, whole) == 0
    job = write(cluster, tmp_path / "cut", tokenizer_folder, strategy)
    at = random.Random(strategy).randint(EVERY + 1, STEPS // 3)
    with memlaunch(cluster, "run", job) as process:
        wait_until(lambda: (job.parent / "runs").exists() and the_run(job).last_step() >= at, 120)
        cluster.cut("node2")
        try:
            output = process.communicate(timeout=120)[0]
            assert process.returncode == 5, output + logs(the_run(job))
            wait_until(lambda: not any(p.name().startswith("python") for p in cluster.processes("node2")), 60)
        finally:
            cluster.restore("node2")
    nothing_left(cluster, 20)
    assert run(cluster, job, "--resume", "auto") == 0, logs(the_run(job))
    events = [event for event, _ in read_lines(the_run(job).events)]
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    (resumed,) = (event["step"] for event in events if event["event"] == "resumed")
    assert resumed in saved
    assert resumed >= at - at % EVERY - EVERY, "only the work since the last checkpoint is repeated"
    assert mathematics(the_run(job)) == mathematics(the_run(whole))
    one, other = weights(the_run(whole)), weights(the_run(job))
    assert all(torch.equal(one[name], other[name]) for name in one)
    nothing_left(cluster, 20)


def write(cluster: Cluster, folder: Path, tokenizer: Path, strategy: str) -> Path:
    path = training_job(
        folder, tokenizer, two_nodes(cluster, "torchrun"), max_steps=STEPS, learning_rate=1e-3
    )
    job = json.loads(path.read_text())
    job |= {"strategy": STRATEGIES[strategy], "output": {"checkpoint_every_steps": EVERY}}
    path.write_text(json.dumps(job))
    return path


def run(cluster: Cluster, job: Path, *arguments: str) -> int:
    with memlaunch(cluster, "run", job, *arguments) as process:
        process.communicate(timeout=300)
    return process.returncode


def weights(folder: RunDir) -> dict[str, Any]:
    return load_file(folder.model / "model.safetensors")

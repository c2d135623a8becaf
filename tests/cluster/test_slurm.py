"""Jobs under a real SLURM: side by side, in allocations, in arrays, and ended from outside."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from memlaunch.deploy.testbed import Cluster
from memlaunch.launcher.rundir import RunDir
from tests.cluster.corpus import VALUES
from tests.cluster.jobs import (
    WAIT,
    events,
    logs,
    losses,
    memlaunch,
    run,
    script_job,
    slurm_says,
    the_run,
    training_job,
    two_nodes,
)
from tests.cluster.test_fanout import nothing_left, wait_until
from tests.cluster.test_jobs import asleep

pytestmark = pytest.mark.cluster

MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]


def submit(cluster: Cluster, *jobs: Path) -> list[RunDir]:
    """Submit jobs with the command; their run folders."""
    with memlaunch(cluster, "submit", *jobs) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    return [RunDir(Path(line)) for line in output.splitlines() if line.startswith("/")]


def state(cluster: Cluster, folder: RunDir) -> str:
    return slurm_says(cluster, folder)["JobState"]


def test_what_is_asked_of_slurm_arrives_as_it_is(cluster: Cluster, tmp_path: Path) -> None:
    asked = {"time": "0:05:00", "comment": VALUES["RUN"], "extra": ["--nice=0", "--wckey=it's #1"]}
    path = script_job(cluster, tmp_path, "slurm", "", slurm=asked)
    job = json.loads(path.read_text())
    job["name"] = 'it\'s "quoted" `twice` # $(touch pwned) %j'
    path.write_text(json.dumps(job))
    (folder,) = submit(cluster, path)
    wait_until(lambda: state(cluster, folder) == "COMPLETED", 60)
    number = slurm_says(cluster, folder)["JobId"]
    argv = ["squeue", "--states=all", f"--jobs={number}", "--noheader", "--format=%j|%k"]
    assert cluster.on(cluster.head, argv).stdout == f"{job['name']}|{VALUES['RUN']}\n"
    assert events(folder) == ["submitted", "started", "finished"]
    assert not list(tmp_path.rglob("pwned"))


def test_gpus_are_asked_for_where_there_are_some(cluster: Cluster, tmp_path: Path) -> None:
    show = "print(os.environ['SLURM_JOB_GPUS'], flush=True)"
    path = script_job(cluster, tmp_path, "slurm", show, device="cuda", gpus_per_node=2)
    (folder,) = submit(cluster, path)
    wait_until(lambda: state(cluster, folder) in ("COMPLETED", "FAILED"), 60)
    assert folder.rank_log(3).read_text().split()[-1] == "0,1", logs(folder)


def test_two_jobs_at_once_both_train(cluster: Cluster, tmp_path: Path, tokenizer_folder: Path) -> None:
    settings = two_nodes(cluster, "slurm")
    paths = [training_job(tmp_path / n, tokenizer_folder, settings, max_steps=40) for n in ("a", "b")]
    folders = [submit(cluster, path)[0] for path in paths]
    wait_until(lambda: all(state(cluster, folder) == "RUNNING" for folder in folders), 60)
    nodes = {slurm_says(cluster, folder)["NodeList"] for folder in folders}
    assert nodes == {"node[1-2]"}
    wait_until(lambda: all(state(cluster, folder) == "COMPLETED" for folder in folders), 120)
    for folder in folders:
        assert len(losses(folder)) == 40
        assert events(folder)[-1] == "finished"
    assert losses(folders[0]) == losses(folders[1])
    nothing_left(cluster)


@pytest.mark.parametrize("inside", ["salloc", "sbatch"])
def test_an_allocation_is_used_from_inside(cluster: Cluster, tmp_path: Path, inside: str) -> None:
    path = script_job(cluster, tmp_path, "slurm", "print(os.environ['SLURM_JOB_ID'], flush=True)")
    train = [*MEMLAUNCH, "run", str(path)]
    if inside == "salloc":
        done = cluster.on(cluster.head, ["salloc", "--nodes=2", "--quiet", *train])
        assert done.stdout == f"{the_run(path).path}\n"
    else:
        script = tmp_path / "mine.sbatch"
        script.write_text(
            f"#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\nsrun {' '.join(train)}\n"
        )
        cluster.on(cluster.head, ["sbatch", "--wait", "--output=%x.log", str(script)], cwd=tmp_path)
    ranks = [the_run(path).rank_log(rank).read_text().split()[-1] for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert sorted(events(the_run(path))) == ["finished", "started"]
    nothing_left(cluster)


def test_a_stop_inside_an_allocation_ends_the_step(cluster: Cluster, tmp_path: Path) -> None:
    path = script_job(cluster, tmp_path, "slurm", WAIT)
    argv = [
        "salloc",
        "--nodes=2",
        "--quiet",
        "bash",
        "-c",
        f"exec {' '.join([*MEMLAUNCH, 'run', str(path)])}",
    ]
    with cluster.start(cluster.head, argv) as process:
        wait_until(lambda: asleep(cluster) == 2, 60)
        launcher = next(p for p in cluster.processes("head") if p.cmdline()[1:4] == [*MEMLAUNCH[1:], "run"])
        launcher.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 75
    nothing_left(cluster, 20)


@pytest.mark.parametrize("by", ["scancel", "stop", "time limit"])
def test_a_job_that_is_ended_from_outside_leaves_nothing(cluster: Cluster, tmp_path: Path, by: str) -> None:
    limit: dict[str, Any] = {"slurm": {"time": "1"}} if by == "time limit" else {}
    path = script_job(cluster, tmp_path, "slurm", WAIT, **limit)
    with run(cluster, path) as process:
        wait_until(lambda: asleep(cluster) == 2, 60)
        folder = the_run(path)
        if by == "scancel":
            cluster.on(cluster.head, ["scancel", slurm_says(cluster, folder)["JobId"]])
        elif by == "stop":
            with memlaunch(cluster, "stop", folder.path) as stop:
                assert stop.wait(60) == 0
        output = process.communicate(timeout=150)[0]
    assert process.returncode == 75, output + logs(folder)
    ended = {"scancel": "CANCELLED", "stop": "FAILED", "time limit": "TIMEOUT"}[by]
    assert state(cluster, folder) == ended
    nothing_left(cluster, 20)


def test_an_array_runs_each_job_in_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    body = "print(pathlib.Path.cwd().name, flush=True)"
    paths = [script_job(cluster, tmp_path / name, "slurm", body) for name in ("it's one", "$(touch pwned)")]
    folders = submit(cluster, *paths)
    wait_until(lambda: all(state(cluster, folder) == "COMPLETED" for folder in folders), 60)
    for folder, path in zip(folders, paths, strict=True):
        assert folder == the_run(path)
        assert folder.rank_log(1).read_text().splitlines()[-1] == path.parent.name
        assert events(folder) == ["submitted", "started", "finished"]
    different = script_job(cluster, tmp_path / "other", "slurm", body, slurm={"time": "7"})
    with memlaunch(cluster, "submit", paths[0], different) as process:
        assert "an array asks SLURM for one thing" in process.communicate(timeout=60)[0]
    assert process.returncode == 2


def test_a_template_of_the_users(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "mine.sbatch.j2").write_text(
        '{% extends "multinode.sbatch.j2" %}\n'
        "{% block directives %}\n#SBATCH --comment=mine\n{% endblock %}\n"
    )
    path = script_job(cluster, tmp_path, "slurm", "", slurm={"template": "mine.sbatch.j2"})
    (folder,) = submit(cluster, path)
    wait_until(lambda: state(cluster, folder) == "COMPLETED", 60)
    assert slurm_says(cluster, folder)["Comment"] == "mine"


def test_what_sbatch_refuses_is_an_error(cluster: Cluster, tmp_path: Path) -> None:
    path = script_job(cluster, tmp_path, "slurm", "", slurm={"partition": "no such; partition"})
    with run(cluster, path) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 4
    assert "error: the job was not submitted: sbatch: error: invalid partition specified" in output
    assert "hint: " in output

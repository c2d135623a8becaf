"""One job file on two real nodes under every launcher: what it trains, what arrives, and how it ends."""

import json
import shutil
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from memlaunch.deploy.testbed import Cluster
from memlaunch.launcher import rundir
from tests.cluster.corpus import VALUES
from tests.cluster.jobs import (
    LAUNCHERS,
    REVIEWS,
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

pytestmark = pytest.mark.cluster

every_launcher = pytest.mark.parametrize("launcher", LAUNCHERS)


# Training


@pytest.fixture(scope="module")
def on_one_machine(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the example on two ranks of one machine."""
    return train_example(cluster, tmp_path_factory.mktemp("one"), {"gpus_per_node": 2, "device": "cpu"})


def train_example(cluster: Cluster, folder: Path, settings: dict[str, Any]) -> list[float]:
    """The losses of ``examples/reviews/job.json``, with other keys of ``cluster`` and nothing else."""
    example = folder / "reviews"
    shutil.copytree(REVIEWS, example, ignore=shutil.ignore_patterns("runs"))
    sets = [f"--set=cluster.{name}={json.dumps(value)}" for name, value in settings.items()]
    sets += ["--set=training.micro_batch_size=16"]  # each launcher would plan it anew
    with run(cluster, example / "job.json", *sets) as process:
        output = process.communicate(timeout=900)[0]
    (folder,) = (example / "runs" / "reviews").iterdir()
    assert process.returncode == 0, output + logs(rundir.RunDir(folder))
    assert output.splitlines()[-1] == str(folder)
    assert events(rundir.RunDir(folder))[-1] == "finished"
    return losses(rundir.RunDir(folder))


@every_launcher
def test_the_example_trains_the_same_under_every_launcher(
    cluster: Cluster, tmp_path: Path, launcher: str, on_one_machine: list[float]
) -> None:
    assert len(on_one_machine) == 60
    here = train_example(cluster, tmp_path, {**two_nodes(cluster, launcher), "gpus_per_node": 1})
    assert here == pytest.approx(on_one_machine, rel=1e-5)
    nothing_left(cluster)


# What arrives


@every_launcher
def test_words_and_environment_arrive_as_they_are_and_nothing_is_run(
    cluster: Cluster, tmp_path: Path, launcher: str
) -> None:
    folder = tmp_path / "a job's $(touch pwned) folder; 100%j"
    report = """
seen = {"host": socket.gethostname(), "words": sys.argv[1:], "env": dict(os.environ), "folder": os.getcwd()}
pathlib.Path(f"{rank}.json").write_text(json.dumps(seen))
"""
    words = list(VALUES.values())
    passed = {"SECRET": f"never-written {VALUES['RUN']}", "NEWS": VALUES["NEWLINES"], "NOTHING": ""}
    ours = {f"OUR_{name}": value for name, value in VALUES.items()}
    job = script_job(
        cluster,
        folder,
        launcher,
        report,
        args=words,
        env=ours,
        pass_env=[*passed, "NOT_SET"],
        setup=["cat; IN_SETUP='a b'", "export FROM_SETUP=1"],
    )
    # As if from within a job of SLURM, and a rank of MPI.
    inherited = {"SLURM_NNODES": "7", "SBATCH_PARTITION": "nowhere", "PMIX_RANK": "3", "OTHER": "stays"}
    with run(cluster, job, env={**passed, **inherited}) as process:
        output = process.communicate(timeout=120)[0]
    folder = the_run(job).path.parents[2]
    assert process.returncode == 0, output + logs(the_run(job))
    for rank, node in enumerate(cluster.nodes):
        seen = json.loads((folder / f"{rank}.json").read_text())
        assert seen["host"] == node
        assert seen["folder"] == str(folder)
        assert seen["words"] == words
        assert {name: seen["env"].get(name) for name in ours} == ours
        assert {name: seen["env"].get(name) for name in passed} == passed
        assert seen["env"]["FROM_SETUP"] == "1"
        assert seen["env"]["WORLD_SIZE"] == "2"
        assert seen["env"]["LOCAL_RANK"] == "0"
        assert not {"OTHER", "NOT_SET", "PMIX_RANK", "IN_SETUP"} & set(seen["env"])
    assert not list(tmp_path.rglob("pwned"))
    assert not (cluster.home / "pwned").exists()
    written = [path for path in the_run(job).path.rglob("*") if path.is_file()]
    assert not any("never-written" in path.read_text() for path in written)
    private = [path for path in written if path.parent.name == "launch"]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    nothing_left(cluster)


# Failures


@every_launcher
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("sys.exit(3)", "ended with exit status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9 (Killed)"),
        ("raise RuntimeError('no more')", "ended with exit status 1"),
    ],
    ids=["status", "signal", "exception"],
)
def test_a_rank_that_fails_ends_the_run_and_is_named(
    cluster: Cluster, tmp_path: Path, launcher: str, failure: str, words: str
) -> None:
    body = f"if rank == 1:\n    time.sleep(1)\n    print('last words', flush=True)\n    {failure}\n{WAIT}"
    job = script_job(cluster, tmp_path, launcher, body)
    with run(cluster, job) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 5, output + logs(the_run(job))
    assert f"rank 1 on node2: error: {words}\n" in output
    assert f"the last lines of {the_run(job).rank_log(1)}:\n" in output
    assert "  last words\n" in output
    nothing_left(cluster, 20)
    if launcher == "slurm":
        assert slurm_says(cluster, the_run(job))["ExitCode"] == "5:0"


@every_launcher
def test_a_worker_that_is_killed_in_training_is_named(
    cluster: Cluster, tmp_path: Path, tokenizer_folder: Path, launcher: str
) -> None:
    job = training_job(tmp_path, tokenizer_folder, two_nodes(cluster, launcher), max_steps=100_000)
    with run(cluster, job) as process:
        wait_until(lambda: len(steps(job)) > 2, 60)
        workers = [p for p in cluster.processes("node2") if "memlaunch.launcher.worker" in p.cmdline()]
        assert len(workers) == 1
        workers[0].kill()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 5, output + logs(the_run(job))
    assert "rank 1 on node2: error: killed by signal 9 (Killed)\n" in output
    nothing_left(cluster, 20)


def steps(job: Path) -> list[float]:
    """The losses of the only run of ``job``, none before there is one."""
    return losses(the_run(job)) if (job.parent / "runs").exists() else []


@every_launcher
def test_what_a_rank_finds_wrong_is_told_where_it_stands(
    cluster: Cluster, tmp_path: Path, tokenizer_folder: Path, launcher: str
) -> None:
    job = training_job(tmp_path, tokenizer_folder, two_nodes(cluster, launcher))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("not json\n")
    with run(cluster, job) as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert "train.jsonl:61: not a line of JSON" in output
    assert "Traceback" not in output
    nothing_left(cluster, 20)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun"])
def test_a_node_that_is_not_there_is_a_failed_launch(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    job = script_job(cluster, tmp_path, launcher, WAIT)
    cluster.stop("node2")
    try:
        with run(cluster, job) as process:
            output = process.communicate(timeout=100)[0]
        assert process.returncode == 4, output + logs(the_run(job))
        assert "node2" in output
    finally:
        cluster.restore("node2")
    nothing_left(cluster, 20)


# Stopping


@every_launcher
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_everything(
    cluster: Cluster, tmp_path: Path, tokenizer_folder: Path, launcher: str, number: signal.Signals
) -> None:
    job = training_job(tmp_path, tokenizer_folder, two_nodes(cluster, launcher), max_steps=100_000)
    with run(cluster, job) as process:
        wait_until(lambda: len(steps(job)) > 2, 60)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output + logs(the_run(job))
    assert output.splitlines()[-1] == str(the_run(job).path)
    nothing_left(cluster, 20)


@every_launcher
def test_a_second_ctrl_c_ends_what_does_not_listen(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    job = script_job(cluster, tmp_path, launcher, f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WAIT}")
    with run(cluster, job) as process:
        wait_until(lambda: asleep(cluster) == 2, 60)
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output + logs(the_run(job))
    nothing_left(cluster, 60)


def asleep(cluster: Cluster) -> int:
    """How many ranks wait on the nodes, by what they have started."""
    return sum(p.name() == "sleep" for node in cluster.nodes for p in cluster.processes(node))


@every_launcher
def test_the_end_of_the_command_is_the_end_of_the_ranks(
    cluster: Cluster, tmp_path: Path, launcher: str
) -> None:
    if launcher == "slurm":
        pytest.skip("a job of SLURM goes on without the command that follows it")
    job = script_job(cluster, tmp_path, launcher, WAIT)
    with run(cluster, job) as process:
        wait_until(lambda: asleep(cluster) == 2, 60)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    nothing_left(cluster, 60)


# From the login node


@every_launcher
def test_status_logs_and_stop(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    job = script_job(cluster, tmp_path, launcher, WAIT)

    def ask(*words: object) -> str:
        with memlaunch(cluster, *words, cwd=tmp_path) as asked:
            return str(asked.communicate(timeout=60)[0])

    with run(cluster, job) as process:
        wait_until(lambda: asleep(cluster) == 2, 60)
        run_folder = the_run(job).path
        shown = json.loads(ask("status", run_folder, "--json"))
        assert (shown["run"], shown["state"]) == (str(run_folder), "running")
        assert f"runs/job/{run_folder.name}  running" in ask("status")
        assert ask("logs", run_folder, "--rank", 1) == "rank 1 is up\n"
        with memlaunch(cluster, "logs", "-f", run_folder) as following:
            assert "stop" in ask("stop", run_folder)
            assert following.communicate(timeout=60)[0].startswith("rank 0 is up\n")
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads(ask("status", run_folder, "--json"))["state"] == "stopped"
    assert "does not run: stopped" in ask("stop", run_folder)
    nothing_left(cluster, 60)


def test_what_is_translated_runs_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    for launcher in LAUNCHERS:
        folder = tmp_path / launcher
        job = script_job(cluster, folder, launcher, "")
        with memlaunch(cluster, "translate", job, "--out", folder / "by hand") as process:
            process.communicate(timeout=60)
        wait = ["--wait"] if launcher == "slurm" else []
        done = cluster.on(cluster.head, ["bash", str(folder / "by hand" / "command.sh"), *wait])
        assert str(the_run(job).path) in done.stderr
        assert sorted(events(the_run(job))) == ["finished", "started"]
        assert the_run(job).rank_log(1).read_text() == "rank 1 is up\n"
    assert sys.executable in (tmp_path / "mpirun" / "by hand" / "node.sh").read_text()


def test_mpi_ranks_of_other_versions_do_not_start(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other" / "transformers-4.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    setup = [f'if [ "$(hostname)" = node2 ]; then export PYTHONPATH={other.parent}; fi']
    job = script_job(cluster, tmp_path, "mpirun", "", setup=setup)
    with run(cluster, job) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 4, output + logs(the_run(job))
    assert (
        f"error: transformers is {metadata.version('transformers')} on node1 and 4.0.0 on node2\n" in output
    )
    assert "started" not in events(the_run(job))
    nothing_left(cluster, 20)


def test_ranks_that_mpi_does_not_know_do_not_start(cluster: Cluster, tmp_path: Path) -> None:
    """As when mpi4py has found the library of another MPI: each rank takes itself for the only one."""
    setup = ["for name in $(compgen -e PMIX_) $(compgen -e OMPI_MCA); do unset $name; done"]
    job = script_job(cluster, tmp_path, "mpirun", "", setup=setup)
    with run(cluster, job) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 4, output + logs(the_run(job))
    assert "error: mpirun started 2 ranks, and mpi4py sees 1\n" in output
    nothing_left(cluster, 20)

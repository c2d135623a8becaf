"""Our sbatch scripts under a real SLURM: they run, values arrive as they are, and jobs end as they should."""

import json
import sys
import time
from pathlib import Path

import pytest

from memlaunch.deploy.testbed import Cluster, TestbedError
from memlaunch.launcher.translate import shell, slurm
from memlaunch.launcher.translate.slurm import Allocation
from tests.cluster.corpus import REPORT, VALUES
from tests.cluster.test_fanout import NEST, counts, nothing_left, wait_until

pytestmark = pytest.mark.cluster

GUARD = (sys.executable, "-m", "memlaunch.launcher.node")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder whose name neither bash nor SLURM takes as it is, unless it is quoted."""
    return make_run(tmp_path / "a run's $(touch pwned) %j folder")


def make_run(folder: Path) -> Path:
    (folder / "launch").mkdir(parents=True)
    (folder / "logs").mkdir()
    return folder


def prepare(run: Path, command: list[str], script: str) -> Path:
    """Write what a run is started with; the path of ``command.sh``."""
    launch = run / "launch"
    (launch / "node.sh").write_text(shell.node_script(about="a test", command=[*GUARD, *command], env=VALUES))
    (launch / "job.sbatch").write_text(script)
    (launch / "command.sh").write_text(slurm.submit(["false"]))
    return launch / "command.sh"


def two_nodes(**parameters: object) -> str:
    allocation = Allocation.of({"time": "5", "cpus_per_task": 1, **parameters})
    return slurm.script("multinode", allocation, name="test", nodes=2, python=sys.executable)


def submit(cluster: Cluster, run: Path, *options: str) -> str:
    """The number of the job."""
    argv = ["bash", str(run / "launch" / "command.sh"), "--parsable", *options]
    return cluster.on(cluster.head, argv, env={"MEMLAUNCH_RUN_DIR": str(run)}).stdout.strip()


def state(cluster: Cluster, job: str) -> str:
    shown = cluster.on(cluster.head, ["scontrol", "show", "job", "--oneliner", job]).stdout
    return next(word.partition("=")[2] for word in shown.split() if word.startswith("JobState="))


def output(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "logs").iterdir()))


def test_adversarial_values_arrive_as_they_are(cluster: Cluster, run_folder: Path) -> None:
    text = slurm.script(
        "multinode",
        Allocation(
            time="0:05:00",
            cpus_per_task=1,
            gpus_per_node=1,
            comment=VALUES["RUN"],
            extra=("--nice=0", "--wckey=it's #1"),
        ),
        name=VALUES["QUOTES"] + " # $(touch pwned) %j",
        nodes=2,
        python=sys.executable,
        about="first\n#SBATCH --hold",
        pass_env=["SECRET", "LIST"],
    )
    words = list(VALUES.values())
    command = prepare(run_folder, [sys.executable, "-c", REPORT, str(run_folder), *words], text)
    env = {
        "MEMLAUNCH_RUN_DIR": str(run_folder),
        "SECRET": VALUES["NEWLINES"],
        "OTHER": "stays",
        # as if submitted from inside another job
        "SLURM_CPU_BIND": "none",
        "SBATCH_PARTITION": "nowhere",
        "SLURM_NNODES": "7",
    }
    done = cluster.on(cluster.head, ["bash", str(command), "--wait"], env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + output(run_folder)
    job = done.stdout.split()[-1]
    shown = cluster.on(
        cluster.head, ["squeue", "--states=all", f"--jobs={job}", "--noheader", "--format=%j|%k"]
    )
    assert shown.stdout == f"{VALUES['QUOTES']} # $(touch pwned) %j|{VALUES['RUN']}\n"
    for rank, node in enumerate(cluster.nodes):
        seen = json.loads((run_folder / f"{rank}.json").read_text())
        assert seen["host"] == node
        assert seen["words"] == words
        assert {name: seen["env"].get(name) for name in VALUES} == VALUES
        assert seen["env"]["SECRET"] == VALUES["NEWLINES"]
        assert seen["env"]["MASTER_ADDR"] == "node1"
        assert seen["env"]["SLURM_CPUS_PER_TASK"] == "1"
        assert seen["env"]["SLURM_NNODES"] == "2"
        assert "OTHER" not in seen["env"]
        assert "SLURM_CPU_BIND_LIST" not in seen["env"] or seen["env"]["SLURM_CPU_BIND"] != "none"
    assert not list(run_folder.parent.rglob("pwned"))


def test_two_jobs_at_once_meet_at_ports_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    meet = (
        "import json, os, sys, torch.distributed as d; rank = int(os.environ['SLURM_PROCID'])\n"
        "d.init_process_group('gloo', rank=rank, world_size=2)\n"
        "seen = [None, None]; d.all_gather_object(seen, os.environ['SLURM_JOB_ID'])\n"
        "print(seen, flush=True)\n"
        "d.destroy_process_group()"
    )
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    jobs = []
    for run in runs:
        prepare(run, [sys.executable, "-c", meet], two_nodes())
        jobs.append(submit(cluster, run))
    wait_until(lambda: {state(cluster, job) for job in jobs} == {"COMPLETED"}, 90)
    for run, job in zip(runs, jobs, strict=True):
        assert output(run).count(f"['{job}', '{job}']") == 2
    nothing_left(cluster)


def test_an_allocation_is_used_from_inside(cluster: Cluster, run_folder: Path) -> None:
    command = prepare(run_folder, ["sh", "-c", 'echo "$SLURM_PROCID of $SLURM_JOB_ID"'], two_nodes())
    salloc = ["salloc", "--nodes=2", "--quiet", "bash", str(command)]
    done = cluster.on(cluster.head, salloc, env={"MEMLAUNCH_RUN_DIR": str(run_folder)})
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == ["0", "1"]


@pytest.mark.parametrize("failure", ["exit 3", "kill -9 $$"])
def test_a_failure_on_one_node_ends_the_job(cluster: Cluster, run_folder: Path, failure: str) -> None:
    script = f'if [ "$SLURM_PROCID" = 1 ]; then sleep 1; {failure}; fi; {NEST}'
    command = prepare(run_folder, ["sh", "-c", script], two_nodes())
    started = time.monotonic()
    done = cluster.on(
        cluster.head,
        ["bash", str(command), "--wait"],
        env={"MEMLAUNCH_RUN_DIR": str(run_folder)},
        check=False,
    )
    # The largest status of all tasks, those that were ended too.
    assert done.returncode in (3, 137, 143), output(run_folder)
    assert time.monotonic() - started < 60
    nothing_left(cluster, 20)


def test_scancel_leaves_nothing(cluster: Cluster, run_folder: Path) -> None:
    prepare(run_folder, ["sh", "-c", NEST], two_nodes())
    job = submit(cluster, run_folder)
    wait_until(lambda: counts(cluster) == [1, 1])
    cluster.on(cluster.head, ["scancel", job])
    wait_until(lambda: state(cluster, job) == "CANCELLED", 30)
    nothing_left(cluster, 20)


def test_a_stop_that_is_asked_for_reaches_the_ranks(cluster: Cluster, run_folder: Path) -> None:
    polite = "trap 'echo stopping; sleep 1; exit 75' TERM; echo up; while :; do sleep 0.1; done"
    text = slurm.script("preemptible", Allocation(time="5"), name="test", nodes=2, python=sys.executable)
    prepare(
        run_folder,
        ["bash", "-c", f'[ "${{SLURM_RESTART_COUNT:-0}}" = 1 ] && echo again || {{ {polite}; }}'],
        text,
    )
    job = submit(cluster, run_folder)
    wait_until(lambda: output(run_folder).count("up") == 2)
    cluster.on(cluster.head, ["scancel", "--signal=TERM", f"{job}.1"])
    wait_until(lambda: output(run_folder).count("stopping") == 2)
    wait_until(lambda: state(cluster, job) == "PENDING")
    cluster.on(cluster.head, ["scancel", job])  # it would run again two minutes later
    nothing_left(cluster, 20)


def test_an_array_gives_each_task_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("it's one", "$(touch pwned)")]
    text = slurm.script(
        "array",
        Allocation(time="5", output=str(tmp_path / "out-%a")),
        name="test",
        nodes=1,
        python=sys.executable,
        runs=[str(run) for run in runs],
        at_once=1,
    )
    for run in runs:
        prepare(run, ["sh", "-c", 'echo "$SLURM_ARRAY_TASK_ID" > "$MEMLAUNCH_RUN_DIR/task"'], text)
    cluster.on(cluster.head, ["sbatch", "--wait", str(runs[0] / "launch" / "job.sbatch")], cwd=tmp_path)
    assert [(run / "task").read_text() for run in runs] == ["0\n", "1\n"]


def test_what_sbatch_refuses_is_an_error(cluster: Cluster, run_folder: Path) -> None:
    prepare(run_folder, ["true"], two_nodes(partition="no such; partition"))
    with pytest.raises(TestbedError, match="invalid partition"):
        submit(cluster, run_folder)
    assert not list((run_folder / "logs").iterdir())

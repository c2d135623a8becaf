"""Ranks under a real mpirun on two nodes: what arrives there, and that nothing stays there."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from memlaunch.deploy.testbed import Cluster
from memlaunch.launcher.hostfile import read
from memlaunch.launcher.translate import mpirun, shell
from tests.cluster.corpus import REPORT, VALUES
from tests.cluster.test_fanout import NEST, counts, nothing_left, wait_until

pytestmark = pytest.mark.cluster

GUARD = (sys.executable, "-m", "memlaunch.launcher.node")


def argv(cluster: Cluster, command: list[str], *names: str) -> list[str]:
    kind = mpirun.kind_of(cluster.on(cluster.head, mpirun.VERSION).stdout)
    return mpirun.argv(kind, command, ranks=2, hosts=read(cluster.hostfile), pass_env=names)


def test_words_and_environment_arrive_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "it's $(touch pwned)"
    (folder / "launch").mkdir(parents=True)
    words = list(VALUES.values())
    script = folder / "launch" / "node.sh"
    ours = {f"OUR_{name}": value for name, value in VALUES.items()}
    command = [*GUARD, sys.executable, "-c", REPORT, str(folder), *words]
    script.write_text(shell.node_script(about="a test", command=command, env=ours))
    env = {**VALUES, "OTHER": "stays"}
    cluster.on(cluster.head, argv(cluster, ["bash", str(script)], *VALUES), env=env, cwd=tmp_path)
    for rank, node in enumerate(cluster.nodes):
        seen = json.loads((folder / f"{rank}.json").read_text())
        assert seen["host"] == node
        assert seen["words"] == words
        assert {name: seen["env"].get(name) for name in VALUES} == VALUES
        assert {name: seen["env"].get(name) for name in ours} == ours
        assert "OTHER" not in seen["env"]
    assert not list(tmp_path.rglob("pwned"))
    assert not (cluster.home / "pwned").exists()


@pytest.mark.parametrize(("failure", "status"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_a_failure_on_one_host_ends_the_others(cluster: Cluster, failure: str, status: int) -> None:
    script = f'if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then sleep 1; {failure}; fi; {NEST}'
    started = time.monotonic()
    done = cluster.on(cluster.head, argv(cluster, [*GUARD, "sh", "-c", script]), check=False)
    assert done.returncode == status, done.stderr
    assert time.monotonic() - started < 60
    nothing_left(cluster, 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_mpirun_is_the_end_of_the_ranks(cluster: Cluster, number: int) -> None:
    with cluster.start(cluster.head, argv(cluster, [*GUARD, "sh", "-c", NEST])) as process:
        wait_until(lambda: counts(cluster) == [1, 1])
        process.send_signal(number)
        process.communicate(timeout=60)
    nothing_left(cluster, 20)


def test_a_request_to_stop_reaches_the_ranks(cluster: Cluster) -> None:
    polite = "trap 'sleep 3; echo stopped; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    with cluster.start(cluster.head, argv(cluster, [*GUARD, "bash", "-c", polite])) as process:
        wait_until(lambda: all(len(cluster.processes(node)) >= 3 for node in cluster.nodes))
        time.sleep(1)
        process.send_signal(signal.SIGUSR2)
        output = process.communicate(timeout=30)[0]
    assert output.count("stopped") == 2
    assert process.returncode == 0
    nothing_left(cluster, 20)

"""The test cluster is what it claims to be: separate nodes with real daemons, and nothing stays behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from memlaunch.deploy.testbed import Cluster, TestbedError

pytestmark = pytest.mark.cluster

EVERYONE = ("head", "node1", "node2")

MEET = """
import socket
from mpi4py import MPI
world = MPI.COMM_WORLD
hosts = world.allgather(socket.gethostname())
print(world.rank, world.size, world.allreduce(world.rank + 1), *hosts, flush=True)
"""


def running(text: str) -> list[psutil.Process]:
    """The processes of this machine whose command line holds ``text``."""
    return [
        found for found in psutil.process_iter(["cmdline"]) if text in " ".join(found.info["cmdline"] or ())
    ]


def soon(condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` comes true within 10 seconds."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(done.stdout.splitlines())


@pytest.mark.parametrize("node", EVERYONE)
def test_each_node_has_its_own_name_address_and_processes(cluster: Cluster, node: str) -> None:
    assert cluster.on(node, ["hostname"]).stdout == f"{node}\n"
    addresses = {each: cluster.on(each, ["hostname", "-I"]).stdout for each in EVERYONE}
    assert len(set(addresses.values())) == len(EVERYONE)
    with cluster.start(node, ["sleep", "60"]) as sleep:
        assert soon(lambda: [process.name() for process in cluster.processes(node)] == ["sleep"])
        assert not any(cluster.processes(other) for other in EVERYONE if other != node)
        sleep.kill()
        assert sleep.wait(10) == -signal.SIGKILL
    assert not cluster.processes(node)


def test_what_a_node_keeps_to_itself(cluster: Cluster) -> None:
    cluster.on("node1", ["touch", "/run/mine", "/dev/shm/mine"])
    assert cluster.on("node2", ["ls", "/run/mine", "/dev/shm/mine"], check=False).returncode
    assert not Path("/run/mine").exists()


def test_a_program_gets_its_signals_and_its_status_comes_back(cluster: Cluster) -> None:
    with cluster.start(
        "node1", ["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep .1; done"]
    ) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        shell.terminate()
        assert shell.wait(10) == 7
    with cluster.start("node1", ["sleep", "60"]) as sleep:
        sleep.send_signal(signal.SIGKILL)
        assert sleep.wait(10) == -signal.SIGKILL
    with pytest.raises(TestbedError, match="ended with 3"):
        cluster.on("node2", ["sh", "-c", "exit 3"])


@pytest.mark.parametrize("node", EVERYONE)
def test_ssh_from_every_node_to_every_other(cluster: Cluster, node: str) -> None:
    for other in EVERYONE:
        assert cluster.on(node, ["ssh", other, "hostname"]).stdout == f"{other}\n"


def test_nobodys_own_ssh_folder_is_used(cluster: Cluster) -> None:
    assert cluster.on("node1", ["sh", "-c", "echo ~root"]).stdout == f"{cluster.home}\n"


def test_pdsh(cluster: Cluster) -> None:
    done = cluster.on(cluster.head, ["pdsh", "-S", "-R", "ssh", "-w", "node1,node2", "hostname"])
    assert lines(done) == ["node1: node1", "node2: node2"]


def test_srun_and_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    assert lines(cluster.on(cluster.head, ["srun", "--nodes=2", "hostname"])) == ["node1", "node2"]
    script = "#!/bin/bash\nsrun hostname\n"
    output = tmp_path / "output"
    sbatch = ["sbatch", "--wait", "--nodes=2", "--gpus-per-node=2", f"--output={output}"]
    cluster.on(cluster.head, sbatch, input=script)
    assert sorted(output.read_text().split()) == ["node1", "node2"]


def test_mpirun_with_mpi4py(cluster: Cluster) -> None:
    argv = ["mpirun", "--host", "node1:1,node2:1", "-np", "2", sys.executable, "-c", MEET]
    assert lines(cluster.on(cluster.head, argv)) == ["0 2 3 node1 node2", "1 2 3 node1 node2"]


def test_a_node_that_is_cut_off_goes_on_and_comes_back(cluster: Cluster) -> None:
    with cluster.start("node2", ["sleep", "60"]) as sleep:
        cluster.cut("node2")
        try:
            ssh = ["ssh", "-o", "ConnectTimeout=1", "node2", "hostname"]
            assert cluster.on("node1", ssh, check=False).returncode == 255
            assert sleep.poll() is None
        finally:
            cluster.restore("node2")
        assert cluster.on("node1", ["ssh", "node2", "hostname"]).stdout == "node2\n"


def test_a_node_that_is_stopped_ends_all_it_ran_and_comes_back(cluster: Cluster) -> None:
    with cluster.start("node2", ["sleep", "60"]) as sleep:
        assert soon(lambda: bool(cluster.processes("node2")))
        cluster.stop("node2")
        try:
            assert sleep.wait(10) == -signal.SIGKILL
            assert not cluster.processes("node2")
            with pytest.raises(TestbedError, match="node2 is not up"):
                cluster.on("node2", ["hostname"])
        finally:
            cluster.restore("node2")
    assert lines(cluster.on(cluster.head, ["srun", "--nodes=2", "hostname"])) == ["node1", "node2"]


def test_nothing_stays_behind(machine: None, tmp_path: Path) -> None:
    def traces() -> tuple[str, str]:
        links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
        return links, Path("/proc/self/mounts").read_text()

    before = traces()
    bed = Cluster.up(tmp_path / "bed", nodes=1)
    daemons = running(str(tmp_path))
    assert {"munged", "sshd", "slurmctld", "slurmd"} <= {process.name() for process in daemons}
    with bed.start("node1", ["sleep", "600"]) as sleep:
        assert traces() == before
        Cluster(tmp_path / "bed").down()  # as another process would
        assert sleep.wait(10) == -signal.SIGKILL
    bed.down()
    assert not any(process.is_running() for process in daemons)
    assert traces() == before
    assert not list(tmp_path.iterdir())


def test_two_clusters_stand_side_by_side_and_one_that_was_left_goes_first(
    cluster: Cluster, tmp_path: Path
) -> None:
    left = Cluster.up(tmp_path, nodes=1)
    with Cluster.up(tmp_path, nodes=1) as second:
        with pytest.raises(TestbedError):
            left.on("node1", ["hostname"])
        assert second.on("node1", ["ssh", "head", "hostname"]).stdout == "head\n"
        second.stop("node1")
        assert cluster.on("head", ["ssh", "node1", "hostname"]).stdout == "node1\n"
    left.down()


def test_a_cluster_that_is_bound_ends_with_its_owner(machine: None, tmp_path: Path) -> None:
    code = (
        "import os, sys; from memlaunch.deploy.testbed import Cluster;"
        "Cluster.up(sys.argv[1], nodes=1, bound=True); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert soon(lambda: not running(str(tmp_path)))

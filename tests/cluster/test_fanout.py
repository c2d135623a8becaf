"""One script on every host over ssh: what arrives there, and that nothing stays there, whatever ends it."""

import contextlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from memlaunch.deploy.testbed import Cluster, NodeProcess
from memlaunch.launcher.translate import shell, ssh
from memlaunch.launcher.translate.shell import Raw
from tests.cluster.corpus import REPORT, VALUES

pytestmark = pytest.mark.cluster

GUARD = (sys.executable, "-m", "memlaunch.launcher.node", "--leash")
FANOUT = (sys.executable, "-m", "memlaunch.launcher.fanout")

#: Leaves the session, and does not mind being asked to stop.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
NEST = f"setsid {shlex.quote(sys.executable)} -c {shlex.quote(STUBBORN)} & setsid setsid sleep 600 & wait"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder whose name a shell would take apart."""
    folder = tmp_path / "a run's $(touch pwned) folder"
    (folder / "launch").mkdir(parents=True)
    return folder


def fanout(
    cluster: Cluster,
    run_folder: Path,
    command: Sequence[str],
    *options: str,
    env: dict[str, str] | None = None,
) -> NodeProcess:
    script = run_folder / "launch" / "node.sh"
    text = shell.node_script(
        about="a test", command=[*GUARD, *command], env=VALUES, setup=["cat; IN_SETUP=1"]
    )
    script.write_text(text)
    return cluster.start(
        cluster.head, [*FANOUT, *options, str(cluster.hostfile), str(script)], env=env, cwd=run_folder
    )


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends while it is looked at
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def counts(cluster: Cluster) -> list[int]:
    """How many of the stubborn processes run on each node."""
    names = [[p.name() for p in cluster.processes(node)] for node in cluster.nodes]
    return [sum(name == "sleep" for name in on) for on in names]


def nothing_left(cluster: Cluster, seconds: float = 5) -> None:
    everyone = (cluster.head, *cluster.nodes)
    try:
        wait_until(lambda: not any(cluster.processes(node) for node in everyone), seconds)
    except AssertionError:
        left = {node: [p.cmdline() for p in cluster.processes(node)] for node in everyone}
        for node in everyone:
            for process in cluster.processes(node):
                process.kill()
        pytest.fail(f"still there: {left}")


def test_words_and_environment_arrive_as_they_are_and_nothing_is_run(
    cluster: Cluster, run_folder: Path
) -> None:
    words = list(VALUES.values())
    ranks = ["env", Raw('"RANK=$1"'), Raw('"ADDR=$2"'), Raw('"PORT=$3"')]
    secrets = {"SECRET": VALUES["RUN"], "NEWS": VALUES["NEWLINES"]}
    options = ("--pass-env=SECRET", "--pass-env=NEWS", "--pass-env=NOT_SET")
    command = [*ranks, sys.executable, "-c", REPORT, str(run_folder), *words]
    with fanout(cluster, run_folder, command, *options, env={**secrets, "OTHER": "stays"}) as process:
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
    for rank, node in enumerate(cluster.nodes):
        seen = json.loads((run_folder / f"{rank}.json").read_text())
        assert seen["host"] == node
        assert seen["words"] == words
        assert {name: seen["env"].get(name) for name in VALUES} == VALUES
        assert {name: seen["env"].get(name) for name in secrets} == secrets
        assert seen["env"]["ADDR"] == "node1"
        assert 20000 <= int(seen["env"]["PORT"]) < 30000
        assert seen["env"]["MEMLAUNCH_RUN_DIR"] == str(run_folder)
        assert "OTHER" not in seen["env"]
        assert "NOT_SET" not in seen["env"]
    assert not list(run_folder.rglob("pwned"))
    assert not (cluster.home / "pwned").exists()
    files = [path for path in run_folder.rglob("*") if path.suffix != ".json" and path.is_file()]
    assert not any("SECRET" in path.read_text() for path in files)


def test_ssh_hands_on_words_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    words = [value for value in VALUES.values() if len(value) < 10_000]
    say = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words]
    done = cluster.on(cluster.head, ssh.argv("node2", say), cwd=tmp_path)
    assert json.loads(done.stdout) == words


def test_ssh_options_are_the_users(cluster: Cluster) -> None:
    argv = ssh.argv("node1", ["true"], ["-p", "2222"])
    assert cluster.on(cluster.head, argv, check=False).returncode == 255


@pytest.mark.parametrize(
    ("failure", "status"), [("exit 3", 3), ("kill -9 $$", 137)], ids=["a status", "a signal"]
)
def test_a_failure_on_one_host_ends_the_others(
    cluster: Cluster, run_folder: Path, failure: str, status: int
) -> None:
    script = f'if [ "$0" = 1 ]; then sleep 1; {failure}; fi; {NEST}'
    started = time.monotonic()
    with fanout(cluster, run_folder, ["sh", "-c", script, Raw('"$1"')]) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == status
    assert "node1: up\n" in output
    assert f"node2: ended with exit status {status}\n" in output
    assert time.monotonic() - started < 30
    nothing_left(cluster)


def test_a_stop_is_handed_on_and_a_second_one_ends_everything(cluster: Cluster, run_folder: Path) -> None:
    stop = "trap 'echo stopping; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    with fanout(cluster, run_folder, ["bash", "-c", stop]) as process:
        wait_until(lambda: all(len(cluster.processes(node)) >= 3 for node in cluster.nodes))
        time.sleep(0.5)
        process.terminate()
        output = process.communicate(timeout=20)[0]
        assert process.returncode == 128 + signal.SIGTERM
    assert "node1: stopping\n" in output
    assert "node2: stopping\n" in output
    nothing_left(cluster)
    with fanout(cluster, run_folder, ["sh", "-c", f"trap '' TERM; {NEST}"]) as process:
        wait_until(lambda: counts(cluster) == [1, 1])
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert counts(cluster)[0] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
    nothing_left(cluster)


@pytest.mark.parametrize("victim", ["fanout", "ssh", "guard"])
def test_a_kill_of_any_part_ends_everything(cluster: Cluster, run_folder: Path, victim: str) -> None:
    with fanout(cluster, run_folder, ["sh", "-c", NEST]) as process:
        wait_until(lambda: counts(cluster) == [1, 1])
        if victim == "fanout":
            process.kill()
        elif victim == "ssh":
            next(p for p in cluster.processes("head") if p.name() == "ssh").kill()
        else:
            next(p for p in cluster.processes("node1") if "--leash" in p.cmdline()).kill()
            # Its own child goes with it; what that has started is beyond reach once the guard is gone.
            for p in cluster.processes("node1"):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may be on its way out
                    if p.name() == "sleep" or STUBBORN in p.cmdline():
                        p.kill()
        process.communicate(timeout=40)
    nothing_left(cluster)


def test_a_host_that_is_cut_off_ends_on_both_sides(cluster: Cluster, run_folder: Path) -> None:
    started = time.monotonic()
    with fanout(cluster, run_folder, ["sh", "-c", NEST]) as process:
        wait_until(lambda: counts(cluster) == [1, 1])
        cluster.cut("node2")
        try:
            output = process.communicate(timeout=60)[0]
            assert process.returncode == 255
            assert "node2: ended with exit status 255: it was lost\n" in output
            assert time.monotonic() - started < 60
            wait_until(lambda: counts(cluster) == [0, 0], 60)
        finally:
            cluster.restore("node2")
    nothing_left(cluster)


def test_a_host_that_is_not_there(cluster: Cluster, run_folder: Path) -> None:
    cluster.stop("node2")
    try:
        with fanout(cluster, run_folder, ["sleep", "60"]) as process:
            output = process.communicate(timeout=60)[0]
            assert process.returncode == 255
            assert "node2: " in output
    finally:
        cluster.restore("node2")
    nothing_left(cluster)

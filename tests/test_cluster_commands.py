"""Command lines and scripts for clusters, as text: what is quoted, refused and written."""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher import ports, resolve, translate
from memlaunch.launcher.hostfile import Host
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.translate import mpirun, shell, slurm, ssh
from memlaunch.launcher.translate.shell import Raw
from memlaunch.launcher.translate.slurm import SlurmSettings
from tests.cluster.corpus import VALUES

TWO = (Host("node-1", (0, 1)), Host("node-2", (0, 1)))
PRINT = (sys.executable, "-c", "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))")


# Shell


def test_words_are_quoted_but_for_our_own() -> None:
    assert shell.join(["a b", "$HOME", "", Raw('"$1"'), "plain"]) == """'a b' '$HOME' '' "$1" plain"""


def test_a_node_script_says_what_it_does_and_starts_from_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "node.sh"
    command = [*PRINT, Raw('"$1"'), *VALUES.values()]
    setup = ["cat", "export FROM_SETUP=1", "unset NOT_SET_BEFORE"]
    script.write_text(shell.node_script(about="two\nlines $(x)", command=command, env=VALUES, setup=setup))
    assert script.read_text().startswith("#!/usr/bin/env bash\n# two lines $(x)\nexport MEMLAUNCH_RUN_DIR=")
    done = subprocess.run(
        ["bash", str(script), "an argument"],
        cwd=tmp_path,
        input="leash",
        capture_output=True,
        text=True,
        check=True,
    )
    words, environment = json.loads(done.stdout)
    assert words == ["an argument", *VALUES.values()]
    assert {name: environment[name] for name in VALUES} == VALUES
    assert environment["MEMLAUNCH_RUN_DIR"] == str(tmp_path)
    assert environment["FROM_SETUP"] == "1"
    assert [path.name for path in tmp_path.rglob("*")] == ["launch", "node.sh"]


def test_setup_that_fails_ends_the_node(tmp_path: Path) -> None:
    script = tmp_path / "node.sh"
    script.write_text(shell.node_script(about="x", command=["true"], env={}, setup=["false"]))
    assert subprocess.run(["bash", str(script)], check=False).returncode == 1


# ssh


def test_ssh_gets_one_word_that_its_shell_takes_apart_as_it_was() -> None:
    words = ["bash", "/a run's $(x)/launch/node.sh", "0", *VALUES.values()]
    argv = ssh.argv("node-1", words, ["-p", "2222"])
    assert argv[:3] == ["ssh", "-p", "2222"]
    assert argv[-3:-1] == ["--", "node-1"]
    assert shlex.split(argv[-1]) == ["exec", *words]


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a b", "a,b", "$(x)", "", "h:22"])
def test_what_is_no_host_name_goes_nowhere(name: str) -> None:
    for build in (
        lambda: ssh.argv(name, ["true"]),
        lambda: mpirun.argv("openmpi", ["true"], ranks=1, hosts=[Host(name, (0,))]),
    ):
        with pytest.raises(ValueError, match="is not a host name"):
            build()


# mpirun


def test_open_mpi() -> None:
    argv = mpirun.argv("openmpi", ["bash", "x y"], ranks=4, hosts=TWO, options=["--tag-output"])
    assert shlex.join(argv) == (
        "mpirun --host node-1:2,node-2:2 -np 4 --bind-to none --mca odls_base_sigkill_timeout 3 "
        "--tag-output bash 'x y'"
    )


def test_mpich() -> None:
    argv = mpirun.argv("mpich", ["bash", "x y"], ranks=4, hosts=TWO)
    assert shlex.join(argv) == "mpiexec -hosts node-1:2,node-2:2 -n 4 -bind-to none bash 'x y'"


def test_mpi_without_hosts() -> None:
    openmpi = shlex.join(mpirun.argv("openmpi", ["x"], ranks=4, per_node=2))
    assert openmpi.startswith("mpirun -np 4 --map-by ppr:2:node:OVERSUBSCRIBE --bind-to none ")
    mpich = shlex.join(mpirun.argv("mpich", ["x"], ranks=4, per_node=2))
    assert mpich == "mpiexec -n 4 -ppn 2 -bind-to none x"


def test_mpi_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="4 slots for 3 ranks"):
        mpirun.argv("openmpi", ["x"], ranks=3, hosts=TWO)


# What each says of itself, asked for its version.
OPEN_MPI = "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/"
MPICH = "HYDRA build details:\n    Version:                                 4.0.2"
INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.9"


@pytest.mark.parametrize(
    ("version", "started"),
    [
        (OPEN_MPI, "mpirun -np 2 --map-by ppr:2:node:OVERSUBSCRIBE --bind-to none "
         "--mca odls_base_sigkill_timeout 3 -x SET -x EMPTY bash"),
        (MPICH, "mpiexec -n 2 -ppn 2 -bind-to none -genvlist SET,EMPTY bash"),
        (INTEL, "mpiexec -n 2 -ppn 2 -bind-to none -genvlist SET,EMPTY bash"),
    ],
    ids=["open mpi", "mpich", "intel"],
)  # fmt: skip
def test_the_command_finds_out_whose_mpirun_there_is(tmp_path: Path, version: str, started: str) -> None:
    for name in ("mpirun", "mpiexec"):
        script = f"#!/bin/bash\n[[ $1 == --version ]] && echo {shlex.quote(version)} && exit\n"
        (tmp_path / name).write_text(script + f'printf "%s\\n" {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = by_mpi(tmp_path, pass_env=["SET", "UNSET", "EMPTY"])
    words = done.stdout.splitlines()
    assert words == [*started.split(), f"{tmp_path}/run/launch/node.sh"], done.stderr


def test_an_mpirun_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mpirun").write_text("#!/bin/bash\necho mpirun 1.0\n")
    (tmp_path / "mpirun").chmod(0o755)
    done = by_mpi(tmp_path)
    assert done.returncode == 4
    assert "error: mpirun is neither Open MPI nor MPICH" in done.stderr


def by_mpi(folder: Path, pass_env: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the ``command.sh`` of a job on two ranks, with the programs that lie in ``folder``."""
    (folder / "train.py").write_text("")
    path = folder / "job.json"
    cluster = {"launcher": "mpirun", "gpus_per_node": 2, "device": "cpu", "pass_env": pass_env or []}
    path.write_text(json.dumps({"script": "train.py", "cluster": cluster}))
    run = RunDir(folder / "run")
    run.launch.mkdir(parents=True)
    run.logs.mkdir()
    run.place(translate.files(resolve.load(path)))
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SET": "a b",
        "EMPTY": "",
        "MEMLAUNCH_RUN_DIR": str(run.path),
    }
    return subprocess.run(
        ["bash", str(run.command)], env=environment, capture_output=True, text=True, check=False
    )


# SLURM

MULTINODE = """\
#!/bin/bash
#SBATCH --job-name='my run'
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --export=MEMLAUNCH_RUN_DIR,HF_TOKEN
#SBATCH --gpus-per-node=4
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=1-00:00:00
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --dependency=afterok:12:13
#SBATCH --comment='it'"'"'s # 1'
#SBATCH --licenses='a b'
#SBATCH --overcommit
# Trains my run on 2 nodes.
set -euo pipefail

: "${MEMLAUNCH_RUN_DIR:?names the run folder; command.sh sets it}"

# The ranks meet on the first node, at a port that was found free there.
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$(srun --export=ALL --overlap --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" \\
    /opt/python -m memlaunch.launcher.ports "$SLURM_JOB_ID")"
export MASTER_ADDR MASTER_PORT

# One task a node, which starts the ranks of the node. A step inherits neither the processors that were asked
# for nor, after --export, the environment. When one task fails, the others are ended.
exec /opt/python -m memlaunch.launcher.attempts \\
    srun --export=ALL --overlap --nodes=2 --ntasks-per-node=1 --cpus-per-task=8 \\
    --kill-on-bad-exit=1 --wait=60 bash "$MEMLAUNCH_RUN_DIR/launch/node.sh"
"""


def render(template: Any = "multinode", parameters: dict[str, Any] | None = None, **more: Any) -> str:
    values = {"name": "x", "nodes": 2, "python": "/opt/python", **more}
    return slurm.script(template, SlurmSettings.model_validate(parameters or {}), **values)


def test_the_script_for_several_nodes() -> None:
    parameters = {
        "partition": "gpu",
        "account": "lab",
        "time": "1-00:00:00",
        "cpus_per_task": 8,
        "requeue": False,
        "exclusive": True,
        "dependency": "afterok:12:13",
        "comment": "it's # 1",
        "extra": ["--licenses=a b", "--overcommit"],
    }
    text = render(
        parameters=parameters,
        name="my run",
        gpus=4,
        about="Trains my run\non 2 nodes.",
        pass_env=["HF_TOKEN"],
    )
    assert text == MULTINODE


@pytest.mark.parametrize("template", ["single", "multinode", "array", "preemptible"])
def test_every_template_is_bash_and_keeps_its_directives_on_top(template: str) -> None:
    more: dict[str, Any] = {"runs": ["/a b", "/it's"]} if template == "array" else {}
    text = render(template, {"time": "10"}, nodes=1, about=VALUES["NEWLINES"] + "\n#SBATCH --x", **more)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives == list(range(1, len(directives) + 1))
    assert "--gpus" not in text
    assert "{{" not in text


def test_an_array_and_a_preemptible_job() -> None:
    array = render("array", runs=["/a b", "/it's", "/c"])
    assert "#SBATCH --array=0-2\n" in array
    assert "runs=(\n    '/a b'\n    '/it'\"'\"'s'\n    /c\n)\n" in array
    preemptible = render("preemptible", {"signal": "TERM@300"})
    assert preemptible.index("--signal=TERM@120") < preemptible.index("--signal=TERM@300")
    assert "exec /opt/python -m memlaunch.launcher.attempts --requeue \\\n" in preemptible


def test_a_template_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.sbatch.j2"
    path.write_text(
        '{% extends "multinode.sbatch.j2" %}\n{% block rendezvous %}\nmodule load cuda\n{% endblock %}\n'
    )
    text = render(path)
    assert "module load cuda\n" in text
    assert "MASTER_ADDR" not in text
    path.write_text("#!/bin/bash\necho {{ name | quote }} {{ nodes }}\n")
    assert render(path, name="$(x)") == "#!/bin/bash\necho '$(x)' 2\n"
    path.write_text("{{ nmae }}")
    with pytest.raises(ValueError, match="'nmae' is undefined"):
        render(path)
    path.write_text("one\n{% if %}")
    with pytest.raises(ValueError, match="line 2"):
        render(path)
    with pytest.raises(OSError, match="No such file"):
        render(tmp_path / "none")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": "a\nb"}, "holds a control character"),
        ({"template": "single"}, "`single` is not for 2 nodes"),
        ({"template": "array"}, "`runs` belongs to"),
        ({"runs": ["/a"]}, "`runs` belongs to"),
    ],
)
def test_scripts_that_cannot_be(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(**more)


def test_a_job_inherits_nothing_from_the_job_it_is_submitted_from(tmp_path: Path) -> None:
    environment = {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "7",
        "SBATCH_PARTITION": "x",
        "PMIX_RANK": "1",
        "OMPI_COMM_WORLD_RANK": "1",
    }
    run = RunDir(tmp_path / "a run's 100%j")
    submitted = by_slurm(tmp_path, run, {**environment, "MEMLAUNCH_SUBMIT": "1"}, "--wait")
    lines = submitted.stdout.splitlines()
    log = f"{run.logs}/slurm-%j.log".replace("100%j", "100%%j")
    assert lines[:4] == [f"--chdir={run.path}", f"--output={log}", "--wait", f"{run.launch}/job.sbatch"]
    assert "SLURM_CONF" in lines
    assert not (set(environment) - {"SLURM_CONF"}) & set(lines)


def test_an_allocation_is_used_and_its_step_forgotten(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "9"}
    inside = by_slurm(tmp_path, run, environment)
    lines = inside.stdout.splitlines()
    assert {"SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"} <= set(lines)
    assert not {"SLURM_STEP_ID", "SLURM_NTASKS"} & set(lines)
    small = by_slurm(tmp_path, RunDir(tmp_path / "other"), {**environment, "SLURM_JOB_NUM_NODES": "1"})
    assert small.returncode == 4
    assert "error: the job wants 2 nodes, and the allocation has 1\n" in small.stderr


def by_slurm(
    folder: Path, run: RunDir, environment: dict[str, str], *options: str
) -> subprocess.CompletedProcess[str]:
    """Run the ``command.sh`` of a job on two nodes, where sbatch, and the job, say what they are given."""
    (folder / "train.py").write_text("")
    path = folder / "job.json"
    cluster = {"launcher": "slurm", "nodes": 2, "device": "cpu"}
    path.write_text(json.dumps({"script": "train.py", "cluster": cluster}))
    say = '#!/bin/bash\nprintf "%s\\n" "$@"; compgen -e\n'
    (folder / "sbatch").write_text(say)
    (folder / "sbatch").chmod(0o755)
    run.launch.mkdir(parents=True)
    run.logs.mkdir()
    run.place({**translate.files(resolve.load(path)), "job.sbatch": say})
    given = {"PATH": f"{folder}:/usr/bin:/bin", "MEMLAUNCH_RUN_DIR": str(run.path)}
    return subprocess.run(
        ["bash", str(run.command), *options],
        env={**environment, **given},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu", 1), ("gpu:4", 4), ("gpu:a100:4", 4), ("gpu:a100", 1), ("nvme:1,gpu:2", 2), ("nvme:4", None),
        ("gpu:2(S:0-1)", 2), ("gpu=3", 3), ("gres/gpu:8", 8), ("mygpu:2", None), ("", None),
    ],
)  # fmt: skip
def test_gpus_that_a_resource_asks_for(gres: str, count: int | None) -> None:
    assert slurm.gpus_in(gres) == count


# Ports


def test_a_port_that_is_taken_is_not_found() -> None:
    first = ports.find("job 1")
    assert first == ports.find("job 1")
    assert first in ports.RANGE
    assert first != ports.find("job 2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert ports.find("job 1") not in (first, None)


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "RANGE", range(port, port + 1))
        with pytest.raises(OSError, match=f"no port from {port} to {port} is free"):
            ports.find()

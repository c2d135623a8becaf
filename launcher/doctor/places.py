"""Where the nodes of a job are, and what SLURM and MPI say of it before a node is asked."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from memlaunch.launcher import slurm_job
from memlaunch.launcher.doctor import diagnosis
from memlaunch.launcher.doctor.diagnosis import HERE, Finding
from memlaunch.launcher.doctor.on_node import MARK
from memlaunch.launcher.doctor.probe import LIMIT, SHELL, Place, outside_job
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.hostfile import Host
from memlaunch.launcher.translate import mpirun, shell, slurm, ssh

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

#: Seconds that SLURM has to give us nodes, and minutes that we may keep them.
SLURM_WAIT = 60
SLURM_MINUTES = 10

_RANK = f"""
import json, socket
from mpi4py import MPI
print({MARK!r} + json.dumps([MPI.COMM_WORLD.size, socket.gethostname()]), flush=True)
"""


def find(resolved: "ResolvedJob | None", stack: contextlib.ExitStack) -> tuple[list[Place], list[Finding]]:
    """The nodes of a job, and what there is to say of them before they are asked."""
    here = socket.gethostname()
    if resolved is None:
        return [Place(here, SHELL, "here", {"OMP_NUM_THREADS": "1"})], []
    cluster, layout = resolved.job.cluster, resolved.layout
    passed = {name: os.environ[name] for name in cluster.pass_env if name in os.environ}
    environment = {**passed, **cluster.env, "OMP_NUM_THREADS": "1"}
    if layout.hosts:
        chosen = any(host.slots != tuple(range(len(host.slots))) for host in layout.hosts)
        return [
            Place(
                host.name,
                ssh.argv(host.name, SHELL, cluster.ssh_options),
                "ssh",
                {**environment, "CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots))}
                if chosen
                else environment,
            )
            for host in layout.hosts
        ], []
    if cluster.launcher == "slurm" or (cluster.launcher == "mpirun" and slurm_job.inside()):
        try:
            nodes, job, findings = _slurm_nodes(resolved, stack)
        except UserError as error:
            return [], [Finding(HERE, "SLURM", "failed", error.message, error.hint or "")]
        return [Place(node, step(job, node), "srun", environment) for node in nodes], findings
    return [Place(here, SHELL, "here", environment)], []


def _slurm_nodes(
    resolved: "ResolvedJob", stack: contextlib.ExitStack
) -> tuple[list[str], str, list[Finding]]:
    """(nodes, the allocation that they are in, findings): the present allocation, or a short one of our own.

    Raises:
        UserError: SLURM is not here, or does not answer.
    """
    findings: list[Finding] = []
    job = os.environ.get("SLURM_JOB_ID")
    if not slurm_job.inside():
        findings += _ask_slurm(resolved)
        if any(finding.state == "failed" for finding in findings):
            return [], "", findings
        job, said = stack.enter_context(_allocation(resolved))
        if job is None:
            hint = "it will wait in the queue; run `memlaunch doctor` in an allocation to look at its nodes"
            message = f"no nodes to look at within {SLURM_WAIT} s: {said}"
            findings.append(Finding(HERE, "SLURM", "warning", message, hint))
            return [], "", findings
    assert job is not None
    listed = _command("squeue", f"--jobs={job}", "--noheader", "--format=%N").stdout.strip()
    nodes = _command("scontrol", "show", "hostnames", listed).stdout.split()
    return nodes[: resolved.layout.nodes], job, findings


def _ask_slurm(resolved: "ResolvedJob") -> Iterator[Finding]:
    """Whether SLURM has the partition, and would take the job. Raises UserError: it does not answer."""
    partition = resolved.job.cluster.slurm.partition
    where = [f"--partition={partition}"] if partition else []
    shown = _command("sinfo", "--noheader", "--Node", "--format=%N|%T|%E", *where)
    if shown.returncode:
        hint = "try again; `scontrol ping` asks whether SLURM is up"
        message = f"SLURM does not answer: {diagnosis.last_line(shown.stderr)}"
        raise UserError(message, hint)
    nodes = [line.split("|", 2) for line in shown.stdout.splitlines()]
    if not nodes:
        there = ", ".join(_command("sinfo", "--noheader", "--format=%R").stdout.split())
        message = f"there is no partition `{partition}` with nodes"
        yield Finding(HERE, "SLURM", "failed", message, f"set `cluster.slurm.partition` to one of {there}")
        return
    down = {name: reason for name, state, reason in nodes if re.match(r"down|drain|fail|unknown|.*\*", state)}
    if down:
        listed = ", ".join(f"{name} ({reason})" for name, reason in list(down.items())[:4])
        more = f" and {len(down) - 4} more" if len(down) > 4 else ""
        hint = "`scontrol update NodeName=... State=RESUME` brings back one that is well"
        message = f"{len(down)} of {len(nodes)} nodes are down: {listed}{more}"
        yield Finding(HERE, "SLURM", "warning", message, hint)
    tried = _command("sbatch", "--test-only", input=slurm.files(resolved, sys.executable)["job.sbatch"])
    said = diagnosis.last_line(tried.stderr)
    if tried.returncode:
        hint = "`cluster.slurm` says what is asked for; `sinfo` shows what there is"
        yield Finding(HERE, "SLURM", "failed", f"it would not take the job: {said}", hint)
    else:
        yield Finding(HERE, "SLURM", "ok", re.sub(r"^Job \d+ ", "it would take the job, ", said))


@contextlib.contextmanager
def _allocation(resolved: "ResolvedJob") -> Iterator[tuple[str | None, str]]:
    """(the number of an allocation like that of the job, what SLURM said); the number is None without one."""
    process = subprocess.Popen(
        salloc(resolved),
        env=outside_job(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=SLURM_WAIT + LIMIT)[1]
    except BaseException:
        process.terminate()
        process.wait()
        raise
    granted = re.search(r"Granted job allocation (\d+)", said)
    try:
        yield granted[1] if granted else None, diagnosis.last_line(said)
    finally:
        if granted:
            _command("scancel", "--quiet", granted[1])


def salloc(resolved: "ResolvedJob") -> list[str]:
    """Asks SLURM for nodes like those of the job, for some minutes, if there are some now."""
    cluster, layout = resolved.job.cluster, resolved.layout
    ours = {"time": str(SLURM_MINUTES), "dependency": None, "output": None, "requeue": None, "signal": None}
    cpus = cluster.slurm.cpus_per_task or layout.largest * resolved.threads_per_rank
    asked = cluster.slurm.model_copy(update={**ours, "cpus_per_task": cpus})
    gpus = cluster.device == "cuda" and cluster.slurm.gres is None
    return [
        *("salloc", "--no-shell", f"--immediate={SLURM_WAIT}", "--job-name=memlaunch-doctor"),
        *(f"--nodes={layout.nodes}", "--ntasks-per-node=1"),
        *([f"--gpus-per-node={layout.largest}"] if gpus else []),
        # As they stand in a script, they are quoted.
        *(word for option in asked.options() for word in shlex.split(option)),
    ]


def step(job: str, node: str) -> list[str]:
    """Runs a shell on ``node`` of an allocation, beside whatever runs there."""
    return [
        *("srun", f"--jobid={job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}"),
        *("--export=NONE", "--quiet", "/usr/bin/env", *SHELL),
    ]


def _command(*argv: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM. Raises UserError: it is not here, or takes too long."""
    try:
        return subprocess.run(
            argv,
            env=outside_job(),
            input=input,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    except FileNotFoundError:
        message = f"`{argv[0]}` is not installed on this machine"
        raise UserError(message, "run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        message = f"`{argv[0]}` did not answer within {LIMIT:.0f} s"
        raise UserError(message, "try again; `scontrol ping` asks whether SLURM is up") from None


def try_mpi(resolved: "ResolvedJob", base: Path) -> Finding:
    """Whether mpirun starts a rank on every node, and mpi4py joins them: it is tried.

    Args:
        base: the output folder, through which the nodes get the script of their ranks.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".memlaunch-doctor-", dir=base) as folder:
            path = Path(folder, "node.sh")  # for our eyes alone, as those of a run
            path.write_text(_node_script(resolved), encoding="utf-8")
            return _judge_mpi(resolved, *_start_mpi(resolved, path))
    except OSError as error:
        hint = "look at its permissions, or choose another `output.dir`"
        return Finding(HERE, "MPI", "failed", f"`{base}` cannot be written to: {error.strerror}", hint)


def _node_script(resolved: "ResolvedJob") -> str:
    cluster = resolved.job.cluster
    command = [sys.executable, "-c", _RANK]
    return shell.node_script(about="a check", command=command, env=cluster.env, setup=cluster.setup)


def _start_mpi(resolved: "ResolvedJob", node_script: Path) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of one rank a node."""
    cluster, layout = resolved.job.cluster, resolved.layout
    starts = {
        kind: mpirun.argv(
            kind,
            ["bash", str(node_script)],
            ranks=layout.nodes,
            per_node=1,
            hosts=[Host(host.name, (0,)) for host in layout.hosts],
            options=cluster.mpi_options,
        )
        for kind in mpirun.VERSIONS
    }
    lines = [
        *cluster.setup,
        'case "$(mpirun --version 2>&1)" in',
        *(f"    {mpirun.VERSIONS[kind]}) exec {shell.join(argv)} ;;" for kind, argv in starts.items()),
        "esac",
        'echo "mpirun is neither Open MPI nor MPICH, or is not installed here" >&2',
        "exit 4",
    ]
    argv = ["timeout", "--kill-after=5", str(round(LIMIT)), "bash", "-c", "\n".join(lines)]
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process.returncode, output, errors


def _judge_mpi(resolved: "ResolvedJob", status: int, output: str, errors: str) -> Finding:
    nodes = resolved.layout.nodes
    answers = [json.loads(found) for found in re.findall(rf"{re.escape(MARK)}(\[.*\])", output)]
    if not status and [size for size, _ in answers] == [nodes] * nodes:
        hosts = sorted({host for _, host in answers})
        return Finding(HERE, "MPI", "ok", f"mpirun and mpi4py join {diagnosis.names(hosts)}")
    hint = "install the same MPI and mpi4py on every node, and let `ssh NODE` find it; see `cluster.setup`"
    if status == 124:
        message = f"mpirun did not end within {LIMIT:.0f} s"
        hint = "it starts its daemons over ssh, and they call back: look at the firewalls"
    elif answers and not status:
        message = f"mpirun started {nodes} ranks, and mpi4py sees {answers[0][0]}"
        hint = "mpi4py uses the library of another MPI; let LD_LIBRARY_PATH lead to that of mpirun"
    else:
        message = diagnosis.cause(errors) or f"mpirun ended with exit status {status}"
    return Finding(HERE, "MPI", "failed", message, hint)

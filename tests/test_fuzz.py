"""Whatever a job file or a hostfile holds, it is refused in words or becomes files that do what it says.

Each case is made from a seed and a number (``mutations.py``), goes through ``validate`` and ``translate``,
and is told in full where it fails. ``make matrix`` runs all of them, ``make test`` a few hundred.
"""

import contextlib
import io
import json
import os
import random
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher import cli, disclose, hostfile, manifest, resolve, translate
from memlaunch.launcher.deep import ask_deepspeed
from memlaunch.launcher.manifest import Damaged
from memlaunch.launcher.training.checkpoint import Checkpoints
from memlaunch.launcher.training.loop import Position
from tests import engines, mutations
from tests.engines import Strategy
from tests.test_checkpoints import ALONE, run_folder, save, start
from tests.test_hostfile import deepspeed_pool

#: Cases of a block, and the blocks: 20,000 job files and 5,000 hostfiles.
BLOCK = 1000
JOB_BLOCKS, HOSTFILE_BLOCKS = range(1, 21), range(1, 6)

#: Of a thousand cases, so many are accepted at least; fewer would say little about what is translated.
ACCEPTED = 0.1

#: Seconds after which a case counts as one that never ends. None takes one.
LIMIT = 60.0

SCRIPTS = ("command.sh", "node.sh", "job.sbatch")


class Escaped(BaseException):
    """What is tested did what it must not; no ``except`` of its own may stop this."""


class Guard:
    """Ends a case that writes outside its folder, starts a program, asks the network, or does not end.

    The one program that may be started is ``bash -n``, which reads a script and runs nothing.
    """

    def __init__(self) -> None:
        self._writable: Path | None = None
        self.escaped: list[str] = []
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def over(self, writable: Path) -> Iterator[None]:
        """Watch what is done until the end; ``writable`` is the one folder that may be written."""
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        self._writable = writable
        try:
            yield
        finally:
            self._writable = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert not self.escaped

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._writable is None:
            return
        if event == "open":
            self._opened(*arguments)
        elif event in (
            "os.mkdir",
            "os.remove",
            "os.rmdir",
            "os.truncate",
            "os.chmod",
            "os.chown",
            "os.utime",
        ):
            self._written(arguments[0], event)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._written(arguments[0], event)
            self._written(arguments[1], event)
        elif event == "subprocess.Popen" and list(arguments[1])[:2] != ["bash", "-n"]:
            self._escape(f"starts {arguments[1]}")
        elif event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "socket.connect",
            "socket.getaddrinfo",
        ):
            self._escape(f"{event}{arguments}")

    def _opened(self, path: Any, mode: Any, flags: int) -> None:
        if isinstance(path, int):
            return
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            self._written(path, "open")
            return
        with contextlib.suppress(OSError, ValueError):
            mode = Path(os.fsdecode(path)).stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                self._escape(f"reads {path}, which need not end")

    def _written(self, path: Any, how: str) -> None:
        assert self._writable is not None
        where = Path(os.fsdecode(path)).absolute()
        if not where.is_relative_to(self._writable) and str(where) != "/dev/null":
            self._escape(f"{how} writes {where}")

    def _escape(self, what: str) -> None:
        self.escaped.append(what)
        raise Escaped(what)


def _too_long(*_: object) -> None:
    raise Escaped(f"does not end within {LIMIT:g} seconds")


GUARD = Guard()


class Place:
    """A folder with what the jobs name, and programs that write down what they are started with."""

    def __init__(self, folder: Path) -> None:
        self.jobs = folder / "jobs"
        self.out = folder / "out"
        self.programs = folder / "programs"
        self.told = folder / "told"
        self.jobs.mkdir()
        self.programs.mkdir()
        mutations.fill(self.jobs)
        self.python = self.programs / "python"
        self.python.write_text(_TELLTALE.format(told=str(self.told), run=str(folder / "run")))
        self.python.chmod(0o755)
        for name in ("mpirun", "srun", "scontrol"):
            (self.programs / name).symlink_to(self.python)

    def clear(self) -> None:
        """Remove what a translation wrote."""
        for path in self.out.iterdir() if self.out.exists() else ():
            path.unlink()
        if self.out.exists():
            self.out.rmdir()

    def started(self, script: Path, *arguments: str) -> list[tuple[list[bytes], dict[bytes, bytes]]]:
        """(argv, environment) of every program that ``script`` starts, none of which does anything."""
        self.told.unlink(missing_ok=True)
        environment = {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "MEMLAUNCH_RUN_DIR": str(self.out),
            "SLURM_JOB_ID": "1",
        }
        environment |= {"SLURM_JOB_NODELIST": "n", "SLURM_PROCID": "0"}
        argv = ["/bin/bash", script, *arguments]
        done = subprocess.run(argv, env=environment, cwd=self.jobs, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        calls = []
        for line in self.told.read_text().splitlines():
            words, variables = json.loads(line)
            pairs = (bytes.fromhex(variable).partition(b"=") for variable in variables)
            calls.append(([bytes.fromhex(word) for word in words], {name: value for name, _, value in pairs}))
        return calls


_TELLTALE = """#!/usr/bin/python3 -IS
import json, os, sys
words = [part.hex() for part in open("/proc/self/cmdline", "rb").read().split(b"\\0")[3:-1]]
variables = [part.hex() for part in open("/proc/self/environ", "rb").read().split(b"\\0")[:-1]]
with open({told!r}, "a") as told:
    told.write(json.dumps([words, variables]) + "\\n")
if sys.argv[1:] == ["--version"]:
    print("mpirun (Open MPI) 4.1.4")
elif "memlaunch.launcher.rundir" in sys.argv:
    print({run!r})
else:
    print("29500")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """What the cases load is loaded before anything is watched; and the jobs that they begin as are right."""
    made = Place(tmp_path)
    monkeypatch.chdir(made.jobs)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for number, job in enumerate(mutations.JOBS):
        path = made.jobs / "job.json"
        path.write_text(json.dumps(job))
        code, told = memlaunch("validate", path)
        assert code == 0, f"job {number}: {told}"
        translate.files(resolve.load(path))
    return made


def memlaunch(*arguments: str | Path) -> tuple[int, str]:
    """(exit code, all that is printed) of the command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = cli.main([str(argument) for argument in arguments])
    return code, printed.getvalue()


def accepted(place: Place, path: Path) -> bool:
    """Whether the job at ``path`` is right. Where it is, its translation does what it says."""
    place.clear()
    with GUARD.over(place.out):
        code, told = memlaunch("validate", "--json", path)
        sets = stand_ins(path) if code == 0 else []
        again = memlaunch("translate", path, "--out", place.out, *(f"--set={text}" for text in sets))
    report = json.loads(told)
    assert (code, report["valid"]) in ((0, True), (2, False)), told
    assert again[0] == code, again[1]
    if code == 2:
        assert report["message"] or report["problems"], told
        assert "error: " in again[1]
        assert again[1].replace("\n", "").isprintable(), "a terminal obeys none of it"
        assert not place.out.exists()
        return False
    check_scripts(place)
    check_deepspeed_config(place.out / "ds_config.json")
    with GUARD.over(place.out):
        resolved = resolve.load(path, sets)
        kept = resolve.load(place.out / "resolved.json")
    assert kept.to_json() == resolved.to_json(), "the resolved job is a job that resolves to itself"
    check_words(place, resolved)
    return True


def stand_ins(path: Path) -> list[str]:
    """The simplest choice for each "auto" of a job: the planner would start programs to make one."""
    resolved = resolve.load(path)
    values = disclose.flat(json.loads(resolved.to_json()))
    return [f"{key}={json.dumps(values[key])}" for key in sorted(resolved.open)]


def check_scripts(place: Place) -> None:
    """bash can read every script."""
    for name in SCRIPTS:
        if (place.out / name).exists():
            read = subprocess.run(
                ["bash", "-n", place.out / name], capture_output=True, text=True, check=False
            )
            assert (read.returncode, read.stderr) == (0, ""), name


def check_deepspeed_config(path: Path) -> None:
    """DeepSpeed takes the config, and reads every key in it."""
    if path.exists():
        assert ask_deepspeed(json.loads(path.read_text())) == (None, [])


def check_words(place: Place, resolved: resolve.ResolvedJob) -> None:
    """What the scripts start gets the job's words and variables byte for byte, and nothing else starts."""
    cluster = resolved.job.cluster
    if cluster.setup:
        return  # text of the user's that is meant to run
    texts = translate.files(resolved, str(place.python))
    for name, text in texts.items():
        (place.out / name).write_text(text)
    (place.out / "launch").symlink_to(".")
    try:
        node = place.started(place.out / "node.sh", "0", "host", "1")
        launched = place.started(place.out / "command.sh") if cluster.launcher != "slurm" else []
        if (place.out / "job.sbatch").exists() and cluster.slurm.template is None:
            launched = place.started(place.out / "job.sbatch")
            check_directives((place.out / "job.sbatch").read_text(), resolved)
    finally:
        (place.out / "launch").unlink()
    words, variables = node[-1]
    assert {name: variables.get(name.encode()) for name in cluster.env} == {
        name: value.encode() for name, value in cluster.env.items()
    }
    assert words[0] == b"-m"
    words = launched[-1][0] if launched else []
    options = [f"--ssh-option={option}" for option in cluster.ssh_options] or cluster.mpi_options
    expected = [option.encode() for option in options]
    assert not expected or any(words[at : at + len(expected)] == expected for at in range(len(words)))
    assert not any((place.jobs / name).exists() for name in (mutations.TRACE, f"{mutations.TRACE};"))


def check_directives(script: str, resolved: resolve.ResolvedJob) -> None:
    """sbatch reads each option as one word."""
    lines = [line.removeprefix("#SBATCH ") for line in script.split("\n") if line.startswith("#SBATCH ")]
    options = [shlex.split(line) for line in lines]
    assert all(len(words) == 1 for words in options), lines
    assert [f"--job-name={resolved.job.name}"] in options
    for key in ("partition", "account", "comment", "nodelist"):
        if (value := getattr(resolved.job.cluster.slurm, key)) is not None:
            assert [f"--{key}={value}"] in options


def run_cases(place: Place, kind: str, block: int, number: int) -> float:
    """Put ``number`` cases of ``block`` through; the share of those that were accepted."""
    count = 0
    for index in range(number):
        seed = f"{kind} {block}:{index}"
        dice = random.Random(seed)
        path = place.jobs / "job.json"
        if kind == "job":
            path.write_bytes(case := mutations.job(dice))
        else:
            case = mutations.hostfile(dice)
            (place.jobs / "hosts").write_bytes(case)
            path.write_text(json.dumps(a_job_with_hosts(dice)))
        try:
            right = accepted(place, path)
            if kind == "hostfile" and right:
                check_hosts(case.decode(), place)
        except BaseException:
            print(f"\nthe case {seed!r}:\n{case!r}\nwith the job\n{path.read_bytes()!r}")
            raise
        count += right
    print(f"{kind}s of block {block}: {count} of {number} accepted")
    return count / number


def a_job_with_hosts(dice: random.Random) -> dict[str, Any]:
    launcher = dice.choice(("torchrun", "deepspeed", "mpirun"))
    cluster: dict[str, Any] = {"hostfile": "hosts", "launcher": launcher, "device": "cuda"}
    if dice.random() < 0.3:
        chosen = dice.choice(
            ("worker-1", "worker-1:0", "worker-1@worker-2:0,1", "worker-2:1", *mutations.TEXTS)
        )
        cluster[dice.choice(("include", "exclude"))] = chosen
    return {"script": "train.py", "cluster": cluster}


def check_hosts(text: str, place: Place) -> None:
    """The hosts are those that DeepSpeed reads, and so is what is handed on to the launcher."""
    read = {host.name: len(host.slots) for host in hostfile.parse(text)}
    assert deepspeed_pool(text.replace("#", " #")) == read
    left = deepspeed_pool((place.out / "hostfile").read_text())
    assert left is not None
    assert all(slots <= read[name] for name, slots in left.items())


def test_a_few_job_files_of_every_kind(place: Place) -> None:
    assert run_cases(place, "job", 0, 200) >= ACCEPTED


def test_a_few_hostfiles_of_every_kind(place: Place) -> None:
    assert run_cases(place, "hostfile", 0, 60) >= ACCEPTED


@pytest.mark.hours
@pytest.mark.parametrize("block", JOB_BLOCKS)
def test_job_files(place: Place, block: int) -> None:
    assert run_cases(place, "job", block, BLOCK) >= ACCEPTED


@pytest.mark.hours
@pytest.mark.parametrize("block", HOSTFILE_BLOCKS)
def test_hostfiles(place: Place, block: int) -> None:
    assert run_cases(place, "hostfile", block, BLOCK) >= ACCEPTED


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 1, in the folder of its run."""
    folder = run_folder(tmp_path_factory.mktemp("run"))
    engine = start(Strategy("torch", 0), ALONE)
    engines.step(engine, 0, ALONE)
    assert save(folder, engine, ALONE, Position(1, 1))
    return folder.checkpoints / "step-00000001"


def test_a_checkpoint_with_a_wrong_bit_or_a_lost_end_is_refused_by_the_name_of_the_file(
    checkpoint: Path,
) -> None:
    """Every file, at offsets that are drawn, and at its first bytes and its last."""
    dice = random.Random("checkpoint")
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        ends = (*range(16), *(len(whole) - 1 - at for at in range(16)))
        for at in (*ends, *dice.sample(range(len(whole)), 100)):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << dice.randrange(8)
            for content in (bytes(damaged), whole[:at], whole[:at] + b"\0" * (len(whole) - at + 1)):
                path.write_bytes(content)
                with pytest.raises(Damaged, match=path.name):
                    manifest.check_files(checkpoint, manifest.read(checkpoint))
        path.write_bytes(whole)
    manifest.check_files(checkpoint, manifest.read(checkpoint))


def test_a_checkpoint_with_a_wrong_bit_is_never_loaded(checkpoint: Path, tmp_path: Path) -> None:
    engine = start(Strategy("torch", 0), ALONE)
    before = engines.weights(engine)
    folder = run_folder(tmp_path)
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for at in (0, 9, len(whole) // 2, len(whole) - 2):
            copy = folder.checkpoints / checkpoint.name
            copy.mkdir(parents=True)
            for other in checkpoint.iterdir():
                (copy / other.name).write_bytes(other.read_bytes())
            (copy / path.name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            assert Checkpoints(folder, engine, ALONE, keep=2).restore(seed=0) == Position()
            assert not copy.exists(), "set aside, under another name"
    after = engines.weights(engine)
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_a_manifest_of_another_shape_is_refused(checkpoint: Path) -> None:
    """One whose sum is right, as another program might write it."""
    path = checkpoint / manifest.MANIFEST
    whole = path.read_bytes()
    content = {key: value for key, value in json.loads(whole).items() if key not in ("format", "sha256")}
    changes: list[dict[str, Any]] = [
        {"files": value} for value in (None, [], 3, {"a": None}, {"a": {"bytes": 1}})
    ]
    others: list[Any] = [{k: v for k, v in content.items() if k != key} for key in content]
    for changed in (*others, *({**content, **change} for change in changes), {**content, "more": 1}):
        text = {"format": manifest.FORMAT, "sha256": manifest._own_sum(changed), **changed}
        path.write_text(json.dumps(text))
        with pytest.raises(Damaged, match=r"manifest\.json"):
            manifest.read(checkpoint)
    path.write_text("[" * 100_000)
    with pytest.raises(Damaged, match=r"manifest\.json cannot be read"):
        manifest.read(checkpoint)
    path.write_bytes(whole)

"""Brings a test cluster up and down, and runs programs on its nodes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from memlaunch.deploy.testbed import files

#: Program -> the Debian package that has it.
PROGRAMS = {
    "ip": "iproute2",
    "mpirun": "openmpi-bin",
    "munged": "munge",
    "nsenter": "util-linux",
    "pdsh": "pdsh",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}

HEAD = "head"
NETWORK = "10.77.0"

#: Seconds that a cluster may take to come up, and a node to come or go.
LIMIT_SECONDS = 60

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IDLE = "exec env --ignore-signal=CHLD sleep infinity"
_SWITCH = "switch"
_STATE = "cluster.json"
_FOLDERS = ("etc", "home", "log", "run", "state")


class TestbedError(Exception):
    """The cluster cannot come up, or something in it did not do what it was asked."""

    __test__ = False  # no test class, whatever pytest thinks of its name


def missing() -> str | None:
    """Why a cluster cannot stand on this machine; None if it can."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    absent = sorted({package for program, package in PROGRAMS.items() if not _which(program)})
    return f"needs the packages {' '.join(absent)}" if absent else None


class NodeProcess(subprocess.Popen[str]):
    """A program that runs on a node; it is killed where a ``with`` block ends before it does.

    Signals go to the program, not to what carried it there.
    """

    def send_signal(self, sig: int) -> None:
        """Send ``sig`` to the program; nothing happens if it has ended."""
        while self.poll() is None:
            if program := psutil.Process(self.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    program[0].send_signal(sig)
                return
            time.sleep(0.01)  # it is on its way

    def __exit__(self, *error: Any) -> None:
        self.kill()
        super().__exit__(*error)


class Cluster:
    """A cluster in ``folder``: ``up`` makes one, ``Cluster(folder)`` finds one that is up.

    Attributes:
        folder: everything of the cluster is in it.
        head: the name of the login node, which runs slurmctld and no jobs.
        nodes: the names of the compute nodes.
        hostfile: the compute nodes with one slot each.
        home: the home folder of all nodes.
        environment: what a program on a node finds in its environment, as after a login.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises TestbedError: no cluster stands in ``folder``."""
        self.folder = Path(folder).resolve()
        self.head = HEAD
        self.hostfile = self.folder / "etc" / "hostfile"
        self.home = self.folder / "home"
        try:
            self._state: dict[str, Any] = json.loads((self.folder / _STATE).read_text())
        except FileNotFoundError:
            raise TestbedError(f"no cluster stands in {self.folder}") from None
        self.nodes: tuple[str, ...] = tuple(self._state["nodes"])
        self.environment = {
            "HOME": str(self.home),
            "USER": "root",
            "LOGNAME": "root",
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}:{_SYSTEM_PATH}",
            # mpirun will not start for root without being told twice.
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self._carriers: list[subprocess.Popen[str]] = []

    # Coming and going

    @classmethod
    def up(cls, folder: str | Path, nodes: int = 2, *, bound: bool = False) -> "Cluster":
        """Bring up a login node and ``nodes`` compute nodes; a cluster that is in ``folder`` goes first.

        Args:
            bound: it ends with the thread that called, however that ends.

        Raises:
            TestbedError: this machine cannot have one, or a daemon did not start.
        """
        if reason := missing():
            raise TestbedError(f"a test cluster {reason}")
        down(folder)
        root = Path(folder).resolve()
        for name in _FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
        names = [f"node{number}" for number in range(1, nodes + 1)]
        _write_files(root, names)
        (root / _STATE).write_text(json.dumps({"nodes": names, "first": {}, "own": {}}))
        cluster = cls(root)
        try:
            cluster._start_switch(bound)
            everyone = (HEAD, *names)
            for name in everyone:
                cluster._start_node(name)
            cluster._wait_for_slurm()
            cluster._remember_daemons(everyone)
        except TestbedError as error:
            raise TestbedError(f"{error}\n{cluster._last_words()}") from None
        except BaseException:
            cluster.down()
            raise
        return cluster

    def down(self) -> None:
        """End every process of the cluster, and with them its namespaces; remove its files."""
        with contextlib.suppress(TestbedError):
            self._end(self._first(_SWITCH))
        for carrier in self._carriers:
            carrier.wait(LIMIT_SECONDS)
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / _STATE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # where it held nothing else

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    # Running programs

    def on(
        self,
        node: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        input: str | None = None,
        timeout: float = LIMIT_SECONDS,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` on ``node`` to its end, with ``env`` added to ``environment``.

        Raises:
            TestbedError: it failed, and ``check`` is true; what it printed is in the message.
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds, and has been killed.
        """
        with self.start(
            node, argv, env=env, cwd=cwd, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                output, errors = process.communicate(input, timeout)
            except BaseException:
                process.kill()
                raise
        done = subprocess.CompletedProcess(list(argv), process.returncode, output, errors)
        if check and done.returncode:
            raise TestbedError(f"{list(argv)} on {node} ended with {done.returncode}\n{output}{errors}")
        return done

    def start(
        self,
        node: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.PIPE,
        stderr: int | IO[Any] = subprocess.STDOUT,
    ) -> NodeProcess:
        """Start ``argv`` on ``node``, in a session of its own."""
        return NodeProcess(
            [*self._inside(node, cwd or self.home), *argv],
            env={**self.environment, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def processes(self, node: str) -> list[psutil.Process]:
        """What runs on ``node`` beside its daemons; the numbers are those of the machine, not of the node."""
        own = set(self._state["own"][node])
        return [process for process in self._all_of(node) if process.pid not in own]

    # Faults

    def stop(self, node: str) -> None:
        """End every process of ``node`` at once, as when its power fails."""
        self._end(self._first(node))

    def cut(self, node: str) -> None:
        """Take ``node`` off the network; its processes go on."""
        self._ip("link", "set", node, "down")

    def restore(self, node: str) -> None:
        """Bring back a node that was stopped or cut off, and wait until SLURM has it again."""
        was_cut = self._runs(node)
        if was_cut:
            self._ip("link", "set", node, "up")
        else:
            self._start_node(node)
        # SLURM does not ask again after a node that it has written off.
        self.on(HEAD, ["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)
        self._wait_for_slurm()
        if not was_cut:
            self._remember_daemons([node])

    # Inside

    def _start_switch(self, bound: bool) -> None:
        """The first process of the cluster, with which all others end, and the bridge of the nodes."""
        binding = ["setpriv", "--pdeathsig", "KILL"] if bound else []
        self._carry(
            _SWITCH, [*binding, "unshare", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", _IDLE]
        )
        self._ip("link", "add", "bridge", "type", "bridge")
        self._ip("link", "set", "bridge", "up")

    def _start_node(self, name: str) -> None:
        ready = self.folder / "run" / f"{name}.ready"
        ready.unlink(missing_ok=True)
        inside = ["nsenter", f"--target={self._first(_SWITCH).pid}", "--pid"]
        apart = ["unshare", "--pid", "--net", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc"]
        script = Path(__file__).with_name("node.sh")
        self._carry(name, [*inside, *apart, "sh", str(script), str(self.folder), name], ready)
        self._join(name)
        daemons = [
            [
                "munged",
                "--force",
                f"--key-file={self.folder}/etc/munge.key",
                f"--log-file={self.folder}/log/munged.{name}",
            ],
            ["/usr/sbin/sshd", "-E", f"{self.folder}/log/sshd.{name}"],
            ["slurmctld" if name == HEAD else "slurmd", "-L", f"{self.folder}/log/slurm.{name}"],
        ]
        for daemon in daemons:
            # Their output goes to a file: a daemon that holds a pipe would keep the reader waiting.
            with (self.folder / "log" / f"start.{name}").open("a+") as log:
                code = self.start(name, daemon, stdout=log).wait(LIMIT_SECONDS)
                if code:
                    log.seek(0)
                    raise TestbedError(f"{daemon[0]} on {name} ended with {code}\n{log.read()}")

    def _remember_daemons(self, names: Sequence[str]) -> None:
        """What runs on the nodes now is theirs; a daemon starts others until the cluster is up."""
        for name in names:
            self._state["own"][name] = [process.pid for process in self._all_of(name)]
        self._save()

    def _join(self, name: str) -> None:
        """A cable from the node to the switch."""
        inside = ["nsenter", f"--target={self._first(name).pid}", "--net", "ip"]
        with contextlib.suppress(TestbedError):
            self._ip("link", "delete", name)  # of the node before it was stopped
        # A node that comes back has the address that the others remember.
        mac = f"02:00:00:00:00:{int(_address(name).rpartition('.')[2]):02x}"
        peer = ["peer", "name", "eth0", "address", mac, "netns", str(self._first(name).pid)]
        self._ip("link", "add", name, "type", "veth", *peer)
        self._ip("link", "set", name, "master", "bridge", "up")
        _run([*inside, "address", "add", f"{_address(name)}/24", "dev", "eth0"])
        _run([*inside, "link", "set", "eth0", "up"])

    def _carry(self, name: str, argv: Sequence[str], ready: Path | None = None) -> None:
        """Start the first process of a namespace, and remember it once ``ready`` is there."""
        with (self.folder / "log" / f"start.{name}").open("w") as log:
            carrier = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True, start_new_session=True
            )
        self._carriers.append(carrier)
        for _ in _patience(f"{name} did not start"):
            if carrier.poll() is not None:
                raise TestbedError(f"{name} did not start\n{Path(log.name).read_text()}")
            inner = psutil.Process(carrier.pid).children(recursive=True)
            if inner and inner[-1].name() == "sleep" and (ready is None or ready.exists()):
                break
        self._state["first"][name] = [inner[-1].pid, inner[-1].create_time()]
        self._save()

    def _last_words(self) -> str:
        """The ends of the logs of a cluster that did not come up, which goes down."""
        logs = {
            path: path.read_text(errors="replace").splitlines()[-5:] for path in self.folder.glob("log/*")
        }
        self.down()
        return "\n".join(f"{path.name}: {line}" for path, lines in sorted(logs.items()) for line in lines)

    def _first(self, name: str) -> psutil.Process:
        """The first process of a node. Raises TestbedError: it has ended."""
        pid, started = self._state["first"].get(name, (None, None))
        with contextlib.suppress(psutil.NoSuchProcess):
            if pid is not None:
                process = psutil.Process(pid)
                if process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        raise TestbedError(f"{name} is not up")

    def _runs(self, name: str) -> bool:
        with contextlib.suppress(TestbedError):
            self._first(name)
            return True
        return False

    def _all_of(self, name: str) -> list[psutil.Process]:
        if not self._runs(name):
            return []
        namespace = _namespace(self._first(name))
        return [process for process in psutil.process_iter() if _namespace(process) == namespace]

    def _inside(self, node: str, folder: str | Path) -> list[str]:
        return [
            "nsenter",
            f"--target={self._first(node).pid}",
            "--pid",
            "--net",
            "--uts",
            "--mount",
            f"--wdns={folder}",
            "--",
        ]

    def _ip(self, *arguments: str) -> None:
        _run(["nsenter", f"--target={self._first(_SWITCH).pid}", "--net", "ip", *arguments])

    def _wait_for_slurm(self) -> None:
        expected = sum(self._runs(node) for node in self.nodes)
        for _ in _patience("SLURM did not come up"):
            states = self.on(
                HEAD, ["sinfo", "--noheader", "--Node", "--format=%T"], check=False
            ).stdout.split()
            if sum(state in ("idle", "mixed", "allocated") for state in states) >= expected:
                return

    def _end(self, first: psutil.Process) -> None:
        """Kill the first process of a namespace; the kernel kills the others, before it lets it go."""
        first.send_signal(signal.SIGKILL)
        with contextlib.suppress(psutil.NoSuchProcess):
            first.wait(LIMIT_SECONDS)

    def _save(self) -> None:
        (self.folder / _STATE).write_text(json.dumps(self._state))


def down(folder: str | Path) -> None:
    """Take down the cluster in ``folder``, if there is one."""
    with contextlib.suppress(TestbedError):
        Cluster(folder).down()


def _write_files(root: Path, names: Sequence[str]) -> None:
    """The files of a new cluster, its keys among them."""
    ssh, slurm, home = root / "etc" / "ssh", root / "etc" / "slurm", root / "home"
    for folder in (ssh, slurm, home / ".ssh"):
        folder.mkdir(parents=True)
    key, host_key = home / ".ssh" / "id_ed25519", ssh / "ssh_host_ed25519_key"
    for path in (key, host_key):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testbed", "-f", str(path)])
    everyone = (HEAD, *names)
    texts = {
        ssh / "sshd_config": files.sshd_config(),
        ssh / "ssh_config": files.ssh_config(),
        ssh / "ssh_known_hosts": files.known_hosts(everyone, host_key.with_suffix(".pub").read_text()),
        home / ".ssh" / "authorized_keys": key.with_suffix(".pub").read_text(),
        slurm / "slurm.conf": files.slurm_conf(HEAD, names, str(root / "state")),
        slurm / "gres.conf": files.gres_conf(),
        slurm / "cgroup.conf": files.cgroup_conf(),
        root / "etc" / "hosts": files.hosts({name: _address(name) for name in everyone}),
        root / "etc" / "hostfile": files.hostfile(names, slots=1),
        root / "etc" / "passwd": files.passwd(Path("/etc/passwd").read_text(), str(home)),
        root / "etc" / "shadow": "root:*:::::::\n",
    }
    for path, text in texts.items():
        path.write_text(text)
    munge_key = root / "etc" / "munge.key"
    munge_key.touch(0o600)
    munge_key.write_bytes(os.urandom(1024))
    # Compiled operators and the like are the machine's, and take minutes to make.
    (home / ".cache").symlink_to(Path.home() / ".cache")


def _address(name: str) -> str:
    return f"{NETWORK}.{1 if name == HEAD else 10 + int(name.removeprefix('node'))}"


def _namespace(process: psutil.Process) -> str | None:
    with contextlib.suppress(OSError):
        return str(Path(f"/proc/{process.pid}/ns/pid").readlink())
    return None


def _patience(what: str) -> Iterator[None]:
    """Turns of a loop that waits. Raises TestbedError: it waited too long."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
    raise TestbedError(f"{what} within {LIMIT_SECONDS} s")


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TestbedError(f"{list(argv)} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")

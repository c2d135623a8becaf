"""``memlaunch doctor``: asks every node of a job whether the job would run there.

Each node runs :mod:`memlaunch.launcher.doctor.on_node`, which goes there as text the same way as the ranks:
over ssh, in a step of SLURM, or in a process here. What the answers mean, and the table of it, is
:mod:`memlaunch.launcher.doctor.diagnosis`.
"""

import contextlib
import json
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from memlaunch.launcher.doctor import diagnosis, on_node, places
from memlaunch.launcher.doctor.diagnosis import HERE, Finding, Lost, Needs
from memlaunch.launcher.doctor.probe import LIMIT, Place, Probe, close, script
from memlaunch.launcher.errors import EXIT_INTERRUPTED, EXIT_LAUNCH

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

#: What must be the same on all nodes.
PACKAGES = ("memlaunch", "torch", "transformers", "deepspeed", "bitsandbytes", "numpy")

#: Seconds that importing torch may take; that the nodes have to meet for the all-reduce, and all of it.
LOAD_LIMIT = 120.0
MEETING_LIMIT = 30.0
REDUCE_LIMIT = 45.0

#: The all-reduce: bytes, and how often.
REDUCED = 64 * 2**20
TIMES = 3


@dataclass
class Report:
    """What was found.

    Attributes:
        nodes: those that were asked, by their names.
        all_reduce: its ``bytes``, ``seconds`` and ``bytes_per_second``, which is that of each node's link:
            2 (n - 1) / n times the bytes pass it; None where it did not come to it.
    """

    nodes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    all_reduce: dict[str, Any] | None = None

    @property
    def code(self) -> int:
        """The exit code."""
        return EXIT_LAUNCH if any(finding.state == "failed" for finding in self.findings) else 0

    def to_json(self) -> str:
        """The report as one object."""
        values = {
            "ok": self.code == 0,
            "nodes": self.nodes,
            "findings": [finding.to_dict() for finding in self.findings],
            "all_reduce": self.all_reduce,
        }
        return json.dumps(values, indent=2, ensure_ascii=False)


def run(resolved: "ResolvedJob | None", *, as_json: bool = False) -> int:
    """Examine the nodes of a job, or this machine without one, and print what was found; the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        report = examine(resolved)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(report.to_json() if as_json else diagnosis.table(report.findings), flush=True)
    if report.code:
        failed = sum(finding.state == "failed" for finding in report.findings)
        print(f"a run would fail: {failed} of {len(report.findings)} checks say so", file=sys.stderr)
    return report.code


def examine(resolved: "ResolvedJob | None") -> Report:
    """Ask the nodes of a job, or this machine without one, whether it would run there."""
    report = Report()
    with contextlib.ExitStack() as stack:
        asked, findings = places.find(resolved, stack)
        report.findings += findings
        report.nodes += [place.name for place in asked]
        complete = bool(asked) and _Examination(resolved, asked, report, stack).do()
        if complete and resolved is not None and resolved.job.cluster.launcher == "mpirun":
            report.findings.append(places.try_mpi(resolved, output_of(resolved)))
    return report


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def needs_of(resolved: "ResolvedJob | None", nodes: Sequence[str]) -> Needs:
    """What a job asks of its ``nodes``; without one, what most jobs do."""
    if resolved is None:
        return Needs(dict.fromkeys(nodes, 1), "auto", {"memlaunch", "torch", "transformers", "numpy"})
    job, layout = resolved.job, resolved.layout
    packages = {"memlaunch", "torch"}
    if job.script is None:
        packages |= {"transformers", "numpy"}
        optimizer = job.strategy.optimizer
        if 8 in (optimizer.bits, *(override.bits for override in optimizer.overrides)):
            packages.add("bitsandbytes")
    if "deepspeed" in (job.cluster.launcher, job.script is None and job.strategy.engine):
        packages.add("deepspeed")
    if job.cluster.launcher == "mpirun":
        packages.add("mpi4py")
    slots = {host.name: len(host.slots) for host in layout.hosts}
    return Needs({node: slots.get(node, layout.largest) for node in nodes}, job.cluster.device, packages)


def paths_of(resolved: "ResolvedJob | None") -> list[str]:
    """The files and folders that every node reads, less what comes from the hub."""
    if resolved is None:
        return []
    job = resolved.job
    if job.script is not None:
        return [job.script.path, *([job.script.folder] if job.script.folder else [])]
    named = [job.data.train, job.data.eval, job.model.path, job.model.tokenizer]
    found = (path for path in named if path is not None)
    return list(dict.fromkeys(path for path in found if path.startswith(("/", "package:"))))


def output_of(resolved: "ResolvedJob") -> Path:
    """The output folder of a job, or that of its parents which is there."""
    output = Path(resolved.job.output.dir)
    return next(path for path in (output, *output.parents) if path.exists())


class _Examination:
    """The questions, one after the other; a node that is lost on the way is asked no more."""

    def __init__(
        self,
        resolved: "ResolvedJob | None",
        places: Sequence[Place],
        report: Report,
        stack: contextlib.ExitStack,
    ) -> None:
        self._resolved = resolved
        self._needs = needs_of(resolved, [place.name for place in places])
        self._report = report
        self._several = len(places) > 1
        self._over = places[0].over
        setup = resolved.job.cluster.setup if resolved is not None else []
        self._probes = {
            place.name: Probe(place, script(sys.executable, place.environment, setup)) for place in places
        }
        self._pool = ThreadPoolExecutor(len(places))
        stack.callback(self._pool.shutdown, cancel_futures=True)
        stack.callback(close, tuple(self._probes.values()))

    def do(self) -> bool:
        """Ask everything; whether all nodes answered to the end."""
        self._reach()
        surveys = self._survey()
        self._output()
        master = self._port(surveys)
        torch = self._load(surveys)
        self._add(*diagnosis.gpus(surveys, torch, self._needs))
        if self._several:
            self._reduce(master, torch)
        return len(self._probes) == len(self._report.nodes)

    def _add(self, *findings: Finding | None) -> None:
        self._report.findings += [finding for finding in findings if finding is not None]

    def _all(self, check: str, question: Callable[[Probe], Any], *nodes: str) -> dict[str, Any]:
        """The answers of all nodes that are left, or of ``nodes``; one that has none is a finding."""
        probes = {node: probe for node, probe in self._probes.items() if not nodes or node in nodes}
        futures = {node: self._pool.submit(question, probe) for node, probe in probes.items()}
        answers = {}
        for node, future in futures.items():
            try:
                answer = future.result()
            except Lost as lost:
                self._add(diagnosis.lost(node, self._over, check, lost, sys.executable))
            except OSError as error:
                message = f"{error.filename or probes[node].place.argv[0]}: {error.strerror}"
                self._add(Finding(node, "reachable", "failed", message, "install it on this machine"))
            else:
                if isinstance(answer, dict) and "error" in answer:
                    self._add(Finding(node, check, "failed", answer["error"], diagnosis.BETWEEN))
                else:
                    answers[node] = answer
                continue
            del self._probes[node]
        return answers

    def _reach(self) -> None:
        for node in self._all("reachable", lambda probe: probe.open(LIMIT)):
            way = {"ssh": ", over ssh", "srun": ", over SLURM", "here": ""}[self._over]
            self._add(Finding(node, "reachable", "ok", f"Python starts there{way}"))
        if self._over != "here":
            for node, samples in self._all("clock", _clock_samples).items():
                self._add(diagnosis.clock(node, samples))

    def _survey(self) -> dict[str, Any]:
        packages = [*PACKAGES, *(["mpi4py"] if "mpi4py" in self._needs.packages else [])]
        paths = paths_of(self._resolved)
        gpus = self._needs.device != "cpu"
        surveys = self._all(
            "survey", lambda probe: probe.ask("survey", packages=packages, paths=paths, gpus=gpus)
        )
        here = on_node.survey(packages, paths, gpus=False)
        if surveys:
            self._add(*diagnosis.versions(surveys, here["versions"], self._needs))
        if self._several:
            self._add(*(diagnosis.address(node, survey) for node, survey in surveys.items()))
        for node, survey in surveys.items():
            self._add(*diagnosis.files(node, survey, here["paths"]))
        return surveys

    def _output(self) -> None:
        """Write into the output folder, and have every node read it and write something back."""
        if self._resolved is None:
            return
        base = output_of(self._resolved)
        try:
            with tempfile.TemporaryDirectory(
                prefix=".memlaunch-doctor-", dir=base, ignore_cleanup_errors=True
            ) as folder:
                self._share(base, Path(folder))
        except OSError as error:
            message = f"`{base}` cannot be written to: {error.strerror}"
            hint = "look at its permissions and its room, or choose another `output.dir`"
            self._add(Finding(HERE, "output", "failed", message, hint))

    def _share(self, base: Path, folder: Path) -> None:
        token = secrets.token_hex(16)
        folder.chmod(0o777)  # a node may know us by another number
        (folder / "token").write_text(token, encoding="utf-8")
        self._add(diagnosis.room(str(base), shutil.disk_usage(base).free))
        if self._over == "here":
            return
        files = {node: folder / str(number) for number, node in enumerate(self._probes)}

        def share(probe: Probe) -> dict[str, Any]:
            return probe.ask("share", folder=str(folder), token=token, name=files[probe.place.name].name)

        answers = self._all("output", share)
        deadline = time.monotonic() + on_node.PATIENCE
        for node, answer in answers.items():
            came_back = not answer and _shows(files[node], token, deadline)
            self._add(diagnosis.shared(node, str(base), answer, came_back))

    def _port(self, surveys: Mapping[str, Any]) -> tuple[str, int] | None:
        """Where the ranks would meet; None where they could not."""
        first = self._report.nodes[0]
        if first not in surveys:
            return None
        token = secrets.token_hex(16)
        listening = self._all("port", lambda probe: probe.ask("listen", token=token), first).get(first)
        if listening is None:
            return None
        if "problem" in listening:
            hint = "end what listens there: `ss --listening --tcp --processes`"
            self._add(Finding(first, "port", "failed", listening["problem"], hint))
            return None
        address, number = self._address(surveys), int(listening["port"])
        answers = self._all(
            "port", lambda probe: probe.ask("connect", address=address, port=number, token=token)
        )
        findings = [diagnosis.port(node, address, number, answer) for node, answer in answers.items()]
        self._add(*findings)
        return None if any(finding.state == "failed" for finding in findings) else (address, number)

    def _address(self, surveys: Mapping[str, Any]) -> str:
        """What the ranks take for the address of the first node."""
        if not self._several and self._over == "here":
            return "127.0.0.1"
        first = self._report.nodes[0]
        if self._resolved is not None and self._resolved.job.cluster.launcher == "mpirun":
            return str(surveys[first]["host"])
        return first

    def _load(self, surveys: Mapping[str, Any]) -> dict[str, Any]:
        """What torch says of the GPUs of each node, where it is needed."""
        nodes = [
            node
            for node, survey in surveys.items()
            if node in self._probes
            and survey["versions"]["torch"]
            and (self._several or self._needs.device == "cuda" or (survey["gpus"] or {}).get("cards"))
        ]
        return self._all("torch", lambda probe: probe.ask("load", LOAD_LIMIT), *nodes) if nodes else {}

    def _reduce(self, master: tuple[str, int] | None, torch: Mapping[str, Any]) -> None:
        nodes = self._report.nodes
        if master is None or set(torch) != set(nodes):
            message = "not tried: not every node came this far"
            self._add(Finding("all nodes", "all-reduce", "warning", message, "see to the rest first"))
            return
        address, number = master
        on_gpu = self._needs.device != "cpu" and all(answer["gpus"] for answer in torch.values())
        way = "nccl" if on_gpu else "gloo"
        answers = self._all(
            "all-reduce",
            lambda probe: probe.ask(
                "reduce",
                REDUCE_LIMIT,
                address=address,
                port=number,
                rank=nodes.index(probe.place.name),
                size=len(nodes),
                on_gpu=on_gpu,
                count=REDUCED // 4,
                times=TIMES,
                patience=MEETING_LIMIT,
            ),
        )
        if len(answers) < len(nodes):
            return
        seconds = max(answer["seconds"] for answer in answers.values())
        rate = 2 * (len(nodes) - 1) / len(nodes) * REDUCED / seconds
        self._report.all_reduce = {
            "backend": way,
            "bytes": REDUCED,
            "seconds": seconds,
            "bytes_per_second": rate,
        }
        message = f"64 MiB in {seconds:.3f} s over {way}: {rate / 1e9:.2f} GB/s for each node"
        self._add(Finding("all nodes", "all-reduce", "ok", message))


def _clock_samples(probe: Probe) -> list[tuple[float, float, float]]:
    samples = []
    for _ in range(3):
        before = time.time()
        theirs = probe.ask("clock")["time"]
        samples.append((before, float(theirs), time.time()))
    return samples


def _shows(path: Path, text: str, deadline: float) -> bool:
    """Whether ``path`` holds ``text`` before ``deadline``; a network file system may take its time."""
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)

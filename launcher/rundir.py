"""The run folder: the only place that knows the names of the files of a run.

``python -m memlaunch.launcher.rundir FOLDER RUN`` makes the run folder RUN (a new one, where RUN is empty
text) from the files in FOLDER, which ``memlaunch translate`` wrote, and prints its path. A run folder that is
there and has not run is printed as it is.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Names the run folder to the ranks of a run.
ENVIRONMENT_VARIABLE = "MEMLAUNCH_RUN_DIR"

#: Seconds that a line waits for room on a full disk; a checkpoint that does not fit gives its own back.
PATIENCE = 20.0
#: Seconds that a run waits for the last ranks of an earlier one in its folder to end.
LOCK_PATIENCE = 60.0


@dataclass(frozen=True)
class RunDir:
    """One run's folder."""

    path: Path

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.json"

    @property
    def launch(self) -> Path:
        return self.path / "launch"

    @property
    def ds_config(self) -> Path:
        return self.launch / "ds_config.json"

    @property
    def command(self) -> Path:
        return self.launch / "command.sh"

    @property
    def launcher(self) -> Path:
        return self.launch / "launcher.json"

    @property
    def hostfile(self) -> Path:
        return self.launch / "hostfile"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def launcher_log(self) -> Path:
        return self.logs / "launcher.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def probe(self) -> Path:
        """A file that says that the ranks are to try whether the job fits, and not to train."""
        return self.path / "probe"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def stop(self) -> Path:
        """A file that asks the ranks to stop between two steps."""
        return self.path / "stop"

    @property
    def hang(self) -> Path:
        """A file that says that the ranks hang, and are to be ended."""
        return self.path / "hang"

    @property
    def writer(self) -> Path:
        """Locked by the main rank while the run goes on; says who that is."""
        return self.path / "writer"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:04d}.log"

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``; numbers that are not finite become null."""
        _append(self.metrics, values)

    def append_event(self, event: str, **details: Any) -> None:
        """Add a line to ``events.jsonl``: the event, the time (seconds since 1970), and its details."""
        _append(self.events, {"event": event, "time": round(time.time(), 3), **details})

    def last_step(self) -> int:
        """The last optimizer step that ``metrics.jsonl`` tells of; 0 before the first."""
        return max((line["step"] for line, _ in read_lines(self.metrics)), default=0)

    def ended(self) -> bool:
        """Whether the run came to its end: its last attempt finished."""
        last = None
        for line, _ in read_lines(self.events):
            if line["event"] in ("restarted", "started", "finished"):
                last = line["event"]
        return last == "finished"

    def cut_metrics(self, step: int) -> None:
        """Take back what ``metrics.jsonl`` tells of steps behind ``step``, and of the evaluation of ``step``.

        A checkpoint comes before the evaluation of its step, which a resumed run repeats.
        """
        if not self.metrics.exists():
            return
        lines = [line for line, _ in read_lines(self.metrics)]
        kept = [line for line in lines if line["step"] < step or (line["step"] == step and "loss" in line)]
        partial = self.metrics.with_name(f"{self.metrics.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.metrics)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keep everyone else from running in this folder; the lock falls with the process that holds it.

        Raises:
            TimeoutError: another process runs in it.
        """
        descriptor = os.open(self.writer, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, self.path)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def ask_to_stop(self, send: Callable[[], object]) -> None:
        """Ask the ranks to stop between two steps; where they do not train, ``send`` does."""
        self.stop.touch()
        started = [
            event for event, _ in read_lines(self.events) if event["event"] in ("started", "restarted")
        ]
        if not started or started[-1]["event"] != "started" or "script" in started[-1]:
            send()

    def launched_here(self) -> None:
        """Keep that this process starts the ranks, for those who want to stop the run."""
        values = {"host": os.uname().nodename, "pid": os.getpid(), "started": _start_of(os.getpid())}
        self.place({self.launcher.name: json.dumps(values) + "\n"})

    def launcher_host(self) -> str | None:
        """The machine that the ranks were started from; None where no one has kept it."""
        host = self._launcher().get("host")
        return host if isinstance(host, str) else None

    def launcher_process(self) -> int | None:
        """The process of this machine that starts the ranks, if it runs."""
        kept = self._launcher()
        if self.launcher_host() != os.uname().nodename or kept["started"] != _start_of(kept["pid"]):
            return None
        return int(kept["pid"])

    def _launcher(self) -> dict[str, Any]:
        if not self.launcher.exists():
            return {}
        kept: dict[str, Any] = json.loads(self.launcher.read_text(encoding="utf-8"))
        return kept

    def place(self, files: Mapping[str, str]) -> None:
        """Write what :func:`memlaunch.launcher.translate.files` made to where a run has it.

        For the owner's eyes alone: the job's environment variables are among it.
        """
        for name, text in files.items():
            on_top = name in (self.resolved.name, self.job.name, self.plan.name)
            path = self.path / name if on_top else self.launch / name
            partial = path.with_name(f"{name}.partial")
            partial.touch(mode=0o600)
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)


def create(output: Path, name: str) -> RunDir:
    """A new, empty run folder ``output/name/<time>-<four hex digits>``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return _make(output / name / f"{stamp}-{secrets.token_hex(2)}")


def _make(path: Path) -> RunDir:
    run = RunDir(path.resolve())
    run.logs.mkdir(parents=True)
    run.launch.mkdir()
    return run


def create_from(folder: Path, path: Path | None = None) -> RunDir:
    """A run folder for the job translated into ``folder``, with copies of its files.

    Args:
        path: where; by default a new folder where the job has its runs. A run folder of the same job that has
            its files is taken as it is, unless that run has come to its end.

    Raises:
        FileNotFoundError: neither ``folder`` nor the folder above it holds a ``resolved.json``.
        FileExistsError: there is something else at ``path``, such as a run that has ended.
    """
    resolved = next(
        (p for p in (folder / "resolved.json", folder.parent / "resolved.json") if p.exists()), None
    )
    if path is not None and RunDir(path).resolved.exists():
        there = RunDir(path)
        if not there.events.exists() or (_same_job(there.resolved, resolved) and not there.ended()):
            return there
    if resolved is None:
        raise FileNotFoundError(f"no resolved.json in {folder}")
    job = json.loads(resolved.read_text(encoding="utf-8"))
    run = create(Path(job["output"]["dir"]), job["name"]) if path is None else _make(path)
    files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    text = resolved.read_text(encoding="utf-8")
    run.place({**files, run.resolved.name: text, run.job.name: text})
    return run


def _same_job(one: Path, other: Path | None) -> bool:
    """Whether two resolved jobs are the same, but for the bucket size that the ranks may have written in."""
    if other is None:
        return False
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in (one, other)]
    for job in jobs:
        job.get("data", {}).get("batching", {}).pop("bucket_size", None)
    return bool(jobs[0] == jobs[1])


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole JSON lines of ``path`` from byte ``start`` on, each with the byte behind it.

    A last line that is still being written is left for the next call; a file that is not there is empty.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            # A full disk may have cut a line short, and a crash may have left zeros.
            with contextlib.suppress(ValueError):
                yield json.loads(line), start


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; no two of one number have the same."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _append(path: Path, values: Mapping[str, Any]) -> None:
    line = json.dumps({key: _finite(value) for key, value in values.items()}) + "\n"
    # One write of one line, so that lines of several processes do not mix.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        _write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; on a full disk, wait for room."""
    patience = time.monotonic() + PATIENCE
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > patience:
                raise
            time.sleep(0.1)


def _lock(descriptor: int, folder: Path) -> None:
    patience = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > patience:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise TimeoutError(f"{holder} runs in {folder}") from None
            time.sleep(0.1)
        else:
            return


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    source, target = sys.argv[1:]
    try:
        print(create_from(Path(source), Path(target) if target else None).path)
    except OSError as error:
        sys.exit(f"error: no run folder can be made: {error}")

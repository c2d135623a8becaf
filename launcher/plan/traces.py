"""Traces of jobs, made in processes of their own and kept on disk by all that they depend on."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from memlaunch.launcher.errors import EXIT_FAILED, UserError

#: What decides a trace beside the job, the shape of its batches and the code of memlaunch.
_LIBRARIES = ("torch", "transformers", "deepspeed", "bitsandbytes")

#: Keys of ``training`` that a trace depends on.
_TRAINING = ("gradient_accumulation_steps", "max_grad_norm", "micro_batch_size", "weight_decay")


class NotTraced(Exception):
    """A job does not fit its model or data. ``key`` is the key of the job file that it is about."""

    def __init__(self, key: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


#: A resolved job, the shape of its batches, a number of layers in the place of the model's, and the bytes
#: that the caching allocator may reserve.
Request = tuple[dict[str, Any], dict[str, Any], int | None, int | None]


class Tracer:
    """Answers of ``python -m memlaunch.launcher.plan.trace``, from processes that start when one is needed.

    Args:
        device: ``cpu``, or ``cuda`` for what CUDA would do.
        processes: how many work at once; each takes about 1 GB of memory.
        cache: where answers are kept; None for nowhere.
    """

    def __init__(self, device: str, processes: int = 2, cache: Path | None = None) -> None:
        self.traced = 0
        self._device = device
        self._limit = processes
        self._cache = cache
        self._started: list[subprocess.Popen[str]] = []
        self._idle: SimpleQueue[subprocess.Popen[str] | None] = SimpleQueue()
        for _ in range(processes):
            self._idle.put(None)

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def warm_up(self, processes: int) -> None:
        """Start to load the libraries in so many processes."""
        for _ in range(min(processes, self._limit)):
            self._idle.get()
            self._idle.put(self._start())

    def shape(self, job: dict[str, Any]) -> dict[str, Any]:
        """The largest micro-batch of a resolved job's own data.

        Raises:
            NotTraced: the data cannot be read.
            UserError: for any other reason.
        """
        kept = {section: job.get(section) for section in ("model", "data")}
        changed = [_stamp(job["data"]["train"])]
        return self._answer({"resolved": job, "shape": None}, [kept, changed, job["training"]])

    def traces(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The trace of each request; see :mod:`memlaunch.launcher.plan.trace.tracing`.

        Raises:
            NotTraced: a job does not fit its model.
            UserError: a trace failed for any other reason.
        """
        with ThreadPoolExecutor(self._limit) as pool:
            return list(pool.map(lambda request: self.trace(*request), requests))

    def trace(
        self,
        job: dict[str, Any],
        shape: dict[str, Any],
        layers: int | None = None,
        capacity: int | None = None,
    ) -> dict[str, Any]:
        """One of :meth:`traces`."""
        request = {"resolved": job, "shape": shape, "layers": layers, "capacity": capacity}
        return self._answer(request, [_effective(job), shape, layers, capacity, self._device])

    def _answer(self, request: dict[str, Any], depends_on: Iterable[Any]) -> dict[str, Any]:
        kept = self._path(depends_on)
        if kept is not None and kept.exists():
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return found
        answer = self._ask({**request, "device": self._device})
        if "error" in answer:
            raise UserError(
                f"the job cannot be traced: {answer['error'].strip().splitlines()[-1]}",
                "plan without `--gpu`, or report it with the job file",
                exit_code=EXIT_FAILED,
            )
        if "key" in answer:
            raise NotTraced(answer["key"], answer["message"], answer["hint"])
        self.traced += 1
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(answer), encoding="utf-8")
            partial.replace(kept)
        return answer

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._idle.get() or self._start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        finally:
            self._idle.put(process)
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the tracing process ended"}
        return answer

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "memlaunch.launcher.plan.trace"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._started.append(process)
        return process

    def _path(self, depends_on: Iterable[Any]) -> Path | None:
        if self._cache is None:
            return None
        text = json.dumps([*depends_on, _versions()], sort_keys=True)
        return self._cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/memlaunch/plan``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memlaunch" / "plan"


def _effective(job: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved job that its trace depends on."""
    training, cluster = job["training"], job["cluster"]
    return {
        "model": job["model"],
        "weights": _stamp(job["model"].get("path") or ""),
        "strategy": job["strategy"],
        "training": {key: training[key] for key in _TRAINING},
        "ranks": [cluster["nodes"], cluster["gpus_per_node"]],
    }


def _stamp(path: str) -> list[Any]:
    """What changes when a file or a model folder does."""
    found = Path(path)
    if found.is_dir():
        found = found / "config.json"
    return [path, found.stat().st_mtime_ns, found.stat().st_size] if path and found.exists() else [path]


def _versions() -> list[str]:
    """Of the libraries, and a fingerprint of memlaunch's own code."""
    versions = [importlib.metadata.version(name) for name in _LIBRARIES]
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    sources = [package / "plan" / "allocator.py"]
    for folder in (package / "plan" / "trace", package / "training", package.parent / "strategies"):
        sources += sorted(folder.rglob("*.py"))
    for source in sources:
        digest.update(source.read_bytes())
    return [*versions, digest.hexdigest()]

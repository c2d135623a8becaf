"""Traces of jobs, made in processes of their own and kept on disk by all that they depend on."""

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memlaunch.launcher import entry
from memlaunch.launcher.errors import EXIT_FAILED, UserError
from memlaunch.launcher.plan import allocator

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


#: A resolved job, the shape of its batches, a number of layers in the place of the model's, and numbers of
#: samples in the place of the shape's, the smallest first.
Request = tuple[dict[str, Any], dict[str, Any], int | None, Sequence[int]]


class Tracer:
    """Answers of ``python -m memlaunch.launcher.plan.trace``, a process that starts when it is needed.

    Args:
        device: ``cpu``, or ``cuda`` for what CUDA would do.
        processes: how many requests are worked on at once; each takes some 100 MB of memory.
        cache: where answers are kept; None for nowhere.
    """

    def __init__(self, device: str, processes: int = 2, cache: Path | None = None) -> None:
        self.traced = 0
        self._device = device
        self._limit = processes
        self._cache = cache
        self._server = _Server()

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.end()

    def on(self, device: str) -> "Tracer":
        """One for another device, with the same process and cache."""
        other = copy.copy(self)
        other._device = device
        return other

    def shape(self, job: dict[str, Any]) -> dict[str, Any]:
        """The largest micro-batch of a resolved job's own data.

        Raises:
            NotTraced: the data cannot be read.
            UserError: for any other reason.
        """
        return self._answer({"resolved": job, "shape": None}, ["shape", *_read(job)])

    def batches(self, job: dict[str, Any]) -> dict[str, Any]:
        """The figures of the batches of a resolved job; see :mod:`memlaunch.launcher.plan.batches`.

        Raises:
            NotTraced, UserError: as for :meth:`shape`.
        """
        ranks = [job["cluster"]["nodes"], job["cluster"]["gpus_per_node"], job["cluster"]["hostfile"]]
        return self._answer({"resolved": job, "batches": True}, ["batches", *_read(job), ranks])

    def steps(self, requests: Sequence[Request]) -> list[list[dict[str, Any]]]:
        """The ``steps`` of the trace of each request: the figures of each number of samples.

        One process makes all steps of a request, with one model and one engine.

        Raises:
            NotTraced, UserError: as for :meth:`trace`.
        """

        def traced(request: Request) -> list[dict[str, Any]]:
            job, shape, layers, (first, *more) = request
            shape = {**shape, "samples": first}
            asked = {"resolved": job, "shape": shape, "layers": layers, "sizes": more}
            depends_on = [_effective(job), shape, layers, self._device, *([more] if more else [])]
            found: list[dict[str, Any]] = self._answer(asked, depends_on)["steps"]
            return found

        with ThreadPoolExecutor(self._limit) as pool:
            return list(pool.map(traced, requests))

    def trace(
        self,
        job: dict[str, Any],
        shape: dict[str, Any],
        layers: int | None = None,
        capacity: int | None = None,
    ) -> dict[str, Any]:
        """One trace; see :mod:`memlaunch.launcher.plan.trace.tracing`.

        What the caching allocator does within ``capacity`` bytes is worked out here, from the trace's events.

        Raises:
            NotTraced: the job does not fit its model.
            UserError: the trace failed for any other reason.
        """
        request = {"resolved": job, "shape": shape, "layers": layers}
        answer = self._answer(request, [_effective(job), shape, layers, self._device])
        events = answer.pop("events", None)
        for key, expandable in (("allocator", False), ("expandable_allocator", True)):
            # What is not reached changes nothing.
            if capacity is not None and key in answer and answer[key]["peak_reserved"] > capacity:
                settings = allocator.Settings(expandable, capacity)
                answer[key] = asdict(allocator.simulate(allocator.unpacked(events), settings))
        return answer

    def _answer(self, request: dict[str, Any], depends_on: Iterable[Any]) -> dict[str, Any]:
        kept = self._path(depends_on)
        if kept is not None and kept.exists():
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return found
        answer = self._server.ask({**request, "device": self._device})
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
            partial = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            partial.write_text(json.dumps(answer), encoding="utf-8")
            partial.replace(kept)
        return answer

    def _path(self, depends_on: Iterable[Any]) -> Path | None:
        if self._cache is None:
            return None
        text = json.dumps([*depends_on, _versions()], sort_keys=True)
        return self._cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


class _Server:
    """The process, which starts with the first request, and who waits for which of its answers."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; ``error`` in it says that there is none."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            process = self._process = self._process or self._start()
            number = next(self._numbers)
            self._waiting[number] = future
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # whoever reads the answers says so
                process.stdin.write(json.dumps({"id": number, **request}) + "\n")
                process.stdin.flush()
        return future.result()

    def end(self) -> None:
        """End the process, and what it is at."""
        with self._lock:
            process, reader = self._process, self._reader
        if process is None:
            return
        process.kill()
        assert reader is not None
        reader.join()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "memlaunch.launcher.plan.trace"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdin is not None
        for line in process.stdout:
            answer = json.loads(line)
            self._waiting.pop(answer.pop("id")).set_result(answer)
        with self._lock:
            self._process = None
            for future in self._waiting.values():
                future.set_result({"error": "the tracing process ended"})
            self._waiting.clear()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/memlaunch/plan``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memlaunch" / "plan"


def _effective(job: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved job that its trace depends on."""
    training, cluster = job["training"], job["cluster"]
    return {
        "model": job["model"],
        "weights": _stamp(job["model"].get("path") or _module(job)),
        "strategy": job["strategy"],
        "training": {key: training[key] for key in _TRAINING},
        "ranks": [cluster["nodes"], cluster["gpus_per_node"]],
    }


def _read(job: dict[str, Any]) -> list[Any]:
    """The part of a resolved job that its batches depend on, and what changes when its files do."""
    files = [job["data"].get(key) for key in ("train", "eval")]
    files += [*(job["model"].get(key) for key in ("path", "tokenizer")), _module(job)]
    return [job["model"], job["data"], job["training"], [_stamp(file or "") for file in files]]


def _module(job: dict[str, Any]) -> str:
    """The file of the user's own model, where the job has one."""
    name = job["model"].get("entry")
    return str(entry.parse(name, Path("/")).file) if name is not None else ""


def _stamp(path: str) -> list[Any]:
    """What changes when a file, or one in a folder, does."""
    found = Path(path)
    if not path or not found.exists():
        return [path]
    files = sorted(found.iterdir()) if found.is_dir() else [found]
    return [path, *([file.name, file.stat().st_mtime_ns, file.stat().st_size] for file in files)]


@functools.cache
def _versions() -> list[str]:
    """Of the libraries, and a fingerprint of memlaunch's own code."""
    versions = [importlib.metadata.version(name) for name in _LIBRARIES]
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    sources = [package / "plan" / name for name in ("allocator.py", "batches.py")]
    for folder in (package / "plan" / "trace", package / "training", package.parent / "strategies"):
        sources += sorted(folder.rglob("*.py"))
    for source in sources:
        digest.update(source.read_bytes())
    return [*versions, digest.hexdigest()]

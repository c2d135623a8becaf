"""Answers requests, one a line of JSON on stdin, each with one line of JSON on stdout.

A request is ``{"id": <anything>, "resolved": <a resolved job>, "device": "cpu" or "cuda", "shape": <a Shape,
as a dict>, "layers": <null, or a number>, "sizes": <numbers of samples>}``. It is answered by ``trace`` of
:mod:`memlaunch.launcher.plan.trace.tracing`; without a shape, by the shape of the job's own data with the
``facts`` of its model; with ``"batches": true``, by the figures of :mod:`memlaunch.launcher.plan.batches`.
Each is worked on in a fork of this process, which has loaded the libraries once, all at the same time; the
answers come as they are ready, each with the ``id`` of its request.
"""

import contextlib
import gc
import json
import os
import selectors
import signal
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any

from memlaunch.launcher.node import end_with_parent


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    if not os.environ.get("MEMLAUNCH_DEBUG"):
        os.dup2(1, 2)
    _load()
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                chunk = os.read(key.fd, 1 << 20)
                fork: _Fork | None = key.data
                if fork is None and not chunk:
                    return
                if fork is None:
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        begun = _begin(json.loads(line))
                        selector.register(begun.pipe, selectors.EVENT_READ, begun)
                elif chunk:
                    fork.chunks.append(chunk)
                else:
                    selector.unregister(fork.pipe)
                    answers.write(json.dumps({**fork.answer(), "id": fork.request}) + "\n")
                    answers.flush()


@dataclass(frozen=True)
class _Fork:
    """A process at work on a request, and what it has answered so far."""

    request: Any
    process: int
    pipe: int
    chunks: list[bytes] = field(default_factory=list)

    def answer(self) -> dict[str, Any]:
        """The whole of it, once the pipe has ended."""
        os.close(self.pipe)
        _, status = os.waitpid(self.process, 0)
        if not self.chunks:
            return {"error": f"the trace ended with status {os.waitstatus_to_exitcode(status)}"}
        answer: dict[str, Any] = json.loads(b"".join(self.chunks))
        return answer


def _begin(request: dict[str, Any]) -> _Fork:
    _load_for(request)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        end_with_parent(signal.SIGKILL)
        with os.fdopen(write, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(_answer(request)))
        os._exit(0)  # nothing of the parent's is to be cleaned up here
    os.close(write)
    return _Fork(request["id"], child, read)


def _load() -> None:
    """Import what every trace needs."""
    import torch
    import torch._dynamo
    import transformers

    import memlaunch.launcher.plan.trace.tracing
    import memlaunch.launcher.training.torch_engine

    assert memlaunch.launcher.training.torch_engine is not None
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    gc.freeze()  # what forks collect is their own


def _load_for(request: dict[str, Any]) -> None:
    """Import what the traces of this job need: its engine, and the code of its model."""
    if request.get("batches"):
        return
    import transformers

    from memlaunch.launcher.job import ModelSection
    from memlaunch.launcher.training.model import load_config
    from memlaunch.launcher.training.tasks import TASKS

    job = request["resolved"]
    if job["strategy"]["engine"] == "deepspeed" and "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        import memlaunch.launcher.training.deepspeed_engine

        assert memlaunch.launcher.training.deepspeed_engine is not None
        import deepspeed.runtime.zero.muon.muon_optimizer  # it loads torch's compiler, in a second

        assert deepspeed.runtime.zero.muon is not None
        gc.freeze()
    with contextlib.suppress(Exception):  # the trace says what is wrong
        model = ModelSection.model_validate(job["model"])
        auto = getattr(transformers, TASKS[model.task].auto_class)
        auto._model_mapping[type(load_config(model))]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from memlaunch.launcher.plan.batches import figures
    from memlaunch.launcher.plan.jobs import resolved_of
    from memlaunch.launcher.plan.trace.rehearsal import Shape, shape_of
    from memlaunch.launcher.plan.trace.tracing import facts, trace
    from memlaunch.launcher.training.errors import JobMismatch, NotApplicable

    try:
        resolved = resolved_of(request["resolved"])
        if request.get("batches"):
            return figures(resolved)
        if request.get("shape") is None:
            shape = shape_of(resolved)
            return {**shape.to_dict(), **facts(resolved, shape)}
        shape = Shape.from_dict(request["shape"])
        return trace(resolved, shape, request["device"], request.get("layers"), request.get("sizes", ()))
    except (JobMismatch, NotApplicable) as error:
        return {"key": error.key, "message": str(error), "hint": error.hint}
    except BaseException:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main()

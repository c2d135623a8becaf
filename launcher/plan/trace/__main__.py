"""Answers requests, one a line of JSON on stdin, each with one line of JSON on stdout.

A request is ``{"resolved": <a resolved job>, "device": "cpu" or "cuda", "shape": <a Shape, as a dict>,
"layers": <null, or a number>, "capacity": <null, or bytes>}``. It is answered by ``trace`` of
:mod:`memlaunch.launcher.plan.trace.tracing`; without a shape, by the shape of the job's own data with the
``facts`` of its model. Each is worked on in a fork of this process, which has loaded the libraries once.
"""

import contextlib
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    if not os.environ.get("MEMLAUNCH_DEBUG"):
        os.dup2(1, 2)
    _load()
    for line in sys.stdin:
        request = json.loads(line)
        _load_for(request["resolved"])
        answers.write(_in_a_fork(request) + "\n")
        answers.flush()


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


def _load_for(job: dict[str, Any]) -> None:
    """Import what the traces of this job need: its engine, and the code of its model."""
    import transformers

    from memlaunch.launcher.job import ModelSection
    from memlaunch.launcher.training.model import load_config
    from memlaunch.launcher.training.tasks import TASKS

    if job["strategy"]["engine"] == "deepspeed":
        import memlaunch.launcher.training.deepspeed_engine

        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        assert memlaunch.launcher.training.deepspeed_engine is not None
        import deepspeed.runtime.zero.muon.muon_optimizer  # it loads torch's compiler, in a second

        assert deepspeed.runtime.zero.muon is not None
    with contextlib.suppress(Exception):  # the trace says what is wrong
        model = ModelSection.model_validate(job["model"])
        auto = getattr(transformers, TASKS[model.task].auto_class)
        auto._model_mapping[type(load_config(model))]


def _in_a_fork(request: dict[str, Any]) -> str:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(_answer(request)))
        os._exit(0)  # nothing of the parent's is to be cleaned up here
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text or json.dumps({"error": f"the trace ended with status {os.waitstatus_to_exitcode(status)}"})


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from memlaunch.launcher.plan.jobs import resolved_of
    from memlaunch.launcher.plan.trace.rehearsal import Shape, shape_of
    from memlaunch.launcher.plan.trace.tracing import facts, trace
    from memlaunch.launcher.training.errors import JobMismatch, NotApplicable

    try:
        resolved = resolved_of(request["resolved"])
        if request.get("shape") is None:
            shape = shape_of(resolved)
            return {**shape.to_dict(), **facts(resolved, shape)}
        shape = Shape.from_dict(request["shape"])
        return trace(resolved, shape, request["device"], request.get("layers"), request.get("capacity"))
    except (JobMismatch, NotApplicable) as error:
        return {"key": error.key, "message": str(error), "hint": error.hint}
    except BaseException:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main()

"""Whether a job fits on a GPU, and the fastest way to run it there; the memory half of ``memlaunch plan``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlaunch.launcher import layout, resolve, schema
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import Job
from memlaunch.launcher.plan import auto, gpus, report
from memlaunch.launcher.plan.search import Question, search
from memlaunch.launcher.plan.time import Machines
from memlaunch.launcher.plan.traces import NotTraced, Tracer, default_cache
from memlaunch.launcher.resolve import ResolvedJob
from memlaunch.launcher.source import Document
from memlaunch.strategies.accumulation import BatchError


def read(path: Path, sets: Sequence[str] = ()) -> tuple[Document, ResolvedJob, frozenset[str]]:
    """A job file in which keys may be ``"auto"``; the job with the simplest in their place; and the keys.

    Raises:
        UserError: with everything that is wrong with the job otherwise.
    """
    document = resolve.read(path, sets)
    found = auto.opened(document.value, schema.shorthands(Job))
    keys = auto.open_keys(found, document.value)
    if found:
        document = resolve.read(
            path, [*sets, *(f"{key}={json.dumps(value)}" for key, value in found.items())]
        )
    return document, resolve.from_document(document, path), keys


def plan(
    document: Document,
    resolved: ResolvedJob,
    keys: frozenset[str],
    gpu: str,
    nodes: int | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """``plan.json`` for a job as :func:`read` gives it; see :func:`memlaunch.launcher.plan.report.to_dict`.

    Args:
        gpu: the name of a GPU of the catalogue.
        nodes: so many machines in the place of the job's own number.
        cache: where traces are kept; by default in the user's cache.

    Raises:
        UserError: the GPU is not known, the batch sizes do not go with the machines, or the job does not fit
            its model or data.
    """
    if resolved.job.script is not None:
        raise UserError("a script of your own cannot be planned", "the planner knows `model` and `data` only")
    machines = Machines(gpus.find(gpu), nodes or resolved.layout.nodes, resolved.layout.largest)
    job = _on(resolved, machines, document, keys)
    with Tracer("cuda", cache=cache or default_cache()) as tracer:
        try:
            question = Question(job, keys, tracer.shape(job), machines, _expandable(resolved.job.cluster.env))
            found = search(question, tracer)
            ways_out = [] if found.fits else report.ways_out(question, tracer)
        except NotTraced as error:
            raise UserError(problems=[document.finding(error.key, str(error), error.hint)]) from None
    return report.to_dict(question, found, ways_out)


def _on(
    resolved: ResolvedJob, machines: Machines, document: Document, keys: frozenset[str]
) -> dict[str, Any]:
    """The job, resolved for these machines; batch sizes that it left open follow from their ranks."""
    values = json.loads(resolved.to_json())
    values["cluster"] |= {"nodes": machines.nodes, "gpus_per_node": machines.per_node, "hostfile": None}
    if machines.nodes != resolved.layout.nodes:
        given = document.value.get("training") or {}
        for key in ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps"):
            values["training"][key] = given.get(key)
    job = Job.model_validate(values)
    here = Path("/")
    try:
        on_them = resolve.resolve(job, layout.of(job.cluster, here), base=here, name=job.name)
    except BatchError as error:
        raise UserError(f"training.{error.key}: {error}", error.hint) from None
    planned: dict[str, Any] = json.loads(on_them.to_json())
    return planned


def _expandable(environment: dict[str, str]) -> bool:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:true" in environment.get(name, "").lower() for name in names)

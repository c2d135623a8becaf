"""Whether a job fits on a GPU, and the fastest way to run it there; the memory half of ``memlaunch plan``."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from memlaunch.launcher import layout, resolve
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import Job
from memlaunch.launcher.plan import auto, machine, report
from memlaunch.launcher.plan.gpus import Gpu
from memlaunch.launcher.plan.search import Question, search
from memlaunch.launcher.plan.time import Machines
from memlaunch.launcher.plan.traces import NotTraced, Tracer, default_cache
from memlaunch.launcher.resolve import ResolvedJob
from memlaunch.launcher.source import Document
from memlaunch.strategies.accumulation import BatchError


def plan(
    document: Document,
    resolved: ResolvedJob,
    gpu: Gpu,
    nodes: int | None = None,
    tracer: Tracer | None = None,
) -> dict[str, Any]:
    """``plan.json`` for a job and the keys that are open in it.

    See :func:`memlaunch.launcher.plan.report.to_dict`.

    Args:
        document: what the job was resolved from.
        gpu: what each rank has.
        nodes: so many machines in the place of the job's own number.
        tracer: one for the GPU's device; by default one with the user's cache.

    Raises:
        UserError: the batch sizes do not go with the machines, or the job does not fit its model or data.
    """
    check(resolved)
    keys = resolved.open
    machines = Machines(gpu, nodes or resolved.layout.nodes, resolved.layout.largest)
    job = _on(resolved, machines, document)
    with nullcontext(tracer) if tracer else Tracer(gpu.device, cache=default_cache()) as started:
        try:
            shape = started.shape(job)
            host = machine.host_memory(resolved, gpu)
            expandable = _expandable(resolved.job.cluster.env)
            question = Question(job, keys, shape, machines, expandable, _bucket(document), host)
            found = search(question, started)
            ways_out = [] if found.fits else report.ways_out(question, started)
        except NotTraced as error:
            raise UserError(problems=[document.finding(error.key, str(error), error.hint)]) from None
    return report.to_dict(question, found, ways_out)


def check(resolved: ResolvedJob) -> None:
    """See that it is a job that can be planned.

    Raises:
        UserError: it is not.
    """
    if resolved.job.script is not None or resolved.job.model.entry is not None:
        what = "script" if resolved.job.script is not None else "model"
        hint = "the planner knows the models of transformers only; start it without"
        raise UserError(f"a {what} of your own cannot be planned", hint)


def _on(resolved: ResolvedJob, machines: Machines, document: Document) -> dict[str, Any]:
    """The job, resolved for these machines; batch sizes that it left open follow from their ranks."""
    values = json.loads(resolved.to_json())
    values["cluster"] |= {"nodes": machines.nodes, "gpus_per_node": machines.per_node, "hostfile": None}
    if machines.nodes != resolved.layout.nodes:
        given = document.value.get("training") or {}
        for key in ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps"):
            values["training"][key] = given.get(key) if given.get(key) != auto.AUTO else None
    job = Job.model_validate(values)
    here = Path("/")
    try:
        on_them = resolve.resolve(job, layout.of(job.cluster, here), base=here, name=job.name)
    except BatchError as error:
        raise UserError(f"training.{error.key}: {error}", error.hint) from None
    planned: dict[str, Any] = json.loads(on_them.to_json())
    return planned


def _bucket(document: Document) -> int | None:
    """The bucket size that the user gave; its default follows from the micro-batch."""
    batching = (document.value.get("data") or {}).get("batching")
    return batching.get("bucket_size") if isinstance(batching, dict) else None


def _expandable(environment: dict[str, str]) -> bool:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:true" in environment.get(name, "").lower() for name in names)

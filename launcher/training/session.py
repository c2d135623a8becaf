"""One rank's part of a run, from the resolved job to the saved model."""

import contextlib
import json
from typing import TYPE_CHECKING, Any

import torch
import transformers

from memlaunch.launcher.training import export, loop, random_state, together
from memlaunch.launcher.training import subject as subjects
from memlaunch.launcher.training.between import Between
from memlaunch.launcher.training.checkpoint import Checkpoints
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.errors import LaunchFailed, NotApplicable, TrainingFailed
from memlaunch.launcher.training.model import parameter_count
from memlaunch.launcher.training.schedule import learning_rate
from memlaunch.launcher.training.stopping import StopRequests
from memlaunch.launcher.training.trackers import Trackers
from memlaunch.launcher.training.world import World
from memlaunch.strategies import TECHNIQUES, optimizer, precision
from memlaunch.strategies.technique import Setup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.hooks import RemovableHandle

    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.rundir import RunDir


def run(resolved: "ResolvedJob", folder: "RunDir", world: World) -> bool:
    """Train the job's model in this rank, from the newest checkpoint of the run on, and save it.

    Returns whether it came to its end, and nobody asked to stop before.

    Raises:
        JobMismatch, NotApplicable: the job does not fit the model, the data or the checkpoint.
        TrainingFailed: training cannot go on.
        LaunchFailed: another process runs in ``folder``.
    """
    with (
        StopRequests(folder, world.is_main) as requests,
        _alone(folder, world),
        Trackers(resolved, folder, world.is_main) as trackers,
    ):
        arrived = _run(resolved, folder, world, requests, trackers.record)
        trackers.ended = "finished" if arrived else "stopped"
        return arrived


@contextlib.contextmanager
def _alone(folder: "RunDir", world: World) -> "Iterator[None]":
    """On the main rank: keep every other run out of the folder; the other ranks wait for that.

    Raises:
        LaunchFailed: there is one.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if world.is_main:
            try:
                stack.enter_context(folder.writing())
            except TimeoutError as error:
                problem = str(error)
        problem = together.gather(problem, world)[0]
        if problem is not None:
            raise LaunchFailed(problem, "wait for it to end, or stop it")
        yield


def _run(
    resolved: "ResolvedJob",
    folder: "RunDir",
    world: World,
    requests: StopRequests,
    record: "Callable[[dict[str, Any]], None]",
) -> bool:
    job = resolved.job
    setup = resolved.setup(world.kind)
    torch.set_num_threads(resolved.threads_per_rank)
    transformers.logging.set_verbosity_error()
    if job.training.deterministic:
        torch.use_deterministic_algorithms(True)
    subject = subjects.load(resolved, world)
    model, task, batches = subject.model, subject.task, subject.batches
    _keep_bucket_size(resolved, folder, subject.bucket_size, world)
    for technique in TECHNIQUES:
        technique.prepare_model(model, setup)
    casts = precision.engine_casts(setup.precision)
    untouched = export.Untouched(model, subject.stored, casts, subject.use_cache, world)
    everything, trainable = parameter_count(model)
    ignored = optimizer.useless_overrides(model, setup.optimizer)
    random_state.renew(job.training.seed + world.rank)  # dropout differs between ranks
    kind = type(model).__name__
    engine = _start(model, setup, folder, world)
    unused, watches = _watch_gradients(model)  # not before: FSDP2 puts parameters of its own in place

    steps = job.training.max_steps or (job.training.epochs or 1) * batches.steps_per_epoch
    warmup = job.training.warmup_steps or round((job.training.warmup_ratio or 0) * steps)
    checkpoints = Checkpoints(folder, engine, world, job.output.keep_checkpoints)
    start = checkpoints.restore(job.training.seed)
    if world.is_main:
        folder.cut_metrics(start.step)
        if start.step:
            folder.append_event("resumed", step=start.step)
        for warning in subject.warnings:
            folder.append_event("warning", message=warning)
        for pattern in ignored:
            folder.append_event(
                "warning",
                message=f"the override `{pattern}` matches frozen parameters only, and does nothing",
            )
        for source in subject.sources:
            folder.append_event("data", **source.summary)
            for problem in source.skipped:
                folder.append_event("warning", message=f"a line is left out: {problem}")
        folder.append_event(
            "started",
            model=kind,
            parameters=everything,
            trainable=trainable,
            world_size=world.size,
            device=_device_name(world),
            steps=steps,
            steps_per_epoch=batches.steps_per_epoch,
            torch=torch.__version__,
            transformers=transformers.__version__,
        )

    def verify() -> None:
        for watch in watches:
            watch.remove()
        if unused:
            raise NotApplicable(
                "strategy.freeze",
                f"nothing asks for a gradient of {', '.join(f'`{name}`' for name in sorted(unused)[:5])}",
                "the model does not use them: freeze them",
            )
        facts = engine.facts()
        wrong = [sentence for technique in TECHNIQUES for sentence in technique.verify(setup, facts)]
        if wrong:
            raise TrainingFailed(
                "what runs is not what the job asks for: " + "; ".join(wrong),
                "this is a defect of memlaunch or of the engine's version; please report it",
            )
        if world.is_main:
            folder.append_event("verified", techniques=[technique.name for technique in TECHNIQUES])

    def evaluate() -> dict[str, float]:
        assert subject.evaluation is not None
        return loop.evaluate(engine, task, subject.evaluation, world)

    plan = loop.Plan(
        steps=steps,
        learning_rate=lambda step: learning_rate(
            step, steps, job.training.learning_rate, job.training.schedule, warmup
        ),
        eval_every=job.training.eval_every_steps,
        record=record,
        after_first_step=verify,
        start=start,
        between=Between(checkpoints, requests, folder, world.is_main, job.output.checkpoint_every_steps),
    )
    arrived = loop.train(
        engine, task, batches, subject.collate, plan, world, evaluate if subject.evaluation else None
    )
    checkpoints.close()
    if not arrived:
        return False
    # Saved first: an evaluation that fails must not take the training with it.
    export.save(engine, model, subject.save_more, untouched, folder.model, world)
    if subject.evaluation is not None:
        figures = evaluate()
        if world.is_main:
            epoch = round(steps / batches.steps_per_epoch, 6)
            record({"step": steps, "epoch": epoch, **figures})
    if world.is_main:
        folder.append_event("finished", steps=steps)
    return True


def _start(model: torch.nn.Module, setup: Setup, folder: "RunDir", world: World) -> Engine:
    if setup.engine == "torch":
        from memlaunch.launcher.training import torch_engine

        return torch_engine.start(model, setup, world)
    from memlaunch.launcher.training.deepspeed_engine import DeepSpeedEngine

    config: dict[str, Any] = json.loads(folder.ds_config.read_text(encoding="utf-8"))
    return DeepSpeedEngine(model, setup, world, config)


def _keep_bucket_size(resolved: "ResolvedJob", folder: "RunDir", bucket_size: int, world: World) -> None:
    """Write a bucket size that the lengths decided into ``resolved.json``."""
    batching = resolved.job.data.batching
    if world.is_main and batching.mode == "bucketed" and batching.bucket_size is None:
        folder.place({folder.resolved.name: resolved.with_bucket_size(bucket_size).to_json()})


def _watch_gradients(model: torch.nn.Module) -> "tuple[set[str], list[RemovableHandle]]":
    """The trainable parameters without a gradient so far, a shrinking set; and the hooks that see to it."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    waiting = set(trainable)

    def watch(name: str) -> "Callable[[torch.Tensor], None]":
        return lambda _: waiting.discard(name)

    return waiting, [p.register_post_accumulate_grad_hook(watch(name)) for name, p in trainable.items()]


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.kind == "cuda" else "CPU"

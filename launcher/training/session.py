"""One rank's part of a run, from the resolved job to the saved model."""

import contextlib
import functools
import inspect
import json
from typing import TYPE_CHECKING, Any

import torch
import transformers

from memlaunch.launcher.training import export, loop, together, tokens
from memlaunch.launcher.training.batches import Collate, CollatePacked, MicroBatch, PackedSampler
from memlaunch.launcher.training.between import Between
from memlaunch.launcher.training.checkpoint import Checkpoints
from memlaunch.launcher.training.data import Data, sampler
from memlaunch.launcher.training.data import load as load_data
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.errors import LaunchFailed, NotApplicable, TrainingFailed
from memlaunch.launcher.training.model import (
    build,
    check_attention,
    load_tokenizer,
    locate,
    parameter_count,
)
from memlaunch.launcher.training.schedule import learning_rate
from memlaunch.launcher.training.stopping import StopRequests
from memlaunch.launcher.training.tasks import TASKS, Task
from memlaunch.launcher.training.trackers import Trackers
from memlaunch.launcher.training.world import World
from memlaunch.strategies import TECHNIQUES, optimizer, precision
from memlaunch.strategies.padding import padded_length
from memlaunch.strategies.technique import Setup

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from transformers import PreTrainedModel

    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.rundir import RunDir
    from memlaunch.strategies.padding import PaddingSettings


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
    task = TASKS[job.model.task]

    data = load_data(resolved)
    names = tokens.label_names(data.train, job.model.num_labels) if data.train.codes is not None else None

    model = build(job.model, names, data.pad_token, job.training.seed)
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # keys and values of earlier tokens have no use in training
    if job.model.task == "causal-lm":
        check_attention(model, job.model.attention, packed=job.data.batching.mode == "packed")
    takes = inspect.signature(model.forward).parameters
    collate = _collate(job.data.padding, data, data.train, "data.train", task, names, takes)
    eval_batches = None
    if data.heldout is not None:
        eval_batches = _collate(job.data.padding, data, data.heldout, "data.eval", task, names, takes)
    for technique in TECHNIQUES:
        technique.prepare_model(model, setup)
    path = job.model.path
    stored = export.stored_dtypes(locate(path), job.model.revision, model) if path else {}
    casts = precision.engine_casts(setup.precision)
    untouched = export.Untouched(model, stored, casts, use_cache, world)
    everything, trainable = parameter_count(model)
    ignored = optimizer.useless_overrides(model, setup.optimizer)
    unused = _watch_gradients(model)
    torch.manual_seed(job.training.seed + world.rank)  # dropout differs between ranks
    engine = _start(model, setup, folder, world)

    batches, train_collate = _training_batches(resolved, folder, data, collate, world)
    steps = job.training.max_steps or (job.training.epochs or 1) * batches.steps_per_epoch
    warmup = job.training.warmup_steps or round((job.training.warmup_ratio or 0) * steps)
    checkpoints = Checkpoints(folder, engine, world, job.output.keep_checkpoints)
    start = checkpoints.restore(job.training.seed)
    if world.is_main:
        folder.cut_metrics(start.step)
        if start.step:
            folder.append_event("resumed", step=start.step)
        if (attention := model.config._attn_implementation) != job.model.attention:
            folder.append_event("warning", message=f"this model has only `{attention}` attention")
        for pattern in ignored:
            folder.append_event(
                "warning",
                message=f"the override `{pattern}` matches frozen parameters only, and does nothing",
            )
        for source in (data.train, data.heldout):
            if source is not None:
                folder.append_event("data", **tokens.summary(source), max_length=data.max_length)
                for problem in source.skipped:
                    folder.append_event("warning", message=f"a line is left out: {problem}")
        folder.append_event(
            "started",
            model=type(model).__name__,
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
        assert eval_batches is not None
        size = _eval_micro_batch_size(resolved, data)
        return loop.evaluate(engine, task, eval_batches, size, world)

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
        engine, task, batches, train_collate, plan, world, evaluate if eval_batches is not None else None
    )
    checkpoints.close()
    if not arrived:
        return False
    # Saved first: an evaluation that fails must not take the training with it. The tokenizer is loaded anew,
    # since one that has been used remembers how it truncated.
    export.save(engine, model, load_tokenizer(job.model), untouched, folder.model, world)
    if eval_batches is not None:
        figures = evaluate()
        if world.is_main:
            epoch = round(steps / batches.steps_per_epoch, 6)
            record({"step": steps, "epoch": epoch, **figures})
    if world.is_main:
        folder.append_event("finished", steps=steps)
    return True


def _start(model: "PreTrainedModel", setup: Setup, folder: "RunDir", world: World) -> Engine:
    if setup.engine == "torch":
        from memlaunch.launcher.training.torch_engine import TorchEngine

        return TorchEngine(model, setup, world)
    from memlaunch.launcher.training.deepspeed_engine import DeepSpeedEngine

    config: dict[str, Any] = json.loads(folder.ds_config.read_text(encoding="utf-8"))
    return DeepSpeedEngine(model, setup, world, config)


def _collate(
    padding: "PaddingSettings",
    data: Data,
    source: tokens.Tokens,
    key: str,
    task: Task,
    names: "list[str] | None",
    takes: "Container[str]",
) -> Collate:
    """What makes micro-batches of ``source``, of the fields that the model ``takes``.

    ``key`` is the key of the job that names the source.
    """
    classes = tokens.class_of_code(source, names, key) if names is not None else None
    fill = {name: data.fill(name) for name in source.fields if name in takes}
    return Collate(source, task, padding, data.max_length, fill, classes)


def _training_batches(
    resolved: "ResolvedJob", folder: "RunDir", data: Data, whole: Collate, world: World
) -> "tuple[loop.Sampler[Any], Callable[[Sequence[Any]], MicroBatch]]":
    """What deals the training data, and what makes micro-batches of it.

    A bucket size that the lengths decided is written into ``resolved.json``.
    """
    dealt = sampler(resolved, data, world.size, world.rank)
    batching = resolved.job.data.batching
    if world.is_main and batching.mode == "bucketed" and batching.bucket_size is None:
        folder.place({folder.resolved.name: resolved.with_bucket_size(dealt.bucket_size).to_json()})
    if resolved.job.data.batching.mode != "packed":
        return dealt, whole
    packing = functools.partial(data.train.packing, data.max_length, resolved.job.training.seed)
    packed = CollatePacked(data.train, resolved.job.data.padding, data.max_length, data.pad_token)
    return PackedSampler(dealt, packing), packed


def _watch_gradients(model: "PreTrainedModel") -> set[str]:
    """The trainable parameters that have had no gradient yet; the set shrinks as they get one."""
    waiting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def watch(name: str, parameter: torch.nn.Parameter) -> None:
        def arrived(tensor: torch.Tensor) -> None:
            waiting.discard(name)
            handle.remove()

        handle = parameter.register_post_accumulate_grad_hook(arrived)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            watch(name, parameter)
    return waiting


def _eval_micro_batch_size(resolved: "ResolvedJob", data: Data) -> int:
    """As the job says; else twice the micro-batch, or as many longest samples as the token budget holds."""
    if resolved.job.training.eval_micro_batch_size is not None:
        return resolved.job.training.eval_micro_batch_size
    if resolved.job.data.batching.max_tokens is not None:
        assert data.heldout is not None
        longest = int(data.heldout.lengths.max())
        width = padded_length(longest, resolved.job.data.padding, data.max_length)
        return max(1, resolved.job.data.batching.max_tokens // width)
    return 2 * resolved.batch.micro_batch_size


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.kind == "cuda" else "CPU"

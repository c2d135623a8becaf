"""One rank's part of a run, from the resolved job to the saved model."""

import json
from typing import TYPE_CHECKING, Any

import torch
import transformers

from memlaunch.launcher.training import export, loop, tokens
from memlaunch.launcher.training.batches import Collate, CollatePacked, MicroBatch, PackedSampler
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.errors import JobMismatch, TrainingFailed
from memlaunch.launcher.training.model import (
    build,
    check_packing,
    load_tokenizer,
    locate,
    parameter_count,
)
from memlaunch.launcher.training.schedule import learning_rate
from memlaunch.launcher.training.tasks import TASKS
from memlaunch.launcher.training.world import World
from memlaunch.strategies import TECHNIQUES, optimizer, precision
from memlaunch.strategies.bucketing import BucketedSampler, Packing
from memlaunch.strategies.technique import Setup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.rundir import RunDir

#: Where neither the job, the tokenizer nor the model says how long a sample may be.
DEFAULT_MAX_LENGTH = 512


def run(resolved: "ResolvedJob", folder: "RunDir", world: World) -> None:
    """Train the job's model in this rank and save it.

    Raises:
        JobMismatch, NotApplicable: the job does not fit the model or the data.
        TrainingFailed: training cannot go on.
    """
    job = resolved.job
    setup = resolved.setup(world.kind)
    torch.set_num_threads(resolved.threads_per_rank)
    transformers.logging.set_verbosity_error()
    if job.training.deterministic:
        torch.use_deterministic_algorithms(True)
    task = TASKS[job.model.task]

    tokenizer = load_tokenizer(job.model)
    pad_token = _pad_token(tokenizer)
    max_length = _max_length(resolved, tokenizer)
    train = tokens.prepare(job.data, "train", tokenizer, job.model.task, max_length)
    heldout = (
        tokens.prepare(job.data, "eval", tokenizer, job.model.task, max_length) if job.data.eval else None
    )
    names = tokens.label_names(train, job.model.num_labels) if train.codes is not None else None

    def collate(source: tokens.Tokens, key: str) -> Collate:
        classes = tokens.class_ids(source, names, key) if names is not None else None
        fill = {name: _fill_value(name, tokenizer, pad_token) for name in source.fields}
        return Collate(source, task, job.data.padding, max_length, fill, classes)

    eval_batches = collate(heldout, "data.eval") if heldout is not None else None

    model = build(job.model, names, pad_token, job.training.seed)
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # keys and values of earlier tokens have no use in training
    if job.data.batching.mode == "packed":
        check_packing(model, job.model.attention)
    for technique in TECHNIQUES:
        technique.prepare_model(model, setup)
    stored = export.stored_dtypes(locate(job.model.path), model) if job.model.path else {}
    casts = precision.engine_casts(setup.precision)
    untouched = export.Untouched(model, stored, casts, use_cache, world)
    everything, trainable = parameter_count(model)
    ignored = optimizer.useless_overrides(model, setup.optimizer)
    torch.manual_seed(job.training.seed + world.rank)  # dropout differs between ranks
    engine = _start(model, setup, folder, world)

    sampler, train_batches = _batches(resolved, train, collate(train, "data.train"), world, pad_token)
    steps = job.training.max_steps or (job.training.epochs or 1) * sampler.steps_per_epoch
    warmup = job.training.warmup_steps or round((job.training.warmup_ratio or 0) * steps)
    if world.is_main:
        for pattern in ignored:
            folder.append_event(
                "warning",
                message=f"the override `{pattern}` matches frozen parameters only, and does nothing",
            )
        for data in (train, heldout):
            if data is not None:
                folder.append_event("data", **tokens.summary(data), max_length=max_length)
        folder.append_event(
            "started",
            model=type(model).__name__,
            parameters=everything,
            trainable=trainable,
            world_size=world.size,
            device=_device_name(world),
            steps=steps,
            steps_per_epoch=sampler.steps_per_epoch,
            torch=torch.__version__,
            transformers=transformers.__version__,
        )

    def verify() -> None:
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
        size = _eval_micro_batch_size(resolved, int(eval_batches.tokens.lengths.max()))
        return loop.evaluate(engine, task, eval_batches, size, world)

    plan = loop.Plan(
        steps=steps,
        learning_rate=lambda step: learning_rate(
            step, steps, job.training.learning_rate, job.training.schedule, warmup
        ),
        eval_every=job.training.eval_every_steps,
        record=folder.append_metrics,
        after_first_step=verify,
    )
    loop.train(
        engine, task, sampler, train_batches, plan, world, evaluate if eval_batches is not None else None
    )
    export.save(engine, model, tokenizer, untouched, folder.model, world)
    if world.is_main:
        folder.append_event("finished", steps=steps)


def _start(model: "PreTrainedModel", setup: Setup, folder: "RunDir", world: World) -> Engine:
    if setup.engine == "torch":
        from memlaunch.launcher.training.torch_engine import TorchEngine

        return TorchEngine(model, setup, world)
    from memlaunch.launcher.training.deepspeed_engine import DeepSpeedEngine

    config: dict[str, Any] = json.loads(folder.ds_config.read_text(encoding="utf-8"))
    return DeepSpeedEngine(model, setup, world, config)


def _sampler(resolved: "ResolvedJob", train: tokens.Tokens, world: World, lengths: Any) -> BucketedSampler:
    """The order of the job's batches over ``lengths``: those of the samples, or of packed blocks."""
    batching = resolved.job.data.batching
    by_tokens = batching.max_tokens is not None
    try:
        return BucketedSampler(
            lengths,
            global_batch_size=resolved.batch.global_batch_size,
            micro_batch_size=None if by_tokens else resolved.batch.micro_batch_size,
            world_size=world.size,
            rank=world.rank,
            seed=resolved.job.training.seed,
            bucket_size=batching.bucket_size,
            max_tokens=batching.max_tokens,
            mode=batching.mode,
            longest_first=batching.longest_first,
            order=train.order if batching.mode == "bucketed" else None,
        )
    except ValueError as error:
        raise JobMismatch(
            "data.batching", str(error), "the longest samples decide; lower `data.max_length`"
        ) from error


def _batches(
    resolved: "ResolvedJob", train: tokens.Tokens, whole: Collate, world: World, pad_token: int
) -> "tuple[loop.Sampler[Any], Callable[[Sequence[Any]], MicroBatch]]":
    """What deals the training data, and what makes micro-batches of it."""
    data, seed = resolved.job.data, resolved.job.training.seed
    if data.batching.mode != "packed":
        return _sampler(resolved, train, world, train.lengths), whole

    def packing(epoch: int) -> Packing:
        return train.packing(whole.max_length, seed, epoch)

    blocks = _sampler(resolved, train, world, packing(0).lengths)
    collate = CollatePacked(train, data.padding, whole.max_length, pad_token)
    return PackedSampler(blocks, packing), collate


def _eval_micro_batch_size(resolved: "ResolvedJob", longest: int) -> int:
    """As the job says; else twice the micro-batch, or as many longest samples as the token budget holds."""
    if resolved.job.training.eval_micro_batch_size is not None:
        return resolved.job.training.eval_micro_batch_size
    if resolved.job.data.batching.max_tokens is not None:
        return max(1, resolved.job.data.batching.max_tokens // longest)
    return 2 * resolved.batch.micro_batch_size


def _max_length(resolved: "ResolvedJob", tokenizer: "PreTrainedTokenizerBase") -> int:
    """The job's ``max_length``, or the tokenizer's where it has one (a huge number says that it has none)."""
    if resolved.job.data.max_length is not None:
        return resolved.job.data.max_length
    limit = int(tokenizer.model_max_length)
    return limit if limit < 1_000_000 else DEFAULT_MAX_LENGTH


def _pad_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with; any will do where there is none, since the attention mask hides it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _fill_value(field: str, tokenizer: "PreTrainedTokenizerBase", pad_token: int) -> int:
    return {"input_ids": pad_token, "token_type_ids": int(tokenizer.pad_token_type_id)}.get(field, 0)


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.kind == "cuda" else "CPU"

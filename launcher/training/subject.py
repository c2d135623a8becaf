"""What a run trains: a model of transformers on tokenised data, or a model and data of the user's own."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from memlaunch.launcher.training import entries, export, labels, tokens
from memlaunch.launcher.training.batches import (
    Collate,
    CollatePacked,
    EpochSampler,
    Evaluation,
    MicroBatch,
    PackedSampler,
)
from memlaunch.launcher.training.data import Data, deal, sampler
from memlaunch.launcher.training.data import load as load_data
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.model import build, check_attention, load_tokenizer, locate
from memlaunch.launcher.training.tasks import CLASSIFIES, TASKS, ModelTask, Task, found
from memlaunch.launcher.training.together import gather
from memlaunch.strategies import precision
from memlaunch.strategies.padding import padded_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.training.loop import Sampler
    from memlaunch.launcher.training.world import World
    from memlaunch.strategies.batching import Mode


#: The class of words that are no part of anything, in the usual notation of entities.
OUTSIDE = "O"


@dataclass(frozen=True)
class Source:
    """One source of data, as events tell it: what is in it, and what was left out."""

    summary: dict[str, Any]
    skipped: Sequence[str] = ()


@dataclass(frozen=True)
class Subject:
    """A model with all that it is trained on.

    Attributes:
        model: in fp32 on the CPU, with all of its parameters trainable.
        batches: deals the training data.
        bucket_size: of these batches.
        collate: makes a micro-batch of what the batches deal; of nothing, a stand-in.
        stored: parameter name -> its dtype where the model was read from.
        warnings: what of the job does not hold for this model.
        use_cache: a setting of the model's own config that training turns off; None where it has none.
        save_more: what is saved beside the model goes into this folder.
    """

    model: nn.Module
    task: Task
    batches: "Sampler[Any]"
    bucket_size: int
    collate: Callable[[Sequence[Any]], MicroBatch]
    evaluation: Evaluation | None
    sources: Sequence[Source]
    warnings: Sequence[str]
    stored: Mapping[str, torch.dtype]
    use_cache: bool | None
    save_more: Callable[[Path], None]


def load(resolved: "ResolvedJob", world: "World") -> Subject:
    """The model and the data of a job; every rank must call it.

    Raises:
        JobMismatch, NotApplicable: they cannot be loaded, or do not fit each other.
    """
    if resolved.job.model.entry is not None:
        return _of_entry(resolved, world)
    return _of_transformers(resolved, world)


def _of_entry(resolved: "ResolvedJob", world: "World") -> Subject:
    job = resolved.job
    entry = entries.build(job.model, job.training.seed)
    sizes = [len(entry.train), len(entry.eval or ()), sum(entry.lengths or ())]
    if any(others != sizes for others in gather(sizes, world)):
        hint = "every rank must see the same data; the sampler shares it out"
        raise JobMismatch(entries.KEY, "the ranks have different samples", hint)
    settings = job.strategy.precision
    dtype = precision.torch_dtype(settings.dtype if precision.engine_casts(settings) else "fp32")
    mode: Mode = job.data.batching.mode
    if entry.lengths is None:
        if job.data.batching.max_tokens is not None:
            hint = "give the entry `lengths`, or `training.micro_batch_size` in its place"
            raise JobMismatch("data.batching.max_tokens", "the samples have no lengths", hint)
        lengths, mode = np.ones(len(entry.train), np.int32), "random"
    else:
        lengths = np.asarray(entry.lengths, np.int32)
    dealt = deal(resolved, lengths, world.size, world.rank, mode)
    evaluation = None
    if entry.eval is not None:
        size = job.training.eval_micro_batch_size or 2 * resolved.batch.micro_batch_size
        ones = np.ones(len(entry.eval), np.int32)
        evaluation = Evaluation(entries.CollateEntry(entry, entry.eval, None, dtype), ones, size)
    collate = entries.CollateEntry(entry, entry.train, lengths if entry.lengths is not None else None, dtype)
    return Subject(
        model=entry.model,
        task=entries.task_of(entry),
        batches=dealt,
        bucket_size=dealt.bucket_size,
        collate=collate,
        evaluation=evaluation,
        sources=[],
        warnings=[],
        stored={},
        use_cache=None,
        save_more=lambda folder: None,
    )


def _of_transformers(resolved: "ResolvedJob", world: "World") -> Subject:
    job = resolved.job
    task = TASKS[job.model.task]
    data = load_data(resolved)
    classifies = job.model.task in CLASSIFIES
    names = tokens.label_names(data.train, job.model.num_labels) if classifies else None
    if job.model.task == "token-classification" and names is not None and OUTSIDE in names:
        task = replace(task, tallies=found(names.index(OUTSIDE)))
    model = build(job.model, names, data.pad_token, job.training.seed)
    attention = model.config._attn_implementation
    other_attention = attention != job.model.attention
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # keys and values of earlier tokens have no use in training
    if job.model.task == "causal-lm":
        check_attention(model, job.model.attention, packed=job.data.batching.mode == "packed")
    collate_of = functools.partial(_collate, resolved, data, task, names, model)
    evaluation = None
    if data.heldout is not None:
        collate = collate_of(data.heldout, "data.eval")
        size = _eval_micro_batch_size(resolved, data)
        evaluation = Evaluation(collate, data.heldout.lengths, size)

    def save_tokenizer(folder: Path) -> None:
        # Loaded anew, since a tokenizer that has been used remembers how it truncated.
        load_tokenizer(job.model).save_pretrained(folder)

    path = job.model.path
    batches, bucket_size, dealt_collate = _training_batches(
        resolved, data, collate_of(data.train, "data.train"), world
    )
    return Subject(
        model=model,
        task=task,
        batches=batches,
        bucket_size=bucket_size,
        collate=dealt_collate,
        evaluation=evaluation,
        sources=[
            Source({**tokens.summary(source), "max_length": data.max_length}, source.skipped)
            for source in (data.train, data.heldout)
            if source is not None
        ],
        warnings=[f"this model has only `{attention}` attention"] if other_attention else [],
        stored=export.stored_dtypes(locate(path), job.model.revision, model) if path else {},
        use_cache=use_cache,
        save_more=save_tokenizer,
    )


def _collate(
    resolved: "ResolvedJob",
    data: Data,
    task: ModelTask,
    names: "list[str] | None",
    model: "PreTrainedModel",
    source: tokens.Tokens,
    key: str,
) -> Collate:
    """What makes micro-batches of ``source``, of the fields that the model takes.

    ``key`` is the key of the job that names the source.
    """
    takes = inspect.signature(model.forward).parameters
    fill = {name: data.fill(name) for name in source.fields if name in takes}
    labelling = _labelling(resolved, data, names, model, source, key)
    return Collate(source, task, resolved.job.data.padding, data.max_length, fill, labelling)


def _labelling(
    resolved: "ResolvedJob",
    data: Data,
    names: "list[str] | None",
    model: "PreTrainedModel",
    source: tokens.Tokens,
    key: str,
) -> labels.Labelling:
    name = resolved.job.model.task
    if names is not None:
        classes = tokens.class_of_code(source, names, key)
        kind = labels.Classes if name == "sequence-classification" else labels.WordClasses
        return kind(source, classes)
    if name == "seq2seq-lm":
        shift: Any = model.prepare_decoder_input_ids_from_labels
        return labels.Targets(source, shift)
    if name == "masked-lm":
        tokenizer = data.tokenizer
        if tokenizer.mask_token_id is None:
            hint = "use the tokenizer of a masked language model"
            raise JobMismatch("model.task", "the tokenizer has no token that stands for a masked one", hint)
        special = frozenset(tokenizer.all_special_ids)
        return labels.Masks(resolved.job.training.seed, tokenizer.mask_token_id, len(tokenizer), special)
    return labels.tokens_themselves


def _training_batches(
    resolved: "ResolvedJob", data: Data, whole: Collate, world: "World"
) -> "tuple[Sampler[Any], int, Callable[[Sequence[Any]], MicroBatch]]":
    """What deals the training data, its bucket size, and what makes micro-batches of it."""
    dealt = sampler(resolved, data, world.size, world.rank)
    if resolved.job.model.task == "masked-lm":
        return EpochSampler(dealt), dealt.bucket_size, whole
    if resolved.job.data.batching.mode != "packed":
        return dealt, dealt.bucket_size, whole
    packing = functools.partial(data.train.packing, data.max_length, resolved.job.training.seed)
    packed = CollatePacked(data.train, resolved.job.data.padding, data.max_length, data.pad_token)
    return PackedSampler(dealt, packing), dealt.bucket_size, packed


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

"""Micro-batches as tensors: which samples the sampler gives, padded, with what is real in them counted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from memlaunch.launcher.training.labels import Labelling, Visit, tokens_themselves
from memlaunch.launcher.training.tasks import IGNORED, ModelTask
from memlaunch.launcher.training.tokens import Tokens
from memlaunch.strategies import padding
from memlaunch.strategies.bucketing import BucketedSampler, Packing


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank.

    Attributes:
        inputs: what the model is called with; each of shape (samples, tokens), for a model of transformers.
        labels: (samples,) classes or (samples, tokens) token ids, `IGNORED` where nothing counts; for a model
            of the user's own, what its loss takes.
        count: how many labels count.
        samples, tokens, padded_tokens: samples, their real tokens, and the tokens of the rectangle; all 0
            for a stand-in.
    """

    inputs: dict[str, Tensor]
    labels: Any
    count: int
    samples: int
    tokens: int
    padded_tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on ``device``."""
        if device.type == "cpu":
            return self
        inputs, labels = tree_map_only(
            Tensor,
            lambda tensor: tensor.pin_memory().to(device, non_blocking=True),
            (self.inputs, self.labels),
        )
        return replace(self, inputs=inputs, labels=labels)


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate on.

    Attributes:
        collate: sample indices -> a micro-batch; of none, a stand-in.
        lengths: tokens of each sample, by which they are ordered.
        micro_batch_size: samples of one rank at once.
    """

    collate: Callable[[Sequence[int]], MicroBatch]
    lengths: np.ndarray[Any, Any]
    micro_batch_size: int


@dataclass(frozen=True)
class Collate:
    """Sample indices to a :class:`MicroBatch`.

    Attributes:
        fill: field -> value to pad it with.
        labelling: what makes the labels.
    """

    tokens: Tokens
    task: ModelTask
    padding: padding.PaddingSettings
    max_length: int
    fill: dict[str, int]
    labelling: Labelling = tokens_themselves

    def __call__(self, items: Sequence[SupportsIndex]) -> MicroBatch:
        """The micro-batch of ``items``, indices of samples; of none, a stand-in of which nothing counts.

        A rank that has no samples left runs it forward and backward, so that the collectives of all ranks
        meet.
        """
        chosen = list(items) or [0]
        indices = [int(item) for item in chosen]
        samples = [self.tokens.sample(index) for index in indices]
        lengths = [len(sample["input_ids"]) for sample in samples]
        inputs = padding.pad(samples, self.padding, self.max_length, self.fill)
        real = torch.arange(inputs["input_ids"].shape[1])[None, :] < torch.tensor(lengths)[:, None]
        inputs["attention_mask"] = real.to(torch.int64)
        labels = self.labelling(chosen, inputs, real)
        if not items:
            return MicroBatch(inputs, torch.full_like(labels, IGNORED), 0, 0, 0, 0)
        padded = sum(inputs[name].numel() for name in ("input_ids", "decoder_input_ids") if name in inputs)
        tokens = int(self.tokens.lengths[indices].sum())
        return MicroBatch(inputs, labels, self.task.count(labels), len(samples), tokens, padded)


@dataclass(frozen=True)
class CollatePacked:
    """Blocks, each the indices of its samples, to a :class:`MicroBatch` for a causal language model.

    The samples of a block stand behind each other in one row. Their positions begin at 0, by which the model
    keeps their attention apart, and no sample predicts the first token of the next.
    """

    tokens: Tokens
    padding: padding.PaddingSettings
    max_length: int
    pad_token: int

    def __call__(self, blocks: Sequence[Sequence[int]]) -> MicroBatch:
        """The micro-batch of ``blocks``; of none, a stand-in as in :class:`Collate`."""
        rows = [self._row(block) for block in blocks or ((0,),)]
        fill = {"input_ids": self.pad_token, "labels": IGNORED, "position_ids": IGNORED}
        inputs = padding.pad(rows, self.padding, self.max_length, fill)
        labels, positions = inputs.pop("labels"), inputs["position_ids"]
        # The padding is one more sample, of which nothing counts.
        past = (positions == IGNORED).cumsum(dim=1)
        inputs["position_ids"] = positions.where(past == 0, past - 1)
        if not blocks:
            return MicroBatch(inputs, torch.full_like(labels, IGNORED), 0, 0, 0, 0)
        count = int((labels != IGNORED).sum())
        samples, real = sum(map(len, blocks)), sum(len(row["input_ids"]) for row in rows)
        return MicroBatch(inputs, labels, count, samples, real, labels.numel())

    def _row(self, block: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
        samples = [self.tokens.sample(index)["input_ids"] for index in block]
        labels = [np.concatenate([[IGNORED], ids[1:]]) for ids in samples]
        return {
            "input_ids": np.concatenate(samples),
            "labels": np.concatenate(labels),
            "position_ids": np.concatenate([np.arange(len(ids)) for ids in samples]),
        }


class PackedSampler:
    """Micro-batches of blocks: ``sampler`` deals the blocks, ``packing`` says what they hold in an epoch."""

    def __init__(self, sampler: BucketedSampler, packing: Callable[[int], Packing]) -> None:
        self.steps_per_epoch = sampler.steps_per_epoch
        self._sampler = sampler
        self._packing = packing
        self._current: tuple[int, Packing] | None = None

    def step(self, epoch: int, k: int) -> list[list[list[int]]]:
        """This rank's micro-batches of step ``k``: blocks, each the indices of its samples."""
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, self._packing(epoch))
        offsets, samples, _ = self._current[1]
        return [
            [samples[offsets[block] : offsets[block + 1]].tolist() for block in micro_batch]
            for micro_batch in self._sampler.step(epoch, k)
        ]


class EpochSampler:
    """The micro-batches of ``sampler``, which tell of each sample in what epoch it comes."""

    def __init__(self, sampler: BucketedSampler) -> None:
        self.steps_per_epoch = sampler.steps_per_epoch
        self._sampler = sampler

    def step(self, epoch: int, k: int) -> list[list[Visit]]:
        """This rank's micro-batches of step ``k``."""
        dealt = self._sampler.step(epoch, k)
        return [[Visit(index, epoch) for index in micro_batch] for micro_batch in dealt]


def evaluation_order(
    lengths: np.ndarray[Any, Any], micro_batch_size: int, world_size: int, rank: int
) -> Iterator[list[int]]:
    """This rank's micro-batches of one pass over everything, longest first; as many on every rank."""
    order = np.argsort(-lengths, kind="stable")
    run = micro_batch_size * world_size
    for start in range(0, len(order), run):
        yield order[start : start + run][rank::world_size].tolist()

"""Micro-batches as tensors: which samples the sampler gives, padded, with what is real in them counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlaunch.launcher.training.tasks import IGNORED, Task
from memlaunch.launcher.training.tokens import Tokens
from memlaunch.strategies import padding


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank.

    Attributes:
        inputs: what the model is called with; each of shape (samples, tokens).
        labels: (samples,) classes or (samples, tokens) token ids, `IGNORED` where nothing counts.
        count: how many labels count.
        samples, tokens, padded_tokens: samples, their real tokens, and the tokens of the rectangle; all 0
            for a stand-in.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    count: int
    samples: int
    tokens: int
    padded_tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on ``device``."""
        if device.type == "cpu":
            return self
        inputs = {name: _send(tensor, device) for name, tensor in self.inputs.items()}
        return MicroBatch(
            inputs, _send(self.labels, device), self.count, self.samples, self.tokens, self.padded_tokens
        )


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Collate:
    """Sample indices to a :class:`MicroBatch`.

    Attributes:
        classes: the class of each sample, for a classification; None where the labels are the tokens.
        fill: field -> value to pad it with.
    """

    tokens: Tokens
    task: Task
    padding: padding.PaddingSettings
    max_length: int
    fill: dict[str, int]
    classes: np.ndarray[Any, np.dtype[np.int64]] | None

    def __call__(self, indices: Sequence[int]) -> MicroBatch:
        """The micro-batch of ``indices``; of none, a stand-in: one real sample of which nothing counts.

        A rank that has no samples left runs it forward and backward, so that the collectives of all ranks
        meet.
        """
        samples = [self.tokens.sample(index) for index in indices or (0,)]
        lengths = [len(sample["input_ids"]) for sample in samples]
        inputs = padding.pad(samples, self.padding, self.max_length, self.fill)
        rows, width = inputs["input_ids"].shape
        real = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
        inputs["attention_mask"] = real.to(torch.int64)
        if self.classes is not None:
            labels = torch.from_numpy(self.classes[list(indices or (0,))])
        else:
            labels = inputs["input_ids"].masked_fill(~real, IGNORED)
        if not indices:
            return MicroBatch(inputs, torch.full_like(labels, IGNORED), 0, 0, 0, 0)
        return MicroBatch(inputs, labels, self.task.count(labels), rows, sum(lengths), rows * width)


def evaluation_order(
    lengths: Sequence[int], micro_batch_size: int, world_size: int, rank: int
) -> Iterator[list[int]]:
    """This rank's micro-batches of one pass over everything, longest first; as many on every rank."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    run = micro_batch_size * world_size
    for start in range(0, len(order), run):
        yield order[start : start + run][rank::world_size].tolist()

"""What a task asks of the model: its class, its loss as a sum and a count, its figures in an evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

#: The label of what must not count.
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        auto_class: the transformers class that builds its models.
        loss_sum: (logits, labels) -> the loss summed over what counts, in fp32.
        count: labels -> how many tokens or samples count.
        correct: (logits, labels) -> how many of those are predicted right; None where nobody asks.
        figures: (mean loss, share of right predictions) -> the columns of an evaluation line.
    """

    auto_class: str
    loss_sum: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], int]
    correct: Callable[[Tensor, Tensor], Tensor] | None
    figures: Callable[[float, float], Mapping[str, float]]


def logits_of(outputs: Any) -> Tensor:
    """The logits among a model's outputs, fp32."""
    logits: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits.float()


def _class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def _class_correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).sum()


def _count(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # The labels move, not the logits: a slice of those would be copied, at the vocabulary's size.
    following = pad(labels[:, 1:], (0, 1), value=IGNORED)
    return _class_loss(logits.flatten(0, 1), following.flatten())


def _next_token_count(labels: Tensor) -> int:
    return _count(labels[:, 1:])


def _perplexity(loss: float) -> float:
    return float(torch.tensor(loss).exp())


TASKS: dict[str, Task] = {
    "sequence-classification": Task(
        auto_class="AutoModelForSequenceClassification",
        loss_sum=_class_loss,
        count=_count,
        correct=_class_correct,
        figures=lambda loss, right: {"eval_loss": loss, "eval_accuracy": right},
    ),
    "causal-lm": Task(
        auto_class="AutoModelForCausalLM",
        loss_sum=_next_token_loss,
        count=_next_token_count,
        correct=None,
        figures=lambda loss, right: {"eval_loss": loss, "eval_perplexity": _perplexity(loss)},
    ),
}

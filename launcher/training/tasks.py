"""What a task asks of the model: its class, its loss as a sum and a count, its figures in an evaluation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, pad

#: The label of what must not count.
IGNORED = -100
#: Tasks whose labels are classes.
CLASSIFIES = ("sequence-classification", "token-classification")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        loss_sum: (predictions, labels) -> the loss summed over what counts, in fp32.
        figures: (mean loss, tallies divided by the count) -> the columns of an evaluation line.
        predictions: what the model returns -> what the loss and the tallies look at.
        tallies: (predictions, labels) -> name -> a sum over what counts.
    """

    loss_sum: Callable[[Any, Any], Tensor]
    figures: Callable[[float, Mapping[str, float]], Mapping[str, float]]
    predictions: Callable[[Any], Any]
    tallies: Callable[[Any, Any], Mapping[str, float | Tensor]] = lambda predictions, labels: {}


@dataclass(frozen=True, kw_only=True)
class ModelTask(Task):
    """A task for a model of transformers.

    Attributes:
        auto_class: the transformers class that builds its models.
        count: labels -> how many tokens or samples count.
    """

    auto_class: str
    count: Callable[[Tensor], int]


def logits_of(outputs: Any) -> Tensor:
    """The logits among a model's outputs, fp32."""
    logits: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits.float()


def _class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def _right(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"right": (logits.argmax(-1) == labels).sum()}


def _count(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return _class_loss(logits.flatten(0, 1), labels.flatten())


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # The labels move, not the logits: a slice of those would be copied, at the vocabulary's size.
    following = pad(labels[:, 1:], (0, 1), value=IGNORED)
    return _token_loss(logits, following)


def _next_token_count(labels: Tensor) -> int:
    return _count(labels[:, 1:])


def _perplexity(loss: float, tallies: Mapping[str, float]) -> dict[str, float]:
    return {"eval_loss": loss, "eval_perplexity": math.exp(loss) if loss < 700 else math.inf}


def _accuracy(loss: float, tallies: Mapping[str, float]) -> dict[str, float]:
    return {"eval_loss": loss, "eval_accuracy": tallies["right"]}


def _both(loss: float, tallies: Mapping[str, float]) -> dict[str, float]:
    return {**_perplexity(loss, tallies), **_accuracy(loss, tallies)}


def found(outside: int | None) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """The tallies of words with a class: right ones, and those for an F1 over all classes but ``outside``."""

    def tallies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        counts = labels != IGNORED
        guessed = logits.argmax(-1)
        right = counts & (guessed == labels)
        inside = counts & (labels != outside)
        return {
            "right": right.sum(),
            "found": (right & inside).sum(),
            "guessed": (counts & (guessed != outside)).sum(),
            "there": inside.sum(),
        }

    return tallies


def _f1(loss: float, tallies: Mapping[str, float]) -> dict[str, float]:
    both = tallies["guessed"] + tallies["there"]
    return {**_accuracy(loss, tallies), "eval_f1": 2 * tallies["found"] / both if both else 0.0}


TASKS: dict[str, ModelTask] = {
    "sequence-classification": ModelTask(
        auto_class="AutoModelForSequenceClassification",
        predictions=logits_of,
        loss_sum=_class_loss,
        count=_count,
        tallies=_right,
        figures=_accuracy,
    ),
    "causal-lm": ModelTask(
        auto_class="AutoModelForCausalLM",
        predictions=logits_of,
        loss_sum=_next_token_loss,
        count=_next_token_count,
        figures=_perplexity,
    ),
    "masked-lm": ModelTask(
        auto_class="AutoModelForMaskedLM",
        predictions=logits_of,
        loss_sum=_token_loss,
        count=_count,
        tallies=_right,
        figures=_both,
    ),
    "token-classification": ModelTask(
        auto_class="AutoModelForTokenClassification",
        predictions=logits_of,
        loss_sum=_token_loss,
        count=_count,
        tallies=found(None),
        figures=_f1,
    ),
    "seq2seq-lm": ModelTask(
        auto_class="AutoModelForSeq2SeqLM",
        predictions=logits_of,
        loss_sum=_token_loss,
        count=_count,
        figures=_perplexity,
    ),
}

"""The training loop: windows of micro-batches become optimizer steps, on any engine."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from memlaunch.launcher.training.batches import Collate, MicroBatch, evaluation_order
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.errors import TrainingFailed
from memlaunch.launcher.training.tasks import Task, logits_of
from memlaunch.launcher.training.world import World
from memlaunch.strategies.accumulation import loss_weight

#: What a micro-batch is made of: indices of samples, or blocks of them.
Item = TypeVar("Item", covariant=True)


class Sampler(Protocol[Item]):
    """Which samples form an optimizer step, and which of them are this rank's."""

    steps_per_epoch: int

    def step(self, epoch: int, k: int) -> Sequence[Sequence[Item]]:
        """This rank's micro-batches of step ``k`` (from 0) of an epoch; as many on every rank."""


@dataclass(frozen=True)
class Plan:
    """How far to train, and what happens on the way.

    Attributes:
        steps: optimizer steps in all.
        learning_rate: applied step (from 0) -> learning rate.
        eval_every: steps between evaluations before the last step; None for none.
        record: called on the main rank with each line of ``metrics.jsonl``.
        after_first_step: called on every rank once the engine has done its first step.
    """

    steps: int
    learning_rate: Callable[[int], float]
    eval_every: int | None
    record: Callable[[dict[str, Any]], None]
    after_first_step: Callable[[], None]


def train(
    engine: Engine,
    task: Task,
    sampler: Sampler[Item],
    collate: Callable[[Sequence[Item]], MicroBatch],
    plan: Plan,
    world: World,
    evaluate: Callable[[], dict[str, float]] | None,
) -> None:
    """Train for ``plan.steps`` optimizer steps.

    Raises:
        TrainingFailed: a loss or gradient is not finite, and no loss scale can mend it.
    """
    applied = 0
    verified = False
    engine.module.train()
    for number, (epoch, window) in enumerate(_windows(sampler, plan.steps), start=1):
        begun = time.perf_counter()
        learning_rate = plan.learning_rate(applied)
        line = _optimizer_step(engine, task, [collate(indices) for indices in window], learning_rate, world)
        if line["loss_scale"] is None and (line["loss"] is not None and not math.isfinite(line["loss"])):
            raise TrainingFailed(f"the loss of step {number} is {line['loss']}", NOT_FINITE)
        if line["loss_scale"] is None and line["grad_norm"] is None:
            raise TrainingFailed(f"the gradients of step {number} are not finite", NOT_FINITE)
        applied += not line["skipped"]
        if not verified and not line["skipped"]:
            plan.after_first_step()
            verified = True
        seconds = time.perf_counter() - begun
        if world.is_main:
            plan.record(
                {
                    "step": number,
                    "epoch": round(epoch, 6),
                    "learning_rate": learning_rate,
                    **line,
                    "step_seconds": round(seconds, 6),
                    "tokens_per_second": round(line["tokens"] / seconds, 3),
                }
            )
        due = plan.eval_every is not None and number % plan.eval_every == 0
        if evaluate is not None and due and number < plan.steps:
            figures = evaluate()
            engine.module.train()
            if world.is_main:
                plan.record({"step": number, "epoch": round(epoch, 6), **figures})
    if not applied:
        raise TrainingFailed(
            "the gradients of every step overflowed, so nothing was learned",
            "lower `strategy.precision.loss_scale` or `initial_scale`, or train for more steps",
        )


NOT_FINITE = "lower `training.learning_rate`, or look at the samples of this step"


def _windows(sampler: Sampler[Item], steps: int) -> Iterator[tuple[float, Sequence[Sequence[Item]]]]:
    """(epochs done behind the step, this rank's micro-batches of it) for each optimizer step of the run."""
    per_epoch = sampler.steps_per_epoch
    for number in range(steps):
        epoch, k = divmod(number, per_epoch)
        yield epoch + (k + 1) / per_epoch, sampler.step(epoch, k)


def _optimizer_step(
    engine: Engine, task: Task, window: Sequence[MicroBatch], learning_rate: float, world: World
) -> dict[str, Any]:
    """One window, forward, backward and step; the part of its metrics line that the ranks share."""
    if world.kind == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    counted, samples, tokens, padded = world.sum(
        [sum(getattr(b, name) for b in window) for name in ("count", "samples", "tokens", "padded_tokens")]
    )
    weight = loss_weight(counted, world.size)
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    for index, batch in enumerate(window):
        batch = batch.to(world.device)
        with engine.micro_step(last=index == len(window) - 1):
            loss = task.loss_sum(logits_of(engine.forward(batch.inputs)), batch.labels)
            engine.backward(loss * weight)
        loss_sum += loss.detach()
    step = engine.step(learning_rate)
    (total,) = world.sum([loss_sum.item()])
    return {
        "loss": total / counted if counted else None,
        "grad_norm": step.grad_norm,
        "loss_scale": step.loss_scale,
        "skipped": step.skipped,
        "samples": int(samples),
        "tokens": int(tokens),
        "padded_tokens": int(padded),
        "peak_memory_bytes": _peak_memory(world),
    }


def _peak_memory(world: World) -> int | None:
    """The largest peak of allocated GPU memory over the ranks; None on a CPU, which cannot tell."""
    if world.kind == "cpu":
        return None
    return int(world.max([torch.cuda.max_memory_allocated(world.device)])[0])


@torch.no_grad()
def evaluate(
    engine: Engine, task: Task, collate: Collate, micro_batch_size: int, world: World
) -> dict[str, float]:
    """The task's figures over the whole evaluation data, the same on every rank."""
    engine.module.eval()
    loss = torch.zeros((), device=world.device, dtype=torch.float64)
    right = torch.zeros((), device=world.device, dtype=torch.int64)
    counted = 0
    for indices in evaluation_order(collate.tokens.lengths, micro_batch_size, world.size, world.rank):
        batch = collate(indices).to(world.device)
        logits = logits_of(engine.forward(batch.inputs))
        loss += task.loss_sum(logits, batch.labels)
        if task.correct is not None:
            right += task.correct(logits, batch.labels)
        counted += batch.count
    loss_sum, correct, total = world.sum([loss.item(), right.item(), counted])
    return dict(task.figures(loss_sum / max(1.0, total), correct / max(1.0, total)))

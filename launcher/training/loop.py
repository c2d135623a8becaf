"""The training loop: windows of micro-batches become optimizer steps, on any engine."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from memlaunch.launcher.training import random_state, statistics
from memlaunch.launcher.training.batches import Evaluation, MicroBatch, evaluation_order
from memlaunch.launcher.training.clock import Clock
from memlaunch.launcher.training.engine import Engine
from memlaunch.launcher.training.errors import TrainingFailed
from memlaunch.launcher.training.tasks import Task
from memlaunch.launcher.training.together import gather
from memlaunch.launcher.training.world import World
from memlaunch.strategies.accumulation import loss_weight
from memlaunch.strategies.precision import ScaleAtMinimum

#: What a micro-batch is made of: indices of samples, or blocks of them.
Item = TypeVar("Item", covariant=True)


class Sampler(Protocol[Item]):
    """Which samples form an optimizer step, and which of them are this rank's."""

    steps_per_epoch: int

    def step(self, epoch: int, k: int) -> Sequence[Sequence[Item]]:
        """This rank's micro-batches of step ``k`` (from 0) of an epoch; as many on every rank."""


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps made, and how many of them were not skipped."""

    step: int = 0
    applied: int = 0


class Between(Protocol):
    """What happens between two optimizer steps."""

    def votes(self) -> Sequence[float]:
        """What this rank has to say behind a step; it is summed over the ranks, together with the loss."""

    def decide(self, position: Position, votes: Sequence[float]) -> bool:
        """Act on the sums, the same on every rank; whether to stop here."""


class _Straight:
    """Nothing happens."""

    def votes(self) -> Sequence[float]:
        return ()

    def decide(self, position: Position, votes: Sequence[float]) -> bool:
        return False


_STRAIGHT = _Straight()


@dataclass(frozen=True)
class Plan:
    """How far to train, and what happens on the way.

    Attributes:
        steps: optimizer steps in all.
        learning_rate: applied step (from 0) -> learning rate.
        eval_every: steps between evaluations before the last step; None for none.
        record: called on the main rank with each line of ``metrics.jsonl``.
        after_first_step: called on every rank once the engine has done its first step.
        start: what a resumed run has behind it.
        between: what happens between two steps.
    """

    steps: int
    learning_rate: Callable[[int], float]
    eval_every: int | None
    record: Callable[[dict[str, Any]], None]
    after_first_step: Callable[[], None]
    start: Position = Position()
    between: Between = _STRAIGHT


def train(
    engine: Engine,
    task: Task,
    sampler: Sampler[Item],
    collate: Callable[[Sequence[Item]], MicroBatch],
    plan: Plan,
    world: World,
    evaluate: Callable[[], dict[str, float]] | None,
) -> bool:
    """Train until ``plan.steps`` optimizer steps are made.

    Returns whether they are, and nobody asked to stop before.

    Raises:
        TrainingFailed: a loss or gradient is not finite, and no loss scale can mend it.
    """
    applied = plan.start.applied
    verified = False
    engine.module.train()

    def evaluate_if_due(number: int, epoch: float) -> None:
        due = plan.eval_every is not None and number % plan.eval_every == 0
        if evaluate is not None and due and number < plan.steps:
            figures = evaluate()
            engine.module.train()
            if world.is_main:
                plan.record({"step": number, "epoch": round(epoch, 6), **figures})

    if 0 < plan.start.step < plan.steps:
        first, *_ = sampler.step(*divmod(plan.start.step, sampler.steps_per_epoch))
        for _ in range(min(plan.start.step, 2)):
            _rehearse(engine, task, lambda: collate(first), world)
        # A checkpoint comes before the evaluation of its step.
        evaluate_if_due(plan.start.step, plan.start.step / sampler.steps_per_epoch)
    for number in range(plan.start.step + 1, plan.steps + 1):
        begun = time.perf_counter()
        clock = Clock(world)
        epoch, k = divmod(number - 1, sampler.steps_per_epoch)
        done = epoch + (k + 1) / sampler.steps_per_epoch
        window = sampler.step(epoch, k)
        batches = [collate(indices) for indices in window]
        clock.mark("data")
        learning_rate = plan.learning_rate(applied)
        try:
            outcome = _optimizer_step(engine, task, batches, learning_rate, world, plan.between, clock)
        except ScaleAtMinimum as error:
            raise TrainingFailed(
                f"step {number}: {error}; it is made of {_samples(window, world)}",
                f"{NOT_FINITE}, or use bf16; `strategy.precision.min_scale` is the bound",
            ) from error
        line = outcome.line
        if line["loss_scale"] is None and (line["loss"] is not None and not math.isfinite(line["loss"])):
            wrong = [w for w, loss in zip(window, outcome.losses, strict=True) if not math.isfinite(loss)]
            raise TrainingFailed(
                f"the loss of step {number} is {line['loss']}, and comes from {_samples(wrong, world)}",
                NOT_FINITE,
            )
        if line["loss_scale"] is None and line["grad_norm"] is None:
            raise TrainingFailed(
                f"the gradients of step {number} are not finite; it is made of {_samples(window, world)}",
                NOT_FINITE,
            )
        applied += not line["skipped"]
        if not verified and not line["skipped"]:
            plan.after_first_step()
            verified = True
        seconds = time.perf_counter() - begun
        if world.is_main:
            parts = {f"{part}_seconds": round(passed, 6) for part, passed in clock.seconds().items()}
            plan.record(
                {
                    "step": number,
                    "epoch": round(done, 6),
                    "learning_rate": learning_rate,
                    **line,
                    **parts,
                    "step_seconds": round(seconds, 6),
                    "tokens_per_second": round(line["tokens"] / seconds, 3),
                }
            )
        if plan.between.decide(Position(number, applied), outcome.votes):
            return False
        evaluate_if_due(number, done)
    if not applied:
        raise TrainingFailed(
            "the gradients of every step overflowed, so nothing was learned",
            "lower `strategy.precision.loss_scale` or `initial_scale`, or train for more steps",
        )
    return True


NOT_FINITE = "lower `training.learning_rate`, or look at these samples"

#: Samples that an error names.
NAMED = 16


def _samples(window: Sequence[Any], world: World) -> str:
    """The samples of the micro-batches in ``window`` and in those of the other ranks, in words."""
    mine = [index for micro_batch in window for item in micro_batch for index in _indices(item)]
    found = sorted({index for indices in gather(mine, world) for index in indices})
    named = ", ".join(map(str, found[:NAMED]))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"the samples {named}{more} of `data.train`, counted from 0"


def _indices(item: Any) -> Sequence[int]:
    """The samples of an item: itself, or those of a packed block."""
    return [int(index) for index in item] if isinstance(item, Sequence) else [int(item)]


def _rehearse(engine: Engine, task: Task, make: Callable[[], MicroBatch], world: World) -> None:
    """Let the engine try a batch, and leave no trace of it in the random states and in running statistics."""
    states = random_state.capture(world)
    batch = make().to(world.device)

    def run() -> None:
        with engine.micro_step(last=True), statistics.kept(engine.module):
            engine.backward(_loss(engine, task, batch))

    engine.rehearse(run)
    random_state.restore(*states, world)


def _loss(engine: Engine, task: Task, batch: MicroBatch) -> Tensor:
    """The summed loss of a micro-batch."""
    return task.loss_sum(task.predictions(engine.forward(batch.inputs)), batch.labels)


@dataclass(frozen=True)
class _Outcome:
    """What a window came to: the part of its metrics line that the ranks share, the sums of the ranks' votes,
    and the summed loss of each micro-batch of this rank.
    """

    line: dict[str, Any]
    votes: Sequence[float]
    losses: Sequence[Tensor]


def _optimizer_step(
    engine: Engine,
    task: Task,
    window: Sequence[MicroBatch],
    learning_rate: float,
    world: World,
    between: Between = _STRAIGHT,
    clock: Clock | None = None,
) -> _Outcome:
    """One window, forward, backward and step."""
    clock = clock or Clock()
    if world.kind == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    mine = [sum(getattr(b, name) for b in window) for name in ("count", "samples", "tokens")]
    # Each rank has its own places in the sum, so that one message tells the size of every micro-batch.
    before, behind = (n * len(window) * [0] for n in (world.rank, world.size - 1 - world.rank))
    counted, samples, tokens, *sizes = world.sum(
        [*mine, *before, *(b.padded_tokens for b in window), *behind]
    )
    clock.mark("communication")
    weight = loss_weight(counted, world.size)
    losses: list[Tensor] = []
    for index, batch in enumerate(window):
        batch = batch.to(world.device)
        with engine.micro_step(last=index == len(window) - 1):
            loss = _loss(engine, task, batch)
            clock.mark("forward")
            engine.backward(loss * weight)
            clock.mark("backward")
        losses.append(loss.detach())
    step = engine.step(learning_rate)
    statistics.share(engine.module, world)
    clock.mark("optimizer")
    loss_sum = torch.stack(losses).sum(dtype=torch.float64).item() if losses else 0.0
    total, *votes = world.sum([loss_sum, *between.votes()])
    peak = _peak_memory(world)
    clock.mark("communication")
    line = {
        "loss": total / counted if counted else None,
        "grad_norm": step.grad_norm,
        "loss_scale": step.loss_scale,
        "skipped": step.skipped,
        "samples": int(samples),
        "tokens": int(tokens),
        "padded_tokens": int(sum(sizes)),
        "idle_share": _idle_share(sizes, world.size),
        "peak_memory_bytes": peak,
    }
    return _Outcome(line, votes, losses)


def _idle_share(sizes: Sequence[float], ranks: int) -> float:
    """The share of a step that ranks wait for the one with the largest micro-batch, if time goes with tokens.

    Args:
        sizes: tokens with padding of each micro-batch, those of a rank together.
    """
    micro_batches = len(sizes) // ranks
    slowest = ranks * sum(max(sizes[number::micro_batches]) for number in range(micro_batches))
    return round(1 - sum(sizes) / slowest, 6) if slowest else 0.0


def _peak_memory(world: World) -> int | None:
    """The largest peak of allocated GPU memory over the ranks; None on a CPU, which cannot tell."""
    if world.kind == "cpu":
        return None
    return int(world.max([torch.cuda.max_memory_allocated(world.device)])[0])


@torch.no_grad()
def evaluate(engine: Engine, task: Task, evaluation: Evaluation, world: World) -> dict[str, float]:
    """The task's figures over the whole evaluation data, the same on every rank."""
    engine.module.eval()
    loss = torch.zeros((), device=world.device, dtype=torch.float64)
    sums: dict[str, float | Tensor] = {}
    counted = 0
    size = evaluation.micro_batch_size
    for indices in evaluation_order(evaluation.lengths, size, world.size, world.rank):
        batch = evaluation.collate(indices).to(world.device)
        predictions = task.predictions(engine.forward(batch.inputs))
        loss += task.loss_sum(predictions, batch.labels)
        for name, tally in task.tallies(predictions, batch.labels).items():
            sums[name] = sums.get(name, 0) + tally * bool(batch.count)
        counted += batch.count
    loss_sum, total, *tallies = world.sum([loss.item(), counted, *map(float, sums.values())])
    shares = [tally / max(1.0, total) for tally in tallies]
    return dict(task.figures(loss_sum / max(1.0, total), dict(zip(sums, shares, strict=True))))

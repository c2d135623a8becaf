"""Gradient accumulation in which every real token (or sample) of a global batch weighs the same.

An optimizer step works on one window: ``gradient_accumulation_steps`` micro-batches on each rank, fewer in
the last window of an epoch. The loss of the window is the sum over all its tokens divided by their number
on all ranks, so no micro-batch counts for more because its samples are short.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memlaunch.strategies.technique import Facts, Setup, Technique


@dataclass(frozen=True)
class Batch:
    """global_batch_size = micro_batch_size x gradient_accumulation_steps x ranks, in samples."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


class BatchError(ValueError):
    """Batch sizes that contradict each other. ``key`` is the key of ``training`` to point at."""

    def __init__(self, key: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


DEFAULT_MICRO_BATCH_SIZE = 8

#: Of any batch; torch counts the elements of a dimension further, but no run does.
LARGEST_BATCH = 2**31 - 1


def solve_batch(
    ranks: int,
    global_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
) -> Batch:
    """Complete the batch sizes from those given.

    Where two are given the third follows; where one is given, accumulation is 1, except that a global batch
    alone is cut into micro-batches of at most 8; where none is, the micro-batch is 8.

    Raises:
        BatchError: the sizes contradict each other, or no whole number completes them.
    """
    total, micro, steps = global_batch_size, micro_batch_size, gradient_accumulation_steps
    if total is None:
        micro = micro or DEFAULT_MICRO_BATCH_SIZE
        steps = steps or 1
        if micro * steps * ranks > LARGEST_BATCH:
            raise BatchError(
                "micro_batch_size" if micro > steps else "gradient_accumulation_steps",
                f"a global batch of {micro} x {steps} x {_count(ranks, 'rank')} is more than {LARGEST_BATCH}",
                "use smaller sizes, or fewer ranks",
            )
        return Batch(micro * steps * ranks, micro, steps)
    if total % ranks:
        raise BatchError(
            "global_batch_size",
            f"a global batch of {total} cannot be shared by {_count(ranks, 'rank')}",
            f"use a multiple of {ranks}, such as {max(1, round(total / ranks)) * ranks}",
        )
    share = total // ranks
    if micro is not None and steps is not None:
        if micro * steps != share:
            raise BatchError(
                "global_batch_size",
                f"{total} is not micro_batch_size {micro} x gradient_accumulation_steps {steps} "
                f"x {_count(ranks, 'rank')} = {micro * steps * ranks}",
                "give two of the three and the third is computed",
            )
    elif micro is not None:
        if share % micro:
            raise BatchError(
                "micro_batch_size",
                f"micro-batches of {micro} do not fill a global batch of {total} on {_count(ranks, 'rank')}: "
                f"{total} / {ranks} / {micro} is not whole",
                f"use a divisor of {share}, such as {_largest_divisor(share, micro)}",
            )
        steps = share // micro
    elif steps is not None:
        if share % steps:
            raise BatchError(
                "gradient_accumulation_steps",
                f"{_count(steps, 'step')} of accumulation do not divide a global batch of {total} "
                f"on {_count(ranks, 'rank')}: {total} / {ranks} / {steps} is not whole",
                f"use a divisor of {share}, such as {_largest_divisor(share, steps)}",
            )
        micro = share // steps
    else:
        micro = _largest_divisor(share, DEFAULT_MICRO_BATCH_SIZE)
        steps = share // micro
    return Batch(total, micro, steps)


def loss_weight(window_count: float, world_size: int) -> float:
    """What to multiply a micro-batch's summed loss by before its backward pass.

    Engines average gradients over ranks, which divides the sum of gradients by ``world_size`` once too
    often; the window's count (tokens or samples, all ranks) turns the sum into a mean. A window in which
    nothing counts has weight 0.
    """
    return world_size / window_count if window_count else 0.0


def _largest_divisor(number: int, at_most: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return max(d for d in (*small, *(number // d for d in small)) if d <= at_most)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _deepspeed_config(setup: Setup) -> Mapping[str, Any]:
    # train_batch_size is left out: DeepSpeed checks it against a world size that may not be known yet.
    # Unmanaged accumulation makes each engine.step() one optimizer step, a short last window included.
    return {
        "train_micro_batch_size_per_gpu": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "managed_gradient_accumulation": False,
        "gradient_clipping": setup.max_grad_norm or 0.0,
    }


def _verify(setup: Setup, facts: Facts) -> Iterable[str]:
    if facts.gradient_accumulation_steps != setup.gradient_accumulation_steps:
        yield (
            f"gradient_accumulation_steps is {facts.gradient_accumulation_steps}, "
            f"the job says {setup.gradient_accumulation_steps}"
        )
    if (facts.max_grad_norm or 0.0) != (setup.max_grad_norm or 0.0):
        yield f"max_grad_norm is {facts.max_grad_norm}, the job says {setup.max_grad_norm}"


TECHNIQUE = Technique(name="accumulation", deepspeed_config=_deepspeed_config, verify=_verify)

"""Length-bucketed batches beside what others offer: padding, idle ranks, randomness, memory and time.

    python benchmarks/batching.py            # every cell, some minutes
    python benchmarks/batching.py --quick    # world size 8 and 10M lengths

Time is taken to follow padded tokens, and ranks to wait for the slowest in every micro-step; see
``BatchFigures`` for the terms. The exit status is 1 where a bar is missed.
"""

import argparse
import json
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memlaunch.strategies.bucketing import BatchFigures, BucketedSampler, length_order, pack

MICRO_BATCH = 16
#: Micro-steps an epoch, and the samples beyond the last full one.
MICRO_STEPS, REMAINDER = 808, 777
REBALANCE_STEPS = 24
REVIEWS = Path(__file__).parents[1] / "examples" / "reviews"

Ints = npt.NDArray[np.int64]


class Cell(NamedTuple):
    """A data set and how many ranks and micro-steps share an optimizer step."""

    name: str
    lengths: Ints
    world_size: int
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        return self.world_size * MICRO_BATCH * self.accumulation


class Epoch(NamedTuple):
    """Which micro-batch each sample is in.

    ``micro_batch`` has shape (samples,): micro-step x ranks + rank, or -1 for a sample left out. ``step`` has
    shape (micro-steps,): the optimizer step. ``whole`` is false where only the first steps were made.
    """

    micro_batch: Ints
    step: Ints
    whole: bool = True


# --- The ways to batch: (cell, epoch number) -> Epoch ---------------------------------------------------


def ours(**options: Callable[[Cell], Any]) -> Callable[[Cell, int], Epoch]:
    """Our sampler; ``options`` are those of the sampler, given the cell."""

    def batches(cell: Cell, epoch: int) -> Epoch:
        chosen: dict[str, Any] = {"micro_batch_size": MICRO_BATCH}
        chosen |= {name: option(cell) for name, option in options.items()}
        sampler = BucketedSampler(
            cell.lengths,
            global_batch_size=cell.global_batch_size,
            world_size=cell.world_size,
            rank=0,
            **chosen,
        )
        micro_batch = np.full(len(cell.lengths), -1)
        step: list[int] = []
        for k in range(sampler.steps_per_epoch):
            # Rank 0 has one sample of each row, and the samples of a step are dealt in turn.
            rows = [len(part) for part in sampler.step(epoch, k)]
            of_row = np.repeat(len(step) + np.arange(len(rows)), rows)
            samples = sampler.step_samples(epoch, k)
            turn = np.arange(len(samples))
            row, rank = np.divmod(turn, cell.world_size)
            micro_batch[samples] = of_row[row] * cell.world_size + rank
            step += [k] * len(rows)
        return Epoch(micro_batch, np.array(step))

    return batches


def in_order(order: Ints, cell: Cell) -> Epoch:
    """Batches of ``MICRO_BATCH`` cut from ``order``, dealt to the ranks in turn; what is left falls off."""
    tile = cell.world_size * MICRO_BATCH
    used = len(order) // tile * tile
    micro_batch = np.full(len(cell.lengths), -1)
    micro_batch[order[:used]] = np.arange(used) // MICRO_BATCH
    return Epoch(micro_batch, np.arange(used // tile) // cell.accumulation)


def random_order(cell: Cell, epoch: int) -> Epoch:
    return in_order(np.random.default_rng(epoch).permutation(len(cell.lengths)), cell)


def sorted_then_shuffled(cell: Cell, epoch: int) -> Epoch:
    batches = np.argsort(cell.lengths, kind="stable")[: len(cell.lengths) // MICRO_BATCH * MICRO_BATCH]
    return in_order(np.random.default_rng(epoch).permutation(batches.reshape(-1, MICRO_BATCH)).ravel(), cell)


def length_grouped(times_world_size: bool) -> Callable[[Cell, int], Epoch]:
    """Hugging Face ``LengthGroupedSampler``; a mega-batch is 50 steps of one rank, or of all."""

    def batches(cell: Cell, epoch: int) -> Epoch:
        import torch
        from transformers.trainer_pt_utils import LengthGroupedSampler

        size = MICRO_BATCH * cell.accumulation * (cell.world_size if times_world_size else 1)
        generator = torch.Generator().manual_seed(epoch)
        sampler = LengthGroupedSampler(size, lengths=cell.lengths.tolist(), generator=generator)
        return in_order(np.array(list(sampler)), cell)

    return batches


def batch_rebalance(cell: Cell, epoch: int) -> Epoch:
    """Hugging Face ``BatchRebalanceSampler``; its assignment is made once, not once a rank.

    Its steps are alike, and take seconds each with many ranks: there, some stand for all.
    """
    import torch
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    sampler = BatchRebalanceSampler(
        cell.lengths.tolist(), cell.global_batch_size, dp_size=cell.world_size, grad_accum=cell.accumulation
    )
    order = torch.randperm(len(cell.lengths), generator=torch.Generator().manual_seed(42 + epoch)).tolist()
    micro_batch = np.full(len(cell.lengths), -1)
    steps = min(sampler.num_global_batches, REBALANCE_STEPS if cell.world_size > 8 else 10**9)
    for k in range(steps):
        samples = order[k * cell.global_batch_size : (k + 1) * cell.global_batch_size]
        for rank, parts in enumerate(sampler._assign(samples, cell.lengths[samples].tolist())):
            for slot, part in enumerate(parts):
                micro_batch[part] = (k * cell.accumulation + slot) * cell.world_size + rank
    step = np.repeat(np.arange(steps), cell.accumulation)
    return Epoch(micro_batch, step, whole=steps == sampler.num_global_batches)


def token_budget(cell: Cell) -> int:
    return max(int(cell.lengths.max()), int(MICRO_BATCH * cell.lengths.mean()))


SAMPLERS: dict[str, Callable[[Cell, int], Epoch]] = {
    "memlaunch bucketed": ours(),
    "memlaunch max_tokens": ours(micro_batch_size=lambda cell: None, max_tokens=token_budget),
    "memlaunch random": ours(mode=lambda cell: "random"),
    "random": random_order,
    "HF LengthGrouped, rank": length_grouped(times_world_size=False),
    "HF LengthGrouped, world": length_grouped(times_world_size=True),
    "HF BatchRebalance": batch_rebalance,
    "sorted, batches shuffled": sorted_then_shuffled,
}
HELD_TO_THE_BARS = ("memlaunch bucketed", "memlaunch max_tokens")


# --- What they cost -------------------------------------------------------------------------------------


def figures(cell: Cell, epoch: Epoch) -> BatchFigures:
    used = epoch.micro_batch >= 0
    micro_batch, lengths = epoch.micro_batch[used], cell.lengths[used]
    shape = (len(epoch.step), cell.world_size)
    longest = np.zeros(shape, np.int64).ravel()
    np.maximum.at(longest, micro_batch, lengths)
    count = np.bincount(micro_batch, minlength=longest.size)
    step = epoch.step[micro_batch // cell.world_size]
    means = np.bincount(step, weights=lengths) / np.bincount(step)
    return BatchFigures.of((longest * count).reshape(shape), int(lengths.sum()), means)


def meeting_again(one: Epoch, other: Epoch) -> float:
    """Of the pairs of samples in one micro-batch of an epoch, the share that is in one of the next epoch."""

    def pairs(labels: Ints) -> int:
        counts = np.unique(labels, return_counts=True)[1]
        return int((counts * (counts - 1) // 2).sum())

    used = one.micro_batch >= 0
    both = used & (other.micro_batch >= 0)
    met = one.micro_batch[both] * (1 + other.micro_batch.max()) + other.micro_batch[both]
    return pairs(met) / max(1, pairs(one.micro_batch[used]))


@dataclass(frozen=True)
class Bar:
    """A figure, and the most it may be (or the least)."""

    what: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def held(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def bars(cell: Cell, cost: BatchFigures, again: float) -> Iterator[Bar]:
    yield Bar("padding", cost.padding, 0.005)
    yield Bar("idle", cost.idle_mean, 0.002)
    yield Bar("idle p99", cost.idle_p99, 0.01)
    yield Bar("efficiency", cost.efficiency, 0.993, at_least=True)
    yield Bar("meet again", again, 0.05)
    if cell.accumulation >= 4:
        tile = cell.world_size * MICRO_BATCH
        tiles = np.sort(cell.lengths)[: len(cell.lengths) // tile * tile].reshape(-1, tile).mean(axis=1)
        yield Bar("sd, of random tiles", cost.mean_length_sd * cell.accumulation**0.5 / tiles.std(), 0.5)
        if cell.world_size == 8:
            random_sd = cell.lengths.std() / cell.global_batch_size**0.5
            yield Bar("sd, of random order", cost.mean_length_sd / random_sd, 6)


def verdict(held: list[Bar]) -> str:
    missed = [f"{bar.what} {bar.value:.4g} (bar {bar.bound:g})" for bar in held if not bar.held]
    return "FAIL: " + ", ".join(missed) if missed else "pass"


# --- The table ------------------------------------------------------------------------------------------


def distributions(samples: int) -> dict[str, Ints]:
    draw = np.random.default_rng(0)
    humps = np.where(draw.random(samples) < 0.7, draw.normal(60, 15, samples), draw.normal(400, 50, samples))
    drawn = {
        "lognormal 8..512": draw.lognormal(np.log(200) - 0.8**2 / 2, 0.8, samples).round().clip(8, 512),
        "lognormal 16..1024": draw.lognormal(np.log(200) - 0.9**2 / 2, 0.9, samples).round().clip(16, 1024),
        "uniform 8..512": draw.integers(8, 513, samples),
        "two humps 8..512": humps.round().clip(8, 512),
    }
    return {name: lengths.astype(np.int64) for name, lengths in drawn.items()}


def review_lengths(folder: Path) -> Ints:
    """Words and punctuation marks of each review, and two special tokens; at most 128."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    counts = [len(re.findall(r"\w+|[^\w\s]", json.loads(line)["text"])) + 2 for line in lines]
    return np.minimum(counts, 128)


def cells(worlds: list[int], reviews: Path) -> Iterator[Cell]:
    for world_size in worlds:
        data = distributions(MICRO_STEPS * world_size * MICRO_BATCH + REMAINDER)
        if reviews.exists():
            data["reviews"] = review_lengths(reviews)
        for name, lengths in data.items():
            for accumulation in (1, 4, 8):
                if len(lengths) >= world_size * MICRO_BATCH * accumulation:
                    yield Cell(name, lengths, world_size, accumulation)


COLUMNS = (
    f"{'world':>5} {'acc':>3}  {'sampler':26}{'padding':>8}{'idle':>8}{'p99':>8}{'effic.':>8}{'micro-':>8}"
    f"{'sd of':>7}{'meet':>7}{'left':>7}{'order':>8}\n{'':37}{'%':>8}{'%':>8}{'%':>8}{'%':>8}{'steps':>8}"
    f"{'mean':>7}{'again%':>7}{'out':>7}{'s':>8}"
)


def table(worlds: list[int], reviews: Path) -> bool:
    passed = True
    title = ""
    for cell in cells(worlds, reviews):
        if title != cell.name:
            title = cell.name
            print(f"\n{title}: mean {cell.lengths.mean():.0f}, {len(cell.lengths)} samples\n{COLUMNS}")
        for name, batches in SAMPLERS.items():
            start = time.perf_counter()
            epoch = batches(cell, 1)
            seconds = time.perf_counter() - start
            cost = figures(cell, epoch)
            again = meeting_again(epoch, batches(cell, 2)) if epoch.whole else float("nan")
            left_out = int((epoch.micro_batch < 0).sum()) if epoch.whole else "-"
            word = ""
            if name in HELD_TO_THE_BARS and cell.name != "reviews":
                held = list(bars(cell, cost, again))
                if name == "memlaunch max_tokens":
                    held.append(Bar("tokens of a micro-batch", cost.largest_micro_batch, token_budget(cell)))
                word = verdict(held)
                passed &= all(bar.held for bar in held)
            print(
                f"{cell.world_size:5d} {cell.accumulation:3d}  {name:26}{100 * cost.padding:8.2f}"
                f"{100 * cost.idle_mean:8.2f}{100 * cost.idle_p99:8.2f}{100 * cost.efficiency:8.2f}"
                f"{cost.micro_steps:8d}{cost.mean_length_sd:7.1f}{100 * again:7.2f}"
                f"{left_out:>7}{seconds:8.2f}  {word}",
                flush=True,
            )
    return passed


# --- Time and memory ------------------------------------------------------------------------------------


def large(samples: int) -> bool:
    """Build and random access for very many samples; in a process of its own, for its peak of memory."""
    draw = np.random.default_rng(0)
    lengths = np.empty(samples, np.uint16)
    for part in np.array_split(lengths, max(1, samples // 10**7)):
        part[:] = draw.lognormal(np.log(200) - 0.32, 0.8, len(part)).round().clip(8, 512)
    start = time.perf_counter()
    order = length_order(lengths)
    options: dict[str, Any] = {"global_batch_size": 8192, "micro_batch_size": 16, "world_size": 64}
    ranks = [BucketedSampler(lengths, rank=0, order=order, **options)]
    build = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    start = time.perf_counter()
    np.argsort(lengths, kind="stable")
    argsort = time.perf_counter() - start

    ranks += [BucketedSampler(lengths, rank=rank, order=order, **options) for rank in (31, 63)]
    slowest = 0.0
    for k in draw.integers(0, ranks[0].steps_per_epoch, 200).tolist():
        for sampler in ranks:
            times = []
            for epoch in (1, 1, 1, 1):  # the best of some, so that other processes do not count
                start = time.perf_counter()
                sampler.step(epoch, k)
                times.append(time.perf_counter() - start)
            slowest = max(slowest, min(times))
    print(f"\n{samples} lengths (uint16), 64 ranks, accumulation 8")
    held = [
        Bar("build, s", build, 10),
        Bar("peak memory of the process with lengths and order, GiB", peak, 2),
        Bar("build / np.argsort(lengths, kind='stable')", build / argsort, 2),
        Bar("slowest optimizer step (8 micro-steps) of a rank, ms", 1000 * slowest, 2),
    ]
    for bar in held:
        print(f"  {bar.what:58}{bar.value:8.2f}  {verdict([bar])}")
    return all(bar.held for bar in held)


def packing() -> None:
    print("\npacking of 1M samples into blocks of twice the longest sample")
    for name, lengths in distributions(10**6).items():
        start = time.perf_counter()
        blocks = pack(lengths, 2 * int(lengths.max())).lengths
        seconds = time.perf_counter() - start
        full = blocks.mean() / (2 * lengths.max())
        print(f"  {name:20}{100 * full:8.2f} % full  {len(blocks)} blocks  {seconds:.2f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="world size 8 and 10M lengths only")
    parser.add_argument("--reviews", type=Path, default=REVIEWS, help="a folder with train.jsonl")
    arguments = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        passed = pool.apply(large, (10**7 if arguments.quick else 10**8,))
    packing()
    passed &= table([8] if arguments.quick else [8, 64], arguments.reviews)
    print("\nall bars hold" if passed else "\na bar is missed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

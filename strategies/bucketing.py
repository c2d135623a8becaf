"""Batches by length: the padding of a sorted data set, the statistics of a shuffled one, any step at once.

The samples stand on a *line*, sorted by length, longest first. The line is cut into strata; an optimizer step
takes one bucket, a run of neighbours, from each stratum. Three shuffles keep this random, each a keyed
bijection of (seed, epoch), so that no order is ever stored:

- of the buckets of each stratum over the steps;
- of the places on the line inside *pools*, runs of nearly equal lengths whose limits move every epoch;
- of the samples of one length.

Which samples a step holds is decided without the ranks. Then they are dealt in *rows*: a row gives one sample
to every rank, neighbours in length, and a micro-step is some consecutive rows, so that all ranks work on the
same shape.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from memlaunch.strategies.batching import BatchingSettings as BatchingSettings
from memlaunch.strategies.batching import Mode

Integers = npt.NDArray[np.integer[Any]]
Index = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

#: The padding that pools may add, as a share of all tokens: the price of changing company.
POOL_PADDING = 0.003
#: A bucket lies within 1 / SLOT_WINDOWS of its stratum around the place that balances the other buckets.
SLOT_WINDOWS = 4
#: The cost of one more micro-step, as a share of the token budget.
MICRO_STEP_COST = 1 / 64


class BucketedSampler:
    """This rank's micro-batches, for ``DataLoader(batch_sampler=...)`` or by optimizer step.

    Iterating yields what is left of the current epoch, one micro-batch (a list of data-set indices) at a
    time, ``[]`` where this rank has nothing in a micro-step; then the next epoch begins. The samples of
    optimizer step k follow from (seed, epoch, k, lengths, mode, global batch size, bucket size) alone. Every
    sample comes exactly once an epoch; the last step holds what remains. All ranks make the same micro-steps.

    Args:
        lengths: tokens of each sample, shape (samples,), any integer type, possibly memory-mapped. In mode
            ``packed`` those of each block (:func:`pack`), and every index is that of a block.
        global_batch_size: samples of an optimizer step over all ranks.
        micro_batch_size: the most samples of a micro-batch; exactly one of this and ``max_tokens`` is given.
        bucket_size: samples of like length that a step takes together. Default: ``world_size`` x
            ``micro_batch_size``; with ``max_tokens``, what ``world_size`` micro-batches of mean length hold.
            Padding and idle time are lowest where ``world_size`` x ``micro_batch_size`` divides it.
        max_tokens: the most padded tokens of a micro-batch. Each step has as many micro-steps as it needs.
        longest_first: step 0 of epoch 0 holds the longest sample, and no micro-batch of any later step has
            more padded tokens than the largest of this one.
        order: :func:`length_order` of ``lengths`` (used in mode ``bucketed``), for ranks that share one
            memory-mapped copy. Without it this rank keeps its own, 4 bytes a sample.

    Attributes:
        steps_per_epoch: optimizer steps an epoch, the short last one included.
        bucket_size: as given or chosen; hand it on to see the same steps on another number of ranks.
        epoch: the current epoch.

    Raises:
        ValueError: sizes that contradict each other, or a sample longer than ``max_tokens``.
    """

    def __init__(
        self,
        lengths: Integers,
        *,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        world_size: int,
        rank: int,
        seed: int = 0,
        bucket_size: int | None = None,
        max_tokens: int | None = None,
        mode: Mode = "bucketed",
        longest_first: bool = True,
        order: Integers | None = None,
    ) -> None:
        lengths = np.asarray(lengths)
        _check(lengths, global_batch_size, micro_batch_size, world_size, rank, bucket_size, max_tokens, order)
        self.world_size = world_size
        self.rank = rank
        self.steps_per_epoch = -(-len(lengths) // global_batch_size)
        self.epoch = 0
        self._position = 0
        self._micro_steps: dict[int, int] = {}

        if bucket_size is None:
            bucket_size = world_size * (
                micro_batch_size or _rows_of_a_bucket(lengths, global_batch_size, world_size, max_tokens)
            )
        self.bucket_size = min(bucket_size, global_batch_size)
        self._sets: _StepSets
        if mode == "bucketed":
            order = length_order(lengths) if order is None else order
            self._sets = _BucketedSets(
                lengths, order, global_batch_size, self.bucket_size, seed, longest_first
            )
        else:
            self._sets = _RandomSets(lengths, global_batch_size, seed, longest_first)

        # Where the micro-batch does not divide a rank's share of the step, the micro-steps share it evenly.
        rows = -(-global_batch_size // world_size)
        self._rows = -(-rows // -(-rows // micro_batch_size)) if micro_batch_size else 0
        self._max_tokens = self._bound = max_tokens or 0
        if max_tokens and longest_first:
            self._bound = max(int(part.padded.max()) for part in self._shapes_of(0, np.zeros(1, np.int64)))

    def __len__(self) -> int:
        """Micro-batches of this rank in the whole current epoch.

        With ``max_tokens`` the first call in an epoch works through all its steps.
        """
        if self.epoch not in self._micro_steps:
            self._micro_steps = {self.epoch: sum(len(part.padded) for part in self._shapes(self.epoch))}
        return self._micro_steps[self.epoch]

    def __iter__(self) -> Iterator[list[int]]:
        while self._position < self.steps_per_epoch:
            *others, last = self.step(self.epoch, self._position)
            yield from others
            # Counted before its last micro-batch is out: whoever holds that has all of the step.
            self._position += 1
            yield last
        self.set_epoch(self.epoch + 1)

    def step(self, epoch: int, k: int) -> list[list[int]]:
        """This rank's micro-batches of optimizer step ``k`` (from 0 in the epoch), the longest samples first.

        Raises:
            IndexError: the epoch has no such step.
        """
        places = self._places(epoch, k)
        cuts = self._cuts(self._sets.lengths(places[:: self.world_size]), len(places))
        mine: list[int] = self._sets.samples(epoch, places[self.rank :: self.world_size]).tolist()
        return [mine[start:stop] for start, stop in pairwise(cuts.tolist())]

    def step_samples(self, epoch: int, k: int) -> list[int]:
        """All samples of optimizer step ``k`` over all ranks, the longest first.

        Raises:
            IndexError: the epoch has no such step.
        """
        samples: list[int] = self._sets.samples(epoch, self._places(epoch, k)).tolist()
        return samples

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; where it is the current one, stay at the current position."""
        if epoch != self.epoch:
            self.epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and the optimizer steps of it that have been handed out in full.

        A ``DataLoader`` with worker processes asks ahead; there, save the epoch and the number of steps
        trained, under the same keys.
        """
        return {"epoch": self.epoch, "step": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the next iteration begins there.

        Raises:
            ValueError: an epoch of this data set has fewer steps.
        """
        if state["epoch"] < 0 or not 0 <= state["step"] <= self.steps_per_epoch:
            raise ValueError(
                f"there is no step {state['step']} in an epoch of {self.steps_per_epoch} steps; "
                "were the data or `global_batch_size` changed?"
            )
        self.epoch, self._position = state["epoch"], state["step"]

    def _places(self, epoch: int, k: int) -> Index:
        if not 0 <= k < self.steps_per_epoch:
            raise IndexError(f"step {k} of an epoch of {self.steps_per_epoch} steps")
        places: Index = self._sets.places(epoch, np.array([k]))[0]
        return places

    def _cuts(self, heads: Index, samples: int) -> Index:
        """The rows at which the micro-steps of a step begin and end.

        Args:
            heads: the longest length of each row, descending.
            samples: those of the step.
        """
        if self._max_tokens:
            most = self._bound // np.maximum(heads, 1)
            price = MICRO_STEP_COST * self._max_tokens
        elif samples == self._sets.global_batch_size:
            micro_steps = -(-len(heads) // self._rows)
            return -(-np.arange(micro_steps + 1) * len(heads) // micro_steps)
        else:
            most = np.full(len(heads), self._rows)
            price = float(heads[0] * len(heads) + 1)  # more than any padding: as few micro-steps as can be
        return _cut(heads, most, price, partial=samples % self.world_size > 0)

    def _shapes(self, epoch: int, width: Callable[[Index], Index] | None = None) -> Iterator["_Shapes"]:
        """The shapes of all micro-steps of an epoch, many optimizer steps at a time."""
        last = self.steps_per_epoch - 1
        at_once = max(1, 2**18 // self._sets.global_batch_size)
        for start in range(0, last, at_once):
            yield from self._shapes_of(epoch, np.arange(start, min(start + at_once, last)), width)
        yield from self._shapes_of(epoch, np.array([last]), width)

    def _shapes_of(
        self, epoch: int, steps: Index, width: Callable[[Index], Index] | None = None
    ) -> Iterator["_Shapes"]:
        lengths = self._sets.lengths(self._sets.places(epoch, steps))
        tokens = lengths.sum(axis=1)
        samples = lengths.shape[1]
        rows = -(-samples // self.world_size)
        table = np.pad(lengths, ((0, 0), (0, rows * self.world_size - samples)))
        table = table.reshape(len(steps), rows, self.world_size)
        present = (np.arange(table[0].size) < samples).reshape(table[0].shape)
        # A fixed micro-batch cuts every step at the same rows.
        for group in [slice(None)] if not self._max_tokens else [slice(i, i + 1) for i in range(len(steps))]:
            cuts = self._cuts(table[group][0, :, 0], samples)[:-1]
            longest = table[group][:, cuts] if width is None else width(table[group][:, cuts])
            padded = longest * np.add.reduceat(present, cuts, axis=0, dtype=np.int64)
            yield _Shapes(padded.reshape(-1, self.world_size), tokens[group], tokens[group] / samples)


class _Shapes(NamedTuple):
    padded: Index  # (micro-steps, ranks): padded tokens
    tokens: Index  # (optimizer steps,)
    mean_length: npt.NDArray[np.float64]  # (optimizer steps,)


@dataclass(frozen=True)
class BatchFigures:
    """What an epoch of micro-batches costs, if time follows padded tokens and ranks wait for the slowest.

    Attributes:
        padding: share of the padded tokens that are padding.
        idle_mean: mean over the micro-steps of 1 - mean / max over the ranks of padded tokens.
        idle_p99: its 99th percentile.
        efficiency: real tokens / (ranks x the sum over micro-steps of the slowest rank's padded tokens).
        steps: optimizer steps.
        micro_steps: micro-steps, the same on every rank.
        largest_micro_batch: the most padded tokens of one micro-batch.
        mean_length_sd: standard deviation over optimizer steps of the mean length of a step's samples.
    """

    padding: float
    idle_mean: float
    idle_p99: float
    efficiency: float
    steps: int
    micro_steps: int
    largest_micro_batch: int
    mean_length_sd: float

    @staticmethod
    def of(padded: Integers, tokens: int, mean_lengths: npt.NDArray[np.float64]) -> "BatchFigures":
        """Figures of any way to batch.

        Args:
            padded: padded tokens of each micro-batch, shape (micro-steps, ranks).
            tokens: real tokens of all samples.
            mean_lengths: mean length of the samples of each optimizer step.
        """
        slowest = padded.max(axis=1)
        idle = 1 - padded.mean(axis=1) / np.maximum(slowest, 1)
        return BatchFigures(
            padding=1 - tokens / max(1, int(padded.sum())),
            idle_mean=float(idle.mean()),
            idle_p99=float(np.percentile(idle, 99)),
            efficiency=tokens / max(1, int(slowest.sum()) * padded.shape[1]),
            steps=len(mean_lengths),
            micro_steps=len(padded),
            largest_micro_batch=int(slowest.max()),
            mean_length_sd=float(mean_lengths.std()),
        )


def summarise(
    sampler: BucketedSampler,
    epoch: int = 0,
    width: Callable[[Index], Index] | None = None,
    tokens: int | None = None,
) -> BatchFigures:
    """Figures of one epoch of ``sampler`` over all its ranks; about 0.1 microseconds a sample.

    Args:
        width: the longest samples of micro-batches -> what these are padded to; by default no more.
        tokens: real tokens of all samples, where the sampler was given more than those for lengths.
    """
    shapes = list(sampler._shapes(epoch, width))
    return BatchFigures.of(
        np.concatenate([shape.padded for shape in shapes]),
        sum(int(shape.tokens.sum()) for shape in shapes) if tokens is None else tokens,
        np.concatenate([shape.mean_length for shape in shapes]),
    )


def length_order(lengths: Integers) -> Integers:
    """Sample indices by descending length, ties by index: shape (samples,), uint32 below 2**32 samples.

    A counting sort over chunks: linear in time, and its memory beside the result is that of one chunk. (Where
    a sample has 2**16 tokens or more, one plain sort to int64.)
    """
    longest = int(lengths.max())
    if longest >= 2**16:
        return np.argsort(-lengths.astype(np.int64), kind="stable")
    order: Integers = np.empty(len(lengths), np.uint32 if len(lengths) < 2**32 else np.int64)
    counts = _counts(lengths, longest)[::-1]
    ends = np.cumsum(counts) - counts  # of what is already in its place, by longest - length
    for start, chunk in _chunks(lengths):
        key = (longest - chunk.astype(np.int64)).astype(np.uint16)
        by_length = np.argsort(key, kind="stable")
        counts = np.bincount(key, minlength=longest + 1)
        shift = ends - (np.cumsum(counts) - counts)
        order[np.arange(len(chunk)) + np.repeat(shift, counts)] = by_length + start
        ends += counts
    return order


class Packing(NamedTuple):
    """Whole samples in blocks: block b holds ``samples[offsets[b]:offsets[b + 1]]``.

    Attributes:
        offsets: shape (blocks + 1,), int64.
        samples: shape (samples,), every index once.
        lengths: tokens of each block, shape (blocks,), int64; the same for every seed and epoch.
    """

    offsets: Index
    samples: Integers
    lengths: Index


def pack(lengths: Integers, max_length: int, *, seed: int = 0, epoch: int = 0) -> Packing:
    """Whole samples in blocks of at most ``max_length`` tokens, by best fit, longest samples first.

    All samples of one length are placed at once, as in the histogram packing of Krell et al. 2021 (arXiv
    2107.02027), so the time is near linear. Only which sample of a length fills which place changes with
    (seed, epoch): the number of blocks and their lengths do not.

    Raises:
        ValueError: a sample that is empty or longer than ``max_length``.
    """
    lengths = np.asarray(lengths)
    _check_lengths(lengths)
    if lengths.max() > max_length:
        raise ValueError(_too_long(lengths, max_length, "`max_length`"))
    if lengths.min() < 1:
        raise ValueError(f"sample {int(lengths.argmin())} has no tokens; leave empty samples out of the data")
    classes = _Classes.of(lengths)
    block_of = np.empty(len(lengths), np.int64)  # by place on the line
    open_blocks: dict[int, list[Index]] = {}  # by their free tokens
    free_sizes: list[int] = []  # the keys of open_blocks, ascending
    count = 0

    def leave_open(free: int, blocks: Index) -> None:
        if free and len(blocks):
            if free not in open_blocks:
                insort(free_sizes, free)
            open_blocks.setdefault(free, []).append(blocks)

    for length, (place, stop) in zip(classes.values.tolist(), pairwise(classes.starts.tolist()), strict=True):
        while place < stop:
            fitting = bisect_left(free_sizes, length)
            free = free_sizes.pop(fitting) if fitting < len(free_sizes) else max_length
            each = free // length
            needed = -(-(stop - place) // each)
            if free in open_blocks:
                blocks = np.concatenate(open_blocks.pop(free))
            else:
                blocks = np.arange(count, count + needed)
                count += needed
            leave_open(free, blocks[needed:])
            blocks = blocks[:needed]
            placed = min(stop - place, len(blocks) * each)
            block_of[place : place + placed] = np.repeat(blocks, each)[:placed]
            place += placed
            full, rest = divmod(placed, each)
            leave_open(free - each * length, blocks[:full])
            leave_open(free - rest * length, blocks[full:])
    by_block = np.argsort(block_of, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(block_of))])
    samples = length_order(lengths)[_shuffle(by_block, classes.starts, _key(seed, epoch, "samples"))]
    return Packing(offsets, samples, np.add.reduceat(classes.lengths(by_block), offsets[:-1]))


class _StepSets(Protocol):
    """Which samples each optimizer step holds. A *place* stands for a sample within an epoch."""

    global_batch_size: int

    def places(self, epoch: int, steps: Index) -> Index:
        """Shape (steps, samples of a step), the longest first; the short last step is asked for alone."""

    def lengths(self, places: Index) -> Index:
        """Tokens, in the shape of ``places``."""

    def samples(self, epoch: int, places: Index) -> Integers:
        """Data-set indices, in the shape of ``places``."""


class _RandomSets:
    """Steps in one random order of all samples; the place of a sample is its index."""

    def __init__(self, lengths: Integers, global_batch_size: int, seed: int, longest_first: bool) -> None:
        self.global_batch_size = global_batch_size
        self._lengths = lengths
        self._seed = seed
        self._longest = int(lengths.argmax()) if longest_first else None

    def places(self, epoch: int, steps: Index) -> Index:
        count = len(self._lengths)
        width = min(self.global_batch_size, count - int(steps[-1]) * self.global_batch_size)
        key = _key(self._seed, epoch, "random")

        def shuffle(index: Index) -> Index:
            return _permute(index, np.array(count), key)

        turns = steps[:, None] * self.global_batch_size + np.arange(width)
        pin = self._longest if epoch == 0 else None
        samples = shuffle(turns) if pin is None else _pinned(shuffle, turns, 0, pin)
        return np.take_along_axis(samples, np.argsort(-self.lengths(samples), axis=1, kind="stable"), axis=1)

    def lengths(self, places: Index) -> Index:
        return self._lengths[places].astype(np.int64)

    def samples(self, epoch: int, places: Index) -> Integers:
        return places


class _BucketedSets:
    """Steps of buckets of like length, one from each stratum; a place is one on the line sorted by length."""

    def __init__(
        self,
        lengths: Integers,
        order: Integers,
        global_batch_size: int,
        bucket_size: int,
        seed: int,
        longest_first: bool,
    ) -> None:
        self.global_batch_size = global_batch_size
        self._order = order
        self._classes = _Classes.of(lengths)
        self._seed = seed
        self._longest_first = longest_first
        count = len(lengths)
        self._steps = -(-count // global_batch_size)
        full, rest = divmod(global_batch_size, bucket_size)
        #: Samples of each stratum in a step: the bucket size, and what remains of the global batch.
        self._widths = np.array([bucket_size] * full + [rest] * (rest > 0))
        self._last = _short_step(self._widths, count - (self._steps - 1) * global_batch_size)
        sizes = self._widths * (self._steps - 1) + self._last
        self._bases = np.cumsum(sizes) - sizes
        self._mirrored = self._balance(sizes)
        self._pool_scale = self._classes.pool_scale(bucket_size)
        self._pools_of: dict[int, Index] = {}

    def places(self, epoch: int, steps: Index) -> Index:
        last = steps[-1] == self._steps - 1
        widths = self._last if last else self._widths
        starts = self._bucket_starts(epoch, steps)
        inside = np.arange(widths.sum()) - np.repeat(np.cumsum(widths) - widths, widths)
        line = np.repeat(starts, widths, axis=1) + inside
        pools = self._pools(epoch)
        key = _key(self._seed, epoch, "pools")

        def shuffle(index: Index) -> Index:
            return _shuffle(index, pools, key)

        pinned = epoch == 0 and self._longest_first
        return np.sort(_pinned(shuffle, line, 0, 0) if pinned else shuffle(line), axis=1)

    def lengths(self, places: Index) -> Index:
        return self._classes.lengths(places)

    def samples(self, epoch: int, places: Index) -> Integers:
        samples: Integers = self._order[
            _shuffle(places, self._classes.starts, _key(self._seed, epoch, "samples"))
        ]
        return samples

    def _bucket_starts(self, epoch: int, steps: Index) -> Index:
        """Where on the line each of ``steps`` begins in each stratum, shape (steps, strata).

        A stratum has one slot a step. The slot of the short last step is narrower (or empty), so that those
        behind it begin earlier.
        """
        slots = self._slots(epoch, np.append(steps, self._steps - 1))
        behind = slots[:-1] > slots[-1]
        starts: Index = self._bases + slots[:-1] * self._widths - behind * (self._widths - self._last)
        return starts

    def _slots(self, epoch: int, steps: Index) -> Index:
        """The slot of each stratum that each step takes, shape (steps, strata).

        The longest stratum is shuffled freely. The others follow it, in its order or against it, each
        shuffled within windows, so that a step with long samples in one has short ones in another.
        """
        key = _key(self._seed, epoch, "steps")

        def shuffle(index: Index) -> Index:
            return _permute(index, np.array(self._steps), key)

        pinned = epoch == 0 and self._longest_first
        lead = (_pinned(shuffle, steps, 0, 0) if pinned else shuffle(steps))[:, None]
        aims = np.where(self._mirrored, self._steps - 1 - lead, lead)
        ends = (np.arange(SLOT_WINDOWS) + _fraction(key)) * self._steps / SLOT_WINDOWS
        windows = np.unique(np.concatenate([[0], ends.astype(np.int64), [self._steps]]))
        slots = _shuffle(aims, windows, key + np.arange(len(self._widths)).astype(np.uint64))
        slots[:, :1] = lead
        return slots

    def _balance(self, sizes: Index) -> npt.NDArray[np.bool_]:
        """Which strata run against the first, so that the lengths of a step's buckets even out.

        Greedy number partitioning of the spread of each stratum (between its quartiles), widest first.
        """
        quartiles = self._bases + sizes * np.array([[1], [3]]) // 4
        upper, lower = self.lengths(np.minimum(quartiles, len(self._order) - 1)) * self._widths
        spread = upper - lower
        signs = np.ones(len(sizes), np.int64)
        balance = spread[0]
        for stratum in 1 + np.argsort(-spread[1:], kind="stable"):
            signs[stratum] = -1 if balance > 0 else 1
            balance += signs[stratum] * spread[stratum]
        return signs < 0

    def _pools(self, epoch: int) -> Index:
        """The limits of this epoch's pools on the line."""
        if epoch not in self._pools_of:
            offset = _fraction(_key(self._seed, epoch, "pools"))
            # Pools end where classes do, or a few samples of the next length would set a bucket's shape.
            marks = np.searchsorted(self._pool_scale, np.arange(offset, self._pool_scale[-1]))
            limits = self._classes.starts[np.concatenate([[0], marks, [-1]])]
            self._pools_of = {epoch: np.unique(limits)}
        return self._pools_of[epoch]


class _Classes(NamedTuple):
    """The line as runs of equal length, longest first."""

    values: Index  # (classes,): tokens, descending
    starts: Index  # (classes + 1,): the first place of each class, and the number of samples

    @staticmethod
    def of(lengths: Integers) -> "_Classes":
        longest = int(lengths.max())
        if longest < 2**16:
            counts = _counts(lengths, longest)
            values = np.flatnonzero(counts)
            counts = counts[values]
        else:
            values, counts = np.unique(lengths.astype(np.int64), return_counts=True)
        return _Classes(values[::-1], np.concatenate([[0], np.cumsum(counts[::-1])]))

    def lengths(self, places: Index) -> Index:
        return self.values[np.searchsorted(self.starts, places, side="right") - 1]

    def pool_scale(self, bucket_size: int) -> npt.NDArray[np.float64]:
        """A scale along the line, given at ``starts``, on which every pool is 1 wide.

        A pool of c buckets, where the line falls by s tokens a bucket, costs c s / 2 tokens of padding a
        sample and lets a pair of samples meet again at a rate of 1 / c. Over the line, the least rate for a
        given cost has c in proportion to 1 / sqrt(s).
        """
        counts = np.diff(self.starts)
        falls = np.concatenate([[0], -np.diff(self.values), [0]])
        slope = (falls[:-1] + falls[1:]) / 2 * bucket_size / counts
        scale = np.concatenate([[0], np.cumsum(counts / bucket_size * np.sqrt(slope))])
        tokens = max(1.0, float(self.values @ counts)) / bucket_size
        # Buckets cut from a sorted line pad too; in a small data set half as much again is a fair price.
        padding = max(POOL_PADDING, float(self.values[0] - self.values[-1]) / tokens / 4)
        units: npt.NDArray[np.float64] = scale * (scale[-1] / (2 * padding * tokens))
        return units


def _shuffle(index: Index, bounds: Index, key: Keys) -> Index:
    """The keyed bijection that shuffles each of the segments between consecutive ``bounds`` in itself."""
    segment = np.searchsorted(bounds, index, side="right") - 1
    start = bounds[segment]
    keys = key + segment.astype(np.uint64) * np.uint64(0xA0761D6478BD642F)
    return start + _permute(index - start, bounds[segment + 1] - start, keys)


def _permute(index: Index, size: Index, key: Keys) -> Index:
    """A keyed bijection of range(size), element by element; the arguments broadcast.

    A generalised Feistel network of six rounds over Z_a x Z_b, with a b just above ``size``, and cycle
    walking (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 5).
    """
    a = np.ceil(np.sqrt(size)).astype(np.int64)
    b = -(-size // a)
    operands = np.broadcast_arrays(index, size, a, b, key)
    image = _walk(*(operand.astype(np.uint64) for operand in operands))
    return image.astype(np.int64)


def _walk(index: Keys, size: Keys, a: Keys, b: Keys, key: Keys) -> Keys:
    left, right = np.divmod(index, b)
    for turn in range(0, 6, 2):
        left = _add(left, _hash(right, key, turn), a)
        right = _add(right, _hash(left, key, turn + 1), b)
    image = left * b + right
    outside = image >= size
    if outside.any():
        image[outside] = _walk(*(x[outside] for x in (image, size, a, b, key)))
    return image


def _hash(value: Keys, key: Keys, turn: int) -> Keys:
    """32 random bits in the low half: splitmix64 (Steele et al. 2014) without what only mixes that half."""
    bits = value + (key + np.uint64(turn * 0x9E3779B97F4A7C15 % 2**64))
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    return bits >> np.uint64(32)


def _add(value: Keys, bits: Keys, modulus: Keys) -> Keys:
    """value + (bits scaled to the modulus), modulo the modulus; without a division."""
    total = value + (bits * modulus >> np.uint64(32))
    total -= modulus * (total >= modulus)
    return total


def _key(seed: int, epoch: int, purpose: str) -> Keys:
    """A 64-bit key of its own for each (seed, epoch, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return np.array(int.from_bytes(digest, "little"), np.uint64)


def _fraction(key: Keys) -> float:
    """The key as a number in [0, 1)."""
    return float(key >> np.uint64(11)) / 2**53


def _pinned(shuffle: Callable[[Index], Index], index: Index, source: int, target: int) -> Index:
    """``shuffle``, but ``source`` goes to ``target``, and what went there goes where ``source`` went."""
    image = shuffle(index)
    image[image == target] = shuffle(np.array([source]))[0]
    image[index == source] = target
    return image


def _rows_of_a_bucket(
    lengths: Integers, global_batch_size: int, world_size: int, max_tokens: int | None
) -> int:
    """Samples a rank has of each bucket of a step, by default, under a token budget.

    A bucket for each micro-step the tokens need keeps the mean length of steps even; from eight on, two
    micro-steps for each keep the micro-batches fuller.
    """
    assert max_tokens is not None
    micro_steps = max(1, round(global_batch_size * float(lengths.mean()) / (world_size * max_tokens)))
    strata = min(micro_steps, max(8, micro_steps // 2))
    return -(-global_batch_size // (world_size * strata))


def _short_step(widths: Index, samples: int) -> Index:
    """What each stratum gives to the last step: as few buckets as hold ``samples``, spread over the strata.

    Few, because buckets of different lengths in one micro-step would be padding.
    """
    buckets = -(-samples // int(widths[0]))
    # A last stratum narrower than the others takes part only where all do.
    strata = len(widths) if buckets == len(widths) else len(widths) - int(widths[-1] < widths[0])
    chosen = (2 * np.arange(buckets) + 1) * strata // (2 * buckets)
    last = np.zeros_like(widths)
    last[chosen] = np.minimum(widths[chosen], samples - (np.cumsum(widths[chosen]) - widths[chosen]))
    return last


def _cut(heads: Index, most: Index, price: float, *, partial: bool) -> Index:
    """The cuts of rows into micro-steps with the least padded tokens plus ``price`` a micro-step.

    Args:
        heads: the longest length of each row, descending.
        most: the most rows of a micro-step that begins at each row.
        partial: the last row is not full; alone, it would leave ranks with nothing, and counts twice.
    """
    rows = len(heads)
    cost = np.full(rows + 1, np.inf)
    cost[0] = 0
    begin = np.zeros(rows + 1, np.int64)
    for row, (head, many) in enumerate(zip(heads.tolist(), most.tolist(), strict=True)):
        alone = partial and row == rows - 1
        ends = slice(row + 1, row + 1 + many)
        offers = cost[row] + price * (1 + alone) + head * np.arange(1, len(cost[ends]) + 1)
        better = offers < cost[ends]
        cost[ends][better] = offers[better]
        begin[ends][better] = row
    cuts = [rows]
    while cuts[-1]:
        cuts.append(int(begin[cuts[-1]]))
    return np.array(cuts[::-1])


def _chunks(lengths: Integers) -> Iterator[tuple[int, Integers]]:
    for start in range(0, len(lengths), 2**17):
        yield start, lengths[start : start + 2**17]


def _counts(lengths: Integers, longest: int) -> Index:
    """Samples of each length, shape (longest + 1,)."""
    counts = np.zeros(longest + 1, np.int64)
    for _, chunk in _chunks(lengths):
        counts += np.bincount(chunk.astype(np.int64), minlength=longest + 1)
    return counts


def _check(
    lengths: Integers,
    global_batch_size: int,
    micro_batch_size: int | None,
    world_size: int,
    rank: int,
    bucket_size: int | None,
    max_tokens: int | None,
    order: Integers | None,
) -> None:
    _check_lengths(lengths)
    if order is not None and len(order) != len(lengths):
        raise ValueError(f"`order` is that of {len(order)} samples, there are {len(lengths)}")
    sizes = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "world_size": world_size,
        "bucket_size": bucket_size,
        "max_tokens": max_tokens,
    }
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"`{name}` is {size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of 0 to {world_size - 1}")
    if (micro_batch_size is None) == (max_tokens is None):
        raise ValueError("give one of `micro_batch_size` and `max_tokens`")
    if max_tokens is not None and lengths.max() > max_tokens:
        raise ValueError(_too_long(lengths, max_tokens, "`max_tokens`"))


def _check_lengths(lengths: Integers) -> None:
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths must be integers in one dimension, not {lengths.dtype} {lengths.shape}")
    if not len(lengths):
        raise ValueError("there are no samples")
    if lengths.min() < 0:
        raise ValueError(f"sample {int(lengths.argmin())} has a negative length")


def _too_long(lengths: Integers, bound: int, name: str) -> str:
    longest = int(lengths.argmax())
    return (
        f"sample {longest} has {int(lengths[longest])} tokens, {name} is {bound}; "
        f"raise {name} or cut the samples"
    )

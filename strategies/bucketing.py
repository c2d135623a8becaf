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
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from memlaunch.strategies.settings import Settings

Mode = Literal["bucketed", "random", "packed"]
Integers = npt.NDArray[np.integer[Any]]
Index = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

#: The tokens of padding that pools may add, as a share of all tokens: the price of changing company.
POOL_PADDING = 0.0015
#: A bucket lies within 1 / SLOT_WINDOWS of its stratum around the place that balances the other buckets.
SLOT_WINDOWS = 4
#: The cost of one more micro-step, as a share of the token budget.
MICRO_STEP_COST = 1 / 64


class BatchingSettings(Settings):
    """How samples are put together into micro-batches."""

    SHORTHAND = "mode"

    mode: Mode = Field(
        default="bucketed",
        description="`bucketed` puts samples of like length together, `random` takes them as they come, "
        "`packed` (causal-lm) fills blocks of `max_length` with whole samples.",
    )
    bucket_size: int | None = Field(
        default=None,
        ge=1,
        description="Samples of like length that an optimizer step takes together; default: ranks x "
        "micro-batch of the first launch. A resumed run keeps it, and with it the samples of every step.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="The most tokens of a micro-batch, padding included; takes the place of "
        "`micro_batch_size` and `gradient_accumulation_steps`.",
    )
    longest_first: bool = Field(
        default=True,
        description="Begin the first epoch with the largest micro-batch, so that what does not fit in memory "
        "shows at once.",
    )

    @model_validator(mode="after")
    def _check_mode(self) -> "BatchingSettings":
        if self.bucket_size is not None and self.mode != "bucketed":
            raise ValueError(f"`bucket_size` means nothing where `mode` is `{self.mode}`; leave it out")
        if self.max_tokens is not None and self.mode == "packed":
            raise ValueError("`packed` fills blocks of `max_length`; leave `max_tokens` out")
        return self


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
        lengths = np.asanyarray(lengths)
        _check(lengths, global_batch_size, micro_batch_size, world_size, rank, bucket_size, max_tokens)
        self.world_size = world_size
        self.rank = rank
        self.steps_per_epoch = -(-len(lengths) // global_batch_size)
        self.epoch = 0
        self._position = 0
        self._micro_steps: dict[int, int] = {}

        if bucket_size is None:
            if micro_batch_size is not None:
                bucket_size = world_size * micro_batch_size
            else:
                assert max_tokens is not None
                mean = float(lengths.mean())
                micro_steps = max(1, round(global_batch_size * mean / (world_size * max_tokens)))
                bucket_size = world_size * -(-global_batch_size // (world_size * micro_steps))
        self.bucket_size = min(bucket_size, global_batch_size)
        self._sets: _StepSets
        if mode == "bucketed":
            if order is None:
                order = length_order(lengths)
            self._sets = _BucketedSets(lengths, order, global_batch_size, self.bucket_size, seed, longest_first)
        else:
            self._sets = _RandomSets(lengths, global_batch_size, seed, longest_first)

        # Where the micro-batch does not divide a rank's share of the step, the micro-steps share it evenly.
        rows = -(-global_batch_size // world_size)
        self._rows = -(-rows // -(-rows // micro_batch_size)) if micro_batch_size else 0
        self._max_tokens = self._bound = max_tokens or 0
        if max_tokens and longest_first:
            heads = self._sets.lengths(self._sets.places(0, np.zeros(1, np.int64))[0, ::world_size])
            cuts = self._cuts(heads)
            self._bound = int((np.diff(cuts) * heads[cuts[:-1]]).max())

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
        cuts = self._cuts(self._sets.lengths(places[:: self.world_size]))
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
        return self._sets.places(epoch, np.array([k]))[0]

    def _cuts(self, heads: Index) -> Index:
        """The rows at which micro-steps begin and end, given the longest length of each row (descending)."""
        if self._rows:
            micro_steps = -(-len(heads) // self._rows)
            return -(-np.arange(micro_steps + 1) * len(heads) // micro_steps)
        return _cut_by_tokens(heads, self._bound, MICRO_STEP_COST * self._max_tokens)

    def _shapes(self, epoch: int) -> Iterator["_Shapes"]:
        """The shapes of all micro-steps of an epoch, many optimizer steps at a time."""
        last = self.steps_per_epoch - 1
        at_once = max(1, 2**18 // self._sets.global_batch_size)
        for start in range(0, last, at_once):
            yield from self._shapes_of(epoch, np.arange(start, min(start + at_once, last)))
        yield from self._shapes_of(epoch, np.array([last]))

    def _shapes_of(self, epoch: int, steps: Index) -> Iterator["_Shapes"]:
        lengths = self._sets.lengths(self._sets.places(epoch, steps))
        tokens = lengths.sum(axis=1)
        samples = lengths.shape[1]
        rows = -(-samples // self.world_size)
        table = np.pad(lengths, ((0, 0), (0, rows * self.world_size - samples)))
        table = table.reshape(len(steps), rows, self.world_size)
        present = (np.arange(table[0].size) < samples).reshape(table[0].shape)
        # A fixed micro-batch cuts every step at the same rows.
        for group in [slice(None)] if self._rows else [slice(i, i + 1) for i in range(len(steps))]:
            cuts = self._cuts(table[group][0, :, 0])[:-1]
            padded = table[group][:, cuts] * np.add.reduceat(present, cuts, axis=0, dtype=np.int64)
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
        mean_length_sd: standard deviation over optimizer steps of the mean length of a step's samples, tokens.
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


def summarise(sampler: BucketedSampler, epoch: int = 0) -> BatchFigures:
    """Figures of one epoch of ``sampler`` over all its ranks; about 0.1 microseconds a sample."""
    padded, tokens, mean_lengths = (np.concatenate(part) for part in zip(*sampler._shapes(epoch), strict=True))
    return BatchFigures.of(padded, int(tokens.sum()), mean_lengths)


def length_order(lengths: Integers) -> Integers:
    """Sample indices by descending length, ties by index: shape (samples,), uint32 below 2**32 samples.

    A counting sort over chunks: linear in time, and its memory beside the result is that of one chunk.
    """
    dtype = np.uint32 if len(lengths) < 2**32 else np.int64
    longest = int(lengths.max())
    if longest >= 2**16:
        return np.argsort(longest - lengths.astype(np.int64), kind="stable").astype(dtype)
    order = np.empty(len(lengths), dtype)
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

    All samples of one length are placed at once (Krell et al. 2021, arXiv 2107.02027, section 3.1), so the
    time is near linear. The blocks are the same for every (seed, epoch) but for which sample of a length
    fills which place, so their number never changes.

    Raises:
        ValueError: a sample that is empty or longer than ``max_length``.
    """
    lengths = np.asanyarray(lengths)
    _check_lengths(lengths)
    if lengths.max() > max_length:
        raise ValueError(_too_long(lengths, max_length, "`max_length`"))
    if lengths.min() < 1:
        raise ValueError(f"sample {int(lengths.argmin())} has no tokens; leave empty samples out of the data")
    classes = _Classes.of(lengths)
    block_of = np.empty(len(lengths), np.int64)  # by place on the line
    room: dict[int, list[Index]] = {}  # free tokens -> the blocks that have them
    sizes: list[int] = []  # the keys of room, ascending
    blocks = 0

    def leave(free: int, some: Index) -> None:
        if free and len(some):
            if free not in room:
                insort(sizes, free)
            room.setdefault(free, []).append(some)

    for length, start, stop in zip(classes.values, classes.starts[:-1], classes.starts[1:], strict=True):
        place = int(start)
        while place < stop:
            smallest = bisect_left(sizes, length)
            free = sizes.pop(smallest) if smallest < len(sizes) else max_length
            each = free // int(length)
            wanted = -(-(int(stop) - place) // each)
            if free in room:
                found = np.concatenate(room.pop(free))
            else:
                found = np.arange(blocks, blocks + wanted)
                blocks += wanted
            leave(free, found[wanted:])
            found = found[:wanted]
            placed = min(int(stop) - place, len(found) * each)
            block_of[place : place + placed] = np.repeat(found, each)[:placed]
            place += placed
            full = placed // each
            leave(free - each * int(length), found[:full])
            leave(free - placed % each * int(length), found[full:])
    by_block = np.argsort(block_of, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(block_of))])
    samples = length_order(lengths)[_shuffle(by_block, classes.starts, _key(seed, epoch, "samples"))]
    return Packing(offsets, samples, np.add.reduceat(classes.lengths(by_block), offsets[:-1]))


class _StepSets(Protocol):
    """Which samples each optimizer step holds. A *place* stands for a sample within an epoch."""

    global_batch_size: int

    def places(self, epoch: int, steps: Index) -> Index:
        """Shape (steps, samples of a step), the longest first; the short last step must be asked for alone."""

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
        self._pool_marks = self._classes.pool_marks(bucket_size)
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
        return self._order[_shuffle(places, self._classes.starts, _key(self._seed, epoch, "samples"))]

    def _bucket_starts(self, epoch: int, steps: Index) -> Index:
        """Where on the line each of ``steps`` begins in each stratum, shape (steps, strata).

        A stratum has one slot a step. The slot of the short last step is narrower (or empty), so that those
        behind it begin earlier.
        """
        slots = self._slots(epoch, np.append(steps, self._steps - 1))
        behind = slots[:-1] > slots[-1]
        return self._bases + slots[:-1] * self._widths - behind * (self._widths - self._last)

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
        windows = _limits(np.array([0, SLOT_WINDOWS]), np.array([0, self._steps]), _fraction(key))
        slots = _shuffle(aims, windows, key + np.arange(len(self._widths), dtype=np.uint64))
        slots[:, :1] = lead
        return slots

    def _balance(self, sizes: Index) -> npt.NDArray[np.bool_]:
        """Which strata run against the first, so that the lengths of a step's buckets even out.

        Greedy number partitioning over the spread of each stratum, widest first.
        """
        bounds = np.append(self._bases, len(self._order))
        upper, middle, lower = bounds[:-1], (bounds[:-1] + bounds[1:]) // 2, bounds[1:]
        total = self._classes.tokens_before
        spread = 2 * total(middle) - total(upper) - total(lower)
        spread = spread / np.maximum(sizes, 1) * self._widths
        signs = np.ones(len(sizes))
        balance = spread[0]
        for stratum in 1 + np.argsort(-spread[1:], kind="stable"):
            signs[stratum] = -1 if balance > 0 else 1
            balance += signs[stratum] * spread[stratum]
        return signs < 0

    def _pools(self, epoch: int) -> Index:
        """The limits of this epoch's pools on the line."""
        if epoch not in self._pools_of:
            offset = _fraction(_key(self._seed, epoch, "pools"))
            self._pools_of = {epoch: _limits(self._pool_marks, self._classes.starts, offset)}
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

    def tokens_before(self, places: Index) -> npt.NDArray[np.float64]:
        """Tokens of all places before each of ``places``."""
        tokens = np.concatenate([[0], np.cumsum(self.values * np.diff(self.starts))])
        return np.interp(places, self.starts, tokens)

    def pool_marks(self, bucket_size: int) -> npt.NDArray[np.float64]:
        """A scale along the line, given at ``starts``, on which every pool is 1 wide.

        A pool of c buckets, where the line falls by s tokens a bucket, costs c s / 2 tokens of padding a
        row and lets a pair of samples meet again at a rate of 1 / c. Over the line, the least rate for a
        given cost has c in proportion to 1 / sqrt(s).
        """
        counts = np.diff(self.starts)
        steps = np.concatenate([[0], -np.diff(self.values), [0]])
        slope = (steps[:-1] + steps[1:]) / 2 * bucket_size / counts
        scale = np.concatenate([[0], np.cumsum(counts / bucket_size * np.sqrt(slope))])
        mean = float(self.tokens_before(self.starts[-1:])[0]) / bucket_size
        width = 2 * POOL_PADDING * mean / max(scale[-1], 1e-9)
        return scale / width if width else scale


def _shuffle(index: Index, bounds: Index, key: Keys) -> Index:
    """The keyed bijection that shuffles each of the segments between consecutive ``bounds`` in itself."""
    segment = np.searchsorted(bounds, index, side="right") - 1
    start = bounds[segment]
    keys = key + segment.astype(np.uint64) * np.uint64(0xA0761D6478BD642F)
    return start + _permute(index - start, bounds[segment + 1] - start, keys)


def _permute(index: Index, size: Index, key: Keys) -> Index:
    """A keyed bijection of range(size), element by element; the arguments broadcast.

    A generalised Feistel network of four rounds over Z_a x Z_b, with a b just above ``size``, and cycle
    walking (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 5).
    """
    limit = size.astype(np.uint64)
    a = np.ceil(np.sqrt(limit)).astype(np.uint64)
    b = -(-size // a.astype(np.int64))
    image = index.astype(np.uint64)
    shape = np.broadcast_shapes(image.shape, limit.shape, key.shape)
    return _walk(*(np.broadcast_to(x, shape) for x in (image, limit, a, b.astype(np.uint64), key))).astype(np.int64)


def _walk(index: Keys, size: Keys, a: Keys, b: Keys, key: Keys) -> Keys:
    left, right = np.divmod(index, b)
    for turn in range(0, 4, 2):
        left = _add(left, _hash(right, key, turn), a)
        right = _add(right, _hash(left, key, turn + 1), b)
    image = left * b + right
    outside = image >= size
    if outside.any():
        image[outside] = _walk(*(x[outside] for x in (image, size, a, b, key)))
    return image


def _hash(value: Keys, key: Keys, turn: int) -> Keys:
    """32 random bits in the low half (the mixing of splitmix64: Steele et al. 2014, figure 16)."""
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


def _limits(scale: npt.NDArray[Any], places: Index, offset: float) -> Index:
    """Places at which a scale along the line, given at ``places``, passes offset, offset + 1, ...; and its ends."""
    marks = np.interp(np.arange(offset, scale[-1]), scale, places)
    return np.unique(np.concatenate([places[:1], np.rint(marks).astype(np.int64), places[-1:]]))


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


def _cut_by_tokens(heads: Index, bound: int, overhead: float) -> Index:
    """The rows at which micro-steps begin and end: the least padded tokens plus ``overhead`` a micro-step.

    Args:
        heads: the longest length of each row, descending.
        bound: the most padded tokens of a micro-batch, that is rows x longest length.
    """
    rows = len(heads)
    cost = np.full(rows + 1, np.inf)
    cost[0] = 0
    begin = np.zeros(rows + 1, np.int64)
    for row, head in enumerate(heads.tolist()):
        stop = min(rows, row + (bound // head if head else rows))
        offer = cost[row] + overhead + head * np.arange(1, stop - row + 1)
        better = offer < cost[row + 1 : stop + 1]
        cost[row + 1 : stop + 1][better] = offer[better]
        begin[row + 1 : stop + 1][better] = row
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
        counts += np.bincount(chunk, minlength=longest + 1)
    return counts


def _check(
    lengths: Integers,
    global_batch_size: int,
    micro_batch_size: int | None,
    world_size: int,
    rank: int,
    bucket_size: int | None,
    max_tokens: int | None,
) -> None:
    _check_lengths(lengths)
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

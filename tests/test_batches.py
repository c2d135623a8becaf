"""What the order of the data promises: which samples, in which step, on which rank, and what it costs."""

import json
import random
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from memlaunch.strategies.bucketing import (
    BatchFigures,
    BatchingSettings,
    BucketedSampler,
    length_order,
    pack,
    summarise,
)

MODES = ("bucketed", "random", "packed")


@dataclass(frozen=True)
class Batching:
    """A data set and a way to batch it, for any rank."""

    lengths: np.ndarray[Any, Any]
    world_size: int
    options: dict[str, Any]

    def sampler(self, rank: int = 0) -> BucketedSampler:
        return BucketedSampler(self.lengths, world_size=self.world_size, rank=rank, **self.options)

    def ranks(self) -> list[BucketedSampler]:
        return [self.sampler(rank) for rank in range(self.world_size)]

    def padded(self, micro_batch: list[int]) -> int:
        return len(micro_batch) * int(self.lengths[micro_batch].max()) if micro_batch else 0


@st.composite
def batchings(draw: st.DrawFn) -> Batching:
    count = draw(st.integers(1, 250))
    longest = draw(st.sampled_from([1, 3, 40, 300, 70_000]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = generator.integers(1, longest, count, endpoint=True).astype(draw(st.sampled_from(["u4", "i8"])))
    world_size = draw(st.integers(1, 6))
    options: dict[str, Any] = {
        "global_batch_size": draw(st.integers(1, 70)),
        "mode": draw(st.sampled_from(MODES)),
        "seed": draw(st.integers(0, 2**40)),
        "bucket_size": draw(st.none() | st.integers(1, 40)),
        "longest_first": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["max_tokens"] = int(lengths.max()) + draw(st.integers(0, 500))
    else:
        options["micro_batch_size"] = draw(st.integers(1, 9))
    return Batching(lengths, world_size, options)


epochs = st.integers(0, 3)


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs)
def test_every_sample_comes_once_an_epoch(batching: Batching, epoch: int) -> None:
    ranks = batching.ranks()
    steps = range(ranks[0].steps_per_epoch)
    seen = [i for rank in ranks for k in steps for micro_batch in rank.step(epoch, k) for i in micro_batch]
    assert sorted(seen) == list(range(len(batching.lengths)))


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs)
def test_the_ranks_share_out_each_step_in_equally_many_micro_steps(batching: Batching, epoch: int) -> None:
    ranks = batching.ranks()
    for k in range(ranks[0].steps_per_epoch):
        shares = [rank.step(epoch, k) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        dealt = [i for share in shares for micro_batch in share for i in micro_batch]
        assert sorted(dealt) == sorted(ranks[0].step_samples(epoch, k))


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs)
def test_every_step_is_full_but_the_last(batching: Batching, epoch: int) -> None:
    sampler = batching.sampler()
    size = batching.options["global_batch_size"]
    sizes = [len(sampler.step_samples(epoch, k)) for k in range(sampler.steps_per_epoch)]
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= size
    with pytest.raises(IndexError):
        sampler.step(epoch, sampler.steps_per_epoch)


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs, st.integers(1, 9), st.integers(1, 9), st.integers(0, 300))
def test_the_samples_of_a_step_do_not_depend_on_ranks_or_micro_batch(
    batching: Batching, epoch: int, world_size: int, micro_batch_size: int, more_tokens: int
) -> None:
    one = batching.sampler()
    kept = {
        name: value
        for name, value in batching.options.items()
        if name not in ("micro_batch_size", "max_tokens", "bucket_size")
    }
    for dealing in (
        {"micro_batch_size": micro_batch_size},
        {"max_tokens": int(batching.lengths.max()) + more_tokens},
    ):
        options = {**kept, **dealing, "bucket_size": one.bucket_size}
        other = replace(batching, world_size=world_size, options=options).sampler()
        assert other.steps_per_epoch == one.steps_per_epoch
        for k in range(one.steps_per_epoch):
            assert other.step_samples(epoch, k) == one.step_samples(epoch, k)


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs)
def test_a_micro_batch_never_passes_its_bound(batching: Batching, epoch: int) -> None:
    for rank in batching.ranks():
        for k in range(rank.steps_per_epoch):
            for micro_batch in rank.step(epoch, k):
                if "max_tokens" in batching.options:
                    assert batching.padded(micro_batch) <= batching.options["max_tokens"]
                else:
                    assert len(micro_batch) <= batching.options["micro_batch_size"]


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs)
def test_random_access_equals_iteration(batching: Batching, epoch: int) -> None:
    sampler = batching.sampler(batching.world_size - 1)
    sampler.set_epoch(epoch)
    count = len(sampler)
    iterated = list(sampler)
    steps = range(sampler.steps_per_epoch)
    assert iterated == [
        micro_batch for k in steps for micro_batch in batching.sampler(sampler.rank).step(epoch, k)
    ]
    assert len(iterated) == count
    assert sampler.state_dict() == {"epoch": epoch + 1, "step": 0}


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs, st.data())
def test_resuming_at_any_step_gives_the_uninterrupted_order(
    batching: Batching, epoch: int, data: st.DataObject
) -> None:
    stopped = batching.sampler()
    stopped.set_epoch(epoch)
    stop = data.draw(st.integers(0, stopped.steps_per_epoch))
    rest = iter(stopped)
    for k in range(stop):
        for _ in stopped.step(epoch, k):
            next(rest)
    resumed = batching.sampler()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    resumed.set_epoch(epoch)  # as a loop over epochs does
    assert list(resumed) == list(rest)


@settings(max_examples=50, deadline=None)
@given(batchings())
def test_a_step_is_counted_when_its_last_micro_batch_is_out(batching: Batching) -> None:
    sampler = batching.sampler()
    micro_batches = iter(sampler)
    for k in range(min(3, sampler.steps_per_epoch)):
        for micro_batch in sampler.step(0, k)[:-1]:
            assert next(micro_batches) == micro_batch
            assert sampler.state_dict() == {"epoch": 0, "step": k}
        next(micro_batches)
        assert sampler.state_dict() == {"epoch": 0, "step": k + 1}


@settings(max_examples=100, deadline=None)
@given(batchings())
def test_the_largest_micro_batch_comes_first(batching: Batching) -> None:
    options = {**batching.options, "longest_first": True}
    ranks = replace(batching, options=options).ranks()
    first, *others = (
        max(batching.padded(micro_batch) for rank in ranks for micro_batch in rank.step(epoch, k))
        for epoch in (0, 1)
        for k in range(ranks[0].steps_per_epoch)
    )
    assert batching.lengths[ranks[0].step(0, 0)[0][0]] == batching.lengths.max()
    assert first >= max(others)


@settings(max_examples=100, deadline=None)
@given(batchings(), epochs)
def test_a_rank_has_nothing_only_where_there_is_nothing_to_give(batching: Batching, epoch: int) -> None:
    """With a global batch that the ranks share evenly, in micro-batches of more than one sample."""
    options = batching.options
    assume(options.get("micro_batch_size", 1) > 1)
    evenly = options["global_batch_size"] * batching.world_size
    for rank in replace(batching, options={**options, "global_batch_size": evenly}).ranks():
        for k in range(rank.steps_per_epoch):
            if len(rank.step_samples(epoch, k)) >= batching.world_size:
                assert [] not in rank.step(epoch, k)


@settings(max_examples=50, deadline=None)
@given(batchings(), epochs)
def test_no_global_random_state_is_read_or_changed(batching: Batching, epoch: int) -> None:
    def everything() -> list[list[int]]:
        sampler = batching.sampler()
        sampler.set_epoch(epoch)
        return list(sampler)

    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    order = everything()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
    random.seed(2)
    np.random.seed(2)
    assert everything() == order


@settings(max_examples=50, deadline=None)
@given(batchings(), epochs)
def test_figures_are_those_of_the_micro_batches(batching: Batching, epoch: int) -> None:
    ranks = batching.ranks()
    steps = range(ranks[0].steps_per_epoch)
    padded = [
        [batching.padded(micro_batch) for micro_batch in micro_step]
        for k in steps
        for micro_step in zip(*(rank.step(epoch, k) for rank in ranks), strict=True)
    ]
    means = [batching.lengths[ranks[0].step_samples(epoch, k)].mean() for k in steps]
    expected = BatchFigures.of(np.array(padded), int(batching.lengths.sum()), np.array(means))
    figures = summarise(ranks[0], epoch)
    for name, value in vars(expected).items():
        assert getattr(figures, name) == pytest.approx(value), name


@pytest.mark.parametrize("mode", ["bucketed", "random"])
def test_seeds_and_epochs_order_the_data_differently(mode: Any) -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)

    def steps(seed: int, epoch: int) -> list[list[int]]:
        sampler = BucketedSampler(
            lengths, global_batch_size=20, micro_batch_size=5, world_size=2, rank=0, seed=seed, mode=mode
        )
        return [sorted(sampler.step_samples(epoch, k)) for k in range(sampler.steps_per_epoch)]

    orders = [steps(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for one, other in combinations(orders, 2):
        assert sum(step in other for step in one) < len(one) / 5


def test_random_order_is_uniform() -> None:
    """The first step of 7 samples is each of the 35 sets of 3 equally often (chi-squared, 34 degrees)."""
    counts: dict[tuple[int, ...], int] = {}
    sampler = BucketedSampler(
        np.ones(7, np.int64), global_batch_size=3, micro_batch_size=3, world_size=1, rank=0, mode="random"
    )
    for epoch in range(1, 3501):
        drawn = tuple(sorted(sampler.step_samples(epoch, 0)))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 35
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 80


DISTRIBUTIONS = {
    "lognormal": lambda draw, n: np.clip(draw.lognormal(np.log(200) - 0.32, 0.8, n).round(), 8, 512),
    "wide lognormal": lambda draw, n: np.clip(draw.lognormal(np.log(200) - 0.405, 0.9, n).round(), 16, 1024),
    "uniform": lambda draw, n: draw.integers(8, 513, n),
    "two humps": lambda draw, n: np.clip(
        np.where(draw.random(n) < 0.7, draw.normal(60, 15, n), draw.normal(400, 50, n)).round(), 8, 512
    ),
}


@pytest.mark.parametrize("max_tokens", [None, 4096])
@pytest.mark.parametrize("accumulation", [1, 4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_batches_cost_little_and_keep_the_statistics_of_a_shuffle(
    name: str, accumulation: int, max_tokens: int | None
) -> None:
    world_size, micro_batch_size = 8, 16
    tile = world_size * micro_batch_size
    lengths = DISTRIBUTIONS[name](np.random.default_rng(0), 800 * tile + 345).astype(np.int32)
    sampler = BucketedSampler(
        lengths,
        global_batch_size=tile * accumulation,
        micro_batch_size=micro_batch_size if max_tokens is None else None,
        max_tokens=max_tokens,
        bucket_size=tile,
        world_size=world_size,
        rank=0,
    )
    figures = summarise(sampler, epoch=1)
    assert figures.padding <= 0.005
    assert figures.idle_mean <= 0.002
    assert figures.idle_p99 <= 0.01
    assert figures.efficiency >= 0.993
    if accumulation >= 4:
        tiles = np.sort(lengths)[: 800 * tile].reshape(800, tile).mean(axis=1)
        assert figures.mean_length_sd <= 0.5 * tiles.std() / accumulation**0.5
        assert figures.mean_length_sd <= 6 * lengths.std() / (tile * accumulation) ** 0.5


def test_a_sample_meets_other_samples_in_every_epoch() -> None:
    """Even where no two samples have the same length."""
    world_size = 8
    lengths = np.random.default_rng(0).permutation(40_000) + 1
    ranks = [
        BucketedSampler(
            lengths,
            global_batch_size=512,
            micro_batch_size=16,
            world_size=world_size,
            rank=rank,
            bucket_size=128,
        )
        for rank in range(world_size)
    ]

    def company(epoch: int) -> set[tuple[int, int]]:
        return {
            pair
            for rank in ranks
            for k in range(rank.steps_per_epoch)
            for micro_batch in rank.step(epoch, k)
            for pair in combinations(sorted(micro_batch), 2)
        }

    before, after = company(1), company(2)
    assert len(before & after) <= 0.05 * len(before)


def test_lengths_and_their_order_may_be_memory_mapped(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 300_000).astype(np.uint16)
    np.save(tmp_path / "lengths.npy", lengths)
    np.save(tmp_path / "order.npy", length_order(lengths))
    mapped = np.load(tmp_path / "lengths.npy", mmap_mode="r")
    order = np.load(tmp_path / "order.npy", mmap_mode="r")
    assert order.tolist() == np.argsort(-lengths.astype(int), kind="stable").tolist()
    one, other = (
        BucketedSampler(
            data, order=given_order, global_batch_size=64, micro_batch_size=8, world_size=2, rank=1
        )
        for data, given_order in [(lengths, None), (mapped, order)]
    )
    assert one.step(3, 100) == other.step(3, 100)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_it_is_a_batch_sampler_of_a_data_loader() -> None:
    from torch.utils.data import DataLoader

    lengths = np.random.default_rng(0).integers(1, 60, 205)
    sampler, same = (
        BucketedSampler(lengths, global_batch_size=24, micro_batch_size=4, world_size=3, rank=2)
        for _ in range(2)
    )
    loader: DataLoader[int] = DataLoader(list(range(205)), batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
    assert len(loader) == len(same)
    assert list(loader) == list(same)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(60, 200), st.integers(0, 2**40))
def test_packing_puts_every_sample_whole_into_one_block(
    values: list[int], max_length: int, seed: int
) -> None:
    lengths = np.array(values)
    packing = pack(lengths, max_length, seed=seed, epoch=1)
    assert sorted(packing.samples.tolist()) == list(range(len(lengths)))
    blocks = np.split(packing.samples, packing.offsets[1:-1])
    assert [int(lengths[block].sum()) for block in blocks] == packing.lengths.tolist()
    assert packing.lengths.max() <= max_length
    assert (2 * packing.lengths <= max_length).sum() <= 1  # two blocks that are half empty would be one
    assert pack(lengths, max_length, seed=seed, epoch=2).lengths.tolist() == packing.lengths.tolist()


def test_packing_changes_with_seed_and_epoch_alone_and_fills_its_blocks() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 20_000)
    packing = pack(lengths, 512, seed=1, epoch=2)
    assert packing.lengths.mean() > 0.99 * 512
    assert pack(lengths, 512, seed=1, epoch=2).samples.tolist() == packing.samples.tolist()
    assert pack(lengths, 512, seed=1, epoch=3).samples.tolist() != packing.samples.tolist()
    assert pack(lengths, 512, seed=2, epoch=2).samples.tolist() != packing.samples.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": np.array([], np.int64)}, "there are no samples"),
        ({"lengths": np.array([1.5])}, "must be integers"),
        ({"lengths": np.array([3, -1])}, "sample 1 has a negative length"),
        ({"micro_batch_size": None}, "give one of `micro_batch_size` and `max_tokens`"),
        ({"max_tokens": 100}, "give one of `micro_batch_size` and `max_tokens`"),
        ({"micro_batch_size": None, "max_tokens": 30}, "sample 2 has 40 tokens, `max_tokens` is 30"),
        ({"global_batch_size": 0}, "`global_batch_size` is 0"),
        ({"rank": 2}, "rank 2 is not one of 0 to 1"),
        ({"order": np.array([0])}, "`order` is that of 1 samples, there are 3"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], message: str) -> None:
    usual = {"lengths": np.array([10, 20, 40]), "global_batch_size": 4, "micro_batch_size": 2}
    with pytest.raises(ValueError, match=message):
        BucketedSampler(**{**usual, "world_size": 2, "rank": 0, **options})


def test_a_position_of_other_data_is_refused() -> None:
    sampler = BucketedSampler(np.ones(10, int), global_batch_size=4, micro_batch_size=2, world_size=2, rank=0)
    with pytest.raises(ValueError, match="no step 4 in an epoch of 3 steps"):
        sampler.load_state_dict({"epoch": 0, "step": 4})


def test_settings_are_strict_and_a_string_stands_for_the_mode() -> None:
    assert BatchingSettings.model_validate("random") == BatchingSettings(mode="random")
    for wrong in (
        "sorted",
        {"mode": "bucketed", "bucket": 4},
        {"max_tokens": "4096"},
        {"bucket_size": 0},
        {"mode": "random", "bucket_size": 64},
        {"mode": "packed", "max_tokens": 4096},
    ):
        with pytest.raises(ValidationError):
            BatchingSettings.model_validate(wrong)

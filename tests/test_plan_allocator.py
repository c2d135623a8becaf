"""The simulated caching allocator: what it rounds, reserves, cuts, joins and gives back."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memlaunch.launcher.plan.allocator import (
    LARGE_SEGMENT,
    MIB,
    SMALL_SEGMENT,
    CachingAllocator,
    Settings,
    rounded,
    segment_size,
    simulate,
)

EXPANDABLE = Settings(expandable_segments=True)


@st.composite
def histories(draw: st.DrawFn, streams: int = 1) -> list[tuple[int, int, int]]:
    """Allocations of all sizes, and frees of what is alive, in any order."""
    sizes = st.one_of(
        st.integers(1, 4096),
        st.integers(4096, 2 * MIB),
        st.integers(2 * MIB, 12 * MIB),
        st.integers(1, 90 * MIB),
    )
    alive: list[int] = []
    events: list[tuple[int, int, int]] = []
    for number, size in enumerate(draw(st.lists(sizes, min_size=1, max_size=60))):
        events.append((number, size, draw(st.integers(0, streams - 1))))
        alive.append(number)
        for _ in range(draw(st.integers(0, min(2, len(alive))))):
            events.append((alive.pop(draw(st.integers(0, len(alive) - 1))), -1, 0))
    return events


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (9 * MIB, 9 * MIB, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the MiB that is left over is not worth cutting off
        (32 * MIB + 1, 34 * MIB, 34 * MIB),
    ],
)
def test_one_request(size: int, allocated: int, reserved: int) -> None:
    usage = simulate([(0, size)])
    if size == 32 * MIB + 1:
        allocated = rounded(size)  # 2 MiB less 512 bytes are left over, and cut off
    assert (usage.peak_requested, usage.peak_allocated, usage.peak_reserved) == (size, allocated, reserved)


def test_a_freed_block_serves_the_next_request_of_its_pool() -> None:
    assert simulate([(0, 30 * MIB), (0, -1), (1, 28 * MIB)]).peak_reserved == 30 * MIB
    assert simulate([(0, 30 * MIB), (0, -1), (1, 4096)]).peak_reserved == 32 * MIB, (
        "small ones have their own"
    )


def test_the_smallest_block_that_is_large_enough_serves() -> None:
    """So the 40 MiB block stays whole for the third request."""
    events = [(0, 40 * MIB), (1, 12 * MIB), (0, -1), (1, -1), (2, 12 * MIB), (3, 40 * MIB)]
    assert simulate(events).peak_reserved == 52 * MIB


def test_neighbours_join_when_they_are_free() -> None:
    halves = [(0, 10 * MIB), (1, 10 * MIB)]
    grown = [(9, 20 * MIB), (9, -1), *halves, (0, -1), (1, -1), (2, 20 * MIB)]
    assert simulate(grown).peak_reserved == 20 * MIB


def test_what_fragmentation_costs_and_expandable_segments_save() -> None:
    """Blocks that grow each time leave holes that nothing fits into; one segment that grows has none."""
    events = []
    for number in range(1, 12):
        events += [(number, number * 16 * MIB), (number - 1, -1)]
    plain, expandable = simulate(events), simulate(events, EXPANDABLE)
    assert plain.peak_allocated == expandable.peak_allocated
    assert plain.fragmentation > expandable.fragmentation


def test_streams_do_not_share_blocks() -> None:
    one = [(0, 30 * MIB, 0), (0, -1, 0), (1, 30 * MIB, 0)]
    two = [(0, 30 * MIB, 0), (0, -1, 0), (1, 30 * MIB, 1)]
    assert simulate(one).peak_reserved * 2 == simulate(two).peak_reserved


def test_unused_segments_are_given_back_before_memory_runs_out() -> None:
    events = [(0, 30 * MIB), (0, -1), (1, 60 * MIB)]
    assert simulate(events).peak_reserved == 90 * MIB
    usage = simulate(events, Settings(capacity=64 * MIB))
    assert (usage.retries, usage.out_of_memory, usage.peak_reserved) == (1, False, 60 * MIB)
    assert simulate(events, Settings(capacity=50 * MIB)).out_of_memory


@given(histories(streams=2), st.booleans())
def test_requested_allocated_reserved_are_in_order_and_nothing_is_lost(events: Any, expandable: bool) -> None:
    allocator = CachingAllocator(Settings(expandable_segments=expandable))
    for number, size, stream in events:
        if size > 0:
            assert allocator.allocate(number, size, stream)
        else:
            allocator.free(number)
        assert 0 <= allocator.requested <= allocator.allocated <= allocator.reserved
    usage = allocator.usage()
    assert usage.peak_requested <= usage.peak_allocated <= usage.peak_reserved
    for number in range(len(events)):
        allocator.free(number)
    assert allocator.requested == allocator.allocated == 0


@given(histories(), st.booleans())
def test_blocks_never_overlap(events: Any, expandable: bool) -> None:
    allocator = CachingAllocator(Settings(expandable_segments=expandable))
    for number, size, _ in events:
        allocator.allocate(number, size) if size > 0 else allocator.free(number)
        blocks = sorted((block.address, block.size) for block, _ in allocator._taken.values())
        for (first, length), (second, _) in pairwise(blocks):
            assert first + length <= second


@given(histories())
def test_everything_freed_becomes_whole_segments_again(events: Any) -> None:
    """So that one request of each segment's size is served without another reservation."""
    allocator = CachingAllocator(Settings())
    for number, size, _ in events:
        allocator.allocate(number, size) if size > 0 else allocator.free(number)
    for number in range(len(events)):
        allocator.free(number)
    blocks = [block for pool in allocator._pools.values() for block in pool.blocks.values()]
    assert all(block.before is None and block.after is None for block in blocks)
    assert sum(block.size for block in blocks) == allocator.reserved


@given(st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=40))
def test_without_frees_expandable_segments_waste_less_than_a_page_of_each_pool(sizes: list[int]) -> None:
    usage = simulate(enumerate(sizes), EXPANDABLE)
    assert usage.peak_allocated == sum(map(rounded, sizes))
    assert usage.fragmentation < SMALL_SEGMENT + LARGE_SEGMENT


@example([(0, MIB + 1, 0), (0, -1, 0), (1, 20 * MIB + 1, 0)], 20, True)
@given(histories(), st.integers(1, 400), st.booleans())
def test_capacity_holds(events: Any, capacity: int, expandable: bool) -> None:
    settings = Settings(expandable, capacity * MIB)
    usage = simulate(events, settings)
    assert usage.peak_reserved <= capacity * MIB
    roomy = simulate(events, Settings(expandable))
    if roomy.peak_reserved <= capacity * MIB:
        assert usage == roomy, "what is not reached changes nothing"


@given(st.integers(1, 200 * MIB))
def test_a_segment_holds_its_request(size: int) -> None:
    assert rounded(size) >= size
    assert rounded(size) % 512 == 0
    assert segment_size(rounded(size)) >= rounded(size)
    assert segment_size(rounded(size)) % SMALL_SEGMENT == 0

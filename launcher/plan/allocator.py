"""The memory that CUDA's caching allocator reserves for a list of allocations and frees.

It asks the driver for segments, cuts blocks from them, and keeps what is freed for the next request that it
is large enough for. The rules follow torch's c10/cuda/CUDACachingAllocator.cpp, native backend, with the
settings that torch has by default or with expandable segments; not held against a GPU yet. Not simulated:
blocks that wait for another stream before they are free, and garbage collection, which is off by default.
"""

import base64
import zlib
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

MIB = 1 << 20
#: Every size is rounded up to a multiple of this.
GRAIN = 512
#: Up to this size a request is small: it comes from segments of ``SMALL_SEGMENT``.
SMALL = MIB
SMALL_SEGMENT = 2 * MIB
#: Below this size a large request comes from a segment of ``LARGE_SEGMENT``, else from one of its own,
#: rounded up to ``ROUND_LARGE``.
LARGE = 10 * MIB
LARGE_SEGMENT = 20 * MIB
ROUND_LARGE = 2 * MIB


@dataclass(frozen=True)
class Settings:
    """How the allocator is set up.

    Attributes:
        expandable_segments: whether one segment a pool and stream grows by pages, as with
            ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
        capacity: bytes that the driver can give; None for as many as are asked for.
    """

    expandable_segments: bool = False
    capacity: int | None = None


@dataclass(frozen=True)
class Usage:
    """What a list of events came to, in bytes.

    Attributes:
        peak_requested: as the tensors have it.
        peak_allocated: rounded up, and whole blocks: ``torch.cuda.max_memory_allocated()``.
        peak_reserved: with what is kept for later: ``torch.cuda.max_memory_reserved()``.
        retries: how often everything unused was given back for lack of memory.
        out_of_memory: whether a request could not be met; the events after it were not simulated.
    """

    peak_requested: int
    peak_allocated: int
    peak_reserved: int
    retries: int
    out_of_memory: bool

    @property
    def fragmentation(self) -> int:
        """What was reserved at most beyond what was allocated at most."""
        return self.peak_reserved - self.peak_allocated


def simulate(
    events: Iterable[tuple[int, int] | tuple[int, int, int]], settings: Settings | None = None
) -> Usage:
    """Run through ``events``: (number, bytes) or (number, bytes, stream); negative bytes free ``number``."""
    allocator = CachingAllocator(settings or Settings())
    for event in events:
        if event[1] < 0:
            allocator.free(event[0])
        elif not allocator.allocate(event[0], event[1], event[2] if len(event) > 2 else 0):
            return allocator.usage(out_of_memory=True)
    return allocator.usage()


def packed(events: Iterable[tuple[int, int]]) -> str:
    """Events without streams as text, for JSON."""
    numbers = array("q", (number for event in events for number in event))
    return base64.b64encode(zlib.compress(numbers.tobytes(), 1)).decode("ascii")


def unpacked(text: str) -> Iterable[tuple[int, int]]:
    """The events that :func:`packed` was given."""
    numbers = array("q")
    numbers.frombytes(zlib.decompress(base64.b64decode(text)))
    return zip(numbers[::2], numbers[1::2], strict=True)


def rounded(size: int) -> int:
    """The size of the block that a request of ``size`` bytes is given at least."""
    return max(GRAIN, -(-size // GRAIN) * GRAIN)


def segment_size(size: int) -> int:
    """The size of the segment that a rounded ``size`` is cut from, where no block is free for it."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


#: Which free blocks may serve a request: (whether it is small, stream).
_Pool = tuple[bool, int]


@dataclass(eq=False, slots=True)
class _Block:
    """A piece of a segment, between its neighbours there."""

    pool: _Pool
    address: int
    size: int
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None


@dataclass(slots=True)
class _Free:
    """The free blocks of a pool: the smallest that is large enough serves, the lowest address first."""

    keys: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, _Block] = field(default_factory=dict)

    def add(self, block: _Block) -> None:
        insort(self.keys, (block.size, block.address))
        self.blocks[block.address] = block

    def remove(self, block: _Block) -> None:
        del self.keys[bisect_left(self.keys, (block.size, block.address))]
        del self.blocks[block.address]

    def best(self, size: int) -> _Block | None:
        index = bisect_left(self.keys, (size, -1))
        return self.blocks[self.keys[index][1]] if index < len(self.keys) else None


class CachingAllocator:
    """The allocator, one request at a time."""

    def __init__(self, settings: Settings) -> None:
        self.requested = self.allocated = self.reserved = 0
        self._settings = settings
        self._peaks = [0, 0, 0]
        self._retries = 0
        self._pools: dict[_Pool, _Free] = {}
        self._last: dict[_Pool, _Block] = {}  # of each expandable segment
        self._taken: dict[int, tuple[_Block, int]] = {}
        self._next_address = 0

    def allocate(self, number: int, size: int, stream: int = 0) -> bool:
        """Serve a request of ``size`` bytes; whether there was memory for it."""
        assert number not in self._taken, "allocated twice"
        if size == 0:
            return True
        wanted = rounded(size)
        pool = (wanted <= SMALL, stream)
        free = self._pools.setdefault(pool, _Free())
        block = free.best(wanted)
        if block is not None:
            free.remove(block)
        else:
            block = self._grow(pool, wanted)
            if block is None:
                return False
        self._split(block, wanted)
        block.free = False
        self._taken[number] = block, size
        self._count(size, block.size, 0)
        return True

    def free(self, number: int) -> None:
        """Take back what ``number`` was given; one that was given nothing is passed over."""
        if number not in self._taken:
            return
        block, size = self._taken.pop(number)
        self._count(-size, -block.size, 0)
        block.free = True
        pool = self._pools[block.pool]
        before, after = block.before, block.after
        if before is not None and before.free:
            pool.remove(before)
            block = self._joined(before, block)
        if after is not None and after.free:
            pool.remove(after)
            block = self._joined(block, after)
        pool.add(block)

    def usage(self, out_of_memory: bool = False) -> Usage:
        """What it has come to."""
        requested, allocated, reserved = self._peaks
        return Usage(requested, allocated, reserved, self._retries, out_of_memory)

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """A new free block of at least ``size``, in no list of free ones; None where memory has run out."""
        if self._settings.expandable_segments:
            return self._expand(pool, size)
        whole = segment_size(size)
        if not self._reserve(whole):
            return None
        block = _Block(pool, self._next_address, whole)
        self._next_address += whole
        return block

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """The same by more pages behind the last block of the pool, which they join where it is free."""
        last, tail, more = self._missing(pool, size)
        if not self._has_room(more):
            self._give_back()
            last, tail, more = self._missing(pool, size)  # of the last block, pages may have gone
            if not self._has_room(more):
                return None
        self._count(0, 0, more)
        if tail is not None:
            self._pools[pool].remove(tail)
            tail.size += more
            return tail
        if last is None:
            address = self._next_address
            self._next_address += 1 << 50  # room to grow in
        else:
            address = last.address + last.size
        block = _Block(pool, address, more, before=last)
        if last is not None:
            last.after = block
        self._last[pool] = block
        return block

    def _missing(self, pool: _Pool, size: int) -> tuple[_Block | None, _Block | None, int]:
        """The last block of an expandable segment, the same where it is free, and bytes of pages to add."""
        page = SMALL_SEGMENT if pool[0] else LARGE_SEGMENT
        last = self._last.get(pool)
        tail = last if last is not None and last.free else None
        return last, tail, -(-(size - (tail.size if tail else 0)) // page) * page

    def _split(self, block: _Block, size: int) -> None:
        """Cut what a request of ``size`` leaves of a free block off it, where that is worth it."""
        rest = block.size - size
        fine = block.pool[0] or self._settings.expandable_segments
        if not (rest >= GRAIN if fine else rest > SMALL):
            return
        cut = _Block(block.pool, block.address + size, rest, before=block, after=block.after)
        if block.after is not None:
            block.after.before = cut
        elif self._last.get(block.pool) is block:
            self._last[block.pool] = cut
        block.after, block.size = cut, size
        self._pools[block.pool].add(cut)

    def _joined(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        elif self._last.get(second.pool) is second:
            self._last[second.pool] = first
        first.free = True
        return first

    def _reserve(self, size: int) -> bool:
        if not self._has_room(size):
            self._give_back()
            if not self._has_room(size):
                return False
        self._count(0, 0, size)
        return True

    def _has_room(self, size: int) -> bool:
        capacity = self._settings.capacity
        return capacity is None or self.reserved + size <= capacity

    def _give_back(self) -> None:
        """Give whole unused segments back to the driver; of expandable ones, unused pages at the end."""
        self._retries += 1
        for key, pool in self._pools.items():
            for block in list(pool.blocks.values()):
                if self._settings.expandable_segments:
                    page = SMALL_SEGMENT if key[0] else LARGE_SEGMENT
                    pages = block.size // page * page
                    if self._last[key] is not block or not pages:
                        continue
                    pool.remove(block)
                    block.size -= pages
                    self._count(0, 0, -pages)
                    if block.size:
                        pool.add(block)
                    elif block.before is not None:
                        block.before.after = None
                        self._last[key] = block.before
                    else:
                        del self._last[key]
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self._count(0, 0, -block.size)

    def _count(self, requested: int, allocated: int, reserved: int) -> None:
        self.requested += requested
        self.allocated += allocated
        self.reserved += reserved
        if requested > 0 or reserved > 0:
            now = (self.requested, self.allocated, self.reserved)
            self._peaks = [max(pair) for pair in zip(self._peaks, now, strict=True)]

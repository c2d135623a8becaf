"""Every allocation and free of a piece of torch code, fake tensors or real ones, as a list of events.

What is counted is live storages: a tensor that shares its storage with another is no allocation. Memory that
a kernel takes and gives back inside itself is not seen.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: The kinds of memory that a breakdown tells apart.
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "engine_buffers",
    "temporaries",
    "batches",
)


@dataclass(frozen=True)
class Allocation:
    """How a storage came to be.

    Attributes:
        op: the operator that made it.
        phase: what was going on: ``build``, ``batch``, ``forward``, ``backward``, ``step`` or ``rest``.
        recorded: whether autograd was recording, which it does when a block is run again too.
        step: the optimizer step, from 0; -1 before the first.
    """

    op: str
    phase: str
    recorded: bool
    step: int


_DEVICE = torch.ops.prim.device.default

#: Stands in for an operator: (arguments, keyword arguments) -> its result.
StandIn = Callable[..., Any]
#: Is told of every operator: (operator, arguments, keyword arguments, result).
Observer = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


class Recorder(TorchDispatchMode):
    """A dispatch mode that records allocations and frees while it is entered.

    Args:
        stand_ins: operator -> what to call in its place.
        through: operator -> its kernel, where that is Python whose own allocations are to be recorded.
        workspace: operator -> (arguments, keyword arguments, result) -> bytes that its kernel takes for
            itself while it runs.

    Attributes:
        events: (storage, bytes) for an allocation, (storage, -bytes) for a free, in order.
        allocations: by number of the storage.
        live: bytes of the storages that are alive.
        phase, step: what new storages are filed under.
        observer: is told of every operator, where there is one.
    """

    def __init__(
        self,
        stand_ins: dict[Any, StandIn] | None = None,
        through: dict[Any, Callable[..., Any]] | None = None,
        workspace: dict[Any, Callable[..., int]] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        self.allocations: list[Allocation] = []
        self.live = 0
        self.phase = "build"
        self.step = -1
        self.observer: Observer | None = None
        self._workspace = workspace or {}
        self._stand_ins = stand_ins or {}
        self._through = through or {}
        self._sizes: list[int] = []
        self._numbers: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._category: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # asked for at every turn, and no work
            return func(*args, **kwargs)
        kernel = self._through.get(func)
        if kernel is not None:
            with self:
                return kernel(*args, **kwargs)
        stand_in = self._stand_ins.get(func)
        out = func(*args, **kwargs) if stand_in is None else stand_in(func, *args, **kwargs)
        size = self._workspace.get(func)
        if size is not None and (taken := size(args, kwargs, out)):
            number = self._add(f"{func} (workspace)", taken)
            self._change(number, 0)
        if isinstance(out, Tensor):
            self.note(out, str(func))
        elif isinstance(out, tuple | list):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.note(leaf, str(func))
        if self.observer is not None:
            self.observer(func, args, kwargs, out)
        return out

    def note(self, tensor: Tensor, op: str) -> None:
        """Count the storage of ``tensor``, if it is new and takes memory."""
        if on_meta(tensor):
            return
        storage = _held(tensor).untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        number = self._add(op, storage.nbytes())
        self._numbers[key] = number, weakref.ref(storage, functools.partial(self._freed, key))

    def file(self, tensors: Iterable[Any], category: str) -> None:
        """Say what the storages of ``tensors`` are for; what was said first holds."""
        for tensor in tensors:
            if (number := self.number(tensor)) is not None:
                self._category.setdefault(number, category)

    def number(self, tensor: Any) -> int | None:
        """The number of the storage of ``tensor``, if it was recorded."""
        if not isinstance(tensor, Tensor):
            return None
        known = self._numbers.get(_held(tensor).untyped_storage()._cdata)
        return None if known is None else known[0]

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """See storages change their size, by which some engines free and take memory."""
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            known = self._numbers.get(storage._cdata)
            if known is not None:
                self._change(known[0], size)
            return result

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def alive(self) -> set[int]:
        """The numbers of the storages that take memory now."""
        return {number for number, size in enumerate(self._sizes) if size}

    def live_without(self, numbers: set[int]) -> int:
        """Bytes that are alive, less those of some storages."""
        return self.live - sum(self._sizes[number] for number in numbers)

    def category(self, number: int) -> str:
        """What a storage is for: as filed, else by when it came."""
        filed = self._category.get(number)
        if filed is not None:
            return filed
        made = self.allocations[number]
        if made.phase == "build":
            return "engine_buffers"
        if made.phase == "batch":
            return "batches"
        if made.recorded and made.phase in ("forward", "backward") and "workspace" not in made.op:
            return "activations"
        return "temporaries"

    def _add(self, op: str, size: int) -> int:
        number = len(self.allocations)
        self.allocations.append(Allocation(op, self.phase, torch.is_grad_enabled(), self.step))
        self._sizes.append(0)
        self._change(number, size)
        return number

    def _change(self, number: int, size: int) -> None:
        before = self._sizes[number]
        if before:
            self.events.append((number, -before))
        if size:
            self.events.append((number, size))
        self.live += size - before
        self._sizes[number] = size

    def _freed(self, key: int, reference: Any) -> None:
        number, _ = self._numbers.pop(key)
        self._change(number, 0)


def on_meta(tensor: Tensor) -> bool:
    """Whether a tensor takes no memory anywhere. A fake one says so without another operator."""
    device: torch.device = getattr(tensor, "fake_device", None) or tensor.device
    return device.type == "meta"


def _held(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its shard, beside which it takes no memory."""
    return getattr(tensor, "_local_tensor", tensor)


@dataclass(frozen=True)
class Peak:
    """The moment at which most was alive.

    Attributes:
        bytes: how much.
        at: index of the event that reached it.
        by_phase: the highest of each phase in which something was allocated.
        breakdown: category -> bytes.
        holders: (operator, category) -> (storages, bytes), the largest first.
    """

    bytes: int
    at: int
    by_phase: dict[str, int]
    breakdown: dict[str, int]
    holders: dict[tuple[str, str], tuple[int, int]]


def peak(recorder: Recorder, without: frozenset[int] = frozenset(), end: int | None = None) -> Peak:
    """The first of the highest moments, not counting the storages ``without``, which live elsewhere.

    Args:
        end: so many events are looked at; None for all.
    """
    live = highest = 0
    at = -1
    by_phase: dict[str, int] = {}
    for index, (number, size) in enumerate(recorder.events[:end]):
        if number in without:
            continue
        live += size
        if size > 0:
            phase = recorder.allocations[number].phase
            by_phase[phase] = max(live, by_phase.get(phase, 0))
        if live > highest:
            highest, at = live, index
    sizes: dict[int, int] = {}
    for number, size in recorder.events[: at + 1]:
        if number not in without:
            sizes[number] = sizes.get(number, 0) + size
    breakdown = dict.fromkeys(CATEGORIES, 0)
    counts: Counter[tuple[str, str]] = Counter()
    held: Counter[tuple[str, str]] = Counter()
    for number, size in sizes.items():
        if size:
            category = recorder.category(number)
            breakdown[category] += size
            key = recorder.allocations[number].op, category
            counts[key] += 1
            held[key] += size
    holders = {key: (counts[key], size) for key, size in held.most_common()}
    return Peak(highest, at, by_phase, breakdown, holders)

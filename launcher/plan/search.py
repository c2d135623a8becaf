"""The fastest way to run a job among those that fit, and what each would need.

Candidates differ in the keys that are open; what the user fixed stays fixed. The memory and the costs of a
strategy are traced at two sizes of the micro-batch, of a model of two and of three layers; both are linear in
each, so four traces tell those of the whole. The fastest that fits is then traced as a whole.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memlaunch.launcher import checks
from memlaunch.launcher.plan import overheads
from memlaunch.launcher.plan.auto import (
    ACCUMULATION,
    BUCKET,
    CHECKPOINTING,
    CHOICES,
    ENGINE,
    MICRO_BATCH,
    OPTIMIZER,
    PARAMETERS,
    STAGE,
)
from memlaunch.launcher.plan.jobs import resolved_of
from memlaunch.launcher.plan.overheads import Circumstances
from memlaunch.launcher.plan.time import Machines, arithmetic_seconds, step_seconds
from memlaunch.launcher.plan.traces import Request, Tracer

#: The share of a GPU's memory that is left free.
MARGIN = 0.04
#: What the caching allocator is taken to reserve beyond what is allocated, until a trace has told.
FRAGMENTATION = 1.06
#: Candidates this much slower than the fastest count as tied with it.
TIE = 0.02
#: Micro-batches beyond this gain nothing.
LARGEST_MICRO_BATCH = 256

Changes = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to run the job.

    Attributes:
        changes: open key -> its value.
        rank: how far it is from the simplest; ties go to the lowest.
        allocated, reserved: the highest of a GPU, in bytes, as torch counts them; what the allocator reserves
            is less where it has to give back what it does not use.
        total: ``reserved`` with what is outside the caching allocator.
        host: bytes of host memory of one rank that offload needs.
        seconds: of an optimizer step.
        trace: the trace of the whole job, where there is one; else the figures are from fits.
    """

    changes: Changes
    rank: tuple[int, ...]
    allocated: int
    reserved: int
    total: int
    host: int
    seconds: float
    trace: dict[str, Any] | None = None

    @property
    def least(self) -> int:
        """Bytes that it needs for sure: how much more the allocator reserves is known from a trace alone."""
        return self.total if self.trace is not None else self.total - self.reserved + self.allocated


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        winner: the fastest that fits; where none does, the one that needs least.
        fits: whether it does.
        candidates: every one that was looked at, the fastest first.
    """

    winner: Candidate
    fits: bool
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Question:
    """A job and where it is to run.

    Attributes:
        job: resolved, with any value in the place of an open key.
        open: the keys to choose; see :data:`CHOICES`, :data:`MICRO_BATCH` and :data:`ACCUMULATION`.
        shape: the largest micro-batch of the job; its number of samples is replaced by each candidate's.
        expandable: whether the allocator has expandable segments.
        bucket: samples of a bucket, where the job fixes it; larger micro-batches would mix lengths.
        host: bytes of the memory of a machine; None where nothing tells.
    """

    job: dict[str, Any]
    open: frozenset[str]
    shape: dict[str, Any]
    machines: Machines
    expandable: bool = False
    bucket: int | None = None
    host: int | None = None

    @property
    def circumstances(self) -> Circumstances:
        """What the overheads depend on."""
        return Circumstances(self.machines.gpu.capability, self.machines.ranks, self.machines.nodes)

    @property
    def room(self) -> int:
        """Bytes of a GPU that may be used."""
        return round(self.machines.gpu.memory_bytes * (1 - MARGIN))

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate fits, as far as it was traced."""
        return candidate.total <= self.room and self._offloads(candidate)

    def may_hold(self, candidate: Candidate) -> bool:
        """Whether nothing says that it does not fit."""
        return candidate.least <= self.room and self._offloads(candidate)

    def _offloads(self, candidate: Candidate) -> bool:
        return self.host is None or self.machines.per_node * candidate.host <= self.host


def search(question: Question, tracer: Tracer) -> Found:
    """Look for the fastest candidate that fits, and trace it as a whole.

    Raises:
        NotTraced: the job does not fit its model.
        UserError: a trace failed.
    """
    space = _Space(question, tracer)
    space.explore()
    while (best := _best(space.fitting())) is not None and best.trace is None:
        space.confirm(best)
        space.explore()  # what was passed over may be better than the next best
    if best is None:
        best = min(space.candidates, key=lambda c: c.total)
        best = best if best.trace is not None else space.confirm(best)
    found = sorted(space.candidates, key=lambda c: (c.seconds, c.rank))
    return Found(best, question.holds(best), tuple(found))


def least_changed(question: Question, tracer: Tracer) -> Candidate | None:
    """Of the strategy nearest to the job's that fits, the fastest micro-batch that does; None if none fits.

    It is traced as a whole.
    """
    return _Space(question, tracer).least_changed()


class _Space:
    """The strategies of a question, of which only those are traced that may be the answer.

    Branch and bound: the next to be looked at is the one that may be the fastest. One is passed over where
    it cannot be faster than what fits, for its arithmetic alone, or for what it takes when less is computed
    again; or where one does not fit that needs less.

    Attributes:
        candidates: all that were looked at.
    """

    def __init__(self, question: Question, tracer: Tracer) -> None:
        self.candidates: list[Candidate] = []
        self._question, self._tracer = question, tracer
        self._sizes = micro_batches(question)
        self._tiers = _tiers(question)
        self._fits: list[Fit] = []

    def fitting(self) -> list[Candidate]:
        """Those that fit, or may."""
        return [candidate for candidate in self.candidates if self._question.may_hold(candidate)]

    def confirm(self, candidate: Candidate) -> Candidate:
        """Trace a candidate as a whole, and have the result in its place."""
        whole = confirm(self._question, candidate.changes, self._tracer)
        self.candidates[self.candidates.index(candidate)] = whole
        return whole

    def explore(self) -> None:
        """Look at strategies until none that is left can be the answer; goes on where it ended before."""
        for tier in self._tiers:
            while (structure := self._next(tier)) is not None:
                tier.remove(structure)
                self._look_at(structure)
            if self.fitting():
                break

    def least_changed(self) -> Candidate | None:
        """See :func:`least_changed`."""
        left = [s for tier in self._tiers for s in tier if _floor(self._question, s) <= self._question.room]
        left.sort(key=lambda s: (_distance(self._question, s), _rank(s)))
        for structure in left:
            # Whether what needs the least of its kind fits tells whether any of them is worth a look.
            kin = [s for s in left if _alike(s, structure, but=(STAGE, CHECKPOINTING))]
            for one in (max(kin, key=lambda s: (_place(s, STAGE), _place(s, CHECKPOINTING))), structure):
                if not self._hopeless(structure) and all(one != fit.structure for fit in self._fits):
                    self._look_at(one)
            if self._hopeless(structure):
                continue
            fit = next(fit for fit in self._fits if fit.structure == structure)
            every = [fit.candidate(size) for size in self._sizes]
            every.sort(key=lambda c: (not self._question.holds(c), c.seconds))
            for candidate in every:
                if self._question.may_hold(candidate):
                    whole = confirm(self._question, candidate.changes, self._tracer)
                    if self._question.holds(whole):
                        return whole
        return None

    def _look_at(self, structure: Changes) -> None:
        fit = Fit.of(self._question, structure, self._sizes, self._tracer)
        self._fits.append(fit)
        self.candidates.extend(fit.candidate(size) for size in self._sizes)

    def _next(self, tier: Sequence[Changes]) -> Changes | None:
        best = _best(self.fitting())
        bounds = [(self._bound(structure), structure) for structure in tier if not self._hopeless(structure)]
        if best is not None:
            fastest = min(candidate.seconds for candidate in self.fitting())
            bounds = [
                (bound, structure)
                for bound, structure in bounds
                if bound < fastest or (bound <= (1 + TIE) * fastest and _rank(structure) < best.rank)
            ]  # what is simpler wins a tie
        if not bounds:
            return None
        chosen = min(bounds, key=lambda pair: pair[0])[1]  # the first of them, which is the simplest
        if best is None and self._fits and self._too_large(self._fits[-1]):
            # If that of the engine which needs the least does not fit either, none of them does.
            last = self._fits[-1].structure
            return next((s for _, s in reversed(bounds) if _alike(s, last, (STAGE, CHECKPOINTING))), chosen)
        return chosen

    def _bound(self, structure: Changes) -> float:
        """Seconds that no candidate of a strategy goes below, from those that compute no more.

        No engine changes the arithmetic, and computing more sends and moves no less.
        """
        place = _place(structure, CHECKPOINTING)
        lesser = [fit for fit in self._fits if _place(fit.structure, CHECKPOINTING) <= place]
        if not lesser:
            return 0.0
        most = max(lesser, key=lambda fit: fit.arithmetic(self._sizes[-1]))
        bound = min(most.arithmetic(size) for size in self._sizes)
        for fit in lesser:
            if _alike(fit.structure, structure, but=(CHECKPOINTING,)):
                bound = max(bound, min(fit.seconds(size, most) for size in self._sizes))
        return bound

    def _hopeless(self, structure: Changes) -> bool:
        """Whether a strategy did not fit that differs only in sharding or computing more."""
        return any(
            _alike(fit.structure, structure, but=(STAGE, CHECKPOINTING))
            and _place(fit.structure, STAGE) >= _place(structure, STAGE)
            and _place(fit.structure, CHECKPOINTING) >= _place(structure, CHECKPOINTING)
            and self._too_large(fit)
            for fit in self._fits
        )

    def _too_large(self, fit: "Fit") -> bool:
        return fit.candidate(self._sizes[0]).least > self._question.room


def _place(structure: Changes, key: str) -> int:
    """How far a value is from the simplest; 0 where the key is not open."""
    return CHOICES[key].index(structure[key]) if key in structure else 0


def _alike(one: Changes, other: Changes, but: Sequence[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in CHOICES if key not in but)


def _distance(question: Question, structure: Changes) -> int:
    """How many keys of the job a strategy changes."""
    return sum(changed(question.job, {key: value}) != question.job for key, value in structure.items())


def _rank(structure: Changes) -> tuple[int, ...]:
    """How far a strategy is from the simplest; offload and small buckets go last, since they cost most."""
    places = [_place(structure, key) for key in CHOICES]
    return (sum(places[:3]), sum(places), *places)


def micro_batches(question: Question) -> list[int]:
    """The micro-batches that a candidate may have, smallest first."""
    training, ranks = question.job["training"], question.machines.ranks
    if training["micro_batch_size"] is None:  # a budget of tokens decides
        return [question.shape["samples"]]
    if MICRO_BATCH not in question.open:
        return [training["micro_batch_size"]]
    share = training["global_batch_size"] // ranks
    if ACCUMULATION not in question.open:
        return [share // training["gradient_accumulation_steps"]]
    most = min(share, LARGEST_MICRO_BATCH, max(1, (question.bucket or share * ranks) // ranks))
    return [n for n in range(1, most + 1) if share % n == 0]


def structures(question: Question) -> Iterator[Changes]:
    """Every strategy that the open keys allow and no technique objects to, the simplest first."""
    keys = [key for key in CHOICES if key in question.open]
    for values in itertools.product(*(CHOICES[key] for key in keys)):
        changes = dict(zip(keys, values, strict=True))
        if _sensible(changes, question) and not _conflicts(changed(question.job, changes)):
            yield changes


def changed(job: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``job`` with dotted keys set."""
    result = copy.deepcopy(dict(job))
    for key, value in changes.items():
        section = result
        *path, last = key.split(".")
        for name in path:
            section = section[name]
        section[last] = value
    return result


def _tiers(question: Question) -> list[list[Changes]]:
    """The strategies, in groups that are looked at only where nothing before them fits."""
    tiers: dict[tuple[Any, ...], list[Changes]] = {}
    for structure in structures(question):
        if _floor(question, structure) <= question.room:
            tiers.setdefault(tuple(structure.get(key) for key in (PARAMETERS, OPTIMIZER, BUCKET)), []).append(
                structure
            )
    if not tiers:  # even the smallest does not fit; look at it all the same
        return [[list(structures(question))[-1]]]
    return list(tiers.values())


def _sensible(changes: Changes, question: Question) -> bool:
    """Whether a strategy does what no simpler one does as well."""
    job = changed(question.job, changes)["strategy"]
    stage, engine, ranks = job["zero"]["stage"], job["engine"], question.machines.ranks
    offloads = "cpu" in (job["zero"]["offload_optimizer"], job["zero"]["offload_parameters"])
    if ENGINE in changes and engine == "deepspeed" and stage == 0:
        return False  # DDP
    if STAGE in changes and ranks == 1 and stage and not offloads:
        return False  # nothing to shard
    if PARAMETERS in changes and job["zero"]["offload_parameters"] == "cpu":
        return bool(job["zero"]["offload_optimizer"] == "cpu")
    default = CHOICES[BUCKET][0]
    return not (changes.get(BUCKET, default) != default and stage == 0)


def _conflicts(job: dict[str, Any]) -> bool:
    resolved = resolved_of(job)
    return any(True for _ in checks.check_strategy(resolved.job, resolved.world_size))


def _floor(question: Question, structure: Changes) -> int:
    """Bytes that the strategy cannot do without: parameters, gradients and states; 0 where nobody knows."""
    counts = question.shape.get("parameters")
    if counts is None:
        return 0
    every, trained = counts
    strategy = changed(question.job, structure)["strategy"]
    stage, ranks = strategy["zero"]["stage"], question.machines.ranks
    held = (
        2 if strategy["precision"]["parameters"] == "same" and strategy["precision"]["dtype"] != "fp32" else 4
    )
    state = 2 if strategy["optimizer"]["bits"] == 8 else 8
    if strategy["zero"]["offload_optimizer"] != "none":
        state = 0
    parameters = held * every // (ranks if stage == 3 else 1)
    if strategy["zero"]["offload_parameters"] != "none":
        parameters = 0
    return int(parameters + (held + state) * trained // (ranks if stage else 1))


@dataclass(frozen=True)
class Fit:
    """A strategy, traced at two micro-batches and, where that is possible, two numbers of layers.

    Attributes:
        corners: (micro-batch, layers) -> trace.
        sizes, depths: the micro-batches and numbers of layers of the corners.
        depth: layers of the whole model.
    """

    question: Question
    structure: Changes
    corners: Mapping[tuple[int, int], dict[str, Any]]
    sizes: tuple[int, int]
    depths: tuple[int, int]
    depth: int
    _made: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, question: Question, structure: Changes, sizes: Sequence[int], tracer: Tracer) -> "Fit":
        """Trace the corners."""
        low, high = (sizes[0], sizes[0]) if len(sizes) == 1 else (2, 4)
        depth = question.shape.get("layers") or 0
        depths = (2, 3) if depth > 3 and _even(question.job) else (depth, depth)
        samples = sorted({low, high})
        layered = sorted(set(depths), reverse=True)  # what takes longest goes first
        job, shape = request(question, structure, low, accumulation=2)
        requests: list[Request] = [(job, shape, None if n == depth else n, samples) for n in layered]
        found = {
            (size, layers): step
            for layers, steps in zip(layered, tracer.steps(requests), strict=True)
            for size, step in zip(samples, steps, strict=True)
        }
        return cls(question, structure, found, (low, high), depths, depth)

    def at(self, size: int, *path: str) -> float:
        """A figure of the traces at a micro-batch of ``size``, for the whole model."""

        def figure(corner: tuple[int, int]) -> float:
            value: Any = self.corners[corner]
            for key in path:
                value = value.get(key, {})
            return float(value or 0)

        def across(layers: int) -> float:
            low, high = self.sizes
            first = figure((low, layers))
            if low == high:
                return first
            return first + (figure((high, layers)) - first) * (size - low) / (high - low)

        few, more = self.depths
        first = across(few)
        if few == more:
            return first
        return first + (across(more) - first) * (self.depth - few) / (more - few)

    def costs(self, size: int) -> dict[str, Any]:
        """The costs of a step, as a trace of the whole would have them."""
        found: dict[str, Any] = self._once(("costs", size), lambda: self._costs(size))
        return found

    def _costs(self, size: int) -> dict[str, Any]:
        counted = [trace["costs"] for trace in self.corners.values()]

        def names(part: str, group: str) -> list[str]:
            return sorted({name for costs in counted for name in costs[part][group]})

        def at(*path: str) -> float:
            return self.at(size, "costs", *path)

        return {
            part: {
                "flops": {dtype: at(part, "flops", dtype) for dtype in names(part, "flops")},
                "bytes_moved": at(part, "bytes_moved"),
                "kernels": at(part, "kernels"),
                "collectives": {
                    kind: {what: at(part, "collectives", kind, what) for what in ("calls", "bytes")}
                    for kind in names(part, "collectives")
                },
            }
            for part in counted[0]
        }

    def arithmetic(self, size: int) -> float:
        """Seconds of a step's arithmetic in the passes alone, which no engine changes."""
        accumulation = _accumulation(self.question, size)
        return arithmetic_seconds(self.costs(size), accumulation, self.question.machines)

    def seconds(self, size: int, computing: "Fit") -> float:
        """Seconds of a step that computes in its passes what another strategy does."""
        costs, other = self.costs(size), computing.costs(size)
        mixed = {part: {**costs[part], "flops": other[part]["flops"]} for part in ("inner", "last")}
        return _seconds(self.question, self.structure, size, {**costs, **mixed}, self.host(size))

    def host(self, size: int) -> int:
        """Bytes of host memory of one rank that offload needs."""
        return max(0, round(self.at(size, "offloaded_bytes")))

    def candidate(self, size: int) -> Candidate:
        """The strategy with micro-batches of ``size``."""
        found: Candidate = self._once(("candidate", size), lambda: self._candidate(size))
        return found

    def _candidate(self, size: int) -> Candidate:
        question = self.question
        phases = {phase for trace in self.corners.values() for phase in trace["by_phase"]}
        # Each by itself: which one is the highest changes with the number of layers.
        highest = round(max(self.at(size, "by_phase", phase) for phase in phases))
        allocated = highest + overheads.reserved(question.circumstances)
        reserved = round(allocated * FRAGMENTATION)
        return _candidate(
            question, self.structure, size, allocated, reserved, self.host(size), self.costs(size)
        )

    def _once(self, what: tuple[str, int], make: Callable[[], Any]) -> Any:
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]


def request(
    question: Question, structure: Changes, size: int, accumulation: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job and the shape of the trace of a candidate."""
    job = changed(question.job, _whole(question, structure, size))
    shape = {key: value for key, value in question.shape.items() if key not in ("parameters", "layers")}
    shape |= {"samples": size, "micro_batches": min(2, accumulation)}
    if question.job["training"]["micro_batch_size"] is not None:
        shape["padded"] = size > 1 or question.shape["padded"]
    return job, shape


def _best(fitting: list[Candidate]) -> Candidate | None:
    """The simplest of those that are about as fast as the fastest."""
    if not fitting:
        return None
    fastest = min(candidate.seconds for candidate in fitting)
    return min((c for c in fitting if c.seconds <= (1 + TIE) * fastest), key=lambda c: (c.rank, c.seconds))


def confirm(question: Question, changes: Changes, tracer: Tracer) -> Candidate:
    """The candidate with these values of the open keys, by a trace of the whole job."""
    structure = {key: value for key, value in changes.items() if key in CHOICES}
    size = changes.get(MICRO_BATCH) or micro_batches(question)[0]
    accumulation = _accumulation(question, size)
    more = overheads.reserved(question.circumstances)
    capacity = question.room - overheads.outside(question.circumstances) - more
    job, shape = request(question, structure, size, accumulation)
    trace = tracer.trace(job, shape, None, capacity)
    usage = trace.get("expandable_allocator" if question.expandable else "allocator")
    allocated = trace["peak_bytes"] + more  # of everything, where the simulation ended early
    reserved = allocated
    if usage is not None:  # a CPU has no caching allocator
        reserved = max(allocated, usage["peak_reserved"] + more)
        if usage["out_of_memory"]:
            reserved = max(reserved, capacity + more + 1)
    return _candidate(
        question, structure, size, allocated, reserved, trace["offloaded_bytes"], trace["costs"], trace
    )


def _candidate(
    question: Question,
    structure: Changes,
    size: int,
    allocated: int,
    reserved: int,
    host: int,
    costs: Mapping[str, Any],
    trace: dict[str, Any] | None = None,
) -> Candidate:
    return Candidate(
        changes=_open_only(question, _whole(question, structure, size)),
        rank=(*_rank(structure), -size),
        allocated=allocated,
        reserved=reserved,
        total=reserved + overheads.outside(question.circumstances),
        host=host,
        seconds=_seconds(question, structure, size, costs, host),
        trace=trace,
    )


def _seconds(question: Question, structure: Changes, size: int, costs: Mapping[str, Any], host: int) -> float:
    fetched = structure.get(PARAMETERS, question.job["strategy"]["zero"]["offload_parameters"]) != "none"
    return step_seconds(costs, _accumulation(question, size), question.machines, host, fetched)


def _whole(question: Question, structure: Changes, size: int) -> Changes:
    """The structure with its batch sizes."""
    if question.job["training"]["micro_batch_size"] is None:
        return structure
    return {**structure, MICRO_BATCH: size, ACCUMULATION: _accumulation(question, size)}


def _open_only(question: Question, changes: Changes) -> Changes:
    return {key: value for key, value in changes.items() if key in question.open}


def _accumulation(question: Question, size: int) -> int:
    training = question.job["training"]
    if training["micro_batch_size"] is None:
        return 1
    return max(1, int(training["global_batch_size"]) // question.machines.ranks // size)


def _even(job: Mapping[str, Any]) -> bool:
    """Whether every layer is treated alike, so that few of them stand for all."""
    strategy = job["strategy"]
    return (
        not strategy["freeze"]
        and not strategy["optimizer"]["overrides"]
        and strategy["activation_checkpointing"]["every"] == 1
    )

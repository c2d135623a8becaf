"""The fastest way to run a job among those that fit, and what each would need.

Candidates differ in the keys that are open; what the user fixed stays fixed. The memory and the costs of a
strategy are traced at two sizes of the micro-batch, of a model of two and of three layers; both are linear in
each, so four traces tell those of the whole. The fastest that fits is then traced as a whole.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memlaunch.launcher.plan import overheads
from memlaunch.launcher.plan.jobs import resolved_of
from memlaunch.launcher.plan.overheads import Circumstances
from memlaunch.launcher.plan.time import Machines, step_seconds, work_seconds
from memlaunch.launcher.plan.traces import Request, Tracer
from memlaunch.strategies import TECHNIQUES

#: The share of a GPU's memory that is left free.
MARGIN = 0.04
#: What the caching allocator is taken to reserve beyond what is allocated, until a trace has told.
FRAGMENTATION = 1.06
#: Candidates this much slower than the fastest count as tied with it.
TIE = 0.02
#: Micro-batches beyond this gain nothing.
LARGEST_MICRO_BATCH = 256
#: How many candidates are traced as a whole before the search gives up.
CONFIRMATIONS = 6

ENGINE = "strategy.engine"
STAGE = "strategy.zero.stage"
BUCKET = "strategy.zero.bucket_size"
OPTIMIZER = "strategy.zero.offload_optimizer"
PARAMETERS = "strategy.zero.offload_parameters"
CHECKPOINTING = "strategy.activation_checkpointing.mode"
MICRO_BATCH = "training.micro_batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"

#: Key that may be open -> its values, the simplest first.
CHOICES: dict[str, tuple[Any, ...]] = {
    PARAMETERS: ("none", "cpu"),
    OPTIMIZER: ("none", "cpu"),
    BUCKET: (50_000_000, 5_000_000),
    CHECKPOINTING: ("none", "selective", "full"),
    ENGINE: ("torch", "deepspeed"),
    STAGE: (0, 1, 2, 3),
}

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
    """

    job: dict[str, Any]
    open: frozenset[str]
    shape: dict[str, Any]
    machines: Machines
    expandable: bool = False

    @property
    def circumstances(self) -> Circumstances:
        """What the overheads depend on."""
        return Circumstances(self.machines.gpu.capability, self.machines.ranks, self.machines.nodes)

    @property
    def room(self) -> int:
        """Bytes of a GPU that may be used."""
        return round(self.machines.gpu.memory_bytes * (1 - MARGIN))


def search(question: Question, tracer: Tracer) -> Found:
    """Look for the fastest candidate that fits, and trace it as a whole.

    Raises:
        NotTraced: the job does not fit its model.
        UserError: a trace failed.
    """
    return _confirmed(question, explore(question, tracer), tracer)


def explore(question: Question, tracer: Tracer) -> list[Candidate]:
    """The candidates that may be the fastest that fits, from fits alone.

    Strategies are looked at from the simplest on. One is passed over where its arithmetic and memory traffic
    alone take longer than the best so far, or where the most sharded one like it does not fit.
    """
    looked_at: list[Candidate] = []
    sizes = micro_batches(question)

    def look(structure: Changes) -> Fit:
        fit = Fit.of(question, structure, sizes, tracer)
        looked_at.extend(fit.candidate(size) for size in sizes)
        return fit

    def best() -> float:
        return min((c.seconds for c in looked_at if c.total <= question.room), default=math.inf)

    for tier in _tiers(question):
        for level in _levels(tier):
            work = 0.0
            for number, structure in enumerate(level):
                if best() <= (1 + TIE) * work:
                    break
                fit = look(structure)
                work = fit.work(sizes[-1])
                if number == 0 and len(level) > 2 and fit.candidate(sizes[0]).total > question.room:
                    sharded = look(level.pop())
                    if sharded.candidate(sizes[0]).total > question.room:
                        break
            if best() <= (1 + TIE) * work:
                break  # what comes computes more
        if best() < math.inf:
            break
    return looked_at


def _levels(tier: Sequence[Changes]) -> list[list[Changes]]:
    """The strategies of a tier by how much they compute again, each from the simplest on."""
    levels: dict[Any, list[Changes]] = {}
    for structure in tier:
        levels.setdefault(structure.get(CHECKPOINTING), []).append(structure)
    return list(levels.values())


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
    return [n for n in range(1, min(share, LARGEST_MICRO_BATCH) + 1) if share % n == 0]


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
    setup = resolved_of(job).setup("cuda")
    return any(True for technique in TECHNIQUES for _ in technique.conflicts(setup))


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

    @classmethod
    def of(cls, question: Question, structure: Changes, sizes: Sequence[int], tracer: Tracer) -> "Fit":
        """Trace the corners."""
        low, high = (sizes[0], sizes[0]) if len(sizes) == 1 else (2, 4)
        depth = question.shape.get("layers") or 0
        depths = (2, 3) if depth > 3 and _even(question.job) else (depth, depth)
        corners = sorted({(size, layers) for size in (low, high) for layers in depths}, reverse=True)
        requests = [
            request(question, structure, size, accumulation=2, layers=None if layers == depth else layers)
            for size, layers in corners
        ]
        found = dict(zip(corners, tracer.traces(requests), strict=True))
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
        one = next(iter(self.corners.values()))["costs"]
        dtypes = {
            dtype
            for trace in self.corners.values()
            for part in one
            for dtype in trace["costs"][part]["flops"]
        }
        kinds = {
            k for trace in self.corners.values() for part in one for k in trace["costs"][part]["collectives"]
        }
        return {
            part: {
                "flops": {dtype: self.at(size, "costs", part, "flops", dtype) for dtype in dtypes},
                "bytes_moved": self.at(size, "costs", part, "bytes_moved"),
                "kernels": self.at(size, "costs", part, "kernels"),
                "collectives": {
                    kind: {
                        w: self.at(size, "costs", part, "collectives", kind, w) for w in ("calls", "bytes")
                    }
                    for kind in kinds
                },
            }
            for part in one
        }

    def work(self, size: int) -> float:
        """Seconds of a step's arithmetic and memory traffic alone."""
        return work_seconds(self.costs(size), _accumulation(self.question, size), self.question.machines)

    def candidate(self, size: int) -> Candidate:
        """The strategy with micro-batches of ``size``."""
        question = self.question
        peaks = [self.at(size, "by_phase", phase) for phase in ("build", "passes", "step")]
        allocated = round(max(peaks)) + overheads.reserved(question.circumstances)
        reserved = round(allocated * FRAGMENTATION)
        host = max(0, round(self.at(size, "offloaded_bytes")))
        return _candidate(question, self.structure, size, allocated, reserved, host, self.costs(size))


def request(
    question: Question, structure: Changes, size: int, accumulation: int, layers: int | None = None
) -> Request:
    """What to ask for the trace of a candidate."""
    job = changed(question.job, _whole(question, structure, size))
    shape = {key: value for key, value in question.shape.items() if key not in ("parameters", "layers")}
    shape |= {"samples": size, "micro_batches": min(2, accumulation)}
    if question.job["training"]["micro_batch_size"] is not None:
        shape["padded"] = size > 1 or question.shape["padded"]
    return job, shape, layers, None


def _confirmed(question: Question, looked_at: list[Candidate], tracer: Tracer) -> Found:
    """Trace the best candidates as a whole, one after the other, until one fits."""
    candidates = sorted(looked_at, key=lambda c: (c.seconds, c.rank))

    def trace(candidate: Candidate) -> Candidate:
        whole = confirm(question, candidate, tracer)
        candidates[candidates.index(candidate)] = whole
        return whole

    for _ in range(CONFIRMATIONS):
        best = _best([c for c in candidates if c.total <= question.room])
        if best is None:
            break
        if best.trace is not None or trace(best).total <= question.room:
            break
    best = _best([c for c in candidates if c.trace is not None and c.total <= question.room])
    if best is None:
        best = min(candidates, key=lambda c: c.total)
        best = best if best.trace is not None else trace(best)
    return Found(best, best.total <= question.room, tuple(candidates))


def _best(fitting: list[Candidate]) -> Candidate | None:
    """The simplest of those that are about as fast as the fastest."""
    if not fitting:
        return None
    fastest = min(candidate.seconds for candidate in fitting)
    return min((c for c in fitting if c.seconds <= (1 + TIE) * fastest), key=lambda c: (c.rank, c.seconds))


def confirm(question: Question, candidate: Candidate, tracer: Tracer) -> Candidate:
    """The candidate by a trace of the whole job."""
    structure = {key: value for key, value in candidate.changes.items() if key in CHOICES}
    size = candidate.changes.get(MICRO_BATCH) or micro_batches(question)[0]
    accumulation = _accumulation(question, size)
    more = overheads.reserved(question.circumstances)
    capacity = question.room - overheads.outside(question.circumstances) - more
    job, shape, layers, _ = request(question, structure, size, accumulation)
    trace = tracer.trace(job, shape, layers, capacity)
    usage = trace["expandable_allocator" if question.expandable else "allocator"]
    allocated = trace["peak_bytes"] + more  # of everything, where the simulation ended early
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
    zero = changed(question.job, structure)["strategy"]["zero"]
    seconds = step_seconds(
        costs,
        _accumulation(question, size),
        question.machines,
        host,
        zero["offload_parameters"] != "none",
    )
    rank = tuple(CHOICES[key].index(value) for key, value in structure.items())
    return Candidate(
        changes=_open_only(question, _whole(question, structure, size)),
        rank=(sum(rank[:3]), sum(rank), *rank, -size),
        allocated=allocated,
        reserved=reserved,
        total=reserved + overheads.outside(question.circumstances),
        host=host,
        seconds=seconds,
        trace=trace,
    )


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

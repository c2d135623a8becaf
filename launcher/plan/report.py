"""A plan as one JSON object, and as text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from memlaunch.launcher.plan import overheads
from memlaunch.launcher.plan.auto import (
    ACCUMULATION,
    CHECKPOINTING,
    CHOICES,
    ENGINE,
    MICRO_BATCH,
    OPTIMIZER,
    PARAMETERS,
    STAGE,
)
from memlaunch.launcher.plan.gpus import CPU
from memlaunch.launcher.plan.search import Candidate, Found, Question, changed, least_changed
from memlaunch.launcher.plan.traces import Tracer

GIB = 1 << 30

#: What to change where nothing fits, the least first; what stands together is changed together.
RELAXATIONS: tuple[frozenset[str], ...] = (
    frozenset({MICRO_BATCH, ACCUMULATION}),
    frozenset({CHECKPOINTING}),
    frozenset({ENGINE, STAGE}),
    frozenset({MICRO_BATCH, ACCUMULATION, CHECKPOINTING}),
    frozenset({ENGINE, STAGE, CHECKPOINTING}),
    frozenset({MICRO_BATCH, ACCUMULATION, ENGINE, STAGE, CHECKPOINTING}),
    frozenset({ENGINE, STAGE, OPTIMIZER}),
    frozenset({MICRO_BATCH, ACCUMULATION, ENGINE, STAGE, CHECKPOINTING, OPTIMIZER, PARAMETERS}),
)
#: How many ways out are shown.
WAYS_OUT = 3


def to_dict(question: Question, found: Found, ways_out: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """``plan.json``."""
    winner, gpu = found.winner, question.machines.gpu
    trace = winner.trace
    return {
        "fits": found.fits,
        "gpu": gpu.name,
        "gpu_memory_bytes": gpu.memory_bytes,
        "usable_memory_bytes": question.room,
        "world_size": question.machines.ranks,
        "peak_allocated_bytes": winner.allocated,
        "peak_reserved_bytes": winner.reserved,
        "breakdown": breakdown(question, winner),
        "moment": trace and trace["moment"],
        "holders": trace and trace["holders"],
        "host_memory_bytes": _host(question, winner),
        "offloaded_bytes": question.machines.per_node * winner.host,
        "usable_host_memory_bytes": question.host,
        "step_seconds": winner.seconds,
        "chosen": [
            {"key": key, "value": value, "why": why(question, found, key)}
            for key, value in sorted(winner.changes.items())
        ],
        "candidates": [_figures(question, candidate) for candidate in found.candidates],
        "changes_that_fit": list(ways_out),
    }


def breakdown(question: Question, candidate: Candidate) -> dict[str, int]:
    """Name -> bytes of a GPU at the peak; empty for a candidate that was not traced as a whole."""
    if candidate.trace is None:
        return {}
    rows = {row.cause: row.size(question.circumstances) for row in overheads.OVERHEADS}
    fragmentation = candidate.reserved - candidate.allocated
    besides = {cause: size for cause, size in rows.items() if size}
    return {**candidate.trace["breakdown"], "fragmentation": fragmentation, **besides}


def why(question: Question, found: Found, key: str) -> str:
    """Why ``key`` has the value that it has, in a sentence."""
    winner, others = found.winner, found.candidates
    if not found.fits:
        return "of all candidates it needs the least memory, and does not fit"
    if key in (MICRO_BATCH, ACCUMULATION):
        size = winner.changes.get(MICRO_BATCH)
        larger = [
            c
            for c in others
            if size is not None and _like(c, winner) and c.changes.get(MICRO_BATCH, 0) > size
        ]
        tight = [c for c in larger if c.total > question.room]
        if tight:
            least = min(tight, key=lambda c: c.total)
            more = least.changes[MICRO_BATCH]
            return f"{more} samples would need {gib(least.total)} of {gib(question.room)}"
        if larger:
            return "larger ones are no faster"
        whole = question.job["training"]["global_batch_size"] // question.machines.ranks
        if question.bucket is not None and size is not None and size < whole:
            return f"larger ones would mix the lengths of buckets of {question.bucket} samples"
        return "it is all of a rank's share of the global batch"
    value = winner.changes[key]
    simplest = CHOICES[key][0]
    if value == simplest:
        return "the simplest, and nothing that fits is faster"
    simpler = [c for c in others if CHOICES[key].index(c.changes[key]) < CHOICES[key].index(value)]
    if not simpler:
        return "what is simpler cannot fit, by its parameters and states alone"
    fitting = [c for c in simpler if question.holds(c)]
    if not fitting:
        least = min(simpler, key=lambda c: c.total)
        return f"with `{least.changes[key]}` it needs at least {gib(least.total)} of {gib(question.room)}"
    fastest = min(fitting, key=lambda c: c.seconds)
    slower = 100 * (fastest.seconds / winner.seconds - 1)
    if slower <= 0:
        return f"with `{fastest.changes[key]}` a step takes as long, and the whole is less simple"
    return f"with `{fastest.changes[key]}` a step would take {slower:.0f} % longer"


def ways_out(question: Question, tracer: Tracer) -> list[dict[str, Any]]:
    """Up to three sets of changes to a job that does not fit, the smallest first; each was traced."""
    shown: list[dict[str, Any]] = []
    enough: list[frozenset[str]] = []
    for keys in RELAXATIONS:
        if keys <= question.open or any(fewer <= keys for fewer in enough):
            continue  # it was searched, or would be found once more
        found = least_changed(replace(question, open=question.open | keys), tracer)
        if found is not None:
            changes = _differences(question, found)
            shown.append({"changes": changes, "memory_bytes": found.total, "step_seconds": found.seconds})
            enough.append(keys)
        if len(shown) == WAYS_OUT:
            break
    return shown


def text(plan: Mapping[str, Any]) -> str:
    """A plan for people."""
    verdict = "fits" if plan["fits"] else "does not fit"
    lines = [
        f"{verdict}: {needs(plan)} ({plan['world_size']} in all), about {plan['step_seconds']:.3g} s a step",
        f"host memory: {_host_needs(plan)}",
    ]
    if plan["moment"]:
        at = plan["moment"]
        lines += ["", f"the peak is in the {at['phase']} pass, at {at['op']}:"]
        parts = sorted(plan["breakdown"].items(), key=lambda part: -part[1])
        lines += _columns([name.replace("_", " "), gib(size)] for name, size in parts if size)
    if plan["chosen"]:
        lines += ["", "chosen:"]
        lines += [f"  {choice['key']} = {choice['value']}: {choice['why']}" for choice in plan["chosen"]]
    if plan["changes_that_fit"]:
        lines += ["", "what would fit:"]
        for way in plan["changes_that_fit"]:
            sets = ", ".join(f"{key}={value}" for key, value in way["changes"].items())
            lines.append(f"  {sets}: {gib(way['memory_bytes'])}")
    if len(plan["candidates"]) > 1:
        keys = [key for key in plan["candidates"][0]["changes"] if len(_values(plan, key)) > 1]
        header = [*(key.rsplit(".", 1)[-1] if key != CHECKPOINTING else "checkpointing" for key in keys)]
        rows = [[*header, "memory", "s a step", ""]]
        for one in plan["candidates"]:
            cells = [str(one["changes"][key]) for key in keys]
            mark = "" if one["fits"] else "does not fit"
            rows.append([*cells, gib(one["memory_bytes"]), f"{one['step_seconds']:.3g}", mark])
        lines += ["", "candidates, the fastest first:", *_columns(rows)]
    return "\n".join(lines)


def needs(plan: Mapping[str, Any]) -> str:
    """What a rank needs, and of what."""
    outside = sum(plan["breakdown"].get(row.cause, 0) for row in overheads.OVERHEADS if not row.reserved)
    where = "a rank's share of the machine" if plan["gpu"] == CPU else f"each {plan['gpu']}"
    room = gib(plan["usable_memory_bytes"])
    needed = f"{gib(plan['peak_reserved_bytes'] + outside)} of the {room} that may be used of {where}"
    limit = plan["usable_host_memory_bytes"]
    too_much = limit is not None and plan["offloaded_bytes"] > limit
    return f"{needed}, and {_host_needs(plan)}" if too_much else needed


def _host_needs(plan: Mapping[str, Any]) -> str:
    """What a machine needs of its own memory, and of how much."""
    needed, limit = gib(plan["host_memory_bytes"]), plan["usable_host_memory_bytes"]
    if limit is not None:
        return f"{needed} of the {gib(limit)} of each machine"
    return f"{needed} a machine" + ("; nothing tells how much it has" if plan["offloaded_bytes"] else "")


def line(plan: Mapping[str, Any]) -> str:
    """A plan in one line: what was chosen and why, and what it needs."""
    chosen = [f"{choice['key']} = {choice['value']} ({choice['why']})" for choice in plan["chosen"]]
    verdict = "" if plan["fits"] else "does not fit: "
    needed = f"{verdict}{needs(plan)}, about {plan['step_seconds']:.3g} s a step"
    return f"planned: {'; '.join([*chosen, needed])}"


def _values(plan: Mapping[str, Any], key: str) -> set[str]:
    return {str(one["changes"][key]) for one in plan["candidates"]}


def _figures(question: Question, candidate: Candidate) -> dict[str, Any]:
    return {
        "changes": candidate.changes,
        "fits": question.holds(candidate),
        "peak_allocated_bytes": candidate.allocated,
        "peak_reserved_bytes": candidate.reserved,
        "memory_bytes": candidate.total,
        "host_memory_bytes": _host(question, candidate),
        "step_seconds": candidate.seconds,
        "traced": candidate.trace is not None,
    }


def _host(question: Question, candidate: Candidate) -> int:
    """Of one machine: each rank builds the whole model in fp32 first, and keeps there what is offloaded."""
    if question.machines.gpu.device == "cpu":
        return question.machines.per_node * candidate.total
    parameters = (question.shape.get("parameters") or (0, 0))[0]
    return question.machines.per_node * max(4 * int(parameters), candidate.host)


def _like(candidate: Candidate, other: Candidate) -> bool:
    return all(candidate.changes.get(key) == other.changes.get(key) for key in CHOICES)


def _differences(question: Question, candidate: Candidate) -> dict[str, Any]:
    """What a candidate changes in the job; the accumulation follows from the micro-batch and is left out."""
    different = {}
    for key, value in candidate.changes.items():
        if (
            key != ACCUMULATION
            and key not in question.open
            and changed(question.job, {key: value}) != question.job
        ):
            different[key] = value
    return different


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"

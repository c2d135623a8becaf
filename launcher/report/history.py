"""What a run folder tells of a run, which may have just begun, or have ended in the middle of a line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from memlaunch.launcher import disclose, outcome, runs
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import Job, batch_of
from memlaunch.launcher.keys import is_in, parse
from memlaunch.launcher.layout import Layout
from memlaunch.launcher.resolve import ResolvedJob
from memlaunch.launcher.rundir import RunDir, read_lines

Line = dict[str, Any]

#: Lines of a log that are shown of a run that failed.
LAST_WORDS = 40
#: Time that is not a part of another figure in a line of metrics.
_WHOLE = "step_seconds"
_ENDS = ("finished", "failed", "stopped", "preempted", "hung", "lost", "restarted", "ended")


@dataclass(frozen=True)
class Attempt:
    """A time in which the ranks trained, in seconds since the first event; ``end`` is an event, or None."""

    begin: float
    until: float
    end: str | None


@dataclass(frozen=True)
class Setting:
    """A key of the resolved job.

    Attributes:
        origin: ``auto`` where the planner chose, ``job file`` where it stands there, else empty.
        why: the planner's reason.
    """

    key: str
    value: str
    origin: str
    why: str


@dataclass(frozen=True)
class History:
    """A run, as its folder tells of it.

    Attributes:
        status: as :func:`memlaunch.launcher.runs.status` gives it.
        resolved: the resolved job, with every value in it.
        written: the job file.
        plan: what was predicted; empty where nothing was.
        events: all of them, each with its time.
        steps: lines of ``metrics.jsonl`` of optimizer steps, by step.
        evaluations: its other lines.
    """

    folder: RunDir
    status: Mapping[str, Any]
    resolved: Mapping[str, Any]
    written: Mapping[str, Any]
    plan: Mapping[str, Any]
    events: Sequence[Line]
    steps: Sequence[Line]
    evaluations: Sequence[Line]

    @property
    def name(self) -> str:
        return f"{self.resolved.get('name', '')} {self.folder.path.name}".strip()

    @property
    def started(self) -> Line:
        """The last event that tells what runs; empty before it."""
        return next((event for event in reversed(self.events) if event["event"] == "started"), {})

    @property
    def failure(self) -> Line | None:
        found = self.status["failure"]
        return found if isinstance(found, dict) else None

    def summary(self) -> str:
        """The job in one line; empty where another version wrote a job that this one does not know."""
        try:
            job = Job.model_validate(self.resolved)
            machines = job.cluster.nodes or 1
            layout = Layout(machines, self.started.get("world_size", machines) // machines or 1)
            return ResolvedJob(job, batch_of(job, layout.ranks), layout, 1).summary()
        except (ValidationError, ValueError):
            return ""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a key of the metrics, where it is a number; what is not finite is NaN."""
        lines = [line for line in (*self.steps, *self.evaluations) if key in line]
        return [line["step"] for line in lines], [_number(line[key]) for line in lines]

    def share(self, step: Line) -> float:
        """The share of padding among the tokens of a step."""
        return 1 - step["tokens"] / step["padded_tokens"] if step.get("padded_tokens") else 0.0

    def parts(self) -> dict[str, float]:
        """Part of a step -> its mean seconds, as far as they were measured; ``other`` is what they leave.

        The first step is left out, in which libraries make themselves ready.
        """
        lines = [line for line in self.steps[1:] if line.get(_WHOLE)]
        names = part_names(lines)
        if not names:
            return {}
        mean = {name: sum(_number(line.get(name) or 0) for line in lines) / len(lines) for name in names}
        whole = sum(line[_WHOLE] for line in lines) / len(lines)
        parts = {name.removesuffix("_seconds"): seconds for name, seconds in mean.items()}
        stalled = [event for event in self.events if event["event"] == "checkpoint"]
        parts["other"] = max(0.0, whole - sum(parts.values()))
        if stalled:  # behind the step, and so not in its time
            parts["checkpoint"] = sum(event["seconds_stalled"] for event in stalled) / len(self.steps)
        return parts

    def attempts(self) -> list[Attempt]:
        """The times in which the ranks trained, or ran a script."""
        found: list[Attempt] = []
        begin: float | None = None
        for event in self.events:
            kind, at = event["event"], self.at(event)
            if begin is not None and (kind == "started" or kind in _ENDS):
                found.append(Attempt(begin, at, kind if kind in _ENDS else None))
                begin = None
            if kind == "started":
                begin = at
        if begin is not None:
            last = max(self.at(self.events[-1]), begin + self._seconds_since(begin))
            found.append(Attempt(begin, last, None))
        return found

    def at(self, event: Line) -> float:
        """When an event was, in seconds since the first one."""
        return float(event["time"] - self.events[0]["time"])

    def _seconds_since(self, begin: float) -> float:
        """The time of the steps that were made since a start, for a run that has not ended."""
        resumed = [event["step"] for event in self.events if event["event"] == "resumed"]
        first = resumed[-1] if resumed and self.events else 0
        return sum(_number(line.get(_WHOLE) or 0) for line in self.steps if line["step"] > first)

    def figures(self) -> dict[str, Any]:
        """What is compared between runs: name -> number, None where it was not measured."""
        last = self.evaluations[-1] if self.evaluations else {}
        padded = sum(line.get("padded_tokens") or 0 for line in self.steps)
        idle = [line["idle_share"] for line in self.steps if line.get("idle_share") is not None]
        peaks = [line["peak_memory_bytes"] for line in self.steps if line.get("peak_memory_bytes")]
        return {
            "step": self.status["step"],
            "steps": self.status["steps"],
            "skipped": sum(bool(line.get("skipped")) for line in self.steps),
            "loss": self.status["loss"],
            **{key: value for key, value in last.items() if key.startswith("eval_")},
            "tokens_per_second": _median(self.steps[1:] or self.steps, "tokens_per_second"),
            "step_seconds": _median(self.steps[1:] or self.steps, _WHOLE),
            "padding": 1 - sum(line["tokens"] for line in self.steps) / padded if padded else None,
            "idle": sum(idle) / len(idle) if idle else None,
            "peak_memory_bytes": max(peaks, default=None),
            "predicted_memory_bytes": self.plan.get("peak_allocated_bytes"),
            "seconds": self.status["seconds"],
        }

    def settings(self) -> list[Setting]:
        """Every key of the resolved job; the values of environment variables are not told."""
        chosen = {entry["key"]: entry.get("why", "") for entry in self.plan.get("chosen") or ()}
        written = disclose.flat(self.written)
        open_keys = [parse(key) for key in {*chosen, *(k for k, value in written.items() if value == "auto")}]
        given = [parse(key) for key in written]
        found = []
        for key, value in disclose.flat(disclose.public(self.resolved)).items():
            path = parse(key)
            automatic = any(is_in(path, section) for section in open_keys)
            stands = any(is_in(path, section) or is_in(section, path) for section in given)
            origin = "auto" if automatic else "job file" if stands else ""
            found.append(Setting(key, text_of(value), origin, chosen.get(key, "")))
        return found

    def last_words(self) -> str:
        """The end of the log of the rank that failed; empty where none did."""
        if self.failure is None or not (log := self.folder.rank_log(self.failure["rank"])).exists():
            return ""
        return outcome.tail(log, LAST_WORDS)


def read(path: Path, *, ended: bool = False) -> History:
    """The history of the run in ``path``; ``ended`` as for :func:`memlaunch.launcher.runs.status`.

    Raises:
        UserError: it is not a run folder.
    """
    folder = runs.find(path)
    lines = [line for line, _ in read_lines(folder.metrics)]
    resolved = _object(folder.resolved)
    if not resolved:
        raise UserError(f"`{folder.resolved}` cannot be read", "it is broken: the run cannot be told of")
    return History(
        folder=folder,
        status=runs.status(folder, ended=ended),
        resolved=resolved,
        written=_object(folder.job),
        plan=_object(folder.plan),
        events=[event for event, _ in read_lines(folder.events)],
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "loss" not in line],
    )


def part_names(lines: Sequence[Line]) -> list[str]:
    """The keys of parts of a step's time, as they follow each other."""
    return list(
        dict.fromkeys(key for line in lines for key in line if key.endswith("_seconds") and key != _WHOLE)
    )


def differences(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of what differs between resolved jobs; a key that one lacks is a dash."""
    jobs = [disclose.flat(history.resolved) for history in histories]
    shown = [disclose.flat(disclose.public(history.resolved)) for history in histories]
    keys = dict.fromkeys(key for job in jobs for key in job)
    return [
        (key, [text_of(job[key]) if key in job else "-" for job in shown])
        for key in keys
        if any(key not in job or job[key] != jobs[0].get(key) for job in jobs)
    ]


def text_of(value: Any) -> str:
    """A value of a job as the job file writes it; text without its quotation marks."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _object(path: Path) -> Line:
    """The JSON object in a file; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _median(lines: Sequence[Line], key: str) -> float | None:
    values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
    return median(values) if values else None

"""Shows a run on the launching terminal, from what its ranks write into the run folder."""

import json
import os
import shlex
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from memlaunch.launcher import runs
from memlaunch.launcher.errors import EXIT_STOPPED, wants_colour
from memlaunch.launcher.rundir import RunDir, read_lines

#: Seconds between lines where there is no terminal to draw a bar on.
PLAIN_INTERVAL = 10.0

#: Steps whose times tell how long the rest will take.
RECENT = 20


class Monitor:
    """Follows ``events.jsonl`` and ``metrics.jsonl``: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, folder: RunDir) -> None:
        self._folder = folder
        # What there is has been written by an earlier attempt.
        self._events_read = folder.events.stat().st_size if folder.events.exists() else 0
        self._metrics_read = folder.metrics.stat().st_size if folder.metrics.exists() else 0
        self._resumed = 0
        self._said: set[str] = set()
        self._live = wants_colour()
        self._console = Console(stderr=True, highlight=False, no_color=not self._live)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("starting the ranks", total=None, status="")
        self._total = 0
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._last_plain = float("-inf")

    def __enter__(self) -> "Monitor":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._total:  # a bar that never began says nothing
            self._bar.update(self._task, visible=False)
        self._bar.stop()

    def update(self) -> None:
        """Show what has been written since the last call."""
        for event, end in read_lines(self._folder.events, self._events_read):
            self._events_read = end
            self._show_event(event)
        for line, end in read_lines(self._folder.metrics, self._metrics_read):
            self._metrics_read = end
            self._show_metrics(line)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _say_once(self, text: str) -> None:
        """As :meth:`say`, but not what was said before: ranks that are started again find the same again."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def _show_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "started" and "script" in event:
            self._bar.update(self._task, description="running")
            self._say_once(f"{event['script']} on {event['world_size']} rank(s)")
        elif kind == "repeated":
            self.say(f"it failed twice behind step {event['step']}, and would again")
        elif kind == "restarted" and "because" in event:
            self.say(f"{event['because']}; restarting, {event['left']} more times at most")
        elif kind == "resumed":
            self._resumed = event["step"]
            self.say(f"goes on behind step {self._resumed}")
        elif kind == "started":
            self._metrics_read = 0  # the lines behind the checkpoint have been taken back
            self._total = event["steps"]
            self._bar.update(self._task, total=self._total, completed=self._resumed)
            self._place(self._resumed)
            for line in header(self._folder, event):
                self._say_once(line)
        elif kind == "data" and event["truncated"]:
            self._say_once(
                f"warning: {event['source']}: {event['truncated']} of {event['samples']} samples were cut to "
                f"max_length {event['max_length']}"
            )
        elif kind == "warning":
            self._say_once(f"warning: {event['message']}")

    def _show_metrics(self, line: dict[str, Any]) -> None:
        if line["step"] <= self._resumed and "loss" in line:
            return
        if "eval_loss" in line:
            self.say(f"step {line['step']}: {_evaluation(line)}")
            return
        self._seconds.append(line["step_seconds"])
        left = (self._total - line["step"]) * statistics.fmean(self._seconds)
        text = "  ".join([*step_words(line), f"{_clock(left)} left"] if left > 0 else step_words(line))
        self._place(line["step"])
        self._bar.update(self._task, completed=line["step"], status=text)
        if not self._live:
            now = time.monotonic()
            if now - self._last_plain >= PLAIN_INTERVAL or line["step"] == self._total:
                self._last_plain = now
                print(f"step {line['step']}/{self._total}: {text}", file=sys.stderr, flush=True)

    def _place(self, step: int) -> None:
        self._bar.update(self._task, description=f"step {step}/{self._total}")


def header(folder: RunDir, started: dict[str, Any]) -> list[str]:
    """What runs: the model and the ranks, the strategy, and what the plan foretold, where there is one.

    Args:
        started: the event of the ranks that begin to train.
    """
    from memlaunch.launcher import resolve
    from memlaunch.launcher.job import Job

    lines = [
        f"{started['model']}: {started['parameters']:,} parameters, {started['trainable']:,} trainable; "
        f"{started['world_size']} rank(s) on {started['device']}; {started['steps']} steps"
    ]
    job = Job.model_validate_json(folder.resolved.read_text(encoding="utf-8"))
    lines.append(", ".join(resolve.strategy_words(job)))
    if folder.plan.exists():
        plan = json.loads(folder.plan.read_text(encoding="utf-8"))
        words = []
        if plan.get("peak_allocated_bytes") is not None:
            words.append(f"{_gib(plan['peak_allocated_bytes'])} at the peak of a rank")
            if plan.get("gpu_memory_bytes"):
                words[-1] += f", of {_gib(plan['gpu_memory_bytes'])}"
        if plan.get("step_seconds") is not None:
            words.append(f"{_short(plan['step_seconds'])} s a step")
        lines += [f"predicted: {'; '.join(words)}"] if words else []
    return lines


def step_words(line: dict[str, Any]) -> list[str]:
    """The figures of one optimizer step, a line of ``metrics.jsonl``."""
    words = [f"loss {_short(line['loss'])}", f"{_short(line['tokens_per_second'])} tokens/s"]
    if line["padded_tokens"]:
        words.append(f"{100 * line['tokens'] / line['padded_tokens']:.0f} % real")
    if line["peak_memory_bytes"] is not None:
        words.append(_gib(line["peak_memory_bytes"]))
    if line["skipped"]:
        words.append("(skipped: gradient overflow)")
    return words


def summary(folder: RunDir, code: int, job: str) -> str:
    """How a run ended, where things are, and the command to type next.

    Args:
        code: its exit code.
        job: the job file, as the user named it.
    """
    status = runs.status(folder, ended=True)
    run = _short_path(folder.path)
    lines = []
    if not code:
        words = [f"finished in {_clock(status['seconds'])}"]
        if status["steps"]:
            words += [f"{status['step']} steps", f"loss {_short(status['loss'])}"]
        if "eval_loss" in status:
            words.append(_evaluation(status))
        lines.append(", ".join(words))
        places = [("model", folder.model), ("report", folder.report), ("logs", folder.logs)]
        lines += [f"{f'{name}:':8}{_short_path(path)}" for name, path in places if path.exists()]
    steps = bool(status["step"])
    following = ["status", run]
    if not code:
        following = ["report", run] if steps else ["logs", run]
    elif code == EXIT_STOPPED:
        lines.append(f"stopped behind step {status['step']}")
        following = ["run", job, "--resume", "auto"]
    elif status["state"] == "failed":
        following = ["logs", run]
    return "\n".join([*lines, next_command(*following)])


def next_command(*words: str) -> str:
    """A line that names the command to type next."""
    return f"next: {shlex.join(['memlaunch', *words])}"


def _evaluation(line: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in line.items() if name.startswith("eval_"))


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _clock(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3600`` -> ``1:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _short_path(path: Path) -> str:
    """``path`` from here, where it lies below."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

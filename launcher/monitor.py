"""Shows a run on the launching terminal, from what its ranks write into the run folder."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from memlaunch.launcher.rundir import RunDir, read_lines

#: Seconds between lines where there is no terminal to draw a bar on.
PLAIN_INTERVAL = 10.0


class Monitor:
    """Follows ``events.jsonl`` and ``metrics.jsonl``: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, folder: RunDir) -> None:
        self._folder = folder
        # What there is has been written by an earlier attempt.
        self._events_read = folder.events.stat().st_size if folder.events.exists() else 0
        self._metrics_read = folder.metrics.stat().st_size if folder.metrics.exists() else 0
        self._resumed = 0
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._last_plain = float("-inf")

    def __enter__(self) -> "Monitor":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
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

    def _show_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "started" and "script" in event:
            self.say(f"{event['script']} on {event['world_size']} rank(s)")
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
            self._task = self._bar.add_task("", total=self._total, status="")
            self.say(
                f"{event['model']}: {event['parameters']:,} parameters, {event['trainable']:,} trainable; "
                f"{event['world_size']} rank(s) on {event['device']}; {event['steps']} steps"
            )
        elif kind == "data" and event["truncated"]:
            self.say(
                f"warning: {event['source']}: {event['truncated']} of {event['samples']} samples were cut to "
                f"max_length {event['max_length']}"
            )
        elif kind == "warning":
            self.say(f"warning: {event['message']}")

    def _show_metrics(self, line: dict[str, Any]) -> None:
        if line["step"] <= self._resumed and "loss" in line:
            return
        if "eval_loss" in line:
            figures = ", ".join(f"{name} {_short(v)}" for name, v in line.items() if name.startswith("eval_"))
            self.say(f"step {line['step']}: {figures}")
            return
        status = f"loss {_short(line['loss'])}  {_short(line['tokens_per_second'])} tokens/s"
        if line["peak_memory_bytes"] is not None:
            status += f"  {line['peak_memory_bytes'] / 2**30:.1f} GiB"
        if line["skipped"]:
            status += "  (skipped: gradient overflow)"
        if self._task is not None:
            self._bar.update(self._task, completed=line["step"], status=status)
        if not self._console.is_terminal:
            now = time.monotonic()
            if now - self._last_plain >= PLAIN_INTERVAL or line["step"] == self._total:
                self._last_plain = now
                print(f"step {line['step']}/{self._total}: {status}", file=sys.stderr, flush=True)


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"

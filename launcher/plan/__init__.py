"""What a job will be like, before it runs."""

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal

from memlaunch.launcher.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.source import Document

#: The comparison: what a sampler that knows nothing of lengths would cost.
BASELINE: Literal["random"] = "random"


def batches(resolved: "ResolvedJob", document: "Document") -> dict[str, Any]:
    """The figures of the job's batches over its own data, tokenised as a run would.

    They are worked out in a process of their own, which loads what a rank loads. See
    :mod:`memlaunch.launcher.plan.batches` for what they are.

    Raises:
        UserError: the data cannot be read, shown where ``document`` names it.
    """
    done = subprocess.run(
        [sys.executable, "-m", "memlaunch.launcher.plan.batches"],
        input=resolved.to_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            "the batches could not be planned", "what went wrong stands above", exit_code=EXIT_FAILED
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "key" in answer:
        raise UserError(problems=[document.finding(answer["key"], answer["message"], answer["hint"])])
    return answer


def table(figures: dict[str, Any]) -> str:
    """The figures of :func:`batches` for people: a line on the data, and a row for each way to batch."""
    data, ways = figures["data"], figures["ways"]
    lines = [
        f"{data['samples']:,} samples, {data['tokens']:,} tokens, the longest {data['longest']:,}"
        + (f", {data['truncated']:,} cut to {data['max_length']:,}" if data["truncated"] else ""),
        "",
    ]
    header = ["batching", "padding", "idle", "idle p99", "efficiency", "micro-batches", "steps", "largest"]
    rows = [header]
    for name, way in ways.items():
        shares = [f"{100 * way[key]:.2f} %" for key in ("padding", "idle_mean", "idle_p99", "efficiency")]
        counts = [f"{way[key]:,}" for key in ("micro_steps", "steps", "largest_micro_batch")]
        rows.append([name, *shares, *counts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    lines += [
        "",
        "idle: share of a micro-step that ranks wait for the slowest; largest: tokens of a micro-batch",
    ]
    return "\n".join(lines)

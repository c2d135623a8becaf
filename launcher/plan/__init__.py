"""What a job will be like, before it runs."""

import json
from typing import TYPE_CHECKING, Any, Literal

from memlaunch.launcher.errors import UserError

if TYPE_CHECKING:
    from memlaunch.launcher.plan.traces import Tracer
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.source import Document

#: The comparison: what a sampler that knows nothing of lengths would cost.
BASELINE: Literal["random"] = "random"


def batches(resolved: "ResolvedJob", document: "Document", tracer: "Tracer") -> dict[str, Any]:
    """The figures of the job's batches over its own data, tokenised as a run would.

    See :mod:`memlaunch.launcher.plan.batches` for what they are.

    Raises:
        UserError: the data cannot be read, shown where ``document`` names it.
    """
    from memlaunch.launcher.plan.traces import NotTraced

    try:
        return tracer.batches(json.loads(resolved.to_json()))
    except NotTraced as error:
        raise UserError(problems=[document.finding(error.key, str(error), error.hint)]) from None


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

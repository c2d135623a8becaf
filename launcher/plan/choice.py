"""What ``"auto"`` becomes, before a job is launched."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaunch.launcher import resolve, resume, schema
from memlaunch.launcher.errors import EXIT_MEMORY, UserError
from memlaunch.launcher.job import Job
from memlaunch.launcher.plan import machine, memory, report

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import Check, ResolvedJob
    from memlaunch.launcher.source import Document


def made(
    resolved: "ResolvedJob",
    document: "Document",
    path: Path,
    then: "Check | None" = None,
    *,
    always: bool = False,
    force: bool = False,
    go_on: str = "never",
) -> "ResolvedJob":
    """The job with the planner's choice in the place of every ``"auto"``; what was chosen is told on stderr.

    A run that is gone on with, on as many ranks as before, keeps what was chosen for it.

    Args:
        document, path, then: what ``resolved`` is resolved from, as for
            :func:`memlaunch.launcher.resolve.from_document`.
        always: plan a job too that leaves nothing open.
        force: take what needs the least where nothing fits.
        go_on: as for :func:`memlaunch.launcher.resume.prepare`.

    Raises:
        UserError: the job does not fit, nothing says what machines it is for, or it cannot be planned.
    """
    if not (resolved.open or always):
        return resolved
    if resolved.open and not always and (kept := resume.choices(resolved, go_on)) is not None:
        try:
            return _with(resolved, document, path, then, kept)
        except UserError:
            pass  # the job has changed in what they depend on
    gpu = machine.of(resolved)
    plan = memory.plan(document, resolved, gpu)
    if not plan["fits"] and not force:
        raise does_not_fit(plan)
    done = settled(resolved, document, path, plan, then)
    print(report.line(plan), file=sys.stderr)
    return replace(done, plan=plan)


def settled(
    resolved: "ResolvedJob",
    document: "Document",
    path: Path,
    plan: Mapping[str, Any],
    then: "Check | None" = None,
) -> "ResolvedJob":
    """The job with what a plan chose, for the arguments of :func:`made`."""
    return _with(resolved, document, path, then, {entry["key"]: entry["value"] for entry in plan["chosen"]})


def does_not_fit(plan: Mapping[str, Any]) -> UserError:
    """The error about a job whose plan does not fit, with the smallest changes that would make it."""
    ways = [
        " ".join(f"--set {key}={value}" for key, value in way["changes"].items())
        + f" ({report.gib(way['memory_bytes'])})"
        for way in plan["changes_that_fit"]
    ]
    hint = f"this would fit: {'; '.join(ways)}; " if ways else "no other strategy would fit on these ranks; "
    return UserError(
        f"the job does not fit: it needs {report.needs(plan)}",
        f"{hint}`--force` runs it all the same",
        exit_code=EXIT_MEMORY,
    )


def _with(
    resolved: "ResolvedJob",
    document: "Document",
    path: Path,
    then: "Check | None",
    chosen: Mapping[str, Any],
) -> "ResolvedJob":
    values = {key: chosen[key] for key in resolved.open if key in chosen}
    done = resolve.from_document(document.with_values(values, schema.shorthands(Job)), path, then)
    assert not done.open
    return done

"""Going on with a run: which one, from which checkpoint, and whether the job is still the same.

The ranks themselves go on from the newest whole checkpoint of their run folder. What is left to the launcher
is to choose the folder, and to see that the job in it is one that the checkpoint fits.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from memlaunch.launcher import disclose, manifest, translate
from memlaunch.launcher.errors import UserError, in_order
from memlaunch.launcher.job import Job
from memlaunch.launcher.keys import KeyPath, dotted, is_in, parse
from memlaunch.launcher.manifest import Damaged, Manifest
from memlaunch.launcher.rundir import RunDir

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.source import Document

#: Keys that do not change what is learned, or say only how far to go.
FREE = tuple(
    parse(key)
    for key in (
        "name",
        "output",
        "cluster",
        "data.eval",
        "data.padding",
        "training.max_steps",
        "training.epochs",
        "training.micro_batch_size",
        "training.gradient_accumulation_steps",
        "training.eval_every_steps",
        "training.eval_micro_batch_size",
        "training.deterministic",
        "strategy.engine",
        "strategy.zero",
        "strategy.activation_checkpointing",
        "strategy.deepspeed",
    )
)
#: Keys that say how far to go.
LIMITS = (parse("training.max_steps"), parse("training.epochs"))
#: Keys that the state in a checkpoint is made for: no force helps.
FIXED = (parse("strategy.optimizer"),)

_BUCKET_SIZE = parse("data.batching.bucket_size")


@dataclass(frozen=True)
class Resumed:
    """A run to go on with.

    Attributes:
        folder: its folder, with the files of the new job in place.
        done: whether it has come to its end already, and there is nothing to do.
    """

    folder: RunDir
    done: bool


def prepare(resolved: "ResolvedJob", document: "Document", resume: str, force: bool) -> Resumed | None:
    """The run to go on with, or None for a new one.

    Args:
        resume: ``never``, ``auto`` for the newest run of the job, or the path of a run or a checkpoint. Where
            a checkpoint is named, newer ones of its run are removed.
        force: go on although the job has changed in what is learned.

    Raises:
        UserError: there is no such run or checkpoint, the checkpoint is damaged, the run goes on, or the job
            has changed in a key that may not change; all of these are named.
    """
    if resume == "never":
        return None
    if resolved.job.script is not None:
        raise UserError("`--resume` is for a job with a `model`", "a script saves and loads its own state")
    if (there := _found(resolved, resume)) is None:
        return None
    folder, found, named = there
    before = _kept(folder, found)
    resolved = _keeping_bucket_size(resolved, document, before)
    changes = dict(_changes(before, json.loads(resolved.to_json())))
    _refuse(changes, document, force)
    further = any(key in LIMITS for key in changes)
    if folder.ended() and not further and not named:
        return Resumed(folder, done=True)
    if folder.ended() and found is None:
        raise UserError(
            f"the run {folder.path} has ended, and has no checkpoint to go on from",
            "begin anew with `--resume never`; `output.checkpoint_every_steps` keeps checkpoints",
        )
    for key, (old, new) in changes.items():
        print(f"{dotted(key)}: {json.dumps(old)} -> {json.dumps(new)}", file=sys.stderr)
    try:
        with folder.writing():
            if named and found is not None:
                _discard_behind(found.step, folder)
            folder.stop.unlink(missing_ok=True)
            folder.place({**translate.files(resolved), folder.job.name: document.text})
            folder.append_event("restarted", resume=resume, changed=[dotted(key) for key in changes])
    except TimeoutError as error:
        raise UserError(str(error), "stop it with `memlaunch stop`, or wait for its end") from error
    return Resumed(folder, done=False)


def choices(resolved: "ResolvedJob", resume: str) -> dict[str, Any] | None:
    """Dotted key -> value of everything in the run to go on with, where that has as many ranks; else None."""
    if resume == "never" or (found := _found(resolved, resume)) is None:
        return None
    folder, checkpoint, _ = found
    before = _kept(folder, checkpoint)
    machines = (before["cluster"]["nodes"], before["cluster"]["gpus_per_node"])
    if machines != (resolved.job.cluster.nodes, resolved.job.cluster.gpus_per_node):
        return None
    return disclose.flat(before)


def _found(resolved: "ResolvedJob", resume: str) -> tuple[RunDir, Manifest | None, bool] | None:
    """(run, its checkpoint, whether that was named) to go on with, or None for a new one."""
    if resume != "auto":
        return _named(Path(resume))
    newest = _newest_run(Path(resolved.job.output.dir) / resolved.job.name)
    return None if newest is None else (newest, _newest_whole(newest), False)


def _kept(folder: RunDir, found: Manifest | None) -> dict[str, Any]:
    """The resolved job of a checkpoint, or of a run without one."""
    return _job_of(found.job if found else json.loads(folder.resolved.read_text(encoding="utf-8")))


def _discard_behind(step: int, run: RunDir) -> None:
    for later in manifest.steps(run.checkpoints):
        if later > step:
            manifest.discard(run.checkpoints / manifest.folder_name(later))


def _newest_run(runs: Path) -> RunDir | None:
    """The run that was begun last; the names of runs begin with the time."""
    newest = max(runs.glob("*/resolved.json"), default=None)
    return RunDir(newest.parent) if newest is not None else None


def _newest_whole(run: RunDir) -> Manifest | None:
    """The newest checkpoint whose files have the right sizes; the ranks read them through."""
    for step in manifest.steps(run.checkpoints):
        try:
            return manifest.read(run.checkpoints / manifest.folder_name(step))
        except Damaged:
            continue
    return None


def _named(path: Path) -> tuple[RunDir, Manifest, bool]:
    """(run, checkpoint, whether it was the checkpoint that was named) at ``path``.

    Raises:
        UserError: there is neither, or the checkpoint is damaged.
    """
    path = path.absolute()
    run = RunDir(path)
    if run.resolved.exists():
        found = _newest_whole(run)
        if found is None:
            raise UserError(
                f"`{path}` has no checkpoint to go on from",
                "begin anew with `--resume never`; `output.checkpoint_every_steps` keeps checkpoints",
            )
        return run, found, False
    run = RunDir(path.parent.parent)
    if path.parent != run.checkpoints or not run.resolved.exists() or not path.is_dir():
        raise UserError(
            f"`{path}` is neither a run nor a checkpoint",
            f"name a run folder, or a folder such as RUN/checkpoints/{manifest.folder_name(500)}",
        )
    try:
        found = manifest.read(path)
        manifest.check_files(path, found)
    except Damaged as error:
        others = [manifest.folder_name(step) for step in manifest.steps(run.checkpoints)]
        rest = ", ".join(name for name in others if name != path.name)
        hint = f"the run also has {rest}" if rest else "begin anew with `--resume never`"
        raise UserError(f"the checkpoint is damaged: {error}", hint) from error
    return run, found, True


def _job_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved job as it was kept, with the defaults of keys that have come since."""
    try:
        filled = Job.model_validate_json(json.dumps(values))
    except ValidationError:
        return dict(values)
    return filled.model_dump(mode="json", by_alias=True)


def _keeping_bucket_size(
    resolved: "ResolvedJob", document: "Document", before: Mapping[str, Any]
) -> "ResolvedJob":
    """The job with the bucket size of its first launch, unless the job file gives one.

    Its default follows the number of ranks, and the order of the samples follows from it.
    """
    batching = before["data"]["batching"]
    same_mode = resolved.job.data.batching.mode == batching["mode"]
    if _gives_bucket_size(document) or batching["bucket_size"] is None or not same_mode:
        return resolved
    return resolved.with_bucket_size(batching["bucket_size"])


def _gives_bucket_size(document: "Document") -> bool:
    return document.anchor(_BUCKET_SIZE) == _BUCKET_SIZE


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], at: KeyPath = ()
) -> Iterator[tuple[KeyPath, tuple[Any, Any]]]:
    """Each key whose value differs: (the value before, the value now)."""
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, (*at, name))
        elif old != new:
            yield (*at, name), (old, new)


def _refuse(changes: Mapping[KeyPath, tuple[Any, Any]], document: "Document", force: bool) -> None:
    """See that only what may change has changed.

    Raises:
        UserError: with every key that may not.
    """
    problems = []
    for key, (old, new) in changes.items():
        fixed = any(is_in(key, section) for section in FIXED)
        if key == _BUCKET_SIZE and not _gives_bucket_size(document):
            continue  # it follows from another change, which is named
        if (force and not fixed) or any(is_in(key, section) for section in FREE):
            continue
        said = f"the run has {json.dumps(old)}, and the job file {json.dumps(new)}"
        hint = "`--resume never` begins a new run"
        hint = f"change it back; {hint}" if fixed else f"change it back, or go on with `--force`; {hint}"
        problems.append(document.finding(dotted(key), said, hint))
    if problems:
        raise UserError(problems=in_order(problems))

"""A job with every default written out: what runs."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from memlaunch.launcher import checks, data_files, entry, layout, model_files, schema, source
from memlaunch.launcher.errors import MOST, Problem, UserError, in_order
from memlaunch.launcher.hostfile import Host
from memlaunch.launcher.job import ClusterSection, Job, ScriptSection, batch_of, setup_of
from memlaunch.launcher.keys import KeyPath, is_in, parse
from memlaunch.launcher.layout import Layout
from memlaunch.launcher.paths import beside
from memlaunch.launcher.plan import auto
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.source import Document
from memlaunch.launcher.translate import slurm
from memlaunch.strategies.accumulation import LARGEST_BATCH, Batch
from memlaunch.strategies.settings import Settings
from memlaunch.strategies.technique import Conflict, Device, Setup

Section = TypeVar("Section", bound=Settings)
Check = Callable[[Job, Path], Iterable[Conflict]]


@dataclass(frozen=True)
class ResolvedJob:
    """A job in which nothing is left to default.

    Attributes:
        job: the job: absolute paths, batch sizes, ranks and threads filled in.
        batch: its batch sizes; under a token budget only the global one counts.
        layout: the machines and their ranks.
        threads_per_rank: CPU threads of each.
        open: keys that the planner is to choose; the simplest that may be stands in their place.
        plan: ``plan.json``, where it has chosen or foretold.
    """

    job: Job
    batch: Batch
    layout: Layout
    threads_per_rank: int
    open: frozenset[str] = frozenset()
    plan: Mapping[str, Any] | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.layout.ranks

    @property
    def hosts(self) -> tuple[Host, ...]:
        """The machines, where a hostfile names them."""
        return self.layout.hosts

    def setup(self, device: Device) -> Setup:
        """What the techniques may know; ``device`` is the one the rank has, or the one the job asks for."""
        return setup_of(self.job, self.batch, self.world_size, device)

    def summary(self) -> str:
        """The job in one line: model, ranks, batch sizes, strategy."""
        job, batch, ranks = self.job, self.batch, self.world_size
        place = {"auto": "", "cpu": " on the CPU", "cuda": " on GPUs"}[job.cluster.device]
        if self.layout.nodes > 1:
            place += f" of {self.layout.nodes} machines"
        count = "1 rank" if ranks == 1 else f"{ranks} ranks"
        if job.script is not None:
            return f"{job.script.path}, {count}{place}"
        model = job.model.path or job.model.entry or f"a new {job.model.architecture}"
        if job.data.batching.max_tokens is not None:
            parts = f" in micro-batches of {job.data.batching.max_tokens} tokens"
        elif self.open & set(auto.SIZES):
            parts = ""
        else:
            parts = (
                f" = {batch.micro_batch_size} x {batch.gradient_accumulation_steps} accumulation x {ranks}"
            )
        sizes = f"global batch {batch.global_batch_size}{parts}"
        words = [model, count + place, sizes, *strategy_words(job, self.open)]
        if self.open:
            words.append(f"{', '.join(f'`{key}`' for key in sorted(self.open))} for the planner to choose")
        return ", ".join(words)

    def with_bucket_size(self, bucket_size: int) -> "ResolvedJob":
        """The same with the bucket size that a rank chose, so that a resumed run sees the same batches."""
        data = self.job.data
        batching = _with(data.batching, bucket_size=bucket_size)
        return replace(self, job=_with(self.job, data=_with(data, batching=batching)))

    def to_json(self) -> str:
        """``resolved.json``: itself a job file, which resolves to this job."""
        absent: dict[str, Any] = {"script": True}
        if self.job.script is not None:
            absent = {"model": True, "data": True}
        elif self.job.model.entry is not None:
            absent["data"] = {key for key in type(self.job.data).model_fields if key != "batching"}
        values = self.job.model_dump(mode="json", by_alias=True, exclude=absent)
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def load(path: Path, sets: Sequence[str] = (), then: Check | None = None) -> ResolvedJob:
    """The job file ``path`` with ``--set`` arguments (``key=value``) applied, checked and resolved.

    Args:
        then: checks a job in which nothing else is wrong.

    Raises:
        UserError: with everything that is wrong.
    """
    return from_document(read(path, sets), path, then)


def read(path: Path, sets: Sequence[str] = ()) -> Document:
    """The job file ``path`` with ``--set`` arguments applied, for :func:`from_document`.

    Raises:
        UserError: there is no such file, or its text is too broken to say more about it.
    """
    return source.read(path, sets, schema.shorthands(Job))


def from_document(document: Document, path: Path, then: Check | None = None) -> ResolvedJob:
    """As :func:`load`, for a document that is read already, from ``path``."""
    shorthands = schema.shorthands(Job)
    found = auto.opened(document.value, shorthands)
    keys = auto.open_keys(found, document.value)
    if found:
        document = _filled(document, found, shorthands)
    checked = schema.check(document, Job)
    problems = [*document.problems, *checked.problems]
    base = path.absolute().parent
    machines = Layout(1, 1)
    if checked.value is not None:
        try:
            machines = layout.of(checked.value.cluster, base)
        except UserError as error:
            at = parse("cluster.hostfile")
            problems += error.problems or [document.problem(at, error.message, error.hint)]
        except ValueError as error:
            key = "include" if checked.value.cluster.include else "exclude"
            hint = "write it such as `worker-1@worker-2:0,2`: hosts, and slots of a host"
            problems.append(document.problem(("cluster", key), f"cluster.{key}: {error}", hint))
        conflicts = [*checks.check_open(checked.value, found), *checks.check(checked.value, base, machines)]
        problems += itertools.islice(_located(conflicts, document, checked.suspect), MOST)
        if then is not None and not problems:
            problems += _located(then(checked.value, base), document, checked.suspect)
    if problems or checked.value is None:
        raise UserError(problems=in_order(problems))
    resolved = resolve(checked.value, machines, base=base, name=path.stem.strip(". ") or "job")
    return replace(resolved, open=keys)


def _filled(document: Document, found: frozenset[str], shorthands: Mapping[KeyPath, str]) -> Document:
    """The document with a strategy in the place of the keys that say ``"auto"``: the simplest that may be.

    Where none may, the one of which the least is wrong.
    """
    best, least = document, math.inf
    for values in auto.stand_ins(found):
        filled = document.with_values(values, shorthands)
        job = schema.check(filled, Job).value
        wrong = len([*checks.check_strategy(job, _ranks(job))]) if job is not None else math.inf
        if best is document or wrong < least:
            best, least = filled, wrong
        if not least:
            break
    return best


def _ranks(job: Job) -> int:
    return (job.cluster.nodes or 1) * (job.cluster.gpus_per_node or 1)


def load_run(folder: RunDir) -> ResolvedJob:
    """The job of a run, as it was launched, whatever became of its hostfile and template meanwhile."""
    fixed = ["cluster.slurm.template=null"]
    if folder.hostfile.exists():
        fixed += [f"cluster.hostfile={folder.hostfile}", "cluster.include=null", "cluster.exclude=null"]
    return load(folder.resolved, fixed)


def strategy_words(job: Job, unknown: frozenset[str] = frozenset()) -> list[str]:
    """The strategy in a few words, as far as it is chosen."""
    strategy = job.strategy
    words = []
    if not unknown & {auto.ENGINE, auto.STAGE}:
        sharded = "DeepSpeed" if strategy.engine == "deepspeed" else "torch FSDP2"
        whole = strategy.engine == "torch" and strategy.zero.stage == 0
        words.append("torch DDP" if whole else f"{sharded} ZeRO-{strategy.zero.stage}")
    offloaded = [n for n in ("optimizer", "parameters") if getattr(strategy.zero, f"offload_{n}") != "none"]
    if offloaded:
        words.append(f"{' and '.join(offloaded)} offloaded")
    words += [strategy.precision.dtype, f"{strategy.optimizer.bits}-bit AdamW"]
    if strategy.activation_checkpointing.mode != "none":
        words.append(f"{strategy.activation_checkpointing.mode} checkpointing")
    if strategy.lora is not None:
        words.append(f"LoRA of rank {strategy.lora.rank}")
    if strategy.freeze:
        words.append(f"{', '.join(f'`{pattern}`' for pattern in strategy.freeze)} frozen")
    return words


def _located(
    conflicts: Iterable[Conflict], document: Document, suspect: Iterable[KeyPath]
) -> Iterator[Problem]:
    """Conflicts where their keys stand, less those about a key whose value is not the user's."""
    for conflict in conflicts:
        concerned = [parse(key) for key in (conflict.key, *conflict.others)]
        if any(is_in(key, place) for key in concerned for place in suspect):
            continue
        at = next((found for key in concerned if (found := document.anchor(key)) is not None), concerned[0])
        yield document.problem(at, f"{conflict.key}: {conflict.message}", conflict.hint)


def resolve(job: Job, machines: Layout, *, base: Path, name: str) -> ResolvedJob:
    """Write out every default of a job in which :func:`memlaunch.launcher.checks.check` finds nothing.

    Args:
        machines: the layout of the job.
        base: the folder that paths are relative to.
        name: what to call a job without a name.
    """
    ranks = machines.ranks
    batch = batch_of(job, ranks)
    threads = job.cluster.threads_per_rank or _threads(job.cluster, machines)
    training, cluster = job.training, job.cluster
    asks_for_gpus = slurm.gpus_in(cluster.slurm.gres or "") is not None
    counts_epochs = training.max_steps is None
    by_ratio = training.warmup_ratio is not None
    by_tokens = job.data.batching.max_tokens is not None
    return ResolvedJob(
        job=_with(
            job if job.script is not None else _sources(job, batch, ranks, base),
            json_schema=None,  # a path relative to the job file
            name=job.name or name,
            training=_with(
                training,
                global_batch_size=batch.global_batch_size,
                micro_batch_size=None if by_tokens else batch.micro_batch_size,
                gradient_accumulation_steps=None if by_tokens else batch.gradient_accumulation_steps,
                epochs=(training.epochs or 1) if counts_epochs else None,
                warmup_steps=None if by_ratio else training.warmup_steps or 0,
                eval_micro_batch_size=training.eval_micro_batch_size
                or (None if by_tokens else min(2 * batch.micro_batch_size, LARGEST_BATCH)),
            ),
            script=job.script and _script(job.script, base),
            cluster=_with(
                cluster,
                nodes=machines.nodes,
                gpus_per_node=machines.per_node,
                hostfile=cluster.hostfile and str(beside(cluster.hostfile, base)),
                device="cuda" if asks_for_gpus or cluster.gpu is not None else cluster.device,
                threads_per_rank=threads,
                slurm=_with(cluster.slurm, template=_template_path(cluster.slurm.template, base)),
            ),
            output=_with(job.output, dir=str(beside(job.output.dir, base))),
        ),
        batch=batch,
        layout=machines,
        threads_per_rank=threads,
    )


def _sources(job: Job, batch: Batch, ranks: int, base: Path) -> Job:
    """A job that is no script, with the defaults of its model and data."""
    model, data = job.model, job.data
    batching = _with(data.batching, bucket_size=_bucket_size(job, batch, ranks))
    if model.entry is not None:
        name = entry.parse(model.entry, base).name
        return _with(job, model=_with(model, entry=name), data=_with(data, batching=batching))
    classifies = model.task in checks.CLASSIFIES
    return _with(
        job,
        model=_with(
            model,
            path=_model_path(model.path, base),
            tokenizer=_model_path(model.tokenizer, base),
        ),
        data=_with(
            data,
            train=_data_path(data.train, base),
            eval=data.eval and _data_path(data.eval, base),
            label=(data.label or "label") if classifies else None,
            target=(data.target or "target") if model.task == "seq2seq-lm" else None,
            max_length=data.max_length or checks.tokenizer_limit(job, base),
            batching=batching,
        ),
    )


def _script(script: ScriptSection, base: Path) -> ScriptSection:
    folder = base if script.folder is None else beside(script.folder, base)
    return _with(script, path=str(beside(script.path, base)), folder=str(folder))


def _threads(cluster: ClusterSection, machines: Layout) -> int:
    """CPU threads of a rank: the cores of a machine shared out; under SLURM, those that are asked for."""
    cores = (cluster.slurm.cpus_per_task or 1) if cluster.launcher == "slurm" else _cores()
    return max(1, cores // machines.largest)


def _template_path(template: str | None, base: Path) -> str | None:
    """A template of ours by its name, the user's by its absolute path."""
    if template is None or template in get_args(slurm.Template):
        return template
    return str(beside(template, base))


def _bucket_size(job: Job, batch: Batch, ranks: int) -> int | None:
    """Written out at the first launch, so that the order of samples outlives a change of the ranks."""
    if job.data.batching.mode != "bucketed" or job.data.batching.max_tokens is not None:
        return job.data.batching.bucket_size
    return job.data.batching.bucket_size or ranks * batch.micro_batch_size


def _cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    return min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)


def _model_path(path: str | None, base: Path) -> str | None:
    if path is None or path.startswith(model_files.PACKAGE):
        return path
    return path if model_files.locate(path, base) is None else str(beside(path, base))


def _data_path(path: str, base: Path) -> str:
    return path if data_files.locate(path, base) is None else str(beside(path, base))


def _with(section: Section, **values: Any) -> Section:
    return section.model_copy(update=values)

"""The checks of a job that need more than one key, a file, or a feature that is not there yet."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memlaunch.launcher import data_files, entry, model_files
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import ClusterSection, Job, ScriptSection, batch_of, setup_of
from memlaunch.launcher.keys import KeyPath, closest, dotted
from memlaunch.launcher.layout import Layout
from memlaunch.launcher.paths import BadPath, beside, kind
from memlaunch.launcher.plan import auto, gpus
from memlaunch.launcher.scanner import kind_of
from memlaunch.launcher.translate import shell, slurm
from memlaunch.strategies import TECHNIQUES, patterns
from memlaunch.strategies.accumulation import Batch, BatchError
from memlaunch.strategies.freezing import no_match
from memlaunch.strategies.settings import changed
from memlaunch.strategies.technique import Conflict

#: What a rank is told by its launcher, or by other keys of the job.
_OWN_VARIABLES = {
    "LOCAL_RANK": None,
    "LOCAL_WORLD_SIZE": None,
    "MASTER_ADDR": None,
    "MASTER_PORT": None,
    "MEMLAUNCH_RUN_DIR": None,
    "OMP_NUM_THREADS": "cluster.threads_per_rank",
    "RANK": None,
    "WORLD_SIZE": None,
}

#: What bash keeps for itself: it refuses another value, or does not hand it on as it is.
_BASH_VARIABLES = (
    "BASHOPTS BASHPID BASH_ALIASES BASH_ARGC BASH_ARGV BASH_CMDS BASH_COMMAND BASH_COMPAT BASH_LINENO "
    "BASH_SOURCE BASH_SUBSHELL BASH_VERSINFO BASH_XTRACEFD DIRSTACK EPOCHREALTIME EPOCHSECONDS EUID FUNCNAME "
    "GROUPS HISTCMD LINENO OPTIND PIPESTATUS PPID RANDOM SECONDS SHELLOPTS SHLVL SRANDOM UID _"
)

#: Keys of a DeepSpeed config that other keys of the job stand for.
_OWN_DEEPSPEED = {
    "activation_checkpointing": "strategy.activation_checkpointing",
    "amp": "strategy.precision",
    "bf16": "strategy.precision",
    "bfloat16": "strategy.precision",
    "data_types": "strategy.precision",
    "fp16": "strategy.precision",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "managed_gradient_accumulation": "training.gradient_accumulation_steps",
    "optimizer": "strategy.optimizer",
    "scheduler": "training.schedule",
    "torch_autocast": "strategy.precision",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "zero_allow_untested_optimizer": "strategy.optimizer",
    "zero_force_ds_cpu_optimizer": "strategy.optimizer",
    "zero_optimization.memory_efficient_linear": "strategy.activation_checkpointing",
    "zero_optimization.allgather_bucket_size": "strategy.zero.bucket_size",
    "zero_optimization.cpu_offload": "strategy.zero.offload_optimizer",
    "zero_optimization.cpu_offload_params": "strategy.zero.offload_parameters",
    "zero_optimization.offload_optimizer": "strategy.zero.offload_optimizer",
    "zero_optimization.offload_param": "strategy.zero.offload_parameters",
    "zero_optimization.reduce_bucket_size": "strategy.zero.bucket_size",
    "zero_optimization.stage": "strategy.zero.stage",
    "zero_optimization.stage3_prefetch_bucket_size": "strategy.zero.bucket_size",
}

#: Keys of a DeepSpeed config that change which ranks share data, or what a batch is, behind our back.
_NOT_OURS = (
    "data_efficiency",
    "expert_parallel",
    "gradient_allreduce_op",
    "hybrid_engine",
    "tensor_parallel",
)

#: Other top-level keys of a DeepSpeed config, which accepts a misspelt one without a word.
_DEEPSPEED = (
    "aio autotuning checkpoint comet comms_logger communication_data_type compile csv_monitor "
    "data_efficiency dataloader_drop_last disable_allgather disable_python_gc dump_state expert_parallel "
    "flops_profiler gradient_allreduce_op gradient_predivide_factor hybrid_engine log_level "
    "memory_breakdown pipeline prescale_gradients seq_parallel_communication_data_type steps_per_print "
    "tensor_parallel tensorboard timers use_data_before_expert_parallelism wandb wall_clock_breakdown "
    "zero_optimization"
)

#: Tasks whose labels are classes.
CLASSIFIES = ("sequence-classification", "token-classification")

_BATCH_KEYS = (
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.gradient_accumulation_steps",
    "cluster.gpus_per_node",
)


def check(job: Job, base: Path, layout: Layout) -> Iterator[Conflict]:
    """What in a job cannot stand together, is not there, or is not supported yet."""
    yield from _check_sections(job)
    if job.script is not None:
        yield from _check_script(job.script, base)
    if "model" in job.model_fields_set:
        yield from _check_model(job, base)
        yield from _check_patterns(job, base)
    if "data" in job.model_fields_set and job.model.entry is None:
        yield from _check_data(job, base)
    yield from _check_training(job, layout.ranks)
    yield from check_strategy(job, layout.ranks)
    yield from _check_cluster(job.cluster, layout, job.script is not None)
    yield from _check_slurm(job.cluster, layout, base)
    yield from _check_output(job, base)


def _check_sections(job: Job) -> Iterator[Conflict]:
    """A job trains a model on data, or runs a script."""
    for name, example in (("model", '{"path": "bert-base-uncased"}'), ("data", '{"train": "train.jsonl"}')):
        given = name in job.model_fields_set
        if name == "data" and job.model.entry is not None and job.script is None:
            continue
        if job.script is None and not given:
            hint = f'add `"{name}": {example}`, for example, or a `script` in the place of both'
            yield Conflict(name, "there is none", hint)
        elif job.script is not None and given:
            yield Conflict(name, "a script brings its own", "remove it, or the `script`", ("script",))


def _check_script(script: ScriptSection, base: Path) -> Iterator[Conflict]:
    for key, path, wanted in (("path", script.path, "file"), ("folder", script.folder, "folder")):
        try:
            if path is not None and (what := kind(beside(path, base))) != wanted:
                message = "does not exist" if what == "nothing" else f"is a {what}"
                yield Conflict(f"script.{key}", f"`{path}` {message}", f"name a {wanted}")
        except BadPath as error:
            yield Conflict(f"script.{key}", str(error), error.hint)


def _check_entry(job: Job, name: str, base: Path) -> Iterator[Conflict]:
    """A model of the user's own brings its data and its loss."""
    try:
        entry.locate(name, base)
    except BadPath as error:
        yield Conflict("model.entry", str(error), error.hint)
    sections = (("model", job.model, ("entry", "config")), ("data", job.data, ("batching",)))
    for section, settings, own in sections:
        for key in changed(settings, *(key for key in type(settings).model_fields if key not in own)):
            hint = "remove it, or the `entry`"
            yield Conflict(f"{section}.{key}", "an `entry` brings its own", hint, ("model.entry",))
    if job.data.batching.mode == "packed":
        hint = "use `bucketed` or `random`"
        yield Conflict("data.batching.mode", "samples of an `entry` cannot be packed", hint, ("model.entry",))


def _check_model(job: Job, base: Path) -> Iterator[Conflict]:
    model = job.model
    if model.entry is not None:
        yield from _check_entry(job, model.entry, base)
        return
    if model.path is None and model.architecture is None:
        yield Conflict(
            "model",
            "there is neither a `path` nor an `architecture`",
            'add `"path"`, or an `"entry"` for a model of your own',
            ("model.path", "model.architecture"),
        )
    if model.path is not None and model.architecture is not None:
        yield Conflict(
            "model.architecture",
            "a model has a `path` or an `architecture`, not both",
            "keep `path` to go on from its weights, `architecture` for random ones",
            ("model.path",),
        )
    if model.config and model.architecture is None:
        yield Conflict(
            "model.config",
            "only an `architecture` takes a config",
            "remove it, or name an `architecture` in the place of `path`",
            ("model.architecture",),
        )
    if model.architecture is not None and model.path is None and model.tokenizer is None:
        yield Conflict(
            "model.architecture",
            "an `architecture` comes without a tokenizer",
            'name one with `"tokenizer"`',
            ("model.tokenizer",),
        )
    try:
        folder = model_files.locate(model.path, base) if model.path is not None else None
    except BadPath as error:
        yield Conflict("model.path", str(error), error.hint)
    else:
        if model.revision is not None and (folder is not None or model.path is None):
            yield Conflict(
                "model.revision",
                "only a model of the Hugging Face hub has revisions",
                "remove it",
                ("model.path",),
            )
        if folder is not None:
            wrong = list(_check_folder("model.path", model.path, folder, model_files.check_model))
            if not wrong and model.tokenizer is None:
                wrong += _check_folder("model.path", model.path, folder, model_files.check_tokenizer)
            yield from wrong
    if model.tokenizer is not None:
        try:
            folder = model_files.locate(model.tokenizer, base)
        except BadPath as error:
            yield Conflict("model.tokenizer", str(error), error.hint)
        else:
            if folder is not None:
                yield from _check_folder(
                    "model.tokenizer", model.tokenizer, folder, model_files.check_tokenizer
                )
    if model.task not in CLASSIFIES and model.num_labels is not None:
        yield Conflict("model.num_labels", f"`{model.task}` has no labels", "remove it", ("model.task",))
    if model.attention == "flash_attention_2":
        if job.cluster.device == "cpu":
            yield Conflict(
                "model.attention", "flash attention runs on a GPU only", "use `sdpa`", ("cluster.device",)
            )
        if job.strategy.precision.dtype == "fp32":
            yield Conflict(
                "model.attention",
                "flash attention runs in fp16 and bf16 only",
                "use `sdpa`, or another `strategy.precision`",
                ("strategy.precision.dtype",),
            )


def _check_folder(
    key: str, path: str | None, folder: Path, examine: Callable[[Path], None]
) -> Iterator[Conflict]:
    try:
        examine(folder)
    except BadPath as error:
        yield Conflict(key, f"`{path}` {error}", error.hint)


def _check_data(job: Job, base: Path) -> Iterator[Conflict]:
    data = job.data
    if not data.train:
        hint = 'add `"train": "train.jsonl"`, for example'
        yield Conflict("data.train", "there is none", hint, ("data",))
    if data.label is not None and job.model.task not in CLASSIFIES:
        yield Conflict("data.label", f"`{job.model.task}` has no labels", "remove it", ("model.task",))
    if data.target is not None and job.model.task != "seq2seq-lm":
        yield Conflict("data.target", f"`{job.model.task}` writes no text", "remove it", ("model.task",))
    if isinstance(data.text, list) and job.model.task != "sequence-classification":
        yield Conflict(
            "data.text", f"`{job.model.task}` takes one text, not a pair", "name one column", ("model.task",)
        )
    for key, path in (("data.train", data.train), ("data.eval", data.eval)):
        if not path:
            continue
        try:
            file = data_files.locate(path, base)
        except BadPath as error:
            yield Conflict(key, str(error), error.hint)
            continue
        if file is None:
            continue
        try:
            record = data_files.first_record(file)
        except BadPath as error:
            yield Conflict(key, f"`{path}` {error}", error.hint)
            continue
        yield from _check_columns(job, key, path, record)
    yield from _check_batching(job, base)
    limit = positions(job, base)
    if data.max_length is not None and limit is not None and data.max_length > limit:
        yield Conflict(
            "data.max_length",
            f"the model has {limit} positions, fewer than {data.max_length}",
            f"use {limit} or less",
            ("model.path",),
        )


def _check_columns(job: Job, source_key: str, path: str, record: Mapping[str, Any]) -> Iterator[Conflict]:
    text, task = job.data.text, job.model.task
    columns = (
        {"data.text": text} if isinstance(text, str) else {f"data.text[{i}]": t for i, t in enumerate(text)}
    )
    if task == "seq2seq-lm":
        columns["data.target"] = job.data.target or "target"
    words = task == "token-classification"
    for key, column in columns.items():
        if column not in record:
            yield _no_column(key, column, source_key, path, record)
        elif not (_is_list(record[column], _is_text) if words else _is_text(record[column])):
            wanted = "a list of words" if words else "text"
            message = f"the column `{column}` of `{path}` is {_kind(record[column])}, not {wanted}"
            yield Conflict(key, message, _columns(record), (source_key,))
    if task not in CLASSIFIES:
        return
    label = job.data.label or "label"
    if label not in record:
        conflict = _no_column("data.label", label, source_key, path, record)
        if source_key == "data.train" and "task" not in job.model.model_fields_set:
            hint = f'{conflict.hint}; to train a language model, set `"task": "causal-lm"`'
            conflict = Conflict(conflict.key, conflict.message, hint, conflict.others)
        yield conflict
    elif not (_is_list(record[label], _is_class) if words else _is_class(record[label])):
        shown = _kind(record[label])
        yield Conflict(
            "data.label",
            f"the column `{label}` of `{path}` is {shown}, not "
            + ("a list with a class for each word" if words else "a class"),
            "a class is a name or a whole number from 0",
            (source_key,),
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_class(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and value >= 0)


def _kind(value: Any) -> str:
    """What a value of a record is, in words: numbers as they are."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}"
    try:
        return kind_of(value)
    except KeyError:
        return f"a {type(value).__name__}"


def _no_column(key: str, column: str, source_key: str, path: str, record: Mapping[str, Any]) -> Conflict:
    close = closest(column, record)
    hint = f"did you mean `{close}`?" if close else _columns(record)
    return Conflict(key, f"`{path}` has no column `{column}`", hint, (source_key,))


def _columns(record: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in list(record)[:8])
    return f"its columns are {names}" if len(record) <= 8 else f"its first columns are {names}"


def _check_batching(job: Job, base: Path) -> Iterator[Conflict]:
    batching, training = job.data.batching, job.training
    if batching.mode == "packed" and job.model.task != "causal-lm":
        yield Conflict(
            "data.batching.mode",
            f"samples cannot be packed together for `{job.model.task}`",
            'use `bucketed` or `random`, or `"task": "causal-lm"`',
            ("model.task",),
        )
    if batching.mode == "packed" and job.model.attention == "flash_attention_2":
        yield Conflict(
            "model.attention",
            "flash attention keeps packed samples apart only in micro-batches of one row",
            'use `"sdpa"` with packed batches, or `bucketed` batches',
            ("data.batching.mode",),
        )
    if batching.max_tokens is None:
        return
    key = "data.batching.max_tokens"
    if job.model.task == "seq2seq-lm":
        hint = "give `training.micro_batch_size` in its place"
        message = "it bounds one length, and a sample of `seq2seq-lm` has two"
        yield Conflict(key, message, hint, ("model.task",))
    if training.global_batch_size is None:
        yield Conflict(
            key,
            "a budget of tokens does not say how many samples an optimizer step has",
            "add `training.global_batch_size`",
            ("training.global_batch_size",),
        )
    for other in ("micro_batch_size", "gradient_accumulation_steps"):
        if getattr(training, other) is not None:
            yield Conflict(
                f"training.{other}",
                "`data.batching.max_tokens` stands in its place",
                "remove one of them",
                (key,),
            )
    longest = job.data.max_length
    if longest is None:
        with contextlib.suppress(BadPath):  # told elsewhere
            longest = tokenizer_limit(job, base)
    if longest is not None and longest > batching.max_tokens:
        yield Conflict(
            key,
            f"a sample of `max_length` {longest} does not fit",
            "give at least `max_length`, or lower that",
            ("data.max_length",),
        )


def _check_training(job: Job, ranks: int) -> Iterator[Conflict]:
    training = job.training
    try:
        batch_of(job, ranks)
    except BatchError as error:
        yield Conflict(f"training.{error.key}", str(error), error.hint, _BATCH_KEYS)
    if training.epochs is not None and training.max_steps is not None:
        yield Conflict(
            "training.max_steps",
            "training ends after `epochs` or after `max_steps`, not both",
            "remove one of them",
            ("training.epochs",),
        )
    if training.warmup_steps is not None and training.warmup_ratio is not None:
        yield Conflict(
            "training.warmup_ratio",
            "the warm-up is given twice, as `warmup_steps` and as a ratio",
            "remove one of them",
            ("training.warmup_steps",),
        )
    if training.max_steps is not None and (training.warmup_steps or 0) > training.max_steps:
        yield Conflict(
            "training.warmup_steps",
            f"a warm-up of {training.warmup_steps} steps is longer than `max_steps`, {training.max_steps}",
            "use fewer",
            ("training.max_steps",),
        )
    if training.eval_every_steps is not None and job.data.eval is None and job.model.entry is None:
        yield Conflict(
            "training.eval_every_steps", "there is nothing to evaluate on", "add `data.eval`", ("data.eval",)
        )


def check_open(job: Job, keys: Iterable[str]) -> Iterator[Conflict]:
    """Keys that say ``"auto"`` where the planner cannot choose."""
    for key in sorted(keys):
        if job.script is not None or job.model.entry is not None:
            what, at = ("script", "script") if job.script is not None else ("model", "model.entry")
            hint = "give a value: the planner knows the models of transformers only"
            yield Conflict(key, f"the planner cannot tell what a {what} of your own needs", hint, (at,))
        elif job.data.batching.max_tokens is not None and key in auto.SIZES:
            at = "data.batching.max_tokens"
            yield Conflict(key, f"`{at}` stands in its place", "remove one of them", (at,))


def check_strategy(job: Job, ranks: int) -> Iterator[Conflict]:
    """What in the strategy of a job cannot stand together."""
    strategy = job.strategy
    try:
        batch = batch_of(job, ranks)
    except BatchError:
        batch = Batch(ranks, 1, 1)
    setup = setup_of(job, batch, ranks, job.cluster.device)
    for technique in TECHNIQUES:
        yield from technique.conflicts(setup)
    if strategy.deepspeed and strategy.engine != "deepspeed":
        yield Conflict(
            "strategy.deepspeed",
            f"the {strategy.engine} engine takes no DeepSpeed keys",
            'set `"engine": "deepspeed"`, or remove them',
            ("strategy.engine",),
        )
    else:
        yield from _check_raw(strategy.deepspeed)


def _check_raw(raw: Mapping[str, Any]) -> Iterator[Conflict]:
    """Raw DeepSpeed keys that other keys of the job stand for, or that look misspelt."""
    zero = raw.get("zero_optimization")
    paths: list[KeyPath] = [(key,) for key in raw]
    if isinstance(zero, Mapping):
        paths += [("zero_optimization", key) for key in zero]
    elif "zero_optimization" in raw:
        key = "strategy.deepspeed.zero_optimization"
        yield Conflict(key, f"it is {kind_of(zero)}, not an object", "use `strategy.zero`, and remove this")
    known = [*_DEEPSPEED.split(), *(key for key in _OWN_DEEPSPEED if "." not in key)]
    for path in paths:
        key = dotted(("strategy", "deepspeed", *path))
        if (ours := _OWN_DEEPSPEED.get(".".join(map(str, path)))) is not None:
            yield Conflict(key, f"`{ours}` stands for it", "use that, and remove this")
        elif path[0] in _NOT_OURS:
            yield Conflict(key, "it changes what a global batch is", "remove it")
        elif len(path) == 1 and path[0] not in known and (close := closest(str(path[0]), known, 0.8)):
            hint = f"did you mean `{close}`?"
            yield Conflict(key, "DeepSpeed has no such key, and would pass over it without a word", hint)


def _check_patterns(job: Job, base: Path) -> Iterator[Conflict]:
    """Freeze and override patterns that match nothing, where the names can be known without torch."""
    folder = _model_folder(job, base)
    if folder is None or job.model.architecture is not None:
        return
    try:
        parameters = model_files.parameters(folder)
    except BadPath as error:
        yield Conflict("model.path", f"`{job.model.path}` {error}", error.hint)
        return
    if parameters is not None:
        yield from check_patterns(job, parameters)


def check_patterns(job: Job, parameters: model_files.Parameters) -> Iterator[Conflict]:
    """Freeze and override patterns that match nothing among ``parameters``, and frozen models."""
    freeze = {f"strategy.freeze[{i}]": pattern for i, pattern in enumerate(job.strategy.freeze)}
    overrides = {
        f"strategy.optimizer.overrides[{i}].modules": override.modules
        for i, override in enumerate(job.strategy.optimizer.overrides)
    }
    adapted = {
        f"strategy.lora.{name}[{i}]": pattern
        for name in ("modules", "train")
        for i, pattern in enumerate(getattr(job.strategy.lora, name, None) or ())
    }
    blocks = {
        f"strategy.activation_checkpointing.blocks[{i}]": pattern
        for i, pattern in enumerate(job.strategy.activation_checkpointing.blocks or ())
    }
    # A pattern that is written ten thousand times is looked up once.
    covers = functools.cache(lambda text: patterns.select(text, parameters.names, parameters.prefixes))
    told = functools.cache(lambda text: _no_match(text, parameters))
    frozen: set[str] = set()
    for key, pattern in (freeze | overrides | adapted | blocks).items():
        covered = covers(pattern)
        if not covered:
            yield Conflict(key, *told(pattern), ("model.path",))
        if key in freeze:
            frozen.update(covered)
    if frozen and frozen == set(parameters.names):
        yield Conflict(
            "strategy.freeze",
            "every parameter of the model is frozen",
            "leave at least one module out of it",
            ("model.path",),
        )


def _no_match(pattern: str, parameters: model_files.Parameters) -> tuple[str, str]:
    message, hint = no_match(pattern, parameters.stored, parameters.prefixes)
    head = pattern.rpartition("[")[0] if pattern.endswith("]") else ""
    count = sum(1 for _ in _items(head, parameters)) if head else 0
    if count:
        hint = f"`{head}` has {count} items, [0] to [{count - 1}]"
    elif close := patterns.nearest(pattern, parameters.names, parameters.prefixes):
        hint = f"did you mean `{close[0]}`?"
    return message, hint


def _items(pattern: str, parameters: model_files.Parameters) -> Iterator[int]:
    """The indices of the list of modules that ``pattern`` is."""
    index = 0
    while patterns.select(f"{pattern}[{index}]", parameters.names, parameters.prefixes):
        yield index
        index += 1


def _check_cluster(cluster: ClusterSection, layout: Layout, is_script: bool) -> Iterator[Conflict]:
    launcher = cluster.launcher
    if cluster.hostfile is not None and launcher == "slurm":
        hint = "remove it; `cluster.slurm.nodelist` asks for nodes by name"
        yield Conflict("cluster.hostfile", "SLURM chooses the nodes", hint, ("cluster.launcher",))
    elif cluster.hostfile is not None:
        if cluster.nodes is not None and cluster.nodes != layout.nodes:
            message = f"{cluster.nodes} machines, and the hostfile has {layout.nodes}"
            yield Conflict("cluster.nodes", message, "remove it, or `include` fewer", ("cluster.hostfile",))
        if cluster.gpus_per_node not in (None, layout.per_node):
            slots = layout.per_node or ", ".join(str(len(host.slots)) for host in layout.hosts)
            message = f"{cluster.gpus_per_node} ranks, and the slots of the hostfile are {slots}"
            yield Conflict("cluster.gpus_per_node", message, "remove it", ("cluster.hostfile",))
    elif (cluster.nodes or 1) > 1 and launcher in ("torchrun", "deepspeed"):
        yield Conflict(
            "cluster.nodes",
            f"nothing says which {cluster.nodes} machines {launcher} is to start ranks on",
            "name a `hostfile`, or use the launcher `slurm`",
            ("cluster.launcher",),
        )
    if cluster.gpu is not None:
        yield from _check_gpu(cluster.gpu, cluster.device)
    for name in ("include", "exclude"):
        if getattr(cluster, name) is not None and cluster.hostfile is None:
            yield Conflict(f"cluster.{name}", "there is no hostfile to choose from", "name a `hostfile`")
    chosen = any(host.slots != tuple(range(len(host.slots))) for host in layout.hosts)
    if launcher == "mpirun" and chosen:
        key = "cluster.include" if cluster.include else "cluster.exclude"
        hint = "choose whole hosts, or set CUDA_VISIBLE_DEVICES in `cluster.env`"
        yield Conflict(key, "mpirun cannot choose among the GPUs of a host", hint, ("cluster.launcher",))
    if cluster.hang_timeout is not None and is_script:
        message = "nothing tells when a script makes a step"
        yield Conflict("cluster.hang_timeout", message, "remove it", ("script",))
    over_ssh = launcher in ("torchrun", "deepspeed")
    if cluster.ssh_options and not (over_ssh and cluster.hostfile is not None):
        hint = "remove them" if over_ssh else "set them in `~/.ssh/config`"
        message = "nothing is started over our ssh here"
        yield Conflict("cluster.ssh_options", message, hint, ("cluster.launcher",))
    if cluster.mpi_options and launcher != "mpirun":
        hint = "remove them, or use the launcher `mpirun`"
        yield Conflict("cluster.mpi_options", f"`{launcher}` takes none", hint, ("cluster.launcher",))
    if cluster.setup and (wrong := shell.mistake(cluster.setup)) is not None:
        hint = "each line is a command of bash, or all lines together are"
        yield Conflict("cluster.setup", f"bash cannot read it: {wrong}", hint)
    for key, names in (("env", list(cluster.env)), ("pass_env", cluster.pass_env)):
        for index, name in enumerate(names):
            at = dotted(("cluster", key, name if key == "env" else index))
            if name in _OWN_VARIABLES:
                ours = _OWN_VARIABLES[name]
                hint = f"use `{ours}`" if ours else "remove it"
                yield Conflict(at, f"the launcher sets `{name}` itself", hint)
            elif key == "env" and name in _BASH_VARIABLES.split():
                yield Conflict(at, f"bash, which starts the ranks, sets `{name}` itself", "remove it")
            elif key == "env" and name == "CUDA_VISIBLE_DEVICES" and chosen:
                chooser = "cluster.include" if cluster.include else "cluster.exclude"
                yield Conflict(at, f"`{chooser}` chooses the GPUs", "remove one of them", (chooser,))
            elif key == "pass_env" and name in cluster.env:
                yield Conflict(at, f"`{name}` has a value in `cluster.env`", "remove one of them")


def _check_gpu(name: str, device: str) -> Iterator[Conflict]:
    """A GPU that the planner does not know, or that nothing is to run on."""
    try:
        gpus.find(name)
    except UserError as error:
        yield Conflict("cluster.gpu", error.message, error.hint or "")
    if device == "cpu":
        message = "it names a GPU, and the ranks compute on the CPU"
        yield Conflict("cluster.gpu", message, "remove it, or the `device`", ("cluster.device",))


def _check_slurm(cluster: ClusterSection, layout: Layout, base: Path) -> Iterator[Conflict]:
    asked = cluster.slurm
    if cluster.launcher != "slurm":
        for name in changed(asked, *type(asked).model_fields):
            hint = "remove it, or use the launcher `slurm`"
            message = f"`{cluster.launcher}` asks SLURM for nothing"
            yield Conflict(f"cluster.slurm.{name}", message, hint, ("cluster.launcher",))
        return
    gpus = slurm.gpus_in(asked.gres or "")
    if gpus is not None and cluster.device == "cpu":
        yield Conflict(
            "cluster.slurm.gres",
            "it asks for GPUs, and the ranks compute on the CPU",
            "remove it, or the `device`",
            ("cluster.device",),
        )
    elif gpus is not None and cluster.gpus_per_node not in (None, gpus):
        yield Conflict(
            "cluster.gpus_per_node",
            f"{cluster.gpus_per_node} ranks, and `slurm.gres` asks for {gpus} GPUs",
            "remove one of them",
            ("cluster.slurm.gres",),
        )
    elif gpus is None and cluster.gpus_per_node is None and cluster.device != "cpu":
        yield Conflict(
            "cluster.gpus_per_node",
            "nothing says how many ranks a node is to run; this machine cannot tell",
            "set it; with `device` `cuda`, as many GPUs are asked for",
            ("cluster.launcher",),
        )
    template = slurm.template(asked, layout.nodes)
    if isinstance(template, Path):
        template = beside(str(template), base)
    try:
        text = slurm.script(template, asked, name="a job", nodes=layout.nodes, python="python")
        if isinstance(template, Path):
            if not text.startswith("#!"):
                raise ValueError(f"what the template `{template}` makes does not begin with `#!`")
            if (wrong := shell.mistake([text])) is not None:
                raise ValueError(f"bash cannot read what the template `{template}` makes: {wrong}")
    except (ValueError, OSError) as error:
        message = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        message = message.replace(f"`{template}`", f"`{asked.template}`")
        hint = "name one of ours, which are single, multinode and preemptible, or a file of your own"
        yield Conflict("cluster.slurm.template", message, hint, ("cluster.nodes",))


def _check_output(job: Job, base: Path) -> Iterator[Conflict]:
    folder = beside(job.output.dir, base)
    try:
        file = next((path for path in (folder, *folder.parents) if kind(path) == "file"), None)
    except BadPath as error:
        yield Conflict("output.dir", str(error), error.hint)
    else:
        if file is not None:
            what = "is a file" if file == folder else f"lies below the file `{file.name}`"
            yield Conflict("output.dir", f"`{job.output.dir}` {what}", "name a folder")


def tokenizer_limit(job: Job, base: Path) -> int | None:
    """The longest sample that tokenizer and model take, where a tokenizer on this machine says so."""
    folder = model_files.locate(job.model.tokenizer or job.model.path or "", base)
    limit = model_files.max_length(folder) if folder is not None else None
    places = positions(job, base)
    return min(limit, places) if limit is not None and places is not None else limit


def positions(job: Job, base: Path) -> int | None:
    """How many positions the model has, where it is on this machine and says so."""
    folder = _model_folder(job, base)
    try:
        return model_files.positions(folder) if folder is not None else None
    except BadPath:
        return None


def _model_folder(job: Job, base: Path) -> Path | None:
    """The folder of ``model.path``; None where it has none, or a wrong one, which is told elsewhere."""
    try:
        return model_files.locate(job.model.path, base) if job.model.path is not None else None
    except BadPath:
        return None

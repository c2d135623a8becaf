"""The job file: what may stand in ``job.json``, and the default of each key.

The settings of a technique are declared in its own file in ``strategies/``; this file puts them together.
What needs more than one key, or a look at the machine, is checked in ``resolve.py``.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue

from memlaunch.launcher.hostfile import MAX_SLOTS
from memlaunch.launcher.translate.slurm import SlurmSettings
from memlaunch.strategies import patterns
from memlaunch.strategies.accumulation import LARGEST_BATCH, Batch, solve_batch
from memlaunch.strategies.batching import BatchingSettings
from memlaunch.strategies.checkpointing import CheckpointingSettings
from memlaunch.strategies.lora import LoraSettings
from memlaunch.strategies.optimizer import OptimizerSettings
from memlaunch.strategies.padding import PaddingSettings
from memlaunch.strategies.precision import PrecisionSettings
from memlaunch.strategies.settings import Settings
from memlaunch.strategies.sharding import ZeroSettings
from memlaunch.strategies.technique import Device, Setup

Task = Literal["sequence-classification", "token-classification", "causal-lm", "masked-lm", "seq2seq-lm"]
Launcher = Literal["torchrun", "deepspeed", "mpirun", "slurm"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_BATCH)]


def _pattern(value: str) -> str:
    try:
        patterns.check_syntax(value)
    except ValueError as error:
        raise ValueError(
            f"{error}; write it such as `encoder.layer[:2]`, `encoder.layer[0,-1]` or `*.attention.*`"
        ) from None
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value, re.ASCII):
        raise ValueError("is not a name for a variable; use letters, digits and `_`, and no digit first")
    return value


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a NUL character, which no shell or environment can")
    return value


def _folder_name(value: str) -> str:
    if not value.strip() or value.startswith(".") or "/" in value or not value.isprintable():
        raise ValueError(
            "must be a name for a folder: without a slash or a line break, not beginning with a dot"
        )
    if len(value.encode()) > 255:
        raise ValueError("must be a name for a folder, of at most 255 bytes")
    return value


ShellText = Annotated[str, AfterValidator(_without_nul)]


def _without_default(schema: dict[str, Any]) -> None:
    """What is missing where there is a `script` or an `entry` has no default that anyone could write."""
    del schema["default"]


class ModelSection(Settings):
    """The model and its task: a `path`, an `architecture` with random weights, or an `entry`."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="A Hugging Face id, a folder, or `package:NAME/FOLDER`, a folder inside an installed "
        "Python package.",
    )
    task: Task = Field(default="sequence-classification", description="What the model learns to do.")
    revision: str | None = Field(
        default=None, min_length=1, description="The branch, tag or commit of a Hugging Face id."
    )
    architecture: str | None = Field(
        default=None,
        min_length=1,
        description="In the place of `path`: a model type of transformers, such as `bert`, built with random "
        "weights.",
    )
    entry: str | None = Field(
        default=None,
        min_length=1,
        description="In the place of `path` and `data`: `MODULE:FUNCTION`, a function of yours in a module "
        "beside the job file. It returns a `memlaunch.launcher.Entry`: any torch module, its data, its loss.",
        examples=["my_module:build"],
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Keys of the transformers config of `architecture`, or the arguments of the `entry`.",
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="Where the tokenizer is, written as for `path`; default: the one of `path`.",
    )
    num_labels: int | None = Field(
        default=None, ge=2, description="Classes of a classification; default: those of the training data."
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        default="sdpa",
        description="The implementation of attention, as transformers names it; `sdpa` is `eager` where an "
        "architecture has no other.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model. Only for sources you trust."
    )


class DataSection(Settings):
    """The samples and how they become batches. An `entry` brings its own; only `batching` goes with it."""

    train: str = Field(
        default="",
        min_length=1,
        description="What to train on: a `.jsonl`, `.csv` or `.parquet` file, a folder saved by `datasets`, "
        "or `NAME:SPLIT` of the Hugging Face hub.",
        examples=["train.jsonl"],
        json_schema_extra=_without_default,
    )
    eval: str | None = Field(
        default=None, min_length=1, description="What to evaluate on, written as for `train`."
    )
    text: str | Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        default="text",
        description="The column that holds the text; two for a pair of texts. For token-classification, a "
        "list of words.",
    )
    label: str | None = Field(
        default=None,
        description="The column that holds the class, or for token-classification the list of the words' "
        "classes; default for a classification: `label`.",
    )
    target: str | None = Field(
        default=None,
        description="The column that holds the text to be written; default for seq2seq-lm: `target`.",
    )
    skip_bad_lines: int = Field(
        default=0,
        ge=0,
        description="Lines of each source that are left out where they cannot be read or lack a column; one "
        "more of them ends the run.",
    )
    max_length: int | None = Field(
        default=None, ge=4, description="Tokens that a text is cut to; default: the tokenizer's limit."
    )
    padding: PaddingSettings = Field(
        default=PaddingSettings(), description="How the samples of a micro-batch are made equally long."
    )
    batching: BatchingSettings = Field(
        default=BatchingSettings(), description="Which samples come together in a micro-batch."
    )


class TrainingSection(Settings):
    """Batch sizes, the optimizer's numbers, and when training ends.

    `global_batch_size` = `micro_batch_size` x `gradient_accumulation_steps` x ranks; give any of them.
    """

    global_batch_size: PositiveInt | None = Field(
        default=None, description="Samples of an optimizer step, over all ranks."
    )
    micro_batch_size: PositiveInt | Literal["auto"] | None = Field(
        default=None,
        description="Samples that one rank holds in memory at once; `auto`: as many as fit and pay. Default: "
        "what the other two leave, at most 8.",
    )
    gradient_accumulation_steps: PositiveInt | Literal["auto"] | None = Field(
        default=None,
        description="Micro-batches of one rank in an optimizer step; `auto`: as the micro-batch needs. "
        "Default: what the other two leave, or 1.",
    )
    epochs: int | None = Field(
        default=None,
        ge=1,
        description="Passes over the training data; default where `max_steps` is not given: 1.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps; in the place of `epochs`."
    )
    learning_rate: float = Field(default=5e-5, gt=0, description="The highest learning rate of the schedule.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Decoupled weight decay; none on biases and norms."
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.999], description="The decay of AdamW's two running means."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator of AdamW's step.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="How the learning rate goes on after the warm-up: down to 0, or constant.",
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Optimizer steps over which the learning rate rises from 0."
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The same as a share of all steps; in the place of `warmup_steps`.",
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients are scaled down to this norm; null: never."
    )
    seed: int = Field(
        default=42, ge=0, lt=2**32, description="Of new weights, dropout and the order of samples."
    )
    eval_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Evaluate after every so many optimizer steps; default: at the end only.",
    )
    eval_micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="Samples of one rank at once in an evaluation; default: twice the micro-batch.",
    )
    deterministic: bool = Field(
        default=False, description="Ask torch for deterministic algorithms; slower on a GPU."
    )


class StrategySection(Settings):
    """The engine and the techniques that save memory."""

    engine: Literal["torch", "deepspeed", "auto"] = Field(
        default="torch",
        description="What runs the optimizer steps: torch's DDP, or DeepSpeed; `auto`: the planner's choice.",
    )
    zero: ZeroSettings = Field(
        default=ZeroSettings(), description="What is sharded over the ranks or kept in host memory."
    )
    precision: PrecisionSettings = Field(
        default=PrecisionSettings(), description="The type of the arithmetic, and its loss scale."
    )
    activation_checkpointing: CheckpointingSettings = Field(
        default=CheckpointingSettings(), description="Which activations are computed again, not kept."
    )
    optimizer: OptimizerSettings = Field(
        default=OptimizerSettings(), description="The optimizer and the bits of its state."
    )
    freeze: list[Annotated[str, AfterValidator(_pattern)]] = Field(
        default_factory=list,
        description="Modules that are not trained: paths from the root of the model or of its base model, "
        "with globs and Python slices, such as `embeddings` and `encoder.layer[:2]`.",
    )
    lora: LoraSettings | None = Field(
        default=None,
        description="Low-rank adapters, trained in the place of the model; `{}` for the usual ones. Needs "
        "the extra `lora` of the package.",
    )
    deepspeed: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Keys for the DeepSpeed config that no other key of the job stands for, handed on "
        "as they are.",
    )


class ScriptSection(Settings):
    """A training script of the user's, in the place of `model` and `data`."""

    SHORTHAND = "path"

    path: str = Field(min_length=1, description="The Python file that every rank runs.")
    args: list[ShellText] = Field(default_factory=list, description="Its arguments, passed on byte for byte.")
    folder: str | None = Field(
        default=None, min_length=1, description="The folder it runs in; default: that of the job file."
    )


class ClusterSection(Settings):
    """The machines and how the ranks start on them."""

    launcher: Launcher = Field(
        default="torchrun",
        description="What starts the ranks. `torchrun` and `deepspeed` start them on this machine, or over "
        "ssh on the hosts of a `hostfile`.",
    )
    nodes: PositiveInt | None = Field(
        default=None, description="Machines; default: the hosts of the `hostfile`, or 1."
    )
    gpus_per_node: Annotated[int, Field(ge=1, le=MAX_SLOTS)] | None = Field(
        default=None,
        description="Ranks of a machine, one a GPU; on a CPU, the number of ranks. Default: the slots of the "
        "`hostfile`, or the GPUs of this machine, or 1.",
    )
    hostfile: str | None = Field(
        default=None,
        min_length=1,
        description="The machines and their slots, `worker-1 slots=8` a line, as DeepSpeed writes it.",
    )
    include: str | None = Field(
        default=None,
        min_length=1,
        description="Only these hosts and slots of the `hostfile`, such as `worker-1@worker-2:0,2`.",
    )
    exclude: str | None = Field(
        default=None, min_length=1, description="All but these hosts and slots of the `hostfile`."
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="Where the ranks compute; `auto`: on GPUs where there are some."
    )
    gpu: str | None = Field(
        default=None,
        min_length=1,
        description="The GPUs of the machines, such as `H100-80GB`: what the planner plans for where this "
        "machine has none of them. Default: the GPU of this machine.",
    )
    threads_per_rank: PositiveInt | None = Field(
        default=None, description="CPU threads of a rank; default: cores / ranks."
    )
    env: dict[Annotated[str, AfterValidator(_variable)], ShellText] = Field(
        default_factory=dict, description="Environment variables of every rank, passed on byte for byte."
    )
    pass_env: list[Annotated[str, AfterValidator(_variable)]] = Field(
        default_factory=list,
        description="Names of environment variables that other machines take over from this one, such as "
        "`HF_TOKEN`. Their values are written nowhere.",
    )
    setup: list[ShellText] = Field(
        default_factory=list,
        description="Shell lines that run before the ranks start, such as `module load cuda`.",
    )
    ssh_options: list[ShellText] = Field(
        default_factory=list,
        description="Options of ssh, each a word, such as `-p2222`.",
    )
    mpi_options: list[ShellText] = Field(
        default_factory=list, description="Options of mpirun, each a word, such as `--tag-output`."
    )
    max_restarts: int = Field(
        default=0,
        ge=0,
        description="How often ranks that fail are started again, from the last checkpoint.",
    )
    hang_timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds without a step after which ranks that train count as failed; default: no limit.",
    )
    slurm: SlurmSettings = Field(default=SlurmSettings(), description="What is asked of SLURM.")


class OutputSection(Settings):
    """Where runs are written, and what they keep."""

    dir: str = Field(default="runs", min_length=1, description="The folder for run folders: `DIR/NAME/TIME`.")
    checkpoint_every_steps: PositiveInt | None = Field(
        default=None,
        description="Optimizer steps between checkpoints; default: none but where the run is stopped.",
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="Checkpoints that are kept, the newest.")
    track: list[Tracker] = Field(
        default_factory=list,
        description="Experiment trackers that get the metrics, too. `wandb` and `mlflow` are extras of the "
        "package, and take their addresses and keys from their own environment variables.",
    )


class Job(Settings):
    """A training job of memlaunch: `model` and `data`, a `model` with an `entry`, or a `script`.

    Paths are relative to the job file. A section with one leading choice may be written as that choice:
    `"precision": "bf16"` is `"precision": {"dtype": "bf16"}`.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["model", "data"], "properties": {"data": {"required": ["train"]}}},
                {"required": ["model"], "properties": {"model": {"required": ["entry"]}}},
                {"required": ["script"]},
            ]
        }
    )

    json_schema: str | None = Field(
        default=None, alias="$schema", exclude=True, description="Where an editor finds this schema."
    )
    name: Annotated[str, AfterValidator(_folder_name)] = Field(
        default="", description="What runs are filed under; default: the name of the job file."
    )
    model: ModelSection = Field(
        default=ModelSection(),
        description="The model and what it is trained for.",
        examples=[{"path": "bert-base-uncased"}],
        json_schema_extra=_without_default,
    )
    data: DataSection = Field(
        default=DataSection.model_construct(train=""),
        description="The samples and how they become batches.",
        examples=[{"train": "train.jsonl"}],
        json_schema_extra=_without_default,
    )
    script: ScriptSection | None = Field(
        default=None,
        description="In the place of `model` and `data`: a training script of your own, which is started the "
        "same way.",
    )
    training: TrainingSection = Field(
        default=TrainingSection(), description="Batch sizes, the optimizer's numbers, and when training ends."
    )
    strategy: StrategySection = Field(
        default=StrategySection(), description="The engine and the techniques that save memory."
    )
    cluster: ClusterSection = Field(
        default=ClusterSection(), description="The machines and how the ranks start on them."
    )
    output: OutputSection = Field(default=OutputSection(), description="Where runs are written.")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}


def setup_of(job: Job, batch: Batch, world_size: int, device: Device) -> Setup:
    """What the techniques of a run of ``job`` may know; the engine is chosen."""
    training, strategy = job.training, job.strategy
    assert strategy.engine != "auto"
    first, second = training.betas
    return Setup(
        engine=strategy.engine,
        device=device,
        world_size=world_size,
        micro_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(first, second),
        eps=training.eps,
        max_grad_norm=training.max_grad_norm,
        zero=strategy.zero,
        precision=strategy.precision,
        activation_checkpointing=strategy.activation_checkpointing,
        optimizer=strategy.optimizer,
        freeze=tuple(strategy.freeze),
        lora=strategy.lora,
    )


def batch_of(job: Job, ranks: int) -> Batch:
    """The batch sizes of ``job`` on so many ranks; under a token budget only the global one counts.

    Raises:
        BatchError: they contradict each other.
    """
    training = job.training
    if job.data.batching.max_tokens is not None:
        return Batch(training.global_batch_size or ranks, 1, 1)
    micro, steps = training.micro_batch_size, training.gradient_accumulation_steps
    assert micro != "auto"
    assert steps != "auto"
    return solve_batch(ranks, training.global_batch_size, micro, steps)

"""A first job file, from a look at the data and at the machine."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from memlaunch.launcher import data_files, layout, model_files, resolve
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import Task, json_schema
from memlaunch.launcher.keys import closest
from memlaunch.launcher.paths import BadPath

#: (question, default) -> answer.
Ask = Callable[[str, str | None], str]
Say = Callable[[str], None]

#: Where the schema lies that editors complete a job file by: beside it, so that they need no network.
SCHEMA = "job.schema.json"

#: Records of the data that are looked at, and the most classes that a guess takes for classes.
LOOK = 1000
CLASSES = 50

#: How much longer than others a column of text is that needs no question.
MUCH = 3

#: Characters of a token, at most: ``max_length`` is to cut few samples.
CHARACTERS = 3
#: What ``max_length`` is a multiple of, and its bounds.
ROUND, SHORTEST, LONGEST = 32, 32, 512

_MODELS: dict[str, str] = {
    "sequence-classification": "sentence-transformers/all-MiniLM-L6-v2",
    "causal-lm": "HuggingFaceTB/SmolLM2-135M",
}
_TEXTS = ("text", "sentence", "content", "review", "question", "premise", "sentence1", "document")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "rating", "stars")
_EVALS = ("eval", "valid", "validation", "dev", "test")


@dataclass(frozen=True)
class Answers:
    """What is known of the job; None is still to be asked, or to be guessed."""

    data: str | None = None
    model: str | None = None
    task: str | None = None
    text: str | None = None
    label: str | None = None
    gpus: int | None = None
    out: Path = Path("job.json")


def write(answers: Answers, ask: Ask | None = None, say: Say = lambda text: None) -> resolve.ResolvedJob:
    """Write the job file ``answers.out``, and the schema beside it; the job that it is.

    Args:
        ask: asks at most six questions, for what ``answers`` leaves open; without it that is guessed.
        say: is told what was seen of the data and the machine.

    Raises:
        UserError: the file is there already, there is no data to look at, or the job would not be valid.
    """
    out = answers.out
    if out.exists():
        raise UserError(f"there is a file `{out}` already", "name another with `--out`, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder `{out.parent}`", "make it first, or name another with `--out`")
    if answers.data is None:
        found = _data_here()
        if ask is None and found is None:
            raise UserError("there is no data to look at", "name the training data: `--data train.jsonl`")
        default = str(found) if found is not None else None
        question = "Training data (.jsonl, .csv, .parquet or a folder)"
        answers = replace(answers, data=(ask or _take_default)(question, default))
    job = first_job(answers, ask or _take_default, say)
    schema = out.with_name(SCHEMA)
    has_schema = not schema.exists() or _is_ours(schema)
    text = json.dumps(({"$schema": f"./{SCHEMA}"} if has_schema else {}) | job, indent=2, ensure_ascii=False)
    out.write_text(f"{text}\n", encoding="utf-8")
    try:
        resolved = resolve.load(out)
    except UserError:
        out.unlink()
        raise
    if has_schema:
        schema.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    return resolved


def first_job(answers: Answers, ask: Ask, say: Say = lambda text: None) -> dict[str, Any]:
    """The job for ``answers``, whose ``data`` is given; paths are relative to ``out``.

    Raises:
        UserError: the data cannot be read.
    """
    assert answers.data is not None
    try:
        file = data_files.locate(answers.data)
        records = data_files.records(file, LOOK) if file is not None else []
    except BadPath as error:
        message = str(error) if "`" in str(error) else f"`{answers.data}` {error}"
        raise UserError(message, error.hint) from None
    columns = {name: [record.get(name) for record in records] for name in (records[0] if records else ())}
    held_out = _held_out(file) if file is not None else None
    say(_about_data(answers.data, records, held_out))
    texts = [name for name, values in columns.items() if all(isinstance(value, str) for value in values)]
    labels = [name for name, values in columns.items() if _may_be_classes(values)]
    task = answers.task or _choose_task(labels, ask)
    data: dict[str, Any] = {"train": _relative(answers.data, file, answers.out)}
    if held_out is not None:
        data["eval"] = _relative(answers.data, held_out, answers.out)
    if columns:
        # What looks like classes may be text only where nothing else is.
        fitting = _much_the_longest(columns, [name for name in texts if name not in labels] or texts)
        data["text"] = answers.text or _column("text", _TEXTS, fitting, list(columns), ask)
        if task == "sequence-classification":
            rest = [name for name in labels if name != data["text"]]
            data["label"] = answers.label or _column("class", _LABELS, rest, list(columns), ask)
        characters = [len(value) for value in columns.get(data["text"], []) if isinstance(value, str)]
        if any(characters):
            data["max_length"] = _max_length(characters)
    question = "Model (Hugging Face id, folder, or package:NAME/FOLDER)"
    model = answers.model or ask(question, _MODELS.get(task))
    machine = _Machine.look()
    say(machine.about())
    gpus = machine.gpus if answers.gpus is None else answers.gpus
    if answers.gpus is None and machine.gpus > 1:
        gpus = _count(ask(f"GPUs to use (of {machine.gpus})", str(machine.gpus)), machine.gpus)
    return {
        "model": {"path": _model(model, answers.out), "task": task},
        "data": data,
        "training": {"micro_batch_size": 8, "epochs": 1},
        "strategy": {
            "engine": "torch",
            "precision": machine.precision if gpus else "fp32",
            "activation_checkpointing": "none",
        },
        "cluster": {"gpus_per_node": gpus or 1, "device": "cuda" if gpus else "cpu"},
    }


@dataclass(frozen=True)
class _Machine:
    """What this machine has; ``capability`` is the CUDA compute capability of its first GPU."""

    gpus: int
    name: str = ""
    memory: int = 0
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def look(cls) -> "_Machine":
        count = layout.gpus()
        if not count:
            return cls(0)
        import pynvml

        try:
            pynvml.nvmlInit()
            first = pynvml.nvmlDeviceGetHandleByIndex(0)
            return cls(
                count,
                str(pynvml.nvmlDeviceGetName(first)),
                int(pynvml.nvmlDeviceGetMemoryInfo(first).total),
                tuple(pynvml.nvmlDeviceGetCudaComputeCapability(first)),
            )
        except pynvml.NVMLError:
            return cls(count)

    @property
    def precision(self) -> str:
        """bf16 where the GPU computes in it: from compute capability 8.0 on."""
        return "fp16" if (0, 0) < self.capability < (8, 0) else "bf16"

    def about(self) -> str:
        """The machine in a line."""
        if not self.gpus:
            return f"this machine: no GPU, {os.cpu_count()} CPU cores; the job is for the CPU"
        each = f", {self.memory / 2**30:.0f} GiB each" if self.memory else ""
        return f"this machine: {self.gpus} x {self.name or 'GPU'}{each}"


def _data_here() -> Path | None:
    """The training data in this folder, where there is no doubt which file that is."""
    files = [path for path in Path().iterdir() if path.suffix.lower() in data_files.SUFFIXES]
    train = [path for path in files if "train" in path.stem.lower()]
    return next((found[0] for found in (train, files) if len(found) == 1), None)


def _about_data(name: str, records: Sequence[dict[str, Any]], held_out: Path | None) -> str:
    """What was seen of the data, in a line."""
    if not records:
        return f"{name}: not on this machine, so nothing was looked at"
    more = "at least " if len(records) == LOOK else ""
    parts = []
    for column in records[0]:
        values = [record.get(column) for record in records]
        distinct = len(set(map(str, values)))
        if _may_be_classes(values) and distinct < len(values):
            parts.append(f"`{column}` ({distinct} classes)")
        elif all(isinstance(value, str) for value in values):
            words = [len(str(value).split()) for value in values]
            long = f"{min(words)} to {max(words)} words" if max(words) > 1 else "one word"
            parts.append(f"`{column}` (text of {long})")
        else:
            parts.append(f"`{column}`")
    beside = f"; evaluation on {held_out.name}" if held_out is not None else ""
    return f"{name}: {more}{len(records)} records, {', '.join(parts)}{beside}"


def _may_be_classes(values: Sequence[Any]) -> bool:
    """Whether a column looks like one of classes: few names or whole numbers, which come again."""
    if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in values):
        return False
    if any(isinstance(value, int) and value < 0 for value in values):
        return False
    distinct = len(set(values))
    comes_again = distinct < len(values) or len(values) <= 2
    return len(values) == 1 or (2 <= distinct <= CLASSES and comes_again)


def _much_the_longest(columns: dict[str, list[Any]], names: list[str]) -> list[str]:
    """The one of the columns ``names`` whose texts are by far the longest; all, where there is none."""
    *others, longest = sorted(names, key=lambda name: sum(map(len, columns[name]))) or [""]
    clear = not others or sum(map(len, columns[longest])) > MUCH * sum(map(len, columns[others[-1]]))
    return [longest] if names and clear else names


def _max_length(characters: Sequence[int]) -> int:
    """Tokens that hold nearly every text."""
    high = sorted(characters)[int(0.99 * (len(characters) - 1))]
    return min(LONGEST, max(SHORTEST, -(-high // (CHARACTERS * ROUND)) * ROUND))


def _is_ours(schema: Path) -> bool:
    """Whether the file is a schema of job files, which a newer one may take the place of."""
    try:
        return bool(json.loads(schema.read_bytes())["title"] == "Job")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _take_default(question: str, default: str | None) -> str:
    if default is None:
        asked = question.split(" (")[0].lower()
        flags = {"column of the text": "text", "column of the class": "label"}
        raise UserError(f"there is no telling: {asked}", f"give it with `--{flags.get(asked, 'model')}`")
    return default


def _choose_task(labels: list[str], ask: Ask) -> str:
    guess = "sequence-classification" if labels else "causal-lm"
    tasks = get_args(Task)
    task = ask(f"Task ({' or '.join(tasks)})", guess)
    return task if task in tasks else closest(task, tasks) or task


def _column(what: str, usual: tuple[str, ...], fitting: list[str], columns: list[str], ask: Ask) -> str:
    """The column for ``what``: the only one that fits, or one with a usual name; else asked for."""
    if len(fitting) == 1:
        return fitting[0]
    named = [name for name in fitting if name.lower() in usual]
    default = min(named, key=lambda name: usual.index(name.lower())) if named else None
    return ask(f"Column of the {what} (one of {', '.join(columns)})", default)


def _count(answer: str, most: int) -> int:
    if not answer.isdecimal() or int(answer) > most:
        raise UserError(f"`{answer}` is no number of GPUs from 0 to {most}", "0 is the CPU")
    return int(answer)


def _held_out(train: Path) -> Path | None:
    """A file beside ``train`` that is named like it, for the evaluation."""
    names = (train.name.replace("train", word) for word in _EVALS if "train" in train.name)
    return next((path for name in names if (path := train.with_name(name)).exists()), None)


def _relative(given: str, file: Path | None, out: Path) -> str:
    """How the job file ``out`` writes ``file``: absolute or relative, as ``given`` is."""
    if file is None:
        return given
    return str(file) if Path(given).is_absolute() else os.path.relpath(file, out.parent)


def _model(given: str, out: Path) -> str:
    try:
        folder = None if given.startswith(model_files.PACKAGE) else model_files.locate(given)
    except BadPath:
        return given  # told where the job is checked
    return _relative(given, folder, out)

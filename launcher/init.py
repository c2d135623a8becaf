"""A first job file, from a look at the data and at the machine."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from memlaunch.launcher import data_files, layout, model_files, resolve
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import Task
from memlaunch.launcher.paths import BadPath

#: (question, default) -> answer.
Ask = Callable[[str, str | None], str]

_MODELS: dict[str, str] = {
    "sequence-classification": "sentence-transformers/all-MiniLM-L6-v2",
    "causal-lm": "HuggingFaceTB/SmolLM2-135M",
}
_TEXTS = ("text", "sentence", "content", "review", "question", "premise", "sentence1", "document")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment")
_EVALS = ("eval", "valid", "validation", "dev", "test")


@dataclass(frozen=True)
class Answers:
    """What is known of the job; None is still to be asked, or to be guessed."""

    data: str | None = None
    model: str | None = None
    task: str | None = None
    gpus: int | None = None
    out: Path = Path("job.json")


def write(answers: Answers, ask: Ask | None = None) -> resolve.ResolvedJob:
    """Write the job file ``answers.out``; the job that it is.

    Args:
        ask: asks at most five questions, for what ``answers`` leaves open; without it that is guessed.

    Raises:
        UserError: the file is there already, there is no data to look at, or the job would not be valid.
    """
    out = answers.out
    if out.exists():
        raise UserError(f"there is a file `{out}` already", "name another with `--out`, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder `{out.parent}`", "make it first, or name another with `--out`")
    if answers.data is None:
        if ask is None:
            raise UserError("there is no data to look at", "name the training data: `--data train.jsonl`")
        answers = replace(answers, data=ask("Training data (.jsonl, .csv, .parquet or a folder)", None))
    job = first_job(answers, ask or _take_default)
    out.write_text(json.dumps(job, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        return resolve.load(out)
    except UserError:
        out.unlink()
        raise


def first_job(answers: Answers, ask: Ask) -> dict[str, Any]:
    """The job for ``answers``, whose ``data`` is given; paths are relative to ``out``.

    Raises:
        UserError: the data cannot be read.
    """
    assert answers.data is not None
    try:
        file = data_files.locate(answers.data)
        record = data_files.first_record(file) if file is not None else {}
    except BadPath as error:
        message = str(error) if "`" in str(error) else f"`{answers.data}` {error}"
        raise UserError(message, error.hint) from None
    texts = [name for name, value in record.items() if isinstance(value, str)]
    labels = [name for name, value in record.items() if isinstance(value, str | int)]
    task = answers.task or _choose_task(labels, ask)
    data: dict[str, Any] = {"train": _relative(answers.data, file, answers.out)}
    if file is not None and (held_out := _held_out(file)) is not None:
        data["eval"] = _relative(answers.data, held_out, answers.out)
    if record:
        data["text"] = _column("text", _TEXTS, texts, list(record), ask)
        if task == "sequence-classification":
            rest = [name for name in labels if name != data["text"]]
            data["label"] = _column("class", _LABELS, rest, list(record), ask)
    model = answers.model or ask("Model (Hugging Face id, folder, or package:NAME/FOLDER)", _MODELS.get(task))
    gpus = layout.gpus() if answers.gpus is None else answers.gpus
    return {
        "model": {"path": _model(model, answers.out), "task": task},
        "data": data,
        "training": {"micro_batch_size": 8, "epochs": 1},
        "strategy": {
            "engine": "torch",
            "precision": "bf16" if gpus else "fp32",
            "activation_checkpointing": "none",
        },
        "cluster": {"gpus_per_node": gpus or 1, "device": "cuda" if gpus else "cpu"},
    }


def _take_default(question: str, default: str | None) -> str:
    if default is None:
        raise UserError(
            f"there is no telling: {question[0].lower()}{question[1:]}", "write the job file by hand"
        )
    return default


def _choose_task(labels: list[str], ask: Ask) -> str:
    guess = "sequence-classification" if any(name.lower() in _LABELS for name in labels) else "causal-lm"
    return ask(f"Task ({' or '.join(get_args(Task))})", guess)


def _column(what: str, usual: tuple[str, ...], fitting: list[str], columns: list[str], ask: Ask) -> str:
    """The column for ``what``: the only one that fits, or one with a usual name; else asked for."""
    if len(fitting) == 1:
        return fitting[0]
    named = [name for name in fitting if name.lower() in usual]
    default = min(named, key=lambda name: usual.index(name.lower())) if named else None
    return ask(f"Column of the {what} (one of {', '.join(columns)})", default)


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

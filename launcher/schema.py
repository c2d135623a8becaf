"""Checks a document against the pydantic models of the job file, and says what is wrong in plain words.

What does not fit is taken out and the rest is checked again, so that every mistake is told at once; the job
that comes out lets the checks of ``resolve.py`` run too, except where they would look at what was taken out.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from memlaunch.launcher.errors import MOST, Problem
from memlaunch.launcher.keys import KeyPath, closest, dotted
from memlaunch.launcher.scanner import kind_of
from memlaunch.launcher.source import Document
from memlaunch.strategies.settings import Settings

Model = TypeVar("Model", bound=Settings)

_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}

#: What other tools call a key of ours.
_FOREIGN = {
    "activation_checkpointing": "strategy.activation_checkpointing",
    "attn_implementation": "model.attention",
    "batch_size": "training.micro_batch_size",
    "bf16": "strategy.precision",
    "clip_grad": "training.max_grad_norm",
    "fp16": "strategy.precision",
    "gradient_checkpointing": "strategy.activation_checkpointing",
    "gradient_clipping": "training.max_grad_norm",
    "gas": "training.gradient_accumulation_steps",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "max_seq_length": "data.max_length",
    "mixed_precision": "strategy.precision",
    "model_name_or_path": "model.path",
    "nproc_per_node": "cluster.gpus_per_node",
    "num_gpus": "cluster.gpus_per_node",
    "num_train_epochs": "training.epochs",
    "optim": "strategy.optimizer",
    "output_dir": "output.dir",
    "per_device_eval_batch_size": "training.eval_micro_batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "scheduler": "training.schedule",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "zero_optimization": "strategy.zero",
}
#: What other tools call a choice of ours.
_FOREIGN_VALUES = {
    "16-mixed": "fp16",
    "bf16-mixed": "bf16",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "gpu": "cuda",
    "half": "fp16",
}


@dataclass(frozen=True)
class Checked(Generic[Model]):
    """A document checked against ``Model``.

    Attributes:
        value: the job, without what is wrong; None where nothing is left to make one.
        problems: what is wrong.
        suspect: paths whose value in ``value`` is not what the user wrote or meant.
    """

    value: Model | None
    problems: tuple[Problem, ...]
    suspect: frozenset[KeyPath]


def check(document: Document, model: type[Model]) -> Checked[Model]:
    """Check ``document`` against ``model``."""
    value = copy.deepcopy(document.value)
    suspect = set(document.suspect)
    problems: list[Problem] = []
    for path in document.unusable:
        _remove(value, path)
    while True:
        try:
            return Checked(model.model_validate(value), tuple(problems), frozenset(suspect))
        except ValidationError as error:
            groups = _by_place(error.errors(include_url=False), value)
        before = copy.deepcopy(value)
        # A key that is missing may be there misspelt: unknown ones first.
        for path, errors in sorted(groups.items(), key=lambda group: group[1][0]["type"] == "missing"):
            if errors[0]["type"] == "missing":
                if path not in suspect and len(problems) < MOST:
                    problems.append(_missing(document, model, path))
                _fill(value, model, path)
            else:
                if len(problems) < MOST:
                    problem, meant = _wrong(document, model, path, errors)
                    problems.append(problem)
                    suspect.update(meant)
                _remove(value, path)
            suspect.add(path)
        if value == before:
            return Checked(None, tuple(problems), frozenset(suspect))


def shorthands(model: type[Settings]) -> dict[KeyPath, str]:
    """Path of each section below ``model`` that may be written as a string -> its leading key."""
    return {path: section.SHORTHAND for path, section in sections(model).items() if section.SHORTHAND}


@cache
def sections(model: type[Settings]) -> Mapping[KeyPath, type[Settings]]:
    """Path -> model of every section of ``model``, itself (the empty path) included."""
    found: dict[KeyPath, type[Settings]] = {(): model}
    for name, field in _fields(model).items():
        if (inner := _section_of(field.annotation)) is not None:
            found |= {(name, *path): section for path, section in sections(inner).items()}
    return found


def _fields(model: type[Settings]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _section_of(annotation: Any) -> type[Settings] | None:
    if get_origin(annotation) in (Union, UnionType):
        return next((s for s in map(_section_of, get_args(annotation)) if s is not None), None)
    is_section = isinstance(annotation, type) and issubclass(annotation, Settings)
    return annotation if is_section else None


def _section_at(model: type[Settings], path: KeyPath) -> type[Settings] | None:
    """The model of the section at ``path``, of an item of a list too."""
    annotation: Any = model
    for part in path:
        if isinstance(part, int):
            annotation = get_args(annotation)[0] if get_origin(annotation) is list else None
        else:
            section = _section_of(annotation)
            field = _fields(section).get(part) if section is not None else None
            annotation = field.annotation if field is not None else None
    return _section_of(annotation)


def _by_place(errors: Iterable[ErrorDetails], value: Any) -> dict[KeyPath, list[ErrorDetails]]:
    """Errors by the path they are about; those inside a value make those about the value pointless.

    A value that may be of several kinds has an error for each, and the kind in its ``loc``.
    """
    places: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        places.setdefault(_place(error, value), []).append(error)
    above = {path[:depth] for path in places for depth in range(len(path))}
    return {path: group for path, group in places.items() if path not in above}


def _place(error: ErrorDetails, value: Any) -> KeyPath:
    path: list[str | int] = []
    for part in error["loc"]:
        inside = (
            part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        )
        if inside:
            value = value[part]
            path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path)


def _remove(value: Any, path: KeyPath) -> None:
    """Take ``path`` out; a list goes as a whole where an item does not fit, so that no other item moves."""
    names = next((path[:depth] for depth, part in enumerate(path) if isinstance(part, int)), path)
    for part in names[:-1]:
        value = value.get(part, {})
    value.pop(names[-1], None)


def _fill(value: Any, model: type[Settings], path: KeyPath) -> None:
    """Put an example where a required key is missing; without one, take its section out."""
    section = _section_at(model, path[:-1])
    examples = _fields(section)[str(path[-1])].examples if section is not None else None
    if not examples:
        _remove(value, path[:-1])
        return
    for part in path[:-1]:
        value = value[part]
    value[path[-1]] = copy.deepcopy(examples[0])


def _missing(document: Document, model: type[Settings], path: KeyPath) -> Problem:
    section = _section_at(model, path[:-1])
    assert section is not None
    field = _fields(section)[str(path[-1])]
    about = (field.description or "").rstrip(".")
    hint = about[:1].lower() + about[1:]
    if field.examples:
        hint = f"add `{_show(path[-1])}: {_show(field.examples[0])}`, for example"
    return document.problem(path, f"{dotted(path)} is missing", hint, at_key=True)


def _wrong(
    document: Document, model: type[Settings], path: KeyPath, errors: list[ErrorDetails]
) -> tuple[Problem, set[KeyPath]]:
    """The problem at ``path``, and the keys that were probably meant."""
    if errors[0]["type"] == "extra_forbidden":
        hint, meant = _nearest_key(model, path)
        return document.problem(path, f"{dotted(path)} is not a known key", hint, at_key=True), meant
    message, advice = _explain(model, path, errors)
    at_key = any("[key]" in error["loc"] for error in errors)
    return document.problem(path, message, advice, at_key=at_key), set()


def _nearest_key(model: type[Settings], path: KeyPath) -> tuple[str, set[KeyPath]]:
    """A hint about the unknown key ``path``, and the known keys that it may mean."""
    here, key = path[:-1], str(path[-1])
    section = _section_at(model, here)
    siblings = list(_fields(section)) if section is not None else []
    elsewhere = [(*at, key) for at, other in sections(model).items() if at != here and key in _fields(other)]
    if close := closest(key, siblings, 0.8):
        return f"did you mean `{close}`?", {(*here, close)}
    if 0 < len(elsewhere) <= 2:
        homes = " or ".join(f"`{dotted(at[:-1])}`" if at[:-1] else "the top level" for at in elsewhere)
        return f"it belongs in {homes}" if elsewhere[0][:-1] else "it belongs at the top level", set(
            elsewhere
        )
    if (ours := _FOREIGN.get(key.lower())) is not None:
        return f"memlaunch calls it `{ours}`", {tuple(ours.split("."))}
    if close := closest(key, siblings):
        return f"did you mean `{close}`?", {(*here, close)}
    everywhere = {name: (*at, name) for at, other in sections(model).items() for name in _fields(other)}
    if close := closest(key, list(everywhere), 0.8):
        return f"did you mean `{dotted(everywhere[close])}`?", {everywhere[close]}
    of = f"`{dotted(here)}`" if here else "a job"
    names = ", ".join(f"`{name}`" for name in siblings if not name.startswith("$"))
    return f"the keys of {of} are {names}", set()


def _explain(model: type[Settings], path: KeyPath, errors: list[ErrorDetails]) -> tuple[str, str | None]:
    """Message and hint for a value that does not fit."""
    key, given = dotted(path), errors[0]["input"]
    kinds = {error["type"] for error in errors}
    for error in errors:
        if (rule := _rule(error, key, kinds)) is not None:
            return rule
    choices = [choice for error in errors if error["type"] == "literal_error" for choice in _choices(error)]
    wanted = [_KINDS[kind] for kind in dict.fromkeys(e["type"] for e in errors) if kind in _KINDS]
    if "model_type" in kinds and (section := _section_at(model, path)) is not None and section.SHORTHAND:
        choices += get_args(_fields(section)[section.SHORTHAND].annotation)
    if not choices and not wanted:
        return f"{key}: {errors[0]['msg']}", None
    whole = [kind for kind in wanted if kind in ("a list", "an object")]
    text = _either([*(kind for kind in wanted if kind not in whole), *map(_show, choices), *whole])
    # The value itself where one of its kind would do, else its kind.
    same_kind = isinstance(given, str) and any(isinstance(choice, str) for choice in choices)
    number = isinstance(given, int | float) and not isinstance(given, bool)
    same_kind |= number and (bool(choices) or "int_type" in kinds)
    as_given = _show(given) if same_kind else kind_of(given)
    return f"{key} must be {text}, not {as_given}", _hint_for_type(model, path, given, kinds, choices)


def _rule(error: ErrorDetails, key: str, kinds: set[str]) -> tuple[str, str | None] | None:
    """Message and hint for a value of the right kind that breaks a rule; None where the kind is wrong."""
    given, context = error["input"], error.get("ctx", {})
    if error["type"] == "value_error":
        said, _, hint = str(context["error"]).partition("; ")
        # A rule is a sentence of its own, or goes on behind the key.
        goes_on = said.startswith(("must ", "is ", "holds "))
        return f"{key} {said}" if goes_on else f"{key}: {said}", hint or None
    if error["type"] in _LIMITS:
        words, name = _LIMITS[error["type"]]
        wants_none = "write null for none" if key.endswith("max_grad_norm") else None
        return f"{key} must be {words} {context[name]:.15g}, not {_show(given)}", wants_none
    if error["type"] in ("too_short", "too_long"):
        length = context.get("min_length", context.get("max_length"))
        one = "for one, write it without the list" if "string_type" in kinds else None
        return f"{key} must have {length} items, not {context['actual_length']}", one
    if error["type"] == "string_too_short":
        return f"{key} must not be empty", None
    return None


def _hint_for_type(
    model: type[Settings], path: KeyPath, given: Any, kinds: set[str], choices: Sequence[Any]
) -> str | None:
    """What to write in the place of a value of the wrong kind."""
    numeric = bool(kinds & {"int_type", "float_type"}) or any(isinstance(c, int) for c in choices)
    if given is None:
        return "leave it out for its default"
    if isinstance(given, bool):
        if numeric and "float_type" not in kinds:
            return f"write {int(given)}, if that is what it means"
        if "string_type" in kinds:
            return f'write "{_show(given)}", with quotes'
    elif isinstance(given, str):
        read = _as_json(given)
        if numeric and isinstance(read, int | float) and not isinstance(read, bool):
            if kinds & {"float_type"} or isinstance(read, int):
                return f"write {given} without quotes"
        elif "bool_type" in kinds and given.lower() in ("true", "false"):
            return f"write {given.lower()} without quotes"
        elif "list_type" in kinds:
            return f"write [{_show(given)}]"
        elif close := _FOREIGN_VALUES.get(given) or closest(given, map(str, choices)):
            return f"did you mean `{close}`?" if close in choices else None
    elif isinstance(given, int | float):
        if "int_type" in kinds and float(given).is_integer():
            return f"write {int(given)}"
        if "bool_type" in kinds and given in (0, 1):
            return f"write {str(bool(given)).lower()}"
        if "string_type" in kinds:
            return f'write "{_show(given)}", with quotes'
    section = _section_at(model, path[:-1])
    field = _fields(section).get(str(path[-1])) if section is not None and path else None
    return f"write it such as `{_show(field.examples[0])}`" if field is not None and field.examples else None


def _choices(error: ErrorDetails) -> Iterator[str | int]:
    """The values that a ``literal_error`` lists in its text."""
    for text, number in re.findall(r"'((?:[^'\\]|\\.)*)'|(-?\d+)", error["ctx"]["expected"]):
        yield int(number) if number else text


def _either(words: Sequence[str]) -> str:
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""What a shell completes the words of a command line to."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def words(kind: str, incomplete: str) -> list[str]:
    """The words of a kind that begin with ``incomplete``.

    Args:
        kind: ``job``, ``run`` or ``data`` (paths), ``task``, ``set`` (keys of a job file), or ``gpu``.
    """
    if kind in ("job", "run", "data"):
        return _paths(kind, incomplete)
    return [word for word in _WORDS[kind]() if word.startswith(incomplete)]


def _paths(kind: str, incomplete: str) -> list[str]:
    """Folders, which lead on, and what the kind looks for; for runs, those below `runs` if there are some."""
    if kind == "run" and (runs := [run for run in _runs() if run.startswith(incomplete)]):
        return runs
    from memlaunch.launcher.data_files import SUFFIXES

    suffixes = {"job": {".json"}, "data": SUFFIXES, "run": set()}[kind]
    name = incomplete.rpartition("/")[2]
    prefix = incomplete[: len(incomplete) - len(name)]
    folder = Path(prefix or ".").expanduser()
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith(".")):
            if path.is_dir():
                found.append(f"{prefix}{path.name}/")
            elif path.suffix.lower() in suffixes:
                found.append(f"{prefix}{path.name}")
    return found


def _runs() -> Iterator[str]:
    from memlaunch.launcher.runs import newest_first

    for run in newest_first(Path("runs")):
        yield str(run.path)


def _tasks() -> Iterable[str]:
    from memlaunch.launcher.job import Task

    return get_args(Task)


def _gpus() -> Iterable[str]:
    from memlaunch.launcher.plan import gpus

    return gpus.catalogue()


def _sets() -> Iterator[str]:
    """``key=`` for every key of a job, and ``key=value`` for each of its choices."""
    from memlaunch.launcher import schema
    from memlaunch.launcher.job import Job
    from memlaunch.launcher.keys import dotted

    sections = schema.sections(Job)
    for path, section in sections.items():
        for name, field in section.model_fields.items():
            here = (*path, field.alias or name)
            inner = sections.get(here)
            if inner is None:
                yield f"{dotted(here)}="
                choices = _choices(field.annotation)
            else:  # the choice that stands for the whole section
                choices = (
                    _choices(inner.model_fields[inner.SHORTHAND].annotation) if inner.SHORTHAND else iter(())
                )
            yield from (f"{dotted(here)}={choice}" for choice in choices)


def _choices(annotation: Any) -> Iterator[str]:
    """The values that a type lists."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) is not list:
        for part in get_args(annotation):
            yield from _choices(part)


_WORDS = {"task": _tasks, "gpu": _gpus, "set": _sets}

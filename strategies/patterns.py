"""Which parameters a module pattern of the job file means.

A pattern is a dotted path, from the model's root or from its base model, in which ``*`` stands for any
characters (dots included), ``?`` for one, and ``[...]`` behind a list of modules picks from it as Python
does: ``embeddings``, ``encoder.layer[:2]``, ``encoder.layer[0,-1]``, ``*.attention.*``. It works on
parameter names alone, so that the header of a weight file answers as well as a live model.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

_SELECTION = re.compile(r"\[([^\[\]]*)\]")
_INDEX = re.compile(r"\s*(-?\d+)\s*")
_SLICE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?\d+)?\s*)?")


def select(pattern: str, parameters: Sequence[str], base_prefixes: Iterable[str] = ()) -> list[str]:
    """The names in ``parameters`` that ``pattern`` covers, in their order; empty where it matches nothing.

    Args:
        pattern: a module path as above; it covers every parameter at or below the modules it matches.
        parameters: all parameter names of the model.
        base_prefixes: names of the base model inside the model (``bert``), tried where the pattern matches
            nothing from the root.

    Each part of a bracket must pick something: where ``encoder.layer`` has 6 modules,
    ``encoder.layer[0,6]`` matches nothing.

    Raises:
        ValueError: the brackets of the pattern hold no index or slice.
    """
    matched = select_modules(pattern, parameters, base_prefixes)
    return [name for name in parameters if any(_covers(module, name) for module in matched)]


def select_modules(pattern: str, parameters: Sequence[str], base_prefixes: Iterable[str] = ()) -> list[str]:
    """The modules (or parameters) that ``pattern`` names itself, in their order; else as :func:`select`.

    A module without parameters is not known here.
    """
    modules = _module_names(parameters)
    for prefix in ("", *(f"{base}." for base in base_prefixes)):
        if matched := _match(prefix, pattern, modules):
            return [name for name in modules if name in matched]
    return []


def nearest(pattern: str, parameters: Sequence[str], base_prefixes: Iterable[str] = ()) -> list[str]:
    """Up to three module names that look like ``pattern``, for a hint."""
    plain = _SELECTION.sub("", pattern).replace("*", "").replace("?", "").strip(".")
    candidates = {_without_indices(name): None for name in _module_names(parameters)}
    for base in base_prefixes:
        candidates |= {n.removeprefix(f"{base}."): None for n in list(candidates) if n.startswith(f"{base}.")}
    close = difflib.get_close_matches(plain, list(candidates), n=3, cutoff=0.5)
    if close:
        return close
    last = plain.rsplit(".", 1)[-1]
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(list(candidates))}
    return [by_last[name] for name in difflib.get_close_matches(last, list(by_last), n=3, cutoff=0.6)]


def check_syntax(pattern: str) -> None:
    """Raise ValueError where the brackets of ``pattern`` hold no index or slice."""
    for selection in _SELECTION.findall(pattern):
        for part in selection.split(","):
            _picked(part, [])
    rest = _SELECTION.sub("", pattern)
    if "[" in rest or "]" in rest:
        raise ValueError(f"`{pattern}` has a bracket that is not closed")
    if not pattern.strip():
        raise ValueError("the pattern is empty")


def _match(prefix: str, pattern: str, modules: dict[str, None]) -> set[str]:
    """Modules that ``pattern`` matches below ``prefix``, one bracket at a time."""
    check_syntax(pattern)
    pieces = _SELECTION.split(pattern)  # path, selection, path, selection, ..., path
    found = _glob(re.escape(prefix) + _to_regex(pieces[0]), modules)
    for selection, path in zip(pieces[1::2], pieces[2::2], strict=True):
        items: set[str] = set()
        for part in selection.split(","):
            picked = {f"{parent}.{index}" for parent in found for index in _pick(part, parent, modules)}
            if not picked:
                return set()
            items |= picked
        found = items
        if path:
            found = {name for item in items for name in _glob(re.escape(item) + _to_regex(path), modules)}
    return found


def _glob(regex: str, modules: dict[str, None]) -> set[str]:
    compiled = re.compile(regex)
    return {name for name in modules if compiled.fullmatch(name)}


def _to_regex(path: str) -> str:
    first, *others = (re.escape(part).replace(r"\?", ".") for part in re.split(r"\*+", path))
    if not others:
        return first
    # What stands between two stars is taken where it first occurs, for good: trying on would take for ever.
    return first + "".join(f"(?>.*?{part})" for part in others[:-1]) + ".*" + others[-1]


def _pick(part: str, parent: str, modules: dict[str, None]) -> list[int]:
    """The indices that one part of a bracket picks from the list of modules ``parent``."""
    head = f"{parent}."
    children = {name[len(head) :].split(".", 1)[0] for name in modules if name.startswith(head)}
    return _picked(part, sorted(int(child) for child in children if child.isdecimal()))


def _picked(part: str, indices: list[int]) -> list[int]:
    if index := _INDEX.fullmatch(part):
        at = int(index[1])
        return [indices[at]] if -len(indices) <= at < len(indices) else []
    if cut := _SLICE.fullmatch(part):
        bounds = [int(bound) if bound else None for bound in cut.groups()]
        if bounds[2] == 0:
            raise ValueError(f"`[{part}]` has a step of zero")
        return indices[slice(*bounds)]
    raise ValueError(f"`[{part}]` is neither an index nor a slice")


def _module_names(parameters: Iterable[str]) -> dict[str, None]:
    """Every parameter and every module above one, in order of first appearance."""
    names: dict[str, None] = {}
    for parameter in parameters:
        parts = parameter.split(".")
        names |= {".".join(parts[:depth]): None for depth in range(1, len(parts) + 1)}
    return names


def _covers(module: str, parameter: str) -> bool:
    return parameter == module or parameter.startswith(f"{module}.")


def _without_indices(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", name)

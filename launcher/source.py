"""A job file as it was read: its value, where everything in it stands, and ``--set`` on top."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memlaunch.launcher import keys
from memlaunch.launcher.errors import Problem, UserError
from memlaunch.launcher.keys import KeyPath, dotted, parse
from memlaunch.launcher.paths import MAX_BYTES
from memlaunch.launcher.scanner import Scanner, Span, Stop, kind_of, problem_at

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Document:
    """A job file as it was read.

    Attributes:
        name: the file as the user named it.
        text: its text, without a byte-order mark.
        value: what it says, with ``--set`` applied.
        keys, values: where each key and value stands.
        overrides: path -> the ``--set`` argument that gave it.
        unusable: paths whose value could not be read; null in ``value``.
        suspect: those, and paths whose value may not be the one that was meant.
        problems: what is wrong with the text and with ``--set``.
    """

    name: str
    text: str
    value: dict[str, Any]
    keys: Mapping[KeyPath, Span]
    values: Mapping[KeyPath, Span]
    overrides: Mapping[KeyPath, str]
    unusable: frozenset[KeyPath]
    suspect: frozenset[KeyPath]
    problems: tuple[Problem, ...]

    def anchor(self, path: KeyPath) -> KeyPath | None:
        """The path to point at for ``path``: itself, or the string that stands for its section."""
        if path in self.values or self._override(path) is not None:
            return path
        span = self.values.get(path[:-1])
        return path[:-1] if span is not None and self.text[span.start] == '"' else None

    def problem(
        self, path: KeyPath, message: str, hint: str | None = None, *, at_key: bool = False
    ) -> Problem:
        """A problem at the value of ``path`` (or at its key), or at the nearest section that is there."""
        key = dotted(path) or None
        if (override := self._override(path)) is not None:
            return Problem(source=f"--set {override}", message=message, hint=hint, key=key)
        inside = path not in self.values
        while path not in self.values:
            path = path[:-1]
        span = self.values[path]
        container = self.text[span.start] in "{["
        if at_key or (container and (inside or "\n" in self.text[span.start : span.end])):
            span = self.keys.get(path, Span(span.start, span.start + 1))
        return problem_at(self.name, self.text, span, message, hint, key)

    def finding(self, key: str, message: str, hint: str) -> Problem:
        """A problem about the dotted ``key`` that was found only in a rank."""
        path = parse(key)
        return self.problem(self.anchor(path) or path, f"{key}: {message}", hint)

    def with_values(self, values: Mapping[str, Any], shorthands: Mapping[KeyPath, str]) -> "Document":
        """The same with other values, dotted key -> value, where something stands in the place of each.

        What is wrong with them is shown where the user wrote what they replace.
        """
        changed = copy.deepcopy(self.value)
        for key, value in values.items():
            _put(changed, parse(key), value, shorthands)
        return replace(self, value=changed)

    def _override(self, path: KeyPath) -> str | None:
        """The ``--set`` argument that gave ``path``, or that made the section it is."""
        for depth in range(len(path), 0, -1):
            if (argument := self.overrides.get(path[:depth])) is not None:
                return argument
        if path in self.values or not path:
            return None
        made = (argument for at, argument in self.overrides.items() if at[: len(path)] == path)
        return next(made, None)


def read(path: Path, sets: Sequence[str] = (), shorthands: Mapping[KeyPath, str] | None = None) -> Document:
    """The job file ``path`` with ``--set`` arguments (``key=value``) applied.

    Args:
        shorthands: section -> its leading key, for sections that may be written as a string; where such a
            string meets a ``--set`` inside the section, it becomes the object that it stands for.

    Raises:
        UserError: there is no such file, or its text is too broken to say more about it.
    """
    return _with_sets(scan(_text_of(path), str(path)), sets, shorthands or {})


def scan(data: bytes, name: str) -> Document:
    """The job file whose bytes are ``data``; ``name`` is for messages.

    Raises:
        UserError: the text is too broken to say more about it.
    """
    text, problems = _decode(data, name)
    scanner = Scanner(name, text, problems)
    try:
        value = scanner.whole()
    except Stop:
        raise UserError(problems=scanner.problems) from None
    return Document(
        name=name,
        text=text,
        value=value,
        keys=scanner.keys,
        values=scanner.values,
        overrides={},
        unusable=frozenset(scanner.unusable),
        suspect=frozenset(scanner.suspect | scanner.unusable),
        problems=tuple(scanner.problems),
    )


def _text_of(path: Path) -> bytes:
    # Path folds the two slashes of a URL into one.
    if _URL.match(str(path).replace(":/", "://", 1)):
        raise UserError(
            f"`{path}` is a URL, and a job file is read from this machine only",
            "download it, look what it runs, and give the file",
        )
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"there is no file `{path}`", _files_near(path)) from None
    except IsADirectoryError:
        raise UserError(f"`{path}` is a folder, not a job file", _files_near(path / "job.json")) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"`{path}` cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"`{path}` has more than {MAX_BYTES:,} bytes", "a job file is a page or two of text")
    return content


def _files_near(path: Path) -> str:
    if path.parent.is_dir():
        names = sorted(file.name for file in path.parent.glob("*.json") if file.is_file())
        close = keys.closest(path.name, names) or (names[0] if len(names) == 1 else None)
        if close is not None:
            return f"did you mean `{path.with_name(close)}`?"
    return "`memlaunch init` writes a first job file"


def _decode(data: bytes, name: str) -> tuple[str, list[Problem]]:
    problems = []
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
        problems.append(
            Problem(
                source=name,
                message="the file begins with a byte-order mark",
                hint="save it as UTF-8 without one",
                line=1,
                column=1,
                length=1,
                text=data.split(b"\n", 1)[0].decode("utf-8", "replace"),
            )
        )
    try:
        return data.decode("utf-8"), problems
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        number = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        text = data.split(b"\n")[number - 1].decode("utf-8", "replace")
        if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:64]:
            hint = "it looks like UTF-16; save it as UTF-8"
        else:
            hint = "save the file as UTF-8"
        problem = Problem(
            source=name,
            message=f"the file is not UTF-8 text: byte 0x{data[error.start]:02x}",
            hint=hint,
            line=number,
            column=column,
            length=1,
            text=text,
        )
        raise UserError(problems=[problem]) from None


def _with_sets(document: Document, sets: Sequence[str], shorthands: Mapping[KeyPath, str]) -> Document:
    """``document`` with the ``--set`` arguments applied, in their order."""
    value = copy.deepcopy(document.value)
    overrides: dict[KeyPath, str] = {}
    problems = list(document.problems)
    for argument in sets:
        source = f"--set {argument}"
        try:
            path, new = _parse_set(argument)
            _put(value, path, new, shorthands)
        except _BadSet as error:
            problems.append(Problem(source=source, message=str(error), hint=error.hint))
            continue
        overrides = {at: other for at, other in overrides.items() if at[: len(path)] != path}
        overrides[path] = argument
    settled = {path for path in document.unusable if any(path[: len(at)] == at for at in overrides)}
    return Document(
        name=document.name,
        text=document.text,
        value=value,
        keys=document.keys,
        values=document.values,
        overrides=overrides,
        unusable=document.unusable - settled,
        suspect=document.suspect - settled,
        problems=tuple(problems),
    )


class _BadSet(ValueError):
    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def _parse_set(argument: str) -> tuple[KeyPath, Any]:
    key, equals, text = argument.partition("=")
    if not equals:
        raise _BadSet("there is no `=`", "write `--set key=value`, such as `--set training.max_steps=10`")
    try:
        path = keys.parse(key)
    except ValueError:
        hint = "a key is names with dots between them, and [0] for an item of a list"
        raise _BadSet(f"`{key}` is not a key of a job", hint) from None
    if not argument.isascii() and any("\ud800" <= character < "\ue000" for character in argument):
        raise _BadSet("it is not UTF-8 text")
    if isinstance(path[0], int):
        raise _BadSet("a job is an object, not a list", "begin with a name, such as `training`")
    return path, _parse_set_value(text)


def _parse_set_value(text: str) -> Any:
    """``text`` as JSON; as a string, where it is no JSON and does not begin like anything but a word."""
    scanner = Scanner("", text)
    try:
        value = scanner.alone()
    except Stop:
        value = None
    if not scanner.problems:
        return value
    if text.lstrip()[:1] in ("{", "[", '"'):
        first = scanner.problems[0]
        raise _BadSet(f"the value is not JSON: {first.message}", first.hint)
    return text


def _put(root: dict[str, Any], path: KeyPath, value: Any, shorthands: Mapping[KeyPath, str]) -> None:
    """Set ``path`` inside ``root``, with the objects and lists above it made where there are none."""
    above: Any = root
    for depth, part in enumerate(path):
        here = path[:depth]
        if isinstance(part, int):
            if not isinstance(above, list):
                raise _BadSet(
                    f"{dotted(here)} is {kind_of(above)}, not a list", f"set `{dotted(here)}` as a whole"
                )
            if part > len(above):
                raise _BadSet(
                    f"{dotted(here)} has {len(above)} items, and [{part}] is beyond its end",
                    f"the next item is [{len(above)}]",
                )
            if part == len(above):
                above.append(None)
        elif not isinstance(above, dict):
            raise _BadSet(
                f"{dotted(here)} is {kind_of(above)}, not an object", f"set `{dotted(here)}` as a whole"
            )
        if depth == len(path) - 1:
            above[part] = value
            return
        inside = above[part] if isinstance(part, int) else above.get(part)
        if isinstance(inside, str) and path[: depth + 1] in shorthands:
            inside = {shorthands[path[: depth + 1]]: inside}
        elif inside is None:
            inside = [] if isinstance(path[depth + 1], int) else {}
        above[part] = inside
        above = inside

"""What a user sees when something is wrong: where, what, and what to do about it; never a traceback."""

import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

#: Exit codes of the command, and what ranks write of how they ended.
EXIT_JOB = 2
EXIT_MEMORY = 3
EXIT_LAUNCH = 4
EXIT_FAILED = 5
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

#: Problems of one kind that are looked for in a job; whoever has made more of them has made the same again.
MOST = 100

#: Columns of a source line that are shown; of a longer one, the part around the problem.
WIDTH = 100

_RED, _BLUE, _BOLD, _PLAIN = "\x1b[1;31m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a job.

    Attributes:
        source: the file as the user named it, or ``--set key=value``.
        message: what is wrong, without a final period.
        hint: what to do about it, where there is something to say.
        key: the dotted key it is about; None where the text is not JSON.
        line, column, length: what to point at, from 1, in characters; ``line`` is 0 where there is no line.
        text: that line.
    """

    source: str
    message: str
    hint: str | None = None
    key: str | None = None
    line: int = 0
    column: int = 0
    length: int = 0
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: everything but the line's text; a place that is not known is null."""
        values = asdict(self)
        del values["text"]
        if not self.line:
            values |= {"line": None, "column": None, "length": None}
        return values


class UserError(Exception):
    """A mistake of the user's: ``problems`` with a job, or one ``message`` about anything else."""

    def __init__(
        self,
        message: str = "",
        hint: str | None = None,
        *,
        problems: Sequence[Problem] = (),
        exit_code: int = EXIT_JOB,
    ) -> None:
        super().__init__(message or "; ".join(problem.message for problem in problems))
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)
        self.exit_code = exit_code

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: the message and hint of an error without a place, and all problems."""
        return {
            "message": self.message or None,
            "hint": self.hint,
            "problems": [problem.to_dict() for problem in self.problems],
        }

    def render(self, colour: bool = False) -> str:
        """The text for stderr, without a final newline."""
        if self.problems:
            return "\n\n".join(render(problem, colour) for problem in self.problems)
        return "\n".join(_with_hint([f"{_error(colour)} {_printable(self.message)}"], self.hint, colour))


def render(problem: Problem, colour: bool = False) -> str:
    """One problem: its place, its source line with a caret line below, its hint."""
    at = f"{problem.source}:{problem.line}:{problem.column}:" if problem.line else f"{problem.source}:"
    lines = [f"{_paint(_printable(at), _BOLD, colour)} {_error(colour)} {_printable(problem.message)}"]
    if problem.line:
        gutter = f"{problem.line:>5} |"
        text, before, under = _excerpt(problem)
        lines.append(f"{_paint(gutter, _BLUE, colour)} {text}".rstrip())
        pointer = " " * before + _paint("^" * under, _RED, colour)
        lines.append(f"{_paint('      |', _BLUE, colour)} {pointer}")
    return "\n".join(_with_hint(lines, problem.hint, colour))


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Problems as they stand in the file, each once; those without a line last."""
    return sorted(dict.fromkeys(problems), key=lambda p: (p.line == 0, p.line, p.column))


def wants_colour(stream: TextIO = sys.stderr) -> bool:
    """Whether ``stream`` is a terminal whose user has not turned colour off."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _excerpt(problem: Problem) -> tuple[str, int, int]:
    """(the part of the line to show, columns before the caret, columns under it)."""
    text = problem.text
    start = problem.column - 1
    end = max(start + 1, min(start + problem.length, len(text)))
    left, right = 0, len(text)
    if len(text) > WIDTH:
        left = max(0, min(start - WIDTH // 3, len(text) - WIDTH))
        right = min(len(text), left + WIDTH)
        end = min(end, right)
    head, tail = "..." if left else "", "..." if right < len(text) else ""
    before, under, behind = (
        _printable(part.replace("\t", " ")) for part in (text[left:start], text[start:end], text[end:right])
    )
    return (
        head + before + under + behind + tail,
        len(head) + _columns(before),
        max(1, _columns(under)),
    )


def _printable(text: str) -> str:
    """``text`` without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _with_hint(lines: list[str], hint: str | None, colour: bool) -> list[str]:
    return [*lines, f"{_paint('hint:', _BOLD, colour)} {_printable(hint)}"] if hint else lines


def _error(colour: bool) -> str:
    return _paint("error:", _RED, colour)


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_PLAIN}" if colour else text

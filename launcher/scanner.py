"""One pass over the text of a job file: its value, where everything in it stands, and what is wrong with it.

As strict as the JSON standard, but it goes on behind the mistakes that people make (trailing commas,
comments, single quotes), so that they are reported together with what else is wrong.
"""

import functools
import json
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from memlaunch.launcher.errors import MOST, Problem
from memlaunch.launcher.keys import KeyPath, dotted

MAX_DEPTH = 64

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_WORD = re.compile(r"[^\s,:;=\[\]{}\"]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_COMMENT = re.compile(r"//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_QUOTED = re.compile(r"(['`‘’“”])([^'`‘’“”\"\n]*)['`‘’“”]")  # noqa: RUF001
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_CONSTANTS = {"true": True, "false": False, "null": None}
_PYTHON = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "None": "null", "NULL": "null"}


class Span(NamedTuple):
    """Offsets into the text; ``end`` is behind the last character."""

    start: int
    end: int


def problem_at(
    name: str, text: str, span: Span, message: str, hint: str | None = None, key: str | None = None
) -> Problem:
    """The problem at ``span`` of ``text``; a span over several lines is pointed at in its first."""
    begin = text.rfind("\n", 0, span.start) + 1
    line = _line(text, begin)
    return Problem(
        source=name,
        message=message,
        hint=hint,
        key=key,
        line=text.count("\n", 0, begin) + 1,
        column=span.start - begin + 1,
        length=max(1, min(span.end - span.start, begin + len(line) - span.start)),
        text=line,
    )


@functools.lru_cache(maxsize=4)
def _line(text: str, begin: int) -> str:
    """The line that begins there: one string for all problems in it, since a line may be long."""
    end = text.find("\n", begin)
    return text[begin : end if end >= 0 else len(text)].rstrip("\r")


class Stop(Exception):
    """The text cannot be read on."""


class Scanner:
    """One pass over the text: its value, the places of all keys and values, and what is wrong with it."""

    def __init__(self, name: str, text: str, problems: Iterable[Problem] = ()) -> None:
        self.keys: dict[KeyPath, Span] = {}
        self.values: dict[KeyPath, Span] = {}
        self.problems = list(problems)
        self.unusable: set[KeyPath] = set()
        self.suspect: set[KeyPath] = set()
        self._name = name
        self._text = text
        self._at = 0
        self._told: set[str] = set()
        self._crooked: int | None = None

    def whole(self) -> dict[str, Any]:
        """The object that the text is.

        Raises:
            Stop: the text cannot be read on; ``problems`` says why.
        """
        self._skip()
        if self._at == len(self._text):
            hint = "`memlaunch init` writes a first job file"
            self.problems.append(Problem(source=self._name, message="the file is empty", hint=hint))
            raise Stop
        value = self.alone()
        if not isinstance(value, dict):
            hint = 'write `{"model": ..., "data": ...}`'
            self._stop(self.values[()], f"a job is an object, not {kind_of(value)}", hint)
        return value

    def alone(self) -> Any:
        """The value that the text is, whatever its kind."""
        self._skip()
        value = self._value(())
        self._skip()
        if self._at < len(self._text):
            self._stop(
                Span(self._at, self._at + 1),
                "there is text behind the end",
                "remove it, or the bracket that ends the job too early",
            )
        return value

    def _value(self, path: KeyPath) -> Any:
        start = self._at
        character = self._peek()
        if character == "{":
            value: Any = self._object(path)
        elif character == "[":
            value = self._array(path)
        elif character == '"':
            told = len(self.problems)
            value = self._string()
            if len(self.problems) > told:
                self.unusable.add(path)
        elif quoted := _QUOTED.match(self._text, self._at):
            value = self._quoted(quoted)
        else:
            value = self._word(path)
        self.values[path] = Span(start, self._at)
        return value

    def _object(self, path: KeyPath) -> dict[str, Any]:
        opened = self._open(path)
        members: dict[str, Any] = {}
        while not self._closes("}", opened):
            start = self._at
            key = self._key()
            span = Span(start, self._at)
            inner = (*path, key)
            self._colon(span)
            if key in members:
                self._repeated(inner, span)
            else:
                self.keys[inner] = span
                members[key] = self._value(inner)
            self._separator("}", opened)
        return members

    def _array(self, path: KeyPath) -> list[Any]:
        opened = self._open(path)
        items: list[Any] = []
        while not self._closes("]", opened):
            items.append(self._value((*path, len(items))))
            self._separator("]", opened)
        return items

    def _open(self, path: KeyPath) -> int:
        if len(path) >= MAX_DEPTH:
            self._stop(
                Span(self._at, self._at + 1), f"nested more than {MAX_DEPTH} deep", "no job needs that"
            )
        opened = self._at
        self._at += 1
        self._skip()
        return opened

    def _closes(self, bracket: str, opened: int) -> bool:
        """Whether the object or array ends here; goes behind its end."""
        while self._peek() == ",":
            self._tell(Span(self._at, self._at + 1), "one comma too many", "remove it")
            self._at += 1
            self._skip()
        if self._at == len(self._text):
            self._never_closed(opened, bracket)
        if self._peek() in "]}":
            if self._peek() != bracket:
                self._wrong_bracket(bracket, opened)
            self._notice(opened)
            self._at += 1
            return True
        return False

    def _notice(self, opened: int) -> None:
        """Remember the first bracket whose line is indented otherwise than that of its closing one."""
        before = self._at
        while before and self._text[before - 1] in " \t\r":
            before -= 1
        alone = not before or self._text[before - 1] == "\n"
        crooked = alone and opened < before and self._indent(self._at) != self._indent(opened)
        if crooked and self._crooked is None:
            self._crooked = opened

    def _indent(self, at: int) -> int:
        """White space at the start of the line."""
        start = self._text.rfind("\n", 0, at) + 1
        blank = _SPACE.match(self._text, start)
        assert blank is not None
        return min(blank.end(), at) - start

    def _separator(self, bracket: str, opened: int) -> None:
        """Go from behind a value to the next one, or to the closing bracket."""
        behind = self._at
        self._skip()
        character = self._peek()
        if character == ",":
            comma = self._at
            self._at += 1
            self._skip()
            if self._peek() == bracket:
                self._tell(
                    Span(comma, comma + 1), f"a comma before the closing `{bracket}`", "remove the comma"
                )
        elif character == ";":
            self._tell(Span(self._at, self._at + 1), "a semicolon in the place of a comma", "write `,`")
            self._at += 1
            self._skip()
        elif character in ("", "}", "]"):
            return
        elif character in '"{[-' or character.isalnum() or _QUOTED.match(self._text, self._at):
            self._tell(Span(behind, behind + 1), "a comma is missing", "put a `,` here")
        else:
            self._unexpected(f"`,` or `{bracket}`")

    def _key(self) -> str:
        if self._peek() == '"':
            return self._string()
        if quoted := _QUOTED.match(self._text, self._at):
            return self._quoted(quoted)
        word = _WORD.match(self._text, self._at)
        if word is None:
            self._unexpected("a key in double quotes")
        self._at = word.end()
        self._once(
            "bare key",
            Span(*word.span()),
            "a key stands in double quotes",
            f'write `"{word[0]}"`, and so every key',
        )
        return word[0]

    def _colon(self, key: Span) -> None:
        self._skip()
        character = self._peek()
        if character == ":":
            self._at += 1
        elif character == "=":
            self._tell(Span(self._at, self._at + 1), "`=` in the place of a colon", "write `:`")
            self._at += 1
        elif character in ("{", "[", '"') or _NUMBER.match(self._text, self._at):
            self._tell(Span(key.end, key.end + 1), "a colon is missing", "put a `:` between key and value")
        else:
            self._stop(
                key, f"the key {self._text[key.start : key.end]} has no value", "write `: ` and a value"
            )
        self._skip()
        if self._peek() in ("", ",", "}", "]"):
            self._stop(
                key, f"the key {self._text[key.start : key.end]} has no value", "write one behind the `:`"
            )

    def _repeated(self, path: KeyPath, span: Span) -> None:
        """A key for the second time: told, read over, and the first one holds."""
        line = self._text.count("\n", 0, self.keys[path].start) + 1
        self._tell(span, f"{dotted(path)} is given twice", f"the first is in line {line}; keep one of them")
        self.suspect.add(path)
        kept = dict(self.keys), dict(self.values), set(self.unusable)
        self._value(path)
        self.keys, self.values, self.unusable = kept

    def _string(self) -> str:
        start = self._at
        self._at += 1
        pieces = []
        while True:
            plain = _PLAIN.match(self._text, self._at)
            assert plain is not None
            pieces.append(plain[0])
            self._at = plain.end()
            character = self._peek()
            if character == '"':
                self._at += 1
                return "".join(pieces)
            if character == "\\":
                pieces.append(self._escape())
            elif character in ("", "\n", "\r"):
                self._stop(Span(start, self._at), "this string is not closed", 'put a `"` behind it')
            else:
                shown = {"\t": "a tab"}.get(character, f"the control character U+{ord(character):04X}")
                escape = json.dumps(character)[1:-1]
                self._tell(Span(self._at, self._at + 1), f"{shown} inside a string", f"write `{escape}`")
                pieces.append(character)
                self._at += 1

    def _escape(self) -> str:
        """The character that the escape here stands for; two halves of a pair are one."""
        start = self._at
        character = self._text[start + 1 : start + 2]
        if character in _ESCAPES and character:
            self._at += 2
            return _ESCAPES[character]
        unit = self._code_unit(start)
        if unit is None:
            self._at = start + 1
            if character not in ("", "\n"):
                self._at += 1
                shown = f"\\{character}"
                self._tell(
                    Span(start, start + 2),
                    f"`{shown}` is not an escape of JSON",
                    "write `\\\\` for a backslash",
                )
            return f"\\{character}"
        self._at = start + 6
        if 0xD800 <= unit < 0xDC00:
            low = self._code_unit(self._at)
            if low is not None and 0xDC00 <= low < 0xE000:
                self._at += 6
                return chr(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00))
        if 0xD800 <= unit < 0xE000:
            self._tell(Span(start, start + 6), "half of a pair of surrogates", "write the character itself")
            return "\N{REPLACEMENT CHARACTER}"
        return chr(unit)

    def _code_unit(self, at: int) -> int | None:
        found = _UNICODE.match(self._text, at)
        return int(found[1], 16) if found else None

    def _quoted(self, quoted: re.Match[str]) -> str:
        self._at = quoted.end()
        hint = f"write `{json.dumps(quoted[2], ensure_ascii=False)}`, and so every string"
        self._once("quotes", Span(*quoted.span()), "a string stands in straight double quotes", hint)
        return quoted[2]

    def _word(self, path: KeyPath) -> Any:
        word = _WORD.match(self._text, self._at)
        if word is None:
            self._unexpected("a value")
        self._at = word.end()
        text, span = word[0], Span(*word.span())
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if (number := _NUMBER.fullmatch(text)) is not None:
            if number[1] is None and number[2] is None and len(text) < 400:
                return int(text)
            if math.isfinite(value := float(text)):
                return value
            return self._no_value(path, span, f"{_short(text)} is too large a number", "write a smaller one")
        if text in _PYTHON:
            self._tell(span, f"`{text}` is not JSON", f"write `{_PYTHON[text]}`")
            return _CONSTANTS[_PYTHON[text]]
        if text.lstrip("+-").lower() in ("nan", "inf", "infinity"):
            return self._no_value(
                path, span, f"`{text}` is not a number that a job can use", "write a finite one"
            )
        try:
            value = float(text if not text.lower().lstrip("+-").startswith("0x") else int(text, 16))
        except (ValueError, OverflowError):
            message, hint = f"`{_short(text)}` is not a JSON value", f'for a string, write `"{_short(text)}"`'
            return self._no_value(path, span, message, hint)
        return self._no_value(path, span, f"`{_short(text)}` is not a JSON number", f"write `{value:.15g}`")

    def _no_value(self, path: KeyPath, span: Span, message: str, hint: str) -> None:
        self._tell(span, message, hint)
        self.unusable.add(path)

    def _skip(self) -> None:
        """Go over white space; comments and the like are told once."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if comment := _COMMENT.match(self._text, self._at):
                self._once("comment", Span(*comment.span()), "JSON has no comments", "remove every comment")
                self._at = comment.end()
            elif self._peek() and (
                self._peek().isspace() or self._peek() in "\u200b\u200c\u200d\u2060\ufeff"
            ):
                name = f"the character U+{ord(self._peek()):04X} is not white space in JSON"
                self._once("space", Span(self._at, self._at + 1), name, "write plain spaces")
                self._at += 1
            else:
                return

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _tell(self, span: Span, message: str, hint: str | None = None) -> None:
        self.problems.append(problem_at(self._name, self._text, span, message, hint))
        if len(self.problems) >= MOST:
            raise Stop

    def _once(self, kind: str, span: Span, message: str, hint: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._tell(span, message, hint)

    def _stop(self, span: Span, message: str, hint: str | None = None) -> NoReturn:
        self._tell(span, message, hint)
        raise Stop

    def _unexpected(self, wanted: str) -> NoReturn:
        if self._at == len(self._text):
            self._stop(Span(self._at, self._at + 1), f"the file ends where {wanted} should stand")
        character = self._peek()
        self._stop(Span(self._at, self._at + 1), f"`{character}` where {wanted} should stand")

    def _never_closed(self, opened: int, bracket: str) -> NoReturn:
        if self._crooked is not None:
            # Some bracket closes an outer one in its place: by the indentation, this one.
            opened = self._crooked
            bracket = {"{": "}", "[": "]"}[self._text[opened]]
        self._stop(
            Span(opened, opened + 1),
            f"this `{self._text[opened]}` is never closed",
            f"put the missing `{bracket}` where it ends",
        )

    def _wrong_bracket(self, bracket: str, opened: int) -> NoReturn:
        line = self._text.count("\n", 0, opened) + 1
        self._stop(
            Span(self._at, self._at + 1),
            f"`{self._peek()}` where the `{self._text[opened]}` of line {line} should be closed",
            f"put the missing `{bracket}` before it",
        )


def kind_of(value: Any) -> str:
    """What kind of JSON value ``value`` is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds[type(value)]


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."

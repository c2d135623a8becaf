"""Keys of a job file: ``strategy.freeze[0]`` as text, ``("strategy", "freeze", 0)`` as a path."""

import difflib
import json
import re
from collections.abc import Iterable

KeyPath = tuple[str | int, ...]

_NAME = re.compile(r"[^\s.\[\]\"=]+")
_BRACKET = re.compile(r'\[\s*(\d+|"(?:[^"\\]|\\.)*")\s*\]')


def parse(text: str) -> KeyPath:
    """The path that ``text`` writes; a name that holds dots or brackets stands as ``["my.name"]``.

    Raises:
        ValueError: it is not a key.
    """
    path: list[str | int] = []
    at = 0
    while at < len(text) or not path:
        if bracket := _BRACKET.match(text, at):
            path.append(json.loads(bracket[1]))
            at = bracket.end()
            continue
        at += bool(path) and text.startswith(".", at)
        name = _NAME.match(text, at)
        if name is None or (path and text[at - 1] != "."):
            raise ValueError(f"`{text}` is not a key")
        path.append(name[0])
        at = name.end()
    return tuple(path)


def dotted(path: KeyPath) -> str:
    """The text that :func:`parse` reads as ``path``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _NAME.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part, ensure_ascii=False)}]"
    return text


def is_in(path: KeyPath, section: KeyPath) -> bool:
    """Whether ``path`` is ``section`` or lies inside it."""
    return path[: len(section)] == section


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name in ``known`` that ``word`` probably means; case, ``_`` and ``-`` count for nothing."""
    plain = {_plain(name): name for name in known}
    close = difflib.get_close_matches(_plain(word), list(plain), n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()

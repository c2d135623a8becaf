"""Paths of a job file, which are relative to it."""

import os
from pathlib import Path
from typing import Literal


class BadPath(ValueError):
    """A path that does not lead to what it should; ``hint`` says what to do about it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def beside(path: str, base: Path) -> Path:
    """``path``, seen from ``base``, absolute, without ``~`` and ``..``; links stay links."""
    return Path(os.path.abspath(base / os.path.expanduser(path)))  # noqa: PTH100, PTH111


def kind(path: Path) -> Literal["file", "folder", "nothing"]:
    """What is at ``path``.

    Raises:
        BadPath: the system does not say.
    """
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else "nothing"
    except OSError as error:
        raise BadPath(
            f"`{path.name}` cannot be looked at: {error.strerror}", "look at its permissions"
        ) from None

"""Paths of a job file, which are relative to it."""

import errno
import os
from pathlib import Path
from typing import Literal

#: The largest file that people write by hand; whoever names a larger one means another.
MAX_BYTES = 1_000_000


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
        BadPath: it is something else, such as a device, or the system does not say.
    """
    try:
        if path.is_dir():
            return "folder"
        if path.exists() and not path.is_file():
            raise BadPath(f"`{path.name}` is neither a file nor a folder", "name a file that is on a disk")
        return "file" if path.exists() else "nothing"
    except OSError as error:
        raise BadPath(
            f"`{path.name}` cannot be looked at: {error.strerror}", "look at its permissions"
        ) from None


def read_small(path: Path) -> bytes:
    """The content of a file that people write by hand.

    Raises:
        OSError: it cannot be read, is a device or a pipe, which need not end, or has more than ``MAX_BYTES``.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is a device or a pipe")
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES:,} bytes")
    return content

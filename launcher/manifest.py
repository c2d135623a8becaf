"""Checkpoints as folders: which of them are whole, which is the newest, which may go.

A checkpoint is written under a temporary name, its manifest last, and then renamed; so a folder with the
right name was whole once. The manifest has the size and the hash of every file, and a hash of its own.
Nothing here needs torch: the launcher looks at checkpoints, too.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Part of every manifest: raise it when the layout changes.
FORMAT = 1
MANIFEST = "manifest.json"
#: End the names of folders that are being written and removed: rubbish, once nobody does that any more.
PARTIAL = ".partial"
REMOVED = ".removed"
#: Ends the name of a folder that was found damaged.
DAMAGED = ".damaged"


class Damaged(ValueError):
    """A checkpoint that is not whole, or not as it was written; the message names the file."""


@dataclass(frozen=True)
class FileSum:
    """The size of a file and its SHA-256, in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: the optimizer step behind which it was taken, from 1.
        applied: how many of the steps were not skipped: where the schedule stands.
        world_size: ranks, each of which wrote one file.
        shapes: parameter name -> shape.
        trainable: names of the parameters that have optimizer state.
        loss_scale: the state of a dynamic loss scale, else None.
        job: the resolved job.
        versions: library -> version.
        files: file name -> size and hash.
    """

    step: int
    applied: int
    world_size: int
    shapes: Mapping[str, list[int]]
    trainable: list[str]
    loss_scale: Mapping[str, float] | None
    job: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileSum]


def folder_name(step: int) -> str:
    """``step-00000500``."""
    return f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps of the checkpoints below ``root``, whole or not, the newest first."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name)), reverse=True)


def write(folder: Path, manifest: Manifest) -> None:
    """Add the manifest to ``folder``, whose files are there, and give the folder its final name.

    ``folder`` has the final name with ``PARTIAL`` behind it. A checkpoint of that name is replaced.
    """
    content = asdict(manifest)
    text = json.dumps({"format": FORMAT, "sha256": _own_sum(content), **content}, indent=1)
    path = folder / MANIFEST
    path.touch(mode=0o600)  # the job's environment variables are in it
    with path.open("w", encoding="utf-8") as file:
        file.write(text)  # with no line break behind it, which could be lost and not be missed
        file.flush()
        os.fsync(file.fileno())
    sync(folder)
    final = folder.with_name(folder.name.removesuffix(PARTIAL))
    if final.exists():
        discard(final)
    folder.rename(final)
    sync(folder.parent)


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint ``folder``.

    Raises:
        Damaged: there is none, it is not as it was written, or a file has not the size that it tells.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, told = content.pop("format"), content.pop("sha256")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if found != FORMAT:
        raise Damaged(f"{path} is of format {found}, this version of memlaunch reads format {FORMAT}")
    if told != _own_sum(content):
        raise Damaged(f"{path} is not as it was written")
    try:
        files = {name: FileSum(**about) for name, about in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
    except (AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is not a manifest of this version of memlaunch: {error}") from error
    for name, about in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != about.bytes:
            state = "is missing" if size is None else f"has {size} bytes, not {about.bytes}"
            raise Damaged(f"{folder / name} {state}")
    return manifest


def check_files(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Read the files ``names``, or all of them, and compare their hashes with the manifest's.

    Raises:
        Damaged: one is not as it was written.
    """
    for name in manifest.files if names is None else names:
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != manifest.files[name].sha256:
            raise Damaged(f"{folder / name} is not as it was written")


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints below ``root``."""
    for step in steps(root)[keep:]:
        discard(root / folder_name(step))


def discard(folder: Path) -> None:
    """Remove a checkpoint; a part of it that is left behind by a crash does not look like a checkpoint."""
    rubbish = folder.with_name(f"{folder.name}{REMOVED}")
    if rubbish.exists():
        shutil.rmtree(rubbish)
    folder.rename(rubbish)
    shutil.rmtree(rubbish)


def sweep(root: Path) -> None:
    """Remove what saves and removals that never ended have left below ``root``."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.endswith((PARTIAL, REMOVED)):
                shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it is not tried again, and its name is free."""
    target = folder.with_name(f"{folder.name}{DAMAGED}")
    shutil.rmtree(target, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(target)


def sync(folder: Path) -> None:
    """Bring the entries of ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

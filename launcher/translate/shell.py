"""What the scripts of a run are made of: words that bash takes as they are, and the few that it expands."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence


class Raw(str):
    """A word of ours that bash is to expand, such as ``"$1"``; never a value of the job."""

    __slots__ = ()


def join(words: Iterable[str]) -> str:
    """A command line; every word that is not :class:`Raw` is quoted."""
    return " ".join(word if isinstance(word, Raw) else shlex.quote(word) for word in words)


def exports(values: Mapping[str, str]) -> list[str]:
    """A line that sets each environment variable, to its value byte for byte."""
    return [f"export {name}={shlex.quote(value)}" for name, value in values.items()]


def comment(text: str) -> str:
    """``text`` on one line, to stand behind ``#``."""
    return " ".join(text.split())


def mistake(lines: Sequence[str]) -> str | None:
    """Why ``lines`` of the user's would break the script that they stand in; None where they do not.

    Asks bash, which reads them and runs nothing.
    """
    text = "\n".join(lines) + "\n"
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    argv = ["bash", "-n"]
    read = subprocess.run(argv, input=text.encode(), env=environment, capture_output=True, check=False)
    told = read.stderr.decode(errors="replace").partition("\n")[0].removeprefix("bash: ")
    if read.returncode or told:  # of a here-document without an end it only warns
        return told or f"exit status {read.returncode}"
    goes_on = re.search(r"(?<!\\)(?:\\\\)*\\\n\Z", text)
    return "the last line ends in a backslash" if goes_on else None


def start_script(*, about: str, python: str, body: Sequence[str]) -> str:
    """``command.sh``: makes or takes the run folder, then does ``body``, lines of ours.

    Its last line is to ``exec``, so that signals reach what it starts.
    """
    new = f'{shlex.quote(python)} -m memlaunch.launcher.rundir "$here" "${{MEMLAUNCH_RUN_DIR:-}}"'
    lines = [
        "#!/usr/bin/env bash",
        f"# {comment(about)}",
        "# MEMLAUNCH_RUN_DIR names the run folder; without it a new one is made.",
        "set -euo pipefail",
        'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        f'MEMLAUNCH_RUN_DIR="$({new})"',
        "export MEMLAUNCH_RUN_DIR",
        'echo "run folder: $MEMLAUNCH_RUN_DIR" >&2',
        *body,
    ]
    return "\n".join(lines) + "\n"


def node_script(
    *,
    about: str,
    command: Sequence[str],
    env: Mapping[str, str],
    setup: Sequence[str] = (),
    before: Sequence[str] = (),
) -> str:
    """``node.sh``: what every machine runs, from the run folder that it shares with the others.

    It is started as ``bash RUN/launch/node.sh [ARGUMENT...]``, so that no value of the job passes through the
    shell of ssh; ``command`` finds the arguments in ``Raw('"$1"')`` and so on, and the run folder in
    ``MEMLAUNCH_RUN_DIR``.

    Args:
        about: a line that says what it does.
        env: environment variables of the job.
        setup: the user's own lines of shell. They find no standard input: it may be the leash of a node.
        before: lines of ours that stand before the command.
    """
    lines = [
        "#!/usr/bin/env bash",
        f"# {comment(about)}",
        'export MEMLAUNCH_RUN_DIR="$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")"',
        "set -e",
        *(["{ :", *setup, "} </dev/null"] if setup else []),
        *exports(env),
        *before,
        f"exec {join(command)}",
    ]
    return "\n".join(lines) + "\n"

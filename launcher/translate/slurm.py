"""A run as a SLURM job: the sbatch script, and the command that submits it; pure functions, text out.

The script is a bash script that also runs inside an allocation, where its ``#SBATCH`` lines mean nothing.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2

from memlaunch.launcher.translate import shell

Template = Literal["single", "multinode", "array", "preemptible"]

#: What a job must not inherit from another that it was submitted from: it would run with the other's limits.
INHERITED = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_")
KEPT = "SLURM_CONF"

#: Status of ranks that stopped because they were asked to.
STOPPED = 75

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}", re.ASCII)
_SIGNAL = re.compile(r"([RB]{1,2}:)?(SIG)?[A-Z0-9]+(@\d+)?", re.ASCII)
_MEMORY = re.compile(r"\d+[KMGT]?", re.ASCII)
_DEPENDENCY = re.compile(
    r"[a-z]+(:\d+(_(\d+|\*))?(\+\d+)?)*([,?][a-z]+(:\d+(_(\d+|\*))?(\+\d+)?)*)*", re.ASCII
)
_EXTRA = re.compile(r"--[a-z][a-z-]*(=.*)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What is asked of SLURM; each field is the option of sbatch of its name, and None leaves it out.

    Attributes:
        time: a limit as SLURM writes it: ``minutes``, ``hours:minutes:seconds``, ``days-hours:minutes``, ...
        mem: memory of a node, in megabytes or with a unit: ``64G``.
        gpus_per_node: GPUs of a node; not together with ``gres``, which names them as older SLURM does.
        signal: a signal before the time is up: ``TERM@120`` comes to the ranks, 120 seconds before.
        output: where the script's own output goes; SLURM's patterns, such as ``%j``, have their meaning.
        extra: whole options for everything else: ``--licenses=matlab``.

    Raises:
        ValueError: a value that no SLURM takes.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    gres: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    exclusive: bool = False
    requeue: bool | None = None
    signal: str | None = None
    output: str | None = None
    dependency: str | None = None
    comment: str | None = None
    extra: tuple[str, ...] = ()

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "Allocation":
        """The allocation with ``parameters``. Raises ValueError: one of them is not known."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in parameters if name not in known]:
            raise ValueError(f"unknown: {', '.join(unknown)}; SLURM parameters are {', '.join(known)}")
        values = dict(parameters)
        if "extra" in values:
            values["extra"] = tuple(values["extra"])
        return cls(**values)

    def __post_init__(self) -> None:
        formats = {"time": _TIME, "signal": _SIGNAL, "mem": _MEMORY, "dependency": _DEPENDENCY}
        for name, pattern in formats.items():
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise ValueError(f"{name}: `{value}` is not what SLURM takes")
        for name in ("cpus_per_task", "gpus_per_node"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}: {number} is less than 1")
        if self.gpus_per_node is not None and self.gres is not None and "gpu" in self.gres:
            raise ValueError("gpus_per_node and gres both ask for GPUs, and only one of them can")
        for option in self.extra:
            if not _EXTRA.fullmatch(option):
                raise ValueError(f"extra: `{option}` is not an option such as `--licenses=matlab`")

    def options(self) -> list[str]:
        """The options, quoted as they stand behind ``#SBATCH``."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            option = f"--{field.name.replace('_', '-')}"
            if field.name == "extra":
                for name, equals, text in (option.partition("=") for option in value):
                    lines.append(name + equals + (directive(text) if equals else ""))
            elif field.name == "requeue" and value is not None:
                lines.append("--requeue" if value else "--no-requeue")
            elif value is True:
                lines.append(option)
            elif value is not None and value is not False:
                lines.append(f"{option}={directive(str(value))}")
        return lines


def script(
    template: Template | Path,
    allocation: Allocation,
    *,
    name: str,
    nodes: int,
    python: str,
    about: str = "",
    pass_env: Sequence[str] = (),
    runs: Sequence[str] = (),
    at_once: int | None = None,
) -> str:
    """The sbatch script of a run.

    Args:
        template: one of ours, or a file of the user's, which may extend ours.
        name: of the job.
        nodes: how many; one task runs on each.
        python: the interpreter on the nodes.
        about: a line that says what it does.
        pass_env: names of environment variables that the job takes along from where it is submitted; it takes
            no others.
        runs, at_once: of an array: the run folder of each task, and how many may run at the same time.

    Raises:
        ValueError: a value cannot stand in a script; the template has a mistake, or uses what is not there.
        OSError: the user's template cannot be read.
    """
    if isinstance(template, str) and template not in get_args(Template):
        raise ValueError(f"`{template}` is not a template; they are {', '.join(get_args(Template))}")
    for variable in pass_env:
        if not _NAME.fullmatch(variable):
            raise ValueError(f"`{variable}` is not a name for an environment variable")
    if (template == "array") != bool(runs):
        raise ValueError("`runs` belongs to the template `array`, and the template to it")
    if nodes < 1 or (template == "single" and nodes != 1):
        raise ValueError(f"the template `{template}` is not for {nodes} nodes")
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.FileSystemLoader(str(resources.files("memlaunch.deploy") / "slurm")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quote": shlex.quote, "directive": directive, "comment": shell.comment}
    cpus = allocation.cpus_per_task
    try:
        if isinstance(template, Path):
            text = environment.from_string(template.read_text(encoding="utf-8"))
        else:
            text = environment.get_template(f"{template}.sbatch.j2")
        return text.render(
            name=name,
            nodes=nodes,
            python=python,
            about=about,
            cpus=f" --cpus-per-task={cpus}" if cpus else "",
            options=[f"--export={','.join(('MEMLAUNCH_RUN_DIR', *pass_env))}", *allocation.options()],
            runs=list(runs),
            at_once=at_once,
            stopped=STOPPED,
        )
    except jinja2.TemplateError as error:
        where = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"the template `{template}`{where}: {error}") from None


def submit(new_run: Sequence[str]) -> str:
    """``command.sh``: submits ``job.sbatch``, which lies beside it, or runs it inside an allocation.

    Its arguments go on to sbatch: ``--wait``, ``--parsable``. With ``MEMLAUNCH_SUBMIT`` set it submits
    inside an allocation too.

    Args:
        new_run: the command that makes a new run folder from the folder it is given, and prints its path.
    """
    patterns = "|".join(f"{prefix}*" for prefix in INHERITED)
    return f"""\
#!/usr/bin/env bash
# MEMLAUNCH_RUN_DIR names the run folder; without it a new one is made. Arguments are handed on to sbatch.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export MEMLAUNCH_RUN_DIR="${{MEMLAUNCH_RUN_DIR:-$({shell.join(new_run)} "$here")}}"
echo "run folder: $MEMLAUNCH_RUN_DIR" >&2

if [[ -n "${{SLURM_JOB_ID:-}}" && -z "${{MEMLAUNCH_SUBMIT:-}}" ]]; then
    exec bash "$MEMLAUNCH_RUN_DIR/launch/job.sbatch"
fi

# Of a job that this may run in, the new one inherits nothing.
for name in $(compgen -e); do
    case "$name" in
        {KEPT}) ;;
        {patterns}) unset "$name" ;;
    esac
done
# A percent sign in the name of the folder is not a pattern of SLURM's.
exec sbatch --chdir="$MEMLAUNCH_RUN_DIR" --output="${{MEMLAUNCH_RUN_DIR//%/%%}}/logs/slurm-%j.log" "$@" \\
    "$MEMLAUNCH_RUN_DIR/launch/job.sbatch"
"""


def without_inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` less what a new job must not inherit from the one that submits it."""
    return {name: v for name, v in environment.items() if name == KEPT or not name.startswith(INHERITED)}


def directive(text: str) -> str:
    """``text`` as a value behind ``#SBATCH``, which sbatch takes apart much as a shell would.

    Raises:
        ValueError: it holds a control character, such as a line break, which no such line can.
    """
    if _CONTROL.search(text):
        raise ValueError(f"{text!r} holds a control character, which no #SBATCH line can")
    return shlex.quote(text)

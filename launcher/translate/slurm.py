"""A run as a SLURM job: the sbatch script, and the command that submits it; pure functions, text out.

The script is a bash script that also runs inside an allocation, where its ``#SBATCH`` lines mean nothing.
"""

import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from memlaunch.launcher.paths import read_small
from memlaunch.launcher.translate import hosts, shell, torchrun
from memlaunch.launcher.translate.shell import Raw
from memlaunch.strategies.settings import Settings

if TYPE_CHECKING:
    from memlaunch.launcher.resolve import ResolvedJob

Template = Literal["single", "multinode", "array", "preemptible"]

#: What a job must not inherit from another that it was submitted from: it would run with the other's limits.
INHERITED = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_")
KEPT = "SLURM_CONF"

#: What tells a step which allocation it is to run in, as patterns of bash.
ALLOCATION = "SLURM_JOB_*|SLURM_JOBID|SLURM_NODELIST|SLURM_TASKS_PER_NODE|SLURM_CLUSTER_NAME"

#: Seconds that torchrun leaves the ranks for their step and a checkpoint when SLURM asks them to stop.
SHUTDOWN = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}

_TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}", re.ASCII)
_SIGNAL = re.compile(r"([RB]{1,2}:)?(SIG)?[A-Z0-9]+(@\d+)?", re.ASCII)
_MEMORY = re.compile(r"\d+[KMGT]?", re.ASCII)
_DEPENDENCY = re.compile(
    r"[a-z]+(:\d+(_(\d+|\*))?(\+\d+)?)*([,?][a-z]+(:\d+(_(\d+|\*))?(\+\d+)?)*)*", re.ASCII
)
_EXTRA = re.compile(r"--[a-z][a-z-]*(=.*)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _takes(pattern: re.Pattern[str], example: str) -> AfterValidator:
    """A value as SLURM writes it."""

    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"`{value}` is not what SLURM takes; write it such as `{example}`")
        return value

    return AfterValidator(check)


def _on_one_line(value: str) -> str:
    directive(value)
    return value


Word = Annotated[str, Field(min_length=1), AfterValidator(_on_one_line)]


class SlurmSettings(Settings):
    """What is asked of SLURM; each key is the option of sbatch of its name, and is left out where it is null.

    Nodes, tasks and GPUs follow from the other keys of `cluster`.
    """

    template: str | None = Field(
        default=None,
        min_length=1,
        description="The sbatch script: `single`, `multinode`, `preemptible`, or a file of your own, which "
        "may extend one of them. Default: by `nodes` and `requeue`.",
    )
    partition: Word | None = Field(default=None, description="Where the job queues.")
    account: Word | None = Field(default=None, description="Who is charged.")
    qos: Word | None = Field(default=None, description="The quality of service.")
    time: Annotated[str, _takes(_TIME, "1-12:00:00")] | None = Field(
        default=None, description="The time limit: minutes, `hours:minutes:seconds` or `days-hours:minutes`."
    )
    mem: Annotated[str, _takes(_MEMORY, "64G")] | None = Field(
        default=None, description="Memory of a node, in megabytes or with a unit."
    )
    cpus_per_task: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="CPUs of a node, for all of its ranks; default: as many as they have threads.",
    )
    gres: Word | None = Field(
        default=None,
        description="GPUs of a node as older clusters name them, such as `gpu:a100:4`; default: as many as "
        "`gpus_per_node`, where `device` is `cuda`.",
    )
    constraint: Word | None = Field(default=None, description="Features that the nodes must have.")
    reservation: Word | None = Field(default=None, description="The reservation to run in.")
    nodelist: Word | None = Field(default=None, description="Nodes that must be among those of the job.")
    exclude: Word | None = Field(default=None, description="Nodes that must not.")
    exclusive: bool = Field(default=False, description="Share no node with another job.")
    requeue: bool | None = Field(
        default=None,
        description="Queue again after a preemption, a lost node or the time limit, and go on from the last "
        "checkpoint.",
    )
    signal: Annotated[str, _takes(_SIGNAL, "TERM@120")] | None = Field(
        default=None, description="A signal before the time is up, with the seconds that it comes before."
    )
    output: Word | None = Field(
        default=None, description="Where what the script prints goes; default: `logs/` of the run folder."
    )
    dependency: Annotated[str, _takes(_DEPENDENCY, "afterok:1234")] | None = Field(
        default=None, description="Jobs to wait for."
    )
    comment: Word | None = Field(default=None, description="A comment for the accounting.")
    extra: list[Annotated[str, _takes(_EXTRA, "--licenses=matlab"), AfterValidator(_on_one_line)]] = Field(
        default_factory=list, description="Whole options of sbatch for everything else."
    )

    def options(self) -> list[str]:
        """The options, quoted as they stand behind ``#SBATCH``."""
        lines = []
        for field in type(self).model_fields:
            value = getattr(self, field)
            option = f"--{field.replace('_', '-')}"
            if field == "template":
                continue
            if field == "extra":
                for name, equals, text in (option.partition("=") for option in value):
                    lines.append(name + equals + (directive(text) if equals else ""))
            elif field == "requeue" and value is not None:
                lines.append("--requeue" if value else "--no-requeue")
            elif value is True:
                lines.append(option)
            elif value is not None and value is not False:
                lines.append(f"{option}={directive(str(value))}")
        return lines


def files(resolved: "ResolvedJob", python: str) -> dict[str, str]:
    """``command.sh``, ``job.sbatch`` and ``node.sh``.

    Raises:
        ValueError: as :func:`script`.
        OSError: the user's template cannot be read.
    """
    layout = resolved.layout
    return {
        "command.sh": shell.start_script(
            about=hosts.about(resolved), python=python, body=_submit(layout.nodes)
        ),
        "job.sbatch": _script(resolved, template(resolved.job.cluster.slurm, layout.nodes), python),
        "node.sh": hosts.node(resolved, [*hosts.guard(python), *_ranks(resolved, python)], SHUTDOWN),
    }


def _script(resolved: "ResolvedJob", chosen: Template | Path, python: str, runs: Sequence[str] = ()) -> str:
    cluster, layout = resolved.job.cluster, resolved.layout
    asked = cluster.slurm
    wants_gpus = cluster.device == "cuda" and asked.gres is None
    cpus = asked.cpus_per_task or layout.largest * resolved.threads_per_rank
    return script(
        chosen,
        asked.model_copy(update={"cpus_per_task": cpus}),
        name=resolved.job.name,
        nodes=layout.nodes,
        gpus=layout.largest if wants_gpus else None,
        python=python,
        about=hosts.about(resolved),
        pass_env=cluster.pass_env,
        runs=runs,
    )


def array(resolved: "ResolvedJob", runs: Sequence[str], python: str) -> str:
    """The sbatch script of several runs that ask for the same; ``runs`` are their folders."""
    return _script(resolved, "array", python, runs)


def template(settings: SlurmSettings, nodes: int) -> Template | Path:
    """The template of a job: the one it names, or the one that its nodes and ``requeue`` call for."""
    if settings.template is None:
        return "preemptible" if settings.requeue else "single" if nodes == 1 else "multinode"
    ours: tuple[Template, ...] = get_args(Template)
    return next((name for name in ours if name == settings.template), Path(settings.template))


def _ranks(resolved: "ResolvedJob", python: str) -> Sequence[str]:
    """The ranks of one node."""
    layout = resolved.layout
    if layout.nodes == 1:
        return torchrun.standalone(python, layout.ranks)
    return torchrun.meeting(
        python,
        nodes=layout.nodes,
        node=Raw('"$SLURM_PROCID"'),
        address=Raw('"$MASTER_ADDR"'),
        port=Raw('"$MASTER_PORT"'),
        ranks=str(layout.largest),
    )


def gpus_in(gres: str) -> int | None:
    """GPUs that ``gres`` asks for: 4 of ``gpu:a100:4``; None where it asks for none."""
    found = re.search(
        r"(?:^|,)(?:gres[:/])?gpu(?::[^:,=()]+)??(?:[:=]([0-9]{1,9}))?(?:\([^)]*\))?(?=,|$)", gres
    )
    return int(found[1] or 1) if found else None


def script(
    chosen: Template | Path,
    settings: SlurmSettings,
    *,
    name: str,
    nodes: int,
    python: str,
    gpus: int | None = None,
    about: str = "",
    pass_env: Sequence[str] = (),
    runs: Sequence[str] = (),
) -> str:
    """The sbatch script of a run.

    Args:
        chosen: the template, one of ours, or a file of the user's, which may extend ours.
        name: of the job.
        nodes: how many; one task runs on each.
        gpus: of a node; None asks for none.
        python: the interpreter on the nodes.
        about: a line that says what it does.
        pass_env: names of environment variables that the job takes along from where it is submitted; it takes
            no others.
        runs: the run folder of each task of an array.

    Raises:
        ValueError: a value cannot stand in a script; the template has a mistake, or uses what is not there.
        OSError: the user's template cannot be read.
    """
    from jinja2 import FileSystemLoader, StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if (chosen == "array") != bool(runs):
        raise ValueError("`runs` belongs to the template `array`, and the template to it")
    if nodes < 1 or (chosen == "single" and nodes != 1):
        raise ValueError(f"the template `{chosen}` is not for {nodes} nodes")
    # A template only makes text: what it could run, it would run where a job is no more than looked at.
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(str(resources.files("memlaunch.deploy") / "slurm")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quote": shlex.quote, "directive": directive, "comment": shell.comment}
    options = [f"--export={','.join(('MEMLAUNCH_RUN_DIR', *pass_env))}"]
    if gpus is not None:
        options.append(f"--gpus-per-node={gpus}")
    cpus = settings.cpus_per_task
    own = read_small(chosen).decode() if isinstance(chosen, Path) else None
    try:
        if own is not None:
            text = environment.from_string(own)
        else:
            text = environment.get_template(f"{chosen}.sbatch.j2")
        return text.render(
            name=name,
            nodes=nodes,
            python=python,
            about=about,
            cpus=f" --cpus-per-task={cpus}" if cpus else "",
            options=[*options, *settings.options()],
            runs=list(runs),
            attempts=shell.join(hosts.attempts(python)),
        )
    except Exception as error:  # a template is a program, whose mistakes are of any kind
        where = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(f"the template `{chosen}`{where}: {error}") from None


def _submit(nodes: int) -> list[str]:
    """The body of ``command.sh``: submits ``job.sbatch``, or runs it inside an allocation.

    Its arguments go on to sbatch: ``--wait``, ``--parsable``. With ``MEMLAUNCH_SUBMIT`` set it submits
    inside an allocation too.
    """
    patterns = "|".join(f"{prefix}*" for prefix in INHERITED)
    return f"""\
inside="${{SLURM_JOB_ID:-}}"
if [[ -n "${{MEMLAUNCH_SUBMIT:-}}" ]]; then inside=""; fi
if [[ -n "$inside" ]] && ((${{SLURM_JOB_NUM_NODES:-{nodes}}} < {nodes})); then
    echo "error: the job wants {nodes} nodes, and the allocation has $SLURM_JOB_NUM_NODES" >&2
    echo "hint: ask for more nodes, or lower cluster.nodes" >&2
    exit 4
fi

# Of a job or a step that this may run in, a new one inherits nothing but, inside, which allocation it is.
for name in $(compgen -e); do
    case "$name" in
        {KEPT}) ;;
        {ALLOCATION}) if [[ -z "$inside" ]]; then unset "$name"; fi ;;
        {patterns}) unset "$name" ;;
    esac
done
if [[ -n "$inside" ]]; then exec bash "$MEMLAUNCH_RUN_DIR/launch/job.sbatch"; fi
# A percent sign in the name of the folder is not a pattern of SLURM's.
exec sbatch --chdir="$MEMLAUNCH_RUN_DIR" --output="${{MEMLAUNCH_RUN_DIR//%/%%}}/logs/slurm-%j.log" "$@" \\
    "$MEMLAUNCH_RUN_DIR/launch/job.sbatch"
""".splitlines()


def directive(text: str) -> str:
    """``text`` as a value behind ``#SBATCH``, which sbatch takes apart much as a shell would.

    Raises:
        ValueError: it holds a control character, such as a line break, which no such line can.
    """
    if _CONTROL.search(text):
        raise ValueError(f"{text!r} holds a control character, which no #SBATCH line can")
    return shlex.quote(text)

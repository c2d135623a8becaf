"""The command ``memlaunch``: each subcommand a few lines that call the room that does it."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlaunch.launcher.errors import UserError, wants_colour

if TYPE_CHECKING:
    from memlaunch.launcher.job import Job
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.strategies.technique import Conflict

app = typer.Typer(
    help="Train under tight GPU memory: one job file, on one GPU, a machine or a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file, such as job.json.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value for a key, such as training.max_steps=10 or strategy.freeze[0]=embeddings. "
        "JSON, or else a string. May be given several times.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. A user's mistake is told on stderr, without a traceback."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="memlaunch")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        print(error.render(wants_colour()), file=sys.stderr)
        return error.exit_code
    return 0


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"memlaunch {version('memlaunch')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def run(
    job: JobFile,
    sets: Sets = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow a job that goes to SLURM to its end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")
    ] = False,
) -> None:
    """Train. Prints the run folder last."""
    from memlaunch.launcher import launch, resolve, translate

    document = resolve.read(job, sets or ())
    resolved = resolve.from_document(document, job)
    if dry_run:
        for name, text in translate.files(resolved).items():
            print(f"==> {name} <==\n{text}")
        return
    raise typer.Exit(launch.run(resolved, document, wait=wait))


@app.command()
def validate(
    job: JobFile,
    sets: Sets = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also build the model, without its weights, and look its modules up."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job file, its paths, its batch sizes and its strategy, without starting anything."""
    from memlaunch.launcher import resolve

    try:
        resolved = resolve.load(job, sets or (), _deep_check if deep else None)
    except UserError as error:
        if as_json:
            print(json.dumps({"valid": False, **error.to_dict()}, indent=2, ensure_ascii=False))
            raise typer.Exit(error.exit_code) from None
        raise
    if as_json:
        report = {"valid": True, "message": None, "hint": None, "problems": [], **_figures(resolved)}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(f"{job} is valid: {resolved.summary()}", file=sys.stderr)


@app.command()
def plan(job: JobFile, sets: Sets = None, as_json: AsJson = False) -> None:
    """Work out what a run will be like: its batches over the job's own data."""
    from memlaunch.launcher import plan as planning
    from memlaunch.launcher import resolve

    document = resolve.read(job, sets or ())
    figures = planning.batches(resolve.from_document(document, job), document)
    print(json.dumps({"batches": figures}, indent=2) if as_json else planning.table(figures))


@app.command()
def translate(
    job: JobFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write into.")],
    sets: Sets = None,
) -> None:
    """Write the files that a run is started with; they run by hand: bash DIR/command.sh."""
    from memlaunch.launcher import resolve
    from memlaunch.launcher import translate as translation

    files = translation.files(resolve.load(job, sets or ()))
    if out.exists() and not out.is_dir():
        raise UserError(f"`{out}` is a file", "name a folder for `--out`")
    if out.is_dir() and {path.name for path in out.iterdir()} - set(files):
        raise UserError(f"the folder `{out}` holds other files", "name a new or an empty folder for `--out`")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a job file, for editors."""
    from memlaunch.launcher.job import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def init(
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="The training data.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A Hugging Face id, a folder, or package:NAME/FOLDER.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="sequence-classification or causal-lm.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs to use; 0 is the CPU.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The job file to write.")] = Path(
        "job.json"
    ),
) -> None:
    """Write a first job file, from a look at the data and the machine. Asks for what is not given."""
    from memlaunch.launcher import init as first

    interactive = sys.stdin.isatty() and sys.stderr.isatty()
    answers = first.Answers(data=data, model=model, task=task, gpus=gpus, out=out)
    resolved = first.write(answers, _ask if interactive else None)
    print(f"{out} is valid: {resolved.summary()}", file=sys.stderr)
    print(out)


def _deep_check(job: "Job", base: Path) -> "Iterable[Conflict]":
    from memlaunch.launcher import deep

    return deep.check(job, base)


def _ask(question: str, default: str | None) -> str:
    try:
        answer: str = typer.prompt(question, default=default, err=True)
    except typer.Abort:  # what typer makes of Ctrl-C here, with an exit code of 1
        raise KeyboardInterrupt from None
    return answer


def _figures(resolved: "ResolvedJob") -> dict[str, Any]:
    batch = resolved.batch
    return {
        "name": resolved.job.name,
        "world_size": resolved.world_size,
        "global_batch_size": batch.global_batch_size,
        "micro_batch_size": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
    }


if __name__ == "__main__":
    sys.exit(main())

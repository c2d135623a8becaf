"""The command ``memlaunch``: each subcommand a few lines that call the room that does it."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memlaunch.launcher.errors import EXIT_MEMORY, UserError, wants_colour

if TYPE_CHECKING:
    from memlaunch.launcher.job import Job
    from memlaunch.launcher.resolve import ResolvedJob
    from memlaunch.launcher.source import Document
    from memlaunch.strategies.technique import Conflict

app = typer.Typer(
    help="Train under tight GPU memory: one job file, on one GPU, a machine or a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete(kind: str) -> dict[str, Any]:
    """What a shell completes a word to; :mod:`memlaunch.launcher.completion` is loaded only when it asks."""

    def words(incomplete: str) -> list[str]:
        from memlaunch.launcher import completion

        return completion.words(kind, incomplete)

    return {"autocompletion": words}


_DATA, _TASK = _complete("data"), _complete("task")

JobFile = Annotated[
    Path, typer.Argument(metavar="JOB", help="The job file, such as job.json.", **_complete("job"))
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, as `run` prints it.", **_complete("run"))
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value for a key, such as training.max_steps=10 or strategy.freeze[0]=embeddings. "
        "JSON, or else a string. May be given several times.",
        **_complete("set"),
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
    resume: Annotated[
        str,
        typer.Option(
            metavar="never|auto|PATH",
            help="Go on with the newest run of the job, or with the run or the checkpoint at PATH.",
        ),
    ] = "never",
    force: Annotated[
        bool,
        typer.Option("--force", help="Go on although the job learns something else now, or will not fit."),
    ] = False,
    planned: Annotated[
        bool, typer.Option("--plan", help='Plan the job first, although nothing in it is "auto".')
    ] = False,
) -> None:
    """Train. Prints the run folder last."""
    from memlaunch.launcher import launch, resolve, translate

    document = resolve.read(job, sets or ())
    resolved = resolve.from_document(document, job, _check)
    if dry_run or not launch.stands_by(resolved):
        resolved = _planned(resolved, document, job, always=planned, force=force, go_on=resume)
    if dry_run:
        for name, text in translate.files(resolved).items():
            print(f"==> {name} <==\n{text}")
        return
    raise typer.Exit(launch.run(resolved, document, wait=wait, go_on=resume, force=force))


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
        resolved = resolve.load(job, sets or (), _deep_check if deep else _check)
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
        _say_model(resolved)
        unplanned = resolved.job.script is not None or resolved.job.model.entry is not None
        _next("run" if unplanned else "plan", str(job), *(f"--set={one}" for one in sets or ()))


@app.command()
def plan(
    job: JobFile,
    sets: Sets = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="On this GPU, such as H100-80GB; default: as it would run.",
            **_complete("gpu"),
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="On so many machines.")] = None,
    probed: Annotated[
        bool,
        typer.Option(
            "--probe", help="Also try it on the machines of the job: two steps, and nothing is kept."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Work out what a run will be like: its batches over the job's own data, its memory and its time."""
    from memlaunch.launcher import plan as planning
    from memlaunch.launcher import resolve
    from memlaunch.launcher.plan import choice, machine, memory, probe, report
    from memlaunch.launcher.plan.traces import Tracer, default_cache

    if probed and (gpu or nodes):
        raise UserError("a probe runs on the machines of the job", "leave out `--gpu` and `--nodes`")
    document = resolve.read(job, sets or ())
    resolved = resolve.from_document(document, job, _check)
    memory.check(resolved)
    on = machine.of(resolved, gpu)
    with Tracer(on.device, cache=default_cache()) as tracer:
        parts: dict[str, Any] = {"batches": planning.batches(resolved, document, tracer)}
        parts |= memory.plan(document, resolved, on, nodes, tracer)
    if probed:
        parts["probe"] = probe.probe(choice.settled(resolved, document, job, parts, _check), document)
    if as_json:
        print(json.dumps(parts, indent=2))
    else:
        print(planning.table(parts["batches"]))
        print(f"\n{report.text(parts)}")
    if probed and not as_json:
        print(f"\n{probe.text(parts['probe'])}")
    if parts.get("probe", parts)["fits"] is not False and not as_json:
        _next("run", str(job), *(f"--set={one}" for one in sets or ()))
    if not parts.get("probe", parts)["fits"]:
        raise typer.Exit(EXIT_MEMORY)


@app.command()
def translate(
    job: JobFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write into.")],
    sets: Sets = None,
) -> None:
    """Write the files that a run is started with; they run by hand: bash DIR/command.sh."""
    from memlaunch.launcher import resolve
    from memlaunch.launcher import translate as translation

    document = resolve.read(job, sets or ())
    resolved = resolve.from_document(document, job, _check)
    files = translation.files(_planned(resolved, document, job))
    if out.exists() and not out.is_dir():
        raise UserError(f"`{out}` is a file", "name a folder for `--out`")
    if out.is_dir() and {path.name for path in out.iterdir()} - set(files):
        raise UserError(f"the folder `{out}` holds other files", "name a new or an empty folder for `--out`")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).touch(mode=0o600)  # the environment of the job is among it
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)


@app.command()
def submit(
    jobs: Annotated[
        list[Path],
        typer.Argument(metavar="JOB...", help="Job files; several become an array.", **_complete("job")),
    ],
    sets: Sets = None,
) -> None:
    """Submit a job to SLURM, or several as one array. Prints the run folders."""
    from memlaunch.launcher import launch, resolve

    documents = [resolve.read(job, sets or ()) for job in jobs]
    read = [resolve.from_document(*pair, _check) for pair in zip(documents, jobs, strict=True)]
    for one in read:
        if one.job.cluster.launcher != "slurm":
            raise UserError(
                f"`{one.job.cluster.launcher}` has no queue to submit to",
                "use `memlaunch run`, or set `cluster.launcher` to `slurm`",
            )
    resolved = [_planned(*job) for job in zip(read, documents, jobs, strict=True)]
    if len(jobs) > 1:
        folders = launch.submit_array(list(zip(resolved, documents, strict=True)))
    else:
        folders = [launch.create(resolved[0], documents[0])]
        launch.submit(folders[0])
    for folder in folders:
        print(folder.path)


@app.command()
def status(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A run folder; default: all below `runs`.", **_complete("run")),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run stands, or all of them."""
    from memlaunch.launcher import runs

    if run is None:
        shown = [runs.status(one) for one in runs.newest_first(Path("runs"))]
        print(json.dumps({"runs": shown}, indent=2) if as_json else "\n".join(map(runs.summary, shown)))
    else:
        one = runs.status(runs.find(run))
        print(json.dumps(one, indent=2) if as_json else runs.summary(one))


@app.command()
def logs(
    run: RunFolder,
    rank: Annotated[int | None, typer.Option(min=0, help="Default: the one that failed, or 0.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run ends.")] = False,
) -> None:
    """Print the log of a rank."""
    from memlaunch.launcher import runs

    found = runs.find(run)
    path = runs.log(found, rank)
    if not follow:
        sys.stdout.write(path.read_text(encoding="utf-8", errors="replace"))
        return
    for text in runs.follow(found, path):
        sys.stdout.write(text)
        sys.stdout.flush()


@app.command()
def stop(
    run: RunFolder,
    now: Annotated[bool, typer.Option("--now", help="End it at once.")] = False,
) -> None:
    """Ask a run to stop behind the step it is in, with a checkpoint to go on from."""
    from memlaunch.launcher import runs

    print(runs.stop(runs.find(run), now=now), file=sys.stderr)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Several are compared.", **_complete("run"))
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page to write; default for a single run: in it."),
    ] = None,
) -> None:
    """Write a page of HTML that shows what became of a run, or of several side by side. Prints its path."""
    from memlaunch.launcher import report as room

    print(room.write(folders, out))


@app.command()
def doctor(
    job: Annotated[
        Path | None,
        typer.Argument(metavar="JOB", help="Default: none, and this machine alone.", **_complete("job")),
    ] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Ask every node whether a job would run there, before it does."""
    from memlaunch.launcher import doctor as room
    from memlaunch.launcher import resolve

    if job is None and sets:
        raise UserError("`--set` changes a job, and there is none", "name the job file")
    resolved = None if job is None else resolve.load(job, sets or (), _check)
    raise typer.Exit(room.run(resolved, as_json=as_json))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a job file, for editors."""
    from memlaunch.launcher.job import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def init(
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="The training data; default: the one here.", **_DATA),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A Hugging Face id, a folder, or package:NAME/FOLDER.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="sequence-classification or causal-lm.", **_TASK)
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="COLUMN", help="The column of the text.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", metavar="COLUMN", help="The column of the class.")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs to use; 0 is the CPU.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The job file to write.")] = Path(
        "job.json"
    ),
) -> None:
    """Write a first job file, from a look at the data and the machine. Asks for what is not given."""
    from memlaunch.launcher import init as first

    interactive = sys.stdin.isatty() and sys.stderr.isatty()
    answers = first.Answers(data=data, model=model, task=task, text=text, label=label, gpus=gpus, out=out)
    resolved = first.write(answers, _ask if interactive else None, lambda said: print(said, file=sys.stderr))
    print(f"{out} is valid: {resolved.summary()}", file=sys.stderr)
    _say_model(resolved)
    _next("validate", str(out))
    print(out)


def _planned(resolved: "ResolvedJob", document: "Document", job: Path, **how: Any) -> "ResolvedJob":
    """The job with nothing left open; the planner is loaded only where there is something to plan."""
    if not (resolved.open or how.get("always")):
        return resolved
    from memlaunch.launcher.plan import choice

    return choice.made(resolved, document, job, _check, **how)


def _check(job: "Job", base: Path) -> "Iterable[Conflict]":
    from memlaunch.launcher import deep

    return deep.check_keys(job, base)


def _deep_check(job: "Job", base: Path) -> "Iterable[Conflict]":
    from memlaunch.launcher import deep

    return [*deep.check_keys(job, base), *deep.check(job, base)]


def _next(*words: str) -> None:
    """Name the command to type next."""
    print(f"next: {shlex.join(['memlaunch', *words])}", file=sys.stderr)


def _say_model(resolved: "ResolvedJob") -> None:
    """Say where the model comes from, where that is not this machine."""
    from memlaunch.launcher import model_files

    if (note := model_files.to_fetch(resolved.job.model.path)) is not None:
        print(note, file=sys.stderr)


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
        "auto": sorted(resolved.open),
    }


if __name__ == "__main__":
    sys.exit(main())

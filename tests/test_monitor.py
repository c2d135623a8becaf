"""What a run shows on the terminal that it was started on, and where there is none."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memlaunch.launcher import monitor, resolve, rundir
from memlaunch.launcher.rundir import RunDir

JOB = Path(__file__).parents[1] / "examples" / "reviews" / "job.json"
STARTED = {
    "model": "BertModel", "parameters": 22_713_986, "trainable": 19_165_058,
    "world_size": 2, "device": "CPU", "steps": 4,
}  # fmt: skip

#: Plays the ranks: a run of four steps, which is started again behind the second.
RANKS = """
import json, sys
from pathlib import Path
from memlaunch.launcher.monitor import Monitor
from memlaunch.launcher.rundir import RunDir

folder = RunDir(Path(sys.argv[1]))
started = json.loads(sys.argv[2])
with Monitor(folder) as monitor:
    def attempt(first, last):
        for _ in range(2):
            folder.append_event("warning", message="the override `x[0]` matches frozen parameters only")
        folder.append_event("started", **started)
        for step in range(first, last + 1):
            folder.append_metrics({
                "step": step, "loss": 1 / step, "skipped": step == 3, "tokens": 90, "padded_tokens": 100,
                "tokens_per_second": 1234.5, "step_seconds": 40.0, "peak_memory_bytes": 3 * 2**29,
            })
            monitor.update()
    attempt(1, 2)
    folder.append_event("restarted", step=2, left=0, because="rank 1 on b: killed by signal 9 (Killed)")
    folder.append_event("resumed", step=2)
    attempt(3, 4)
    folder.append_metrics({"step": 4, "eval_loss": 0.25, "eval_accuracy": 0.5})
    monitor.update()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    """The folder of a run of the example, with a plan."""
    run = rundir.create(tmp_path, "reviews")
    plan = {"peak_allocated_bytes": 3 * 2**30, "gpu_memory_bytes": 24 * 2**30, "step_seconds": 0.5}
    run.place({"resolved.json": resolve.load(JOB).to_json()})
    run.plan.write_text(json.dumps(plan))
    return run


def shown(folder: RunDir, **environment: str) -> str:
    """What the run prints into a pipe."""
    command = [sys.executable, "-c", RANKS, str(folder.path), json.dumps(STARTED)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "", "stdout is for data"
    return done.stderr


def drawn(folder: RunDir, **environment: str) -> str:
    """What the run sends to a terminal of 100 columns."""
    leader, follower = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-c", RANKS, str(folder.path), json.dumps(STARTED)],
        env={**inherited, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", **environment},
        stdin=follower, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # of a terminal whose other end has gone
            break
        if not data:
            break
        seen += data
    os.close(leader)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_without_a_terminal_there_are_plain_lines(folder: RunDir) -> None:
    text = shown(folder)
    assert "\x1b" not in text
    assert text.splitlines() == [
        "warning: the override `x[0]` matches frozen parameters only",
        "BertModel: 22,713,986 parameters, 19,165,058 trainable; 2 rank(s) on CPU; 4 steps",
        "DeepSpeed ZeRO-2, fp32, 8-bit AdamW, full checkpointing, `encoder.layer[:2]` frozen",
        "predicted: 3.0 GiB at the peak of a rank, of 24.0 GiB; 0.5 s a step",
        "step 1/4: loss 1  1,234 tokens/s  90 % real  1.5 GiB  2:00 left",
        "rank 1 on b: killed by signal 9 (Killed); restarting, 0 more times at most",
        "goes on behind step 2",
        "step 4/4: loss 0.25  1,234 tokens/s  90 % real  1.5 GiB",
        "step 4: eval_loss 0.25, eval_accuracy 0.5",
    ]


def test_on_a_terminal_there_is_a_bar(folder: RunDir) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn(folder))
    bar = [line for line in re.split(r"[\r\n]+", text) if re.match(r"step \d/4 \S+ loss", line)]
    assert bar, text
    assert bar[-1].startswith(f"step 4/4 {'━' * 20} loss 0.25  1,234 tokens/s  90 % real  1.5 GiB")
    assert text.count("warning: the override") == 1, "once, not once an attempt"
    assert "starting the ranks" in text, "something is there before the ranks train"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_a_user_who_wants_no_colour_gets_lines(folder: RunDir, environment: dict[str, str]) -> None:
    text = drawn(folder, **environment)
    assert "\x1b" not in text
    assert "step 4/4: loss 0.25" in text


def ended(folder: RunDir, code: int, *events: tuple[str, dict[str, Any]]) -> list[str]:
    for event, details in events:
        folder.append_event(event, **details)
    line = {"step": 3, "loss": 0.5}
    folder.append_metrics(line)
    return monitor.summary(folder, code, "my job.json").splitlines()


def test_a_run_that_is_done_says_where_things_are(folder: RunDir) -> None:
    folder.model.mkdir()
    folder.report.touch()
    lines = ended(folder, 0, ("started", {"steps": 3}), ("finished", {"steps": 3}))
    assert lines == [
        "finished in 0:00, 3 steps, loss 0.5",
        f"model:  {folder.model}",
        f"report: {folder.report}",
        f"logs:   {folder.logs}",
        f"next: memlaunch report {folder.path}",
    ]


def test_a_run_that_was_stopped_says_how_it_goes_on(folder: RunDir) -> None:
    assert ended(folder, 75, ("started", {"steps": 9}), ("stopped", {})) == [
        "stopped behind step 3",
        "next: memlaunch run 'my job.json' --resume auto",
    ]


def test_a_run_that_failed_leads_to_the_log(folder: RunDir) -> None:
    failure = {"rank": 1, "host": "b", "exit_code": 5, "message": "killed", "hint": "look", "status": -9}
    lines = ended(folder, 5, ("started", {"steps": 9}), ("failed", failure))
    assert lines == [f"next: memlaunch logs {folder.path}"]

"""Ranks that fail or hang are started again, and go on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from memlaunch.launcher.rundir import RunDir, read_lines

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews"
MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]


@pytest.fixture
def job(tmp_path: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """A tiny model with dropout on two ranks, with a checkpoint every two steps."""
    lines = (REVIEWS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:60]), encoding="utf-8")
    config = {
        "vocab_size": 30522,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return {
        "model": {"architecture": "bert", "config": config, "tokenizer": str(tokenizer_folder)},
        "data": {"train": "train.jsonl", "max_length": 24},
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 40},
        "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1, "max_restarts": 1},
        "output": {"checkpoint_every_steps": 2},
    }


class Run:
    """``memlaunch run`` of a job, while it goes on."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        path = folder / "job.json"
        path.write_text(json.dumps(job, indent=2))
        self._runs = folder / "runs" / "job"
        before = set(self._runs.iterdir()) if self._runs.exists() else set()
        self.process = subprocess.Popen(
            [*MEMLAUNCH, "run", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: self._runs.exists() and set(self._runs.iterdir()) != before)
        (new,) = set(self._runs.iterdir()) - before
        self.folder = RunDir(new)

    def losses(self) -> list[float]:
        return [line["loss"] for line, _ in read_lines(self.folder.metrics)]

    def events(self) -> list[str]:
        return [event["event"] for event, _ in read_lines(self.folder.events)]

    def worker(self, rank: int) -> psutil.Process:
        """The process of a rank that trains."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        workers = [child for child in children if "memlaunch.launcher.worker" in child.cmdline()]
        return next(worker for worker in workers if worker.environ()["RANK"] == str(rank))

    def end(self) -> tuple[int, str]:
        """(exit code, what it said)."""
        said = self.process.communicate(timeout=300)[1]
        return self.process.returncode, said


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


@pytest.fixture
def undisturbed(job: dict[str, Any], tmp_path: Path) -> Iterator[list[float]]:
    run = Run(tmp_path, job)
    assert run.end()[0] == 0
    losses = run.losses()
    assert len(losses) == 40
    return losses


def test_a_rank_that_dies_is_started_again_with_the_others(
    job: dict[str, Any], tmp_path: Path, undisturbed: list[float]
) -> None:
    run = Run(tmp_path, job)
    wait_until(lambda: "checkpoint" in run.events())
    run.worker(1).kill()
    code, said = run.end()
    assert code == 0, said
    assert run.losses() == undisturbed
    assert run.events().count("restarted") == 1
    assert run.events()[-1] == "finished"
    assert "rank 1" in said
    assert "restarting" in said


def test_ranks_that_hang_say_where_and_are_started_again(
    job: dict[str, Any], tmp_path: Path, undisturbed: list[float]
) -> None:
    job["cluster"]["hang_timeout"] = 4
    run = Run(tmp_path, job)
    wait_until(lambda: "checkpoint" in run.events())
    os.kill(run.worker(1).pid, signal.SIGSTOP)
    code, said = run.end()
    assert code == 0, said
    assert run.losses() == undisturbed
    assert run.events().count("hung") == 1
    stacks = run.folder.rank_log(0).read_text()
    assert "Fatal Python error: Aborted" in stacks
    assert "in _optimizer_step" in stacks
    assert "made no step for too long" in said


def test_a_failure_that_repeats_behind_the_same_step_ends_the_run(
    job: dict[str, Any], tmp_path: Path
) -> None:
    job["training"]["learning_rate"] = 1e30
    job["cluster"]["max_restarts"] = 5
    run = Run(tmp_path, job)
    code, said = run.end()
    assert code == 5, said
    assert run.events().count("restarted") == 1
    assert "it failed twice behind step" in said
    assert "learning_rate" in said


def test_a_mistake_in_the_job_is_not_tried_again(job: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("not json\n")
    run = Run(tmp_path, job)
    code, said = run.end()
    assert code == 2, said
    assert "restarted" not in run.events()

"""Whatever is killed, and whenever: the run goes on from its last checkpoint and ends as if nothing had been.

``make kill-matrix`` runs every case; the ordinary run a sample. What a node does that is cut off is in
``tests/cluster/test_node_cut.py``.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file

from memlaunch.launcher import resolve, rundir, translate
from memlaunch.launcher.rundir import RunDir
from tests import ranks

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews" / "train.jsonl"
MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]
#: Every process of a case has this variable, by which what is left running is found.
MARK = "MEMLAUNCH_TEST_CASE"

STEPS = 30
EVERY = 5
LIMIT_SECONDS = 120.0

EIGHT_BIT = {"bits": 8, "overrides": [{"modules": "*embeddings*", "bits": 32}]}
FP16 = {"dtype": "fp16", "initial_scale": 2.0**20, "growth_interval": 3, "hysteresis": 1}

STRATEGIES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {"zero": {"stage": 3}},
    "ZeRO-1": {"engine": "deepspeed", "zero": {"stage": 1}},
    "ZeRO-2": {"engine": "deepspeed", "zero": {"stage": 2}},
    "ZeRO-3": {"engine": "deepspeed", "zero": {"stage": 3}},
    "8-bit": {"engine": "deepspeed", "zero": {"stage": 2}, "optimizer": EIGHT_BIT},
    "fp16": {"precision": FP16},
}


@dataclass(frozen=True)
class Case:
    """Something to kill, in a run of some strategy; ``seed`` says when, and which rank."""

    strategy: str
    fault: str
    seed: int

    def __str__(self) -> str:
        return f"{self.strategy}, {self.fault}, {self.seed}"


FAULTS = ["a worker is killed", "the launcher is killed", "SIGTERM", "killed during a save"]
CASES = [Case(s, f, seed) for s in STRATEGIES for f in FAULTS for seed in range(3)]
SAMPLE = [Case("ZeRO-2", "killed during a save", 100)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny BERT with dropout."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_job(model: Path, strategy: str, folder: Path) -> Path:
    path = folder / "job.json"
    job = {
        "model": {"path": str(model), "num_labels": 2},
        "data": {"train": str(REVIEWS), "max_length": 16},
        "training": {
            "global_batch_size": 12,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
        },
        "strategy": STRATEGIES[strategy],
        "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
        "output": {"dir": str(folder / "runs"), "checkpoint_every_steps": EVERY},
    }
    path.write_text(json.dumps(job))
    return path


def train_all(world: Any, folders: list[Path]) -> None:
    """In a rank: undisturbed runs, one after the other."""
    from memlaunch.launcher.training import session

    for folder in folders:
        assert session.run(resolve.load(RunDir(folder).resolved), RunDir(folder), world)


def undisturbed(model: Path, strategies: list[str], folder: Path) -> dict[str, RunDir]:
    runs = {}
    for strategy in strategies:
        place = folder / strategy
        place.mkdir()
        runs[strategy] = rundir.create(place, "undisturbed")
        runs[strategy].place(translate.files(resolve.load(write_job(model, strategy, place))))
    ranks.run(2, train_all, [run.path for run in runs.values()])
    return runs


def mathematics(run: RunDir) -> list[dict[str, Any]]:
    """The metrics, less what the clock says."""
    clock = ("_seconds", "tokens_per_second")
    return [
        {k: v for k, v in line.items() if not k.endswith(clock)} for line, _ in rundir.read_lines(run.metrics)
    ]


def launch(job: Path) -> subprocess.Popen[bytes]:
    with (job.parent / "output").open("ab") as output:
        return subprocess.Popen(
            [*MEMLAUNCH, "run", str(job), "--resume", "auto"],
            env={**os.environ, MARK: str(job)},
            stdout=output,
            stderr=output,
        )


def marked(job: Path) -> list[psutil.Process]:
    """The processes of a case that run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(job) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def worker(job: Path, rank: int) -> psutil.Process:
    def is_it(process: psutil.Process) -> bool:
        words = process.cmdline()
        trains = "memlaunch.launcher.worker" in words and "torch.distributed.run" not in words
        return trains and process.environ()["RANK"] == str(rank)

    return next(process for process in marked(job) if is_it(process))


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None, pause: float = 0.001
) -> Any:
    """What ``condition`` returns, once it is true, while ``process`` runs."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        assert process is None or process.poll() is None, "the run ended before"
        time.sleep(pause)
    return found


def the_run(job: Path) -> RunDir | None:
    runs = list((job.parent / "runs" / "job").glob("*/metrics.jsonl"))
    assert len(runs) <= 1, "it goes on in the folder in which it began"
    return RunDir(runs[0].parent) if runs else None


def last_step(job: Path) -> int:
    run = the_run(job)
    return max((line["step"] for line, _ in rundir.read_lines(run.metrics)), default=0) if run else 0


def strike(case: Case, job: Path, process: subprocess.Popen[bytes]) -> None:
    """Do what the case says, at its step."""
    chance = random.Random(f"{case}")
    at, rank = chance.randint(1, STEPS - 2 * EVERY), chance.randint(0, 1)
    wait_for(lambda: last_step(job) >= at, process)
    victim = worker(job, rank)
    if case.fault == "a worker is killed":
        victim.kill()
    elif case.fault == "the launcher is killed":
        process.kill()
    elif case.fault == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        run = the_run(job)
        assert run is not None
        wait_for(lambda: list(run.checkpoints.glob("*.partial/rank-*")), process)
        victim.kill()


def check(case: Case, model: Path, expected: RunDir, folder: Path) -> None:
    """Disturb a run, start it again, and hold what it comes to against an undisturbed one."""
    folder.mkdir()
    job = write_job(model, case.strategy, folder)
    try:
        process = launch(job)
        strike(case, job, process)
        code = process.wait(LIMIT_SECONDS)
        assert code != 0, "it was disturbed"
        assert code == 75 or case.fault != "SIGTERM"
        wait_for(lambda: not marked(job), pause=0.1)
        run = the_run(job)
        assert run is not None
        assert launch(job).wait(LIMIT_SECONDS) == 0, (folder / "output").read_text()
        wait_for(lambda: not marked(job), pause=0.1)
    finally:
        for left in marked(job):
            left.kill()
    events = [event for event, _ in rundir.read_lines(run.events)]
    again = next(number for number, event in enumerate(events) if event["event"] == "restarted")
    saved = [event["step"] for event in events[:again] if event["event"] == "checkpoint"]
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    assert resumed == saved[-1:], "only the work since the last checkpoint is repeated"
    lines = mathematics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines == mathematics(expected)
    one, other = (load_file(r.model / "model.safetensors") for r in (expected, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(run.checkpoints.glob("*.partial"))


def check_all(cases: list[Case], model: Path, folder: Path) -> None:
    strategies = list(dict.fromkeys(case.strategy for case in cases))
    expected = undisturbed(model, strategies, folder)
    misses = []
    for number, case in enumerate(cases):
        try:
            check(case, model, expected[case.strategy], folder / str(number))
        except AssertionError as error:
            misses.append(f"{case} ({folder / str(number)}): {error}")
    print(f"{len(cases) - len(misses)} of {len(cases)} runs ended as if nothing had been")
    assert not misses, "\n".join(misses)


def test_a_sample_of_the_disturbed_runs_ends_as_if_nothing_had_been(model: Path, tmp_path: Path) -> None:
    check_all(SAMPLE, model, tmp_path)


@pytest.mark.hours
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_disturbed_run_ends_as_if_nothing_had_been(model: Path, strategy: str, tmp_path: Path) -> None:
    check_all([case for case in CASES if case.strategy == strategy], model, tmp_path)

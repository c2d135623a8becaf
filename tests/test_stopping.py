"""A run that is asked to stop ends behind a step of all ranks, with a checkpoint, and goes on from there."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from memlaunch.launcher import manifest, resolve, rundir, translate
from memlaunch.launcher.rundir import RunDir
from memlaunch.launcher.training import session
from memlaunch.launcher.training.world import World
from tests import ranks

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews"
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
STEPS = 12

# The tokens are memory-mapped, and not to be written.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


def place(output: Path, tokenizer: Path, size: int, **changes: Any) -> RunDir:
    """A new run folder for a tiny job without a checkpoint on its way."""
    job = {
        "model": {
            "architecture": "bert",
            "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
            "tokenizer": str(tokenizer),
            "num_labels": 2,
        },
        "data": {
            "train": str(REVIEWS / "train.jsonl"),
            "eval": str(REVIEWS / "eval.jsonl"),
            "max_length": 8,
        },
        "training": {"global_batch_size": 8, "max_steps": STEPS, "eval_every_steps": 4, **changes},
        "cluster": {"gpus_per_node": size, "device": "cpu", "threads_per_rank": 1},
        "output": {"dir": str(output)},
    }
    (output / "job.json").write_text(json.dumps(job))
    run = rundir.create(output, "run")
    run.place(translate.files(resolve.load(output / "job.json")))
    return run


def lines(run: RunDir) -> list[dict[str, Any]]:
    clock = ("_seconds", "tokens_per_second")
    return [
        {k: v for k, v in line.items() if not k.endswith(clock)} for line, _ in rundir.read_lines(run.metrics)
    ]


def last_event(run: RunDir) -> dict[str, Any]:
    return [event for event, _ in rundir.read_lines(run.events)][-1]


def train(run: RunDir, world: World = ALONE) -> bool:
    return session.run(resolve.load(run.resolved), run, world)


def test_a_file_in_the_run_folder_stops_it_and_a_run_stopped_often_is_the_same_run(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    whole, parts = (place(tmp_path, tokenizer_folder, 1) for _ in range(2))
    assert train(whole)
    stops = 0
    while True:
        parts.stop.touch()
        if stops == 5:
            parts.stop.unlink()
        if train(parts):
            break
        stops += 1
        event = last_event(parts)
        assert (event["event"], event["step"], event["reason"]) == ("stopped", stops, "stop")
        assert event["checkpoint"] == manifest.folder_name(stops)
        assert not parts.stop.exists(), "the wish is fulfilled"
        assert not parts.model.exists()
    assert stops == 5
    assert manifest.steps(parts.checkpoints) == [5, 4]
    assert lines(parts) == lines(whole), "evaluations too, each once"
    assert [line["step"] for line in lines(parts) if "eval_loss" in line] == [4, 8, 12]
    assert last_event(parts)["event"] == "finished"


def signalled(
    world: World, folders: list[Path], numbers: list[signal.Signals]
) -> list[tuple[bool, list[int]]]:
    """In a rank: runs in which rank 1 gets a signal in some step; whether each arrived; its checkpoints."""
    return [_signalled(world, RunDir(f), number) for f, number in zip(folders, numbers, strict=True)]


def _signalled(world: World, run: RunDir, number: signal.Signals) -> tuple[bool, list[int]]:
    def send() -> None:
        while len(lines(run)) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    if world.rank == 1:
        threading.Thread(target=send, daemon=True).start()
    arrived = train(run, world)
    assert signal.getsignal(number) is before
    return arrived, manifest.steps(run.checkpoints)


def test_a_signal_to_any_rank_stops_all_of_them_behind_the_same_step(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    numbers = [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT]
    runs = [place(tmp_path, tokenizer_folder, 2, max_steps=100_000) for _ in numbers]
    told = ranks.run(2, signalled, [run.path for run in runs], numbers)
    for run, kind, outcomes in zip(
        runs, ["preempted", "preempted", "stopped"], zip(*told, strict=True), strict=True
    ):
        event = last_event(run)
        assert (event["event"], event["reason"]) == (kind, "another rank")
        assert event["step"] == lines(run)[-1]["step"] >= 3
        assert outcomes == ((False, [event["step"]]),) * 2


def test_a_stop_without_room_for_a_checkpoint_is_a_stop_all_the_same(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    run = place(tmp_path, tokenizer_folder, 1)
    run.checkpoints.write_text("not a folder")
    run.stop.touch()
    assert not train(run)
    *_, warning, stopped = [event for event, _ in rundir.read_lines(run.events)]
    assert "no checkpoint at step 1" in warning["message"]
    assert (stopped["event"], stopped["checkpoint"]) == ("stopped", None)

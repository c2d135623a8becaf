"""``memlaunch run`` from the job file to the run folder, and what happens when it goes wrong."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers

from memlaunch.launcher.rundir import RunDir, read_lines

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews"
MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]


@pytest.fixture
def job(tmp_path: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """A tiny random model on 60 real sentences, on two ranks under DeepSpeed."""
    for split, count in (("train", 60), ("eval", 20)):
        lines = (REVIEWS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return {
        "model": {
            "architecture": "bert",
            "config": {
                "vocab_size": 30522,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            },
            "task": "sequence-classification",
            "tokenizer": str(tokenizer_folder),
        },
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 24},
        "training": {"global_batch_size": 8, "micro_batch_size": 2, "epochs": 1, "learning_rate": 1e-3},
        "strategy": {"engine": "deepspeed", "zero": {"stage": 2}},
        "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
    }


def write(job: dict[str, Any], folder: Path) -> Path:
    path = folder / "job.json"
    path.write_text(json.dumps(job, indent=2))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MEMLAUNCH, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


def metrics(folder: RunDir) -> list[dict[str, Any]]:
    return [line for line, _ in read_lines(folder.metrics)]


def events(folder: RunDir) -> list[str]:
    return [event["event"] for event, _ in read_lines(folder.events)]


def the_run(folder: Path) -> RunDir:
    (only,) = (folder / "runs" / "job").iterdir()
    return RunDir(only)


def test_a_run_leaves_a_folder_that_explains_it(job: dict[str, Any], tmp_path: Path) -> None:
    done = run("run", write(job, tmp_path))
    assert done.returncode == 0, done.stderr
    folder = the_run(tmp_path)
    assert done.stdout == f"{folder.path}\n", "the run folder, and nothing else, on stdout"
    lines = metrics(folder)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9)), (
        "60 samples are 7 whole batches and a short one"
    )
    assert {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "loss_scale", "skipped", "samples", "tokens",
        "padded_tokens", "step_seconds", "tokens_per_second", "peak_memory_bytes",
    } <= set(steps[0])  # fmt: skip
    assert sum(line["samples"] for line in steps) == 60
    assert all(line["tokens"] <= line["padded_tokens"] for line in steps)
    assert steps[0]["peak_memory_bytes"] is None, "a CPU cannot tell"
    assert lines[-1]["step"] == 8
    assert {"eval_loss", "eval_accuracy"} <= set(lines[-1])
    assert events(folder) == ["data", "data", "started", "verified", "finished"]
    assert folder.job.read_text() == (tmp_path / "job.json").read_text()
    assert folder.ds_config.exists()
    assert folder.rank_log(0).exists()
    assert folder.rank_log(1).exists()
    assert "samples were cut to max_length 24" in done.stderr
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder.model)
    assert loaded.config.num_labels == 2


def test_the_translated_command_runs_by_hand_and_gives_the_same_metrics(
    job: dict[str, Any], tmp_path: Path
) -> None:
    path = write(job, tmp_path)
    assert run("run", path).returncode == 0
    by_run = the_run(tmp_path)
    assert run("translate", path, "--out", tmp_path / "translated").returncode == 0
    assert {file.name for file in (tmp_path / "translated").iterdir()} == {
        "command.sh", "ds_config.json", "node.sh", "resolved.json",
    }  # fmt: skip
    for file in ("command.sh", "ds_config.json"):
        assert (tmp_path / "translated" / file).read_text() == (by_run.launch / file).read_text()
    subprocess.run(
        ["bash", tmp_path / "translated" / "command.sh"], check=True, capture_output=True, timeout=300
    )
    (by_hand,) = (RunDir(p) for p in (tmp_path / "runs" / "job").iterdir() if p != by_run.path)
    assert (by_hand.launch / "command.sh").read_text() == (by_run.launch / "command.sh").read_text()
    again = subprocess.run(
        ["bash", tmp_path / "translated" / "command.sh"],
        env={**os.environ, "MEMLAUNCH_RUN_DIR": str(by_run.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode != 0
    assert "no run folder can be made" in again.stderr, "a run that has been is not written into"

    def without_time(line: dict[str, Any]) -> dict[str, Any]:
        clock = ("_seconds", "tokens_per_second")
        return {key: value for key, value in line.items() if not key.endswith(clock)}

    assert [without_time(line) for line in metrics(by_hand)] == [
        without_time(line) for line in metrics(by_run)
    ]


def test_a_dry_run_prints_what_would_run_and_makes_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    path = write(job, tmp_path)
    done = run("run", path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run" in done.stdout
    assert "train_micro_batch_size_per_gpu" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"strategy.freeze": ["encoder.layers[:1]"]}, 2, ["matches no module", "encoder.layer"]),
        ({"model.config.hidden_sizes": 3}, 2, ["hidden_sizes", "did you mean `hidden_size`?"]),
        ({"model.num_labels": 3, "data.train": "bad-label.jsonl"}, 2, ["bad-label.jsonl:4", "out of range"]),
        ({"data.train": "broken.jsonl"}, 2, ["broken.jsonl:3", "not a line of JSON"]),
        ({"training.learning_rate": 1e30}, 5, ["the loss of step", "learning_rate"]),
        (
            {"strategy.engine": "deepspeed", "strategy.deepspeed": {"frobnication": 3}},
            2,
            ["strategy.deepspeed.frobnication", "DeepSpeed has no such key"],
        ),
    ],
    ids=["freeze", "config key", "label", "line", "loss", "deepspeed key"],
)
def test_what_only_a_rank_can_find_is_told_like_any_other_mistake(
    job: dict[str, Any], tmp_path: Path, changes: dict[str, Any], code: int, words: list[str]
) -> None:
    job["strategy"] = {}
    job["cluster"]["gpus_per_node"] = 1
    for key, value in changes.items():
        section, *rest = key.split(".")
        target = job[section] if len(rest) == 1 else job[section][rest[0]]
        target[rest[-1]] = value
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "bad-label.jsonl").write_text(
        "\n".join([*lines[:3], json.dumps({"text": "a film", "label": 7}), *lines[4:]])
    )
    (tmp_path / "broken.jsonl").write_text("\n".join([*lines[:2], "{not json", *lines[3:]]))
    done = run("run", write(job, tmp_path))
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_that_is_killed_ends_the_run_and_leaves_no_process(
    job: dict[str, Any], tmp_path: Path
) -> None:
    job["training"] |= {"max_steps": 100_000}
    del job["training"]["epochs"]
    with subprocess.Popen(
        [*MEMLAUNCH, "run", write(job, tmp_path)], stderr=subprocess.PIPE, text=True
    ) as process:
        workers = _workers(process.pid)
        next(w for w in workers if w.environ()["RANK"] == "1").kill()
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 5
    assert f"rank 1 on {socket.gethostname()}: error: killed by signal 9 (Killed)\n" in stderr
    assert not [worker for worker in workers if worker.is_running() and worker.status() != "zombie"]


def test_an_interrupt_stops_every_rank(job: dict[str, Any], tmp_path: Path) -> None:
    job["training"] |= {"max_steps": 100_000}
    del job["training"]["epochs"]
    with subprocess.Popen(
        [*MEMLAUNCH, "run", write(job, tmp_path)], stderr=subprocess.PIPE, text=True
    ) as process:
        workers = _workers(process.pid)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 75
    assert not [worker for worker in workers if worker.is_running() and worker.status() != "zombie"]
    assert events(the_run(tmp_path))[-1] == "stopped"


def _workers(launcher: int) -> list[psutil.Process]:
    """The processes of both ranks, once they train."""
    for _ in range(600):
        time.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends while it is looked at
            found = [
                child
                for child in psutil.Process(launcher).children(recursive=True)
                if "memlaunch.launcher.worker" in child.cmdline()
                and "torch.distributed.run" not in child.cmdline()
            ]
            if len(found) == 2 and all(child.num_threads() > 1 for child in found):
                return found
    raise AssertionError("the ranks did not start")

"""``memlaunch plan`` tells what a job's batches over its own data will be like."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlaunch.launcher.training.batches import Collate
from memlaunch.launcher.training.labels import Classes
from memlaunch.strategies.bucketing import BucketedSampler, summarise
from memlaunch.strategies.padding import PaddingSettings, padded_lengths

JOB = Path(__file__).parents[1] / "examples" / "reviews" / "job.json"
CHOSEN = "--set=training.micro_batch_size=16"


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memlaunch.launcher.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_figures_of_the_review_data_beside_random_batches() -> None:
    done = plan(JOB, CHOSEN, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["batches"]
    assert figures["data"]["samples"] == 9500
    assert figures["data"]["longest"] == 64
    ours, random = figures["ways"]["bucketed"], figures["ways"]["random"]
    assert ours["padding"] < 0.01 < 0.2 < random["padding"]
    assert ours["idle_mean"] < 0.002 < random["idle_mean"]
    assert ours["steps"] == random["steps"] == 149
    assert ours["largest_micro_batch"] == 16 * 64


def test_a_table_for_people() -> None:
    done = plan(JOB, CHOSEN, "--set", "data.batching=random")
    assert done.returncode == 0, done.stderr
    first, _, header, row, *_ = done.stdout.splitlines()
    assert first == "9,500 samples, 254,539 tokens, the longest 64, 5 cut to 64"
    assert header.split()[:3] == ["batching", "padding", "idle"]
    assert row.startswith("random")


def test_data_that_cannot_be_batched_is_shown_where_the_job_names_it(tmp_path: Path) -> None:
    job = json.loads(JOB.read_text())
    records = ['{"text": "fine", "label": 1}', '{"text": "bad", "label": 0}', '{"text": 3, "label": 0}']
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    job["data"] = {"train": "train.jsonl", "max_length": 64}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job, indent=2))
    done = plan(path)
    assert done.returncode == 2
    assert f"{path}:" in done.stderr
    assert "train.jsonl:3: `text` is 3, not text" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "padding", [PaddingSettings(), PaddingSettings(multiple_of=8), PaddingSettings(mode="fixed")], ids=str
)
@pytest.mark.parametrize("sizes", [{"micro_batch_size": 4}, {"max_tokens": 160}], ids=str)
def test_the_figures_are_those_of_the_batches_that_a_run_makes(padding: Any, sizes: dict[str, Any]) -> None:
    """Counted on the very tensors of every rank, fixed and rounded padding and the token budget included."""
    max_length = 40
    lengths = np.random.default_rng(3).integers(1, max_length + 1, 203).astype(np.int32)

    class Samples:
        codes = np.zeros(len(lengths), np.int32)

        def sample(self, index: int) -> dict[str, Any]:
            return {"input_ids": np.ones(lengths[index], dtype=np.int32)}

    tokens: Any = Samples()
    tokens.lengths = lengths
    task: Any = None
    padded = padded_lengths(lengths, padding, max_length)
    samplers = [
        BucketedSampler(
            padded if "max_tokens" in sizes else lengths,
            global_batch_size=24,
            world_size=2,
            rank=rank,
            **sizes,
        )
        for rank in range(2)
    ]
    classes = Classes(tokens, np.zeros(1, np.int64))
    collate = Collate(tokens, task, padding, max_length, {"input_ids": 0}, classes)
    object.__setattr__(collate, "task", type("Task", (), {"count": staticmethod(len)}))
    total = largest = micro_steps = 0
    for step in range(samplers[0].steps_per_epoch):
        for micro_batches in zip(*(sampler.step(0, step) for sampler in samplers), strict=True):
            shapes = [collate(micro_batch).padded_tokens for micro_batch in micro_batches]
            total += sum(shapes)
            largest = max(largest, *shapes)
            micro_steps += 1
    figures = summarise(
        samplers[0],
        width=lambda longest: padded_lengths(longest, padding, max_length),
        tokens=int(lengths.sum()),
    )
    assert figures.micro_steps == micro_steps
    assert figures.largest_micro_batch == largest
    assert largest <= sizes.get("max_tokens", 4 * max_length)
    assert 1 - figures.padding == pytest.approx(int(lengths.sum()) / total)

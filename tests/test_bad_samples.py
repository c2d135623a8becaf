"""Samples that break training: the step and the samples are named, on every rank alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from memlaunch.launcher import resolve, rundir, translate
from memlaunch.launcher.rundir import RunDir
from tests import ranks

#: The model knows this word only as an infinity.
POISON = "zebra"
SAMPLES = 24
BAD = (7, 18)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder with a tiny model and samples, two of which hold the word."""
    folder = tmp_path_factory.mktemp("poisoned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids(POISON)] = torch.inf
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = [f"{POISON} film" if index in BAD else "a fine film" for index in range(SAMPLES)]
    records = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("\n".join(records))
    return folder


def failures(world: Any, folders: list[Path]) -> list[tuple[str, str, list[int]]]:
    """In a rank, for each run: what it failed with, and the steps it recorded."""
    from memlaunch.launcher.training import session
    from memlaunch.launcher.training.errors import TrainingFailed
    from tests import engines

    engines.claim_fp16()
    found = []
    for folder in folders:
        run = RunDir(folder)
        with pytest.raises(TrainingFailed) as error:
            session.run(resolve.load(run.resolved), run, world)
        steps = [line["step"] for line, _ in rundir.read_lines(run.metrics)]
        found.append((str(error.value), error.value.hint, steps))
    return found


LOWEST = {"dtype": "fp16", "initial_scale": 1.0, "min_scale": 1.0, "hysteresis": 1}


def test_the_step_and_the_samples_are_named_on_every_rank(poisoned: Path, tmp_path: Path) -> None:
    strategies: list[dict[str, Any]] = [
        {},
        {"engine": "deepspeed", "zero": {"stage": 2}, "precision": {**LOWEST, "parameters": "same"}},
    ]
    runs = []
    for number, strategy in enumerate(strategies):
        job = {
            "model": {"path": str(poisoned), "num_labels": 2},
            "data": {"train": str(poisoned / "train.jsonl"), "batching": "random"},
            "training": {"global_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 3},
            "strategy": strategy,
            "cluster": {"gpus_per_node": 2, "device": "auto", "threads_per_rank": 1},
            "output": {"dir": str(tmp_path)},
        }
        (tmp_path / "job.json").write_text(json.dumps(job))
        runs.append(rundir.create(tmp_path, str(number)))
        runs[-1].place(translate.files(resolve.load(tmp_path / "job.json")))
    one, other = ranks.run(2, failures, [run.path for run in runs])
    assert [message for message, _, _ in one] == [message for message, _, _ in other]
    for (message, hint, steps), strategy in zip(one, strategies, strict=True):
        bad_step = len(steps) + 1
        assert f"step {bad_step}" in message
        assert "`data.train`, counted from 0" in message
        named = {
            int(word.strip(",")) for word in message.partition("samples ")[2].split() if word[0].isdigit()
        }
        assert "learning_rate" in hint
        if "precision" in strategy:
            assert "smallest loss scale, 1" in message
            assert "min_scale" in hint
            assert len(named) == 8
        else:
            assert f"the loss of step {bad_step} is nan" in message
            assert named & set(BAD)
            assert len(named) <= 4, "those of the micro-batches whose loss it is"
        assert named & set(BAD)

"""Masked and translating language models, and classifiers of words, learn as a plain loop has them learn.

The plain loop is one process on whole global batches, and takes the loss that transformers itself computes.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from memlaunch.launcher import resolve, rundir, translate
from memlaunch.launcher.job import DataSection
from memlaunch.launcher.training import tokens
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.labels import Masks, Visit
from memlaunch.launcher.training.tasks import TASKS, found
from memlaunch.strategies.bucketing import BucketedSampler
from tests import ranks

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews" / "train.jsonl"

GLOBAL_BATCH = 12
SAMPLES = 41  # three whole global batches and a short one of 5
STEPS = 6  # into the second epoch
MAX_LENGTH = 16
LEARNING_RATE = 1e-3

STRATEGIES: list[dict[str, Any]] = [{"engine": "torch"}, {"engine": "deepspeed", "zero": {"stage": 3}}]

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A task, its data, and its batches written a second time.

    Attributes:
        record: a sentence -> a record of the data file.
        encode: (tokenizer, record, sample, epoch) -> input ids, labels.
    """

    task: str
    architecture: str
    record: Callable[[str], dict[str, Any]]
    encode: Callable[[Any, Mapping[str, Any], int, int], tuple[list[int], list[int]]]

    def __str__(self) -> str:
        return self.task


def _kind(word: str) -> str:
    return "O" if len(word) < 5 else "LONG" if word.islower() else "OTHER"


def _words(sentence: str) -> dict[str, Any]:
    words = sentence.split()
    return {"text": words, "label": [_kind(word) for word in words]}


def _encode_words(tokenizer: Any, record: Mapping[str, Any], sample: int, epoch: int) -> Any:
    encoded = tokenizer(record["text"], is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
    classes = sorted({"O", "LONG", "OTHER"})
    labels, seen = [], set()
    for word in encoded.word_ids():
        first = word is not None and word not in seen
        labels.append(classes.index(record["label"][word]) if first else -100)
        seen.add(word)
    return encoded["input_ids"], labels


def _encode_target(tokenizer: Any, record: Mapping[str, Any], sample: int, epoch: int) -> Any:
    cut: dict[str, Any] = {"truncation": True, "max_length": MAX_LENGTH}
    return tokenizer(record["text"], **cut)["input_ids"], tokenizer(record["target"], **cut)["input_ids"]


def _encode_masked(tokenizer: Any, record: Mapping[str, Any], sample: int, epoch: int) -> Any:
    """What is hidden is asked of memlaunch, for this one sample alone."""
    ids = tokenizer(record["text"], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    inputs = {"input_ids": torch.tensor([ids])}
    masks = Masks(42, tokenizer.mask_token_id, len(tokenizer), frozenset(tokenizer.all_special_ids))
    labels = masks([Visit(sample, epoch)], inputs, torch.ones(1, len(ids), dtype=torch.bool))
    return inputs["input_ids"][0].tolist(), labels[0].tolist()


CASES = [
    Case("token-classification", "bert", _words, _encode_words),
    Case("masked-lm", "bert", lambda sentence: {"text": sentence}, _encode_masked),
    Case(
        "seq2seq-lm",
        "t5",
        lambda sentence: {"text": sentence, "target": " ".join(sentence.split()[2::-1])},
        _encode_target,
    ),
]

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
}


def job(case: Case, folder: Path, tokenizer: Path, strategy: dict[str, Any], size: int) -> dict[str, Any]:
    return {
        "name": case.task,
        "model": {
            "architecture": case.architecture,
            "config": {**CONFIGS[case.architecture], "vocab_size": 30522},
            "tokenizer": str(tokenizer),
            "task": case.task,
        },
        "data": {
            "train": "train.jsonl",
            "eval": "eval.jsonl",
            "max_length": MAX_LENGTH,
            "batching": "random",
        },
        "training": {
            "global_batch_size": GLOBAL_BATCH,
            "gradient_accumulation_steps": 3,
            "max_steps": STEPS,
            "learning_rate": LEARNING_RATE,
        },
        "strategy": strategy,
        "cluster": {"gpus_per_node": size, "device": "cpu", "threads_per_rank": 1},
        "output": {"dir": str(folder)},
    }


def train_all(world: Any, folders: list[Path]) -> None:
    """In a rank: the runs in ``folders``, one after the other."""
    from memlaunch.launcher.training import session

    for folder in folders:
        run = rundir.RunDir(folder)
        session.run(resolve.load(run.resolved), run, world)


def batch_of(case: Case, tokenizer: Any, records: Sequence[Any], chosen: Sequence[int], epoch: int) -> Batch:
    """The inputs of the model, with the labels that transformers takes."""
    encoded = [case.encode(tokenizer, records[index], index, epoch) for index in chosen]
    ids, labels = ([torch.tensor(row) for row in rows] for rows in zip(*encoded, strict=True))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def plain_loop(case: Case, model: Any, tokenizer: Any, records: Sequence[Any]) -> list[float]:
    """The loss of each step."""
    lengths = []
    for index, record in enumerate(records):
        ids, labels = case.encode(tokenizer, record, index, 0)
        lengths.append(len(ids) + (len(labels) if case.task == "seq2seq-lm" else 0))
    sampler = BucketedSampler(
        np.array(lengths),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH,
        world_size=1,
        rank=0,
        seed=42,
        mode="random",
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], foreach=False
    )
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / STEPS)
        epoch, k = divmod(step, sampler.steps_per_epoch)
        batch = batch_of(case, tokenizer, records, sampler.step_samples(epoch, k), epoch)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_task_learns_as_in_a_plain_loop(case: Case, tokenizer_folder: Path, tmp_path: Path) -> None:
    sentences = [json.loads(line)["text"] for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    for split, part in (("train", sentences[:SAMPLES]), ("eval", sentences[SAMPLES : SAMPLES + 9])):
        lines = [json.dumps(case.record(sentence)) for sentence in part]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    runs = []
    for strategy in STRATEGIES:
        path = tmp_path / "job.json"
        path.write_text(json.dumps(job(case, tmp_path, tokenizer_folder, strategy, 2)))
        run = rundir.create(tmp_path / "runs", case.task)
        run.place(translate.files(resolve.load(path)))
        runs.append(run)
    ranks.run(2, train_all, [run.path for run in runs])

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    config = transformers.AutoConfig.for_model(
        case.architecture, **CONFIGS[case.architecture], vocab_size=30522
    )
    config.pad_token_id, config.num_labels = tokenizer.pad_token_id, 3
    torch.manual_seed(42)
    auto = getattr(transformers, TASKS[case.task].auto_class)
    model = auto.from_config(config).train()
    if case.task == "seq2seq-lm":
        model.config.decoder_start_token_id = tokenizer.pad_token_id
    records = [case.record(sentence) for sentence in sentences]
    losses = plain_loop(case, model, tokenizer, records[:SAMPLES])
    for strategy, run in zip(STRATEGIES, runs, strict=True):
        *lines, evaluation = [line for line, _ in rundir.read_lines(run.metrics)]
        assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5), strategy
        trained = auto.from_pretrained(run.model).eval()
        expected = evaluated(case, trained, tokenizer, records[SAMPLES : SAMPLES + 9])
        found = {name: value for name, value in evaluation.items() if name.startswith("eval_")}
        assert found == pytest.approx(expected, rel=1e-4), strategy


@torch.no_grad()
def evaluated(case: Case, model: Any, tokenizer: Any, records: Sequence[Any]) -> dict[str, float]:
    """The figures of an evaluation, by way of plain lists."""
    none: Any = None
    batch = batch_of(case, tokenizer, records, range(len(records)), none)
    outputs = model(**batch)
    pairs = [
        (guess, label)
        for guess, label in zip(
            outputs.logits.argmax(-1).flatten().tolist(), batch["labels"].flatten().tolist(), strict=True
        )
        if label != -100
    ]
    figures = {"eval_loss": outputs.loss.item()}
    if case.task != "token-classification":
        figures["eval_perplexity"] = outputs.loss.exp().item()
    if case.task != "seq2seq-lm":
        figures["eval_accuracy"] = sum(guess == label for guess, label in pairs) / len(pairs)
    if case.task == "token-classification":
        outside = sorted({"O", "LONG", "OTHER"}).index("O")
        hits = sum(guess == label != outside for guess, label in pairs)
        guessed = sum(guess != outside for guess, _ in pairs)
        there = sum(label != outside for _, label in pairs)
        figures["eval_f1"] = 2 * hits / (guessed + there)
    return figures


def test_fifteen_percent_of_the_tokens_are_hidden_as_in_bert() -> None:
    """0.15 are chosen, and of those 0.8 masked, 0.1 random and 0.1 as they are; special tokens never."""
    masks = Masks(seed=7, mask=103, vocabulary=30000, special=frozenset({101, 102}))
    ids = torch.full((500, 80), 2000)
    ids[:, 0], ids[:, -1] = 101, 102
    inputs = {"input_ids": ids.clone()}
    labels = masks(range(500), inputs, torch.ones_like(ids, dtype=torch.bool))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert not chosen[:, [0, -1]].any()
    seen = inputs["input_ids"]
    assert torch.equal(seen[~chosen], ids[~chosen])
    ways = Counter(
        "mask" if token == 103 else "same" if token == 2000 else "random" for token in seen[chosen].tolist()
    )
    total = chosen.sum().item()
    assert total / (500 * 78) == pytest.approx(0.15, abs=0.01)
    assert ways["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert ways["random"] / total == pytest.approx(0.1, abs=0.015)
    assert len(set(seen[chosen].tolist())) > 300, "random tokens are of the whole vocabulary"


def test_what_is_hidden_follows_from_seed_epoch_and_sample_alone() -> None:
    def hidden(seed: int, samples: Sequence[Any], lengths: Sequence[int]) -> list[list[int]]:
        masks = Masks(seed=seed, mask=103, vocabulary=500, special=frozenset())
        real = torch.arange(40)[None, :] < torch.tensor(lengths)[:, None]
        inputs = {"input_ids": torch.arange(200, 240).repeat(len(samples), 1)}
        labels = masks(samples, inputs, real)
        return [
            [*row[:length].tolist(), *label[:length].tolist()]
            for row, label, length in zip(inputs["input_ids"], labels, lengths, strict=True)
        ]

    alone = hidden(1, [Visit(5, 2)], [30])[0]
    assert hidden(1, [Visit(9, 2), Visit(5, 2), Visit(0, 1)], [40, 30, 7])[1] == alone, "in any company"
    assert hidden(1, [Visit(5, 3)], [30])[0] != alone
    assert hidden(2, [Visit(5, 2)], [30])[0] != alone
    assert hidden(1, [5], [30]) == hidden(1, [5], [30]), "an evaluation always hides the same"


def test_f1_leaves_what_is_outside_out() -> None:
    labels = torch.tensor([[0, 1, 2, 0, -100]])
    guesses = torch.tensor([[0, 1, 1, 2, 1]])
    tallies = found(outside=0)(torch.nn.functional.one_hot(guesses, 3).float(), labels)
    shares = {name: float(tally) / 4 for name, tally in tallies.items()}
    figures = TASKS["token-classification"].figures(0.5, shares)
    assert figures == {"eval_loss": 0.5, "eval_accuracy": 0.5, "eval_f1": pytest.approx(2 / (3 + 2))}


GOOD = {"text": ["a", "film"], "label": ["O", "N"], "target": "ein Film"}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("token-classification", {"text": "a film"}, "`text` is 'a film', not a list of words"),
        ("token-classification", {"text": []}, r"`text` is \[\], not a list of words"),
        ("token-classification", {"label": ["O"]}, "`label` has 1 labels for 2 words"),
        ("token-classification", {"label": "O"}, "`label` is 'O', not a list with a label for each word"),
        ("token-classification", {"label": ["O", None]}, "the label `label` is None"),
        ("seq2seq-lm", {"text": "a film", "target": None}, "`target` is missing"),
        ("seq2seq-lm", {"text": "a film", "target": 3}, "`target` is 3, not text"),
        ("masked-lm", {"text": 4}, "`text` is 4, not text"),
    ],
)
def test_a_bad_sample_is_named_with_its_line(
    task: str,
    changes: dict[str, Any],
    message: str,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEMLAUNCH_CACHE", str(tmp_path / "cache"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    good = GOOD if task == "token-classification" else {**GOOD, "text": "a film"}
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in (good, {**good, **changes}, good)))
    data = DataSection(train=str(file))
    with pytest.raises(JobMismatch, match=f":2: {message}"):
        tokens.prepare(data, "train", tokenizer, task, MAX_LENGTH)
    skipping = DataSection(train=str(file), skip_bad_lines=1)
    found = tokens.prepare(skipping, "train", tokenizer, task, MAX_LENGTH)
    assert len(found) == 2

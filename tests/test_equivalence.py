"""One job has the same losses and the same weights on every engine, stage and number of ranks.

A cell is trained by the ranks of a real run, from its resolved job to its saved model, and held against a
plain one-process loop. ``pytest -m long`` runs every cell, the ordinary run a sample in which each value of
each axis occurs with each number of ranks.
"""

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from memlaunch.launcher import resolve, rundir, translate
from memlaunch.strategies.bucketing import BucketedSampler, pack
from tests import ranks, reference

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews" / "train.jsonl"

GLOBAL_BATCH = 12
STEPS = 10
SAMPLES = 53  # 4 whole global batches and a short one of 5: two epochs are ten steps
BUCKET = 4
MAX_LENGTH = 24
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Cell:
    """One way to run the job."""

    engine: str
    stage: int
    accumulation: int
    checkpointing: str
    padding: str

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


ENGINES = [*(("torch", stage) for stage in (0, 2, 3)), *(("deepspeed", stage) for stage in range(4))]
CELLS = [
    Cell(engine, stage, accumulation, checkpointing, padding)
    for (engine, stage), accumulation, checkpointing, padding in product(
        ENGINES, (1, 3), ("none", "full"), ("fixed", "dynamic")
    )
]
#: Two cells an engine, so chosen that each pair of values of two axes occurs.
SAMPLE = [
    Cell(engine, stage, *rest)
    for number, (engine, stage) in enumerate(ENGINES)
    for rest in (
        [(3, "full", "dynamic"), (1, "none", "fixed")]
        if number % 2
        else [(3, "none", "dynamic"), (1, "full", "fixed")]
    )
]


@dataclass(frozen=True)
class Subject:
    """The model and data that every cell trains."""

    model: Path
    data: Path
    losses: dict[str, list[float]]
    changes: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Subject:
    folder = tmp_path_factory.mktemp("subject")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(7)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = folder / "train.jsonl"
    data.write_text("".join(REVIEWS.read_text(encoding="utf-8").splitlines(keepends=True)[:SAMPLES]))
    lengths = [
        min(MAX_LENGTH, len(tokenizer(json.loads(line)["text"])["input_ids"]))
        for line in data.read_text(encoding="utf-8").splitlines()
    ]
    losses, changes = {}, {}
    for mode in ("random", "bucketed"):
        sampler = BucketedSampler(
            torch.tensor(lengths).numpy(),
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=GLOBAL_BATCH,
            world_size=1,
            rank=0,
            seed=42,
            bucket_size=BUCKET,
            mode=mode,
        )
        batches = [sampler.step_samples(*divmod(step, sampler.steps_per_epoch)) for step in range(STEPS)]
        assert sorted(len(batch) for batch in batches) == [5, 5, *[12] * 8], "a short window in each epoch"
        losses[mode], changes[mode] = reference.train(
            folder / "model",
            data,
            batches,
            max_length=MAX_LENGTH,
            learning_rate=LEARNING_RATE,
            weight_decay=0.1,
            max_grad_norm=1.0,
        )
    return Subject(folder / "model", data, losses, changes)


def job(subject: Subject, cell: Cell, size: int, output: Path, batching: str) -> dict[str, Any]:
    return {
        "name": f"{cell}",
        "model": {"path": str(subject.model), "task": "sequence-classification", "num_labels": 2},
        "data": {
            "train": str(subject.data),
            "max_length": MAX_LENGTH,
            "padding": cell.padding,
            "batching": {"mode": batching, **({"bucket_size": BUCKET} if batching == "bucketed" else {})},
        },
        "training": {
            "global_batch_size": GLOBAL_BATCH,
            "gradient_accumulation_steps": cell.accumulation,
            "max_steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.1,
        },
        "strategy": {
            "engine": cell.engine,
            "zero": {"stage": cell.stage},
            "activation_checkpointing": cell.checkpointing,
        },
        "cluster": {"gpus_per_node": size, "device": "cpu", "threads_per_rank": 1},
        "output": {"dir": str(output)},
    }


def train_all(world: Any, folders: list[Path]) -> None:
    """In a rank: the runs in ``folders``, one after the other."""
    from memlaunch.launcher.training import session

    for folder in folders:
        run = rundir.RunDir(folder)
        session.run(resolve.load(run.resolved), run, world)


def check(subject: Subject, cells: list[Cell], size: int, output: Path) -> None:
    """Train ``cells`` on ``size`` ranks and hold each against the reference; every miss is told."""
    folders: dict[tuple[Cell, str], Path] = {}
    for number, cell in enumerate(sorted(cells, key=lambda cell: cell.stage)):
        batching = ("random", "bucketed")[number % 2]
        path = output / f"{cell}.json"
        path.write_text(json.dumps(job(subject, cell, size, output, batching)))
        resolved = resolve.load(path)
        run = rundir.create(output, str(cell))
        run.place(translate.files(resolved))
        folders[cell, batching] = run.path
    ranks.run(size, train_all, list(folders.values()))
    misses = []
    initial = load_file(subject.model / "model.safetensors")
    for (cell, batching), folder in folders.items():
        run = rundir.RunDir(folder)
        losses = [line["loss"] for line, _ in rundir.read_lines(run.metrics)]
        expected = subject.losses[batching]
        assert len(losses) == STEPS
        loss_error = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        weights = load_file(run.model / "model.safetensors")
        difference = scale = 0.0
        for name, change in subject.changes[batching].items():
            difference += float((weights[name] - initial[name] - change).square().sum())
            scale += float(change.square().sum())
        weight_error = (difference / scale) ** 0.5
        print(f"{size} ranks {cell} {batching}: loss {loss_error:.1e}, weights {weight_error:.1e}")
        if loss_error > 1e-5 or weight_error > 1e-3:
            misses.append(f"{cell} on {size} ranks: loss {loss_error:.1e}, weights {weight_error:.1e}")
    assert not misses, "\n".join(misses)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sample_of_the_matrix_equals_a_plain_loop(subject: Subject, size: int, tmp_path: Path) -> None:
    check(subject, SAMPLE, size, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_whole_matrix_equals_a_plain_loop(subject: Subject, size: int, tmp_path: Path) -> None:
    check(subject, CELLS, size, tmp_path)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Path]:
    """A tiny GPT-2, and sentences without labels."""
    folder = tmp_path_factory.mktemp("language")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, eos_token="[SEP]")
    torch.manual_seed(7)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = folder / "train.jsonl"
    records = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()[:SAMPLES]]
    data.write_text("".join(json.dumps({"text": record["text"]}) + "\n" for record in records))
    return folder / "model", data


#: Batching of a causal language model, and the batch sizes that go with it.
BATCHINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": "bucketed", "bucket_size": BUCKET}, {"gradient_accumulation_steps": 3}),
    ({"mode": "random"}, {"gradient_accumulation_steps": 1}),
    ({"mode": "bucketed", "bucket_size": BUCKET, "max_tokens": 60}, {}),
    ({"mode": "bucketed", "max_tokens": 100}, {}),
    ({"mode": "packed"}, {"global_batch_size": 6, "gradient_accumulation_steps": 3}),
]


def samples_of_steps(resolved: dict[str, Any], lengths: Any) -> list[list[int]]:
    """The samples of each optimizer step of a resolved job, as one rank of one would see them."""
    batching, size = resolved["data"]["batching"], resolved["training"]["global_batch_size"]
    assert (batching["bucket_size"] is None) == (batching["mode"] != "bucketed"), "recorded where it counts"
    packed = batching["mode"] == "packed"
    sampler = BucketedSampler(
        pack(lengths, MAX_LENGTH, seed=42).lengths if packed else lengths,
        global_batch_size=size,
        micro_batch_size=None if batching["max_tokens"] else size,
        world_size=1,
        rank=0,
        seed=42,
        **batching,
    )
    steps = []
    for step in range(STEPS):
        epoch, k = divmod(step, sampler.steps_per_epoch)
        chosen = sampler.step_samples(epoch, k)
        if packed:
            packing = pack(lengths, MAX_LENGTH, seed=42, epoch=epoch)
            pieces = [packing.samples[packing.offsets[b] : packing.offsets[b + 1]] for b in chosen]
            chosen = [int(index) for piece in pieces for index in piece]
        steps.append(chosen)
    return steps


@pytest.mark.parametrize("size", [1, 2])
def test_every_token_of_a_causal_language_model_weighs_the_same(
    language: tuple[Path, Path], size: int, tmp_path: Path
) -> None:
    model, data = language
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    lengths = torch.tensor([min(MAX_LENGTH, len(tokenizer(text)["input_ids"])) for text in texts]).numpy()
    runs = []
    for (engine, stage), (batching, sizes) in product(
        [("torch", 0), ("torch", 3), ("deepspeed", 3)], BATCHINGS
    ):
        path = tmp_path / f"{len(runs)}.json"
        path.write_text(
            json.dumps(
                {
                    "model": {"path": str(model), "task": "causal-lm"},
                    "data": {"train": str(data), "max_length": MAX_LENGTH, "batching": batching},
                    "training": {
                        "global_batch_size": GLOBAL_BATCH,
                        "max_steps": STEPS,
                        "learning_rate": LEARNING_RATE,
                        **sizes,
                    },
                    "strategy": {"engine": engine, "zero": {"stage": stage}},
                    "cluster": {"gpus_per_node": size, "device": "cpu", "threads_per_rank": 1},
                    "output": {"dir": str(tmp_path)},
                }
            )
        )
        run = rundir.create(tmp_path, f"{len(runs)}")
        run.place(translate.files(resolve.load(path)))
        runs.append(run)
    ranks.run(size, train_all, [run.path for run in runs])
    for run in runs:
        batches = samples_of_steps(json.loads(run.resolved.read_text()), lengths)
        losses, _ = reference.train(
            model,
            data,
            batches,
            auto=transformers.AutoModelForCausalLM,
            max_length=MAX_LENGTH,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            max_grad_norm=1.0,
        )
        lines = [line for line, _ in rundir.read_lines(run.metrics)]
        assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5), run.path.parent

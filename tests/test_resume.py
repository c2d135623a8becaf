"""A resumed run is the run: bit for bit on the same layout, and the same losses on another one."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from memlaunch.launcher import manifest, resolve, rundir, translate
from memlaunch.launcher.rundir import RunDir
from tests import ranks

REVIEWS = Path(__file__).parents[1] / "examples" / "reviews" / "train.jsonl"

STEPS = 9
EVERY = 4
SAMPLES = 53  # 4 whole global batches and a short one: two epochs, a checkpoint in the middle of the first
GLOBAL_BATCH = 12

EIGHT_BIT = {"bits": 8, "overrides": [{"modules": "*embeddings*", "bits": 32}]}
#: Overflows at once, and grows soon, so that a checkpoint finds it on the move.
FP16 = {"dtype": "fp16", "initial_scale": 2.0**24, "growth_interval": 2, "hysteresis": 1}


@dataclass(frozen=True, eq=False)
class Way:
    """One way to train the job."""

    engine: str = "torch"
    stage: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.1

    def __str__(self) -> str:
        words = [f"{key} {value}" if isinstance(value, str) else key for key, value in self.more.items()]
        return "-".join([self.engine, str(self.stage), *words]).replace(" ", "-")


def job(subject: Mapping[float, Path], way: Way, size: int, output: Path) -> dict[str, Any]:
    """Two epochs of a tiny BERT; a checkpoint every ``EVERY`` steps."""
    return {
        "name": str(way),
        "model": {"path": str(subject[way.dropout]), "task": "sequence-classification", "num_labels": 2},
        "data": {"train": str(REVIEWS.parent / "train.jsonl"), "max_length": 16},
        "training": {
            "global_batch_size": GLOBAL_BATCH,
            "gradient_accumulation_steps": 3,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
        },
        "strategy": {"engine": way.engine, "zero": {"stage": way.stage}, **way.more},
        # Not "cpu", where DeepSpeed refuses fp16; these ranks find no GPU.
        "cluster": {"gpus_per_node": size, "device": "auto", "threads_per_rank": 1},
        "output": {"dir": str(output), "checkpoint_every_steps": EVERY, "keep_checkpoints": 5},
    }


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[float, Path]:
    """A model for each dropout."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    folders = {}
    for dropout in (0.0, 0.1):
        folder = folders[dropout] = tmp_path_factory.mktemp("model")
        torch.manual_seed(7)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=160,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def write(description: Mapping[str, Any], output: Path) -> Path:
    path = output / "job.json"
    path.write_text(json.dumps(description))
    return path


def place(description: Mapping[str, Any], output: Path) -> RunDir:
    """A new run folder for a job."""
    run = rundir.create(output, str(description["name"]))
    run.place(translate.files(resolve.load(write(description, output))))
    return run


def train_all(world: Any, folders: list[Path]) -> None:
    """In a rank: the runs in ``folders``, one after the other."""
    from memlaunch.launcher.training import session
    from tests import engines

    engines.claim_fp16()
    for folder in folders:
        run = RunDir(folder)
        assert session.run(resolve.load(run.resolved), run, world), "nobody asked to stop"


def cut_down(run: RunDir, output: Path, step: int) -> RunDir:
    """A copy of ``run`` as a crash behind ``step`` would have left it."""
    copy = rundir.create(output / "cut", run.path.parent.name)
    shutil.rmtree(copy.path)
    shutil.copytree(run.path, copy.path)
    shutil.rmtree(copy.model)
    for later in manifest.steps(copy.checkpoints):
        if later > step:
            shutil.rmtree(copy.checkpoints / manifest.folder_name(later))
    return copy


def mathematics(run: RunDir) -> list[dict[str, Any]]:
    """The metrics, less what the clock says."""
    clock = ("_seconds", "tokens_per_second")
    return [
        {k: v for k, v in line.items() if not k.endswith(clock)} for line, _ in rundir.read_lines(run.metrics)
    ]


@dataclass(frozen=True)
class Move:
    """From one layout to another, or back to the same."""

    before: Way
    size_before: int
    after: Way
    size_after: int

    def __str__(self) -> str:
        return f"{self.before} on {self.size_before} to {self.after} on {self.size_after}"

    @property
    def stays(self) -> bool:
        return (self.before, self.size_before) == (self.after, self.size_after)


def stay(way: Way, size: int) -> Move:
    return Move(way, size, way, size)


WAYS = [
    Way("deepspeed", 2, {"precision": FP16, "optimizer": EIGHT_BIT}),
    Way("deepspeed", 3, {"freeze": ["encoder.layer[0]"]}),
    Way("torch", 3),
    Way("torch", 3, {"precision": {**FP16, "parameters": "same"}}),
    Way("torch", 3, {"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}}),
    Way("torch", 2, {"precision": FP16, "activation_checkpointing": "full"}),
    Way("torch", 2, {"optimizer": EIGHT_BIT, "freeze": ["encoder.layer[0]"]}),
    Way(more={"precision": FP16}),
    Way(),
    Way(more={"optimizer": EIGHT_BIT, "freeze": ["encoder.layer[0]"]}),
    Way("deepspeed", 0),
    Way("deepspeed", 1),
    Way("deepspeed", 1, {"optimizer": EIGHT_BIT}),
    Way("deepspeed", 2, {"precision": {**FP16, "parameters": "same"}}),
    Way("deepspeed", 3, {"optimizer": EIGHT_BIT}),
    Way("deepspeed", 3, {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}),
    Way("deepspeed", 2, {"zero": {"stage": 2, "offload_optimizer": "cpu"}}),
]

TORCH = Way(dropout=0.0)
ZERO = [Way("deepspeed", stage, dropout=0.0) for stage in range(4)]
FSDP = {stage: Way("torch", stage, dropout=0.0) for stage in (2, 3)}
MOVES = [
    Move(TORCH, 2, ZERO[1], 2),
    Move(TORCH, 2, ZERO[3], 2),
    Move(TORCH, 2, FSDP[3], 2),
    Move(FSDP[3], 2, TORCH, 1),
    Move(FSDP[3], 2, FSDP[3], 1),
    Move(FSDP[2], 1, FSDP[3], 2),
    Move(FSDP[3], 2, ZERO[3], 4),
    Move(ZERO[3], 2, FSDP[2], 2),
    Move(ZERO[2], 2, FSDP[3], 4),
    Move(FSDP[2], 2, ZERO[2], 2),
    Move(ZERO[2], 2, ZERO[3], 2),
    Move(TORCH, 2, TORCH, 1),
    Move(TORCH, 1, TORCH, 4),
    Move(ZERO[3], 2, ZERO[1], 1),
    Move(ZERO[1], 2, ZERO[3], 4),
    Move(ZERO[3], 2, ZERO[3], 4),
    Move(ZERO[2], 2, TORCH, 1),
    Move(ZERO[0], 2, ZERO[2], 2),
]


def check(subject: Mapping[float, Path], moves: list[Move], output: Path) -> None:
    """Train to the end, cut back to the first checkpoint, train on, and compare; every miss is told."""
    before = {
        (way, size): place(job(subject, way, size, output), output)
        for way, size in dict.fromkeys((move.before, move.size_before) for move in moves)
    }
    train({run.path: size for (_, size), run in before.items()})
    after = {move: cut_down(before[move.before, move.size_before], output, EVERY) for move in moves}
    for move, run in after.items():
        order = json.loads(run.resolved.read_text())["data"]["batching"]
        description = job(subject, move.after, move.size_after, output)
        description["data"]["batching"] = order
        run.place(translate.files(resolve.load(write(description, output))))
    train({run.path: move.size_after for move, run in after.items()})
    misses = []
    for move, run in after.items():
        events = [event for event, _ in rundir.read_lines(run.events)]
        assert [event["step"] for event in events if event["event"] == "resumed"] == [EVERY]
        whole = before[move.before, move.size_before]
        misses += [f"{move}: {miss}" for miss in differences(whole, run, exactly=move.stays)]
    assert not misses, "\n".join(misses)


def train(sizes: Mapping[Path, int]) -> None:
    for size in sorted(set(sizes.values())):
        ranks.run(size, train_all, [path for path, needed in sizes.items() if needed == size])


def differences(whole: RunDir, run: RunDir, exactly: bool) -> Iterator[str]:
    """In what a resumed run is not the uninterrupted one."""
    expected, lines = mathematics(whole), mathematics(run)
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        yield f"the steps are {[line['step'] for line in lines]}"
        return
    for key in ("samples", "tokens", "padded_tokens") if exactly else ("samples", "tokens"):
        if [line[key] for line in lines] != [line[key] for line in expected]:
            yield key
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(lines, expected, strict=True))
    if apart > (0 if exactly else 1e-5):
        yield f"the losses are up to {apart:.1e} apart"
    if exactly:
        if lines != expected:
            yield "the metrics"
        one, other = (load_file(r.model / "model.safetensors") for r in (whole, run))
        yield from (f"weight {name}" for name in one if not torch.equal(one[name], other[name]))


def test_a_sample_goes_on_bit_for_bit_or_elsewhere_with_the_same_losses(
    subject: dict[float, Path], tmp_path: Path
) -> None:
    check(subject, [*(stay(way, 2) for way in WAYS[:3]), *MOVES[:3]], tmp_path)


@pytest.mark.long
def test_on_the_same_layout_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    subject: dict[float, Path], tmp_path: Path
) -> None:
    check(subject, [stay(way, 2) for way in WAYS], tmp_path)


@pytest.mark.long
def test_on_four_ranks_too_where_the_order_of_a_sum_depends_on_the_communication_buckets(
    subject: dict[float, Path], tmp_path: Path
) -> None:
    check(subject, [stay(way, 4) for way in WAYS if "precision" not in way.more], tmp_path)


@pytest.mark.long
def test_with_other_ranks_stages_and_engines_a_run_goes_on_with_the_same_losses(
    subject: dict[float, Path], tmp_path: Path
) -> None:
    check(subject, MOVES, tmp_path)

"""A model of the user's own, with its data and its loss, trains like any other: ``model.entry``."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from memlaunch.launcher import manifest, resolve, rundir, translate
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.plan.traces import Tracer
from memlaunch.launcher.rundir import RunDir
from memlaunch.strategies.bucketing import BucketedSampler
from tests import ranks

MEMLAUNCH = [sys.executable, "-m", "memlaunch.launcher.cli"]
CNN = Path(__file__).parents[1] / "examples" / "cnn"

#: Rows of different lengths, a count that is not that of the samples, a tied weight, dropout or a batch norm.
MODULE = """
import torch
from memlaunch.launcher import Entry
from torch import nn


class Rows(nn.Module):
    def __init__(self, norm, dropout):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, rows):
        hidden = self.embed(rows)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return self.out(self.dropout(hidden))


class Data:
    def __init__(self, count):
        generator = torch.Generator().manual_seed(3)
        self.rows = [torch.randint(1, 11, (2 + i % 7,), generator=generator) for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return batch, nn.functional.pad(batch[:, 1:], (0, 1))


def loss(outputs, targets):
    summed = nn.functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=0
    )
    return summed, (targets != 0).sum()


def build(norm=False, dropout=0.0, with_lengths=True, counts=True):
    data = Data(29)
    return Entry(
        model=Rows(norm, dropout),
        train=data,
        eval=Data(7),
        collate=collate,
        loss=loss,
        count=(lambda targets: int((targets != 0).sum())) if counts else None,
        lengths=[len(row) for row in data.rows] if with_lengths else None,
        metrics=lambda outputs, targets: {"right": (outputs.argmax(-1) == targets)[targets != 0].sum()},
    )


def fails():
    raise RuntimeError("no such disk")


def nothing():
    return None
"""

STEPS = 6
GLOBAL_BATCH = 8

STRATEGIES: list[dict[str, Any]] = [
    {"engine": "torch", "activation_checkpointing": "full"},
    {"engine": "deepspeed", "zero": {"stage": 1}},
    {"engine": "deepspeed", "zero": {"stage": 3}, "activation_checkpointing": "full"},
]


def job(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "name": "rows",
        "model": {"entry": "rows_of_numbers:build"},
        "training": {
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
        },
        "cluster": {"gpus_per_node": 2, "device": "cpu", "threads_per_rank": 1},
        "output": {"dir": str(folder / "runs"), "checkpoint_every_steps": 3},
        **sections,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entry")
    (folder / "rows_of_numbers.py").write_text(MODULE)
    return folder


def write(description: dict[str, Any], folder: Path, name: str = "job.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(description, indent=2))
    return path


def place(description: dict[str, Any], folder: Path) -> RunDir:
    run = rundir.create(folder / "runs", "rows")
    run.place(translate.files(resolve.load(write(description, folder))))
    return run


def train_all(world: Any, folders: list[Path]) -> None:
    """In a rank: the runs in ``folders``, one after the other."""
    from memlaunch.launcher.training import session
    from tests import engines

    engines.claim_fp16()
    for path in folders:
        run = RunDir(path)
        assert session.run(resolve.load(run.resolved), run, world), "nobody asked to stop"


def metrics(run: RunDir) -> list[dict[str, Any]]:
    """Less what the clock says."""
    clock = ("_seconds", "tokens_per_second")
    return [
        {k: v for k, v in line.items() if not k.endswith(clock)} for line, _ in rundir.read_lines(run.metrics)
    ]


def plain_loop(with_lengths: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in one process, over whole global batches."""
    scope: dict[str, Any] = {}
    exec(MODULE, scope)
    torch.manual_seed(42)
    entry = scope["build"]()
    lengths = [len(row) if with_lengths else 1 for row in entry.train.rows]
    sampler = BucketedSampler(
        torch.tensor(lengths).numpy(),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH,
        world_size=1,
        rank=0,
        seed=42,
        mode="bucketed" if with_lengths else "random",
        bucket_size=4 if with_lengths else None,
    )
    model = entry.model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], foreach=False
    )
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        chosen = sampler.step_samples(*divmod(step, sampler.steps_per_epoch))
        inputs, targets = scope["collate"]([entry.train[index] for index in chosen])
        total, count = scope["loss"](model(inputs), targets)
        (total / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / count).item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("with_lengths", [True, False], ids=["bucketed", "random"])
def test_it_learns_as_in_a_plain_loop(folder: Path, with_lengths: bool) -> None:
    model = {"entry": "rows_of_numbers:build", "config": {"with_lengths": with_lengths}}
    runs = [place(job(folder, model=model, strategy=strategy), folder) for strategy in STRATEGIES]
    ranks.run(2, train_all, [run.path for run in runs])
    losses, weights = plain_loop(with_lengths)
    for strategy, run in zip(STRATEGIES, runs, strict=True):
        *lines, evaluation = metrics(run)
        assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5), strategy
        assert {"eval_loss", "eval_right"} <= set(evaluation)
        saved = load_file(run.model / "model.safetensors")
        for name, weight in weights.items():
            torch.testing.assert_close(saved[name], weight, rtol=1e-3, atol=1e-5)
        assert torch.equal(saved["out.weight"], saved["embed.weight"]), "tied, and under both names"


def test_batch_norms_and_dropout_resume_bit_for_bit_and_agree_on_all_ranks(folder: Path) -> None:
    """An uninterrupted run against one that goes on from step 3."""
    model = {"entry": "rows_of_numbers:build", "config": {"norm": True, "dropout": 0.2}}
    whole = [place(job(folder, model=model, strategy=strategy), folder) for strategy in STRATEGIES]
    ranks.run(2, train_all, [run.path for run in whole])
    cut = []
    for run in whole:
        copy = RunDir(run.path.with_name(f"{run.path.name}-cut"))
        shutil.copytree(run.path, copy.path)
        shutil.rmtree(copy.model)
        shutil.rmtree(copy.checkpoints / manifest.folder_name(6))
        cut.append(copy)
    ranks.run(2, train_all, [run.path for run in cut])
    for strategy, run, resumed in zip(STRATEGIES, whole, cut, strict=True):
        assert metrics(run) == metrics(resumed), strategy
        one, other = (load_file(r.model / "model.safetensors") for r in (run, resumed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), strategy
        assert one["norm.running_var"].ne(1).all(), "the statistics are those of the data"
        assert one["norm.num_batches_tracked"] == 2 * STEPS
        files = sorted((run.checkpoints / manifest.folder_name(3)).glob("rank-*.safetensors"))
        first, second = (load_file(file)["buffer/norm.running_mean"] for file in files)
        assert torch.equal(first, second), strategy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entry": "rows_of_number:build"}, ["no file", "did you mean `rows_of_numbers:build`?"]),
        ({"entry": "rows_of_numbers:built"}, ["defines no `built`", "did you mean `rows_of_numbers:build`?"]),
        ({"entry": "rows_of_numbers.py:build"}, ["without `.py`"]),
        ({"entry": "rows_of_numbers"}, ["not a module and a function"]),
        ({"entry": "broken:build"}, ["broken.py:2", "is not Python"]),
        ({"entry": "torch:build"}, ["the name of an installed module"]),
        ({"entry": "rows_of_numbers:build", "path": "x/y"}, ["model.path: an `entry` brings its own"]),
        ({"entry": "rows_of_numbers:build", "task": "causal-lm"}, ["model.task: an `entry` brings its own"]),
    ],
    ids=lambda value: str(value.get("entry")) if isinstance(value, dict) else "",
)
def test_an_entry_is_checked_without_running_it(
    folder: Path, changes: dict[str, Any], words: list[str]
) -> None:
    (folder / "broken.py").write_text("def build():\n    return (\n")
    (folder / "torch.py").write_text("def build():\n    pass\n")
    try:
        with pytest.raises(UserError) as caught:
            resolve.load(write(job(folder, model=changes), folder, "wrong.json"))
    finally:
        (folder / "torch.py").unlink()
    for word in words:
        assert word in str(caught.value.render(colour=False))


def test_data_of_an_entry_are_its_own(folder: Path) -> None:
    with pytest.raises(UserError, match="an `entry` brings its own"):
        resolve.load(write(job(folder, data={"train": "train.jsonl"}), folder, "wrong.json"))
    resolved = resolve.load(write(job(folder, data={"batching": "random"}), folder))
    again = folder / "elsewhere" / "resolved.json"
    again.parent.mkdir(exist_ok=True)
    again.write_text(resolved.to_json())
    assert resolve.load(again).to_json() == resolved.to_json(), "a job that runs, wherever it stands"


@pytest.mark.parametrize(
    ("function", "config", "words"),
    [
        ("fails", {}, "`fails` failed: RuntimeError: no such disk"),
        ("nothing", {}, "`nothing` returns nothing, not a `memlaunch.launcher.Entry`"),
        ("build", {"norms": 1}, "unexpected keyword argument 'norms'"),
    ],
    ids=["fails", "nothing", "argument"],
)
def test_a_function_that_returns_no_entry_is_told(
    folder: Path, function: str, config: dict[str, Any], words: str
) -> None:
    from memlaunch.launcher.training import entries
    from memlaunch.launcher.training.errors import JobMismatch

    model = {"entry": f"rows_of_numbers:{function}", "config": config}
    resolved = resolve.load(write(job(folder, model=model), folder))
    with pytest.raises(JobMismatch, match=words):
        entries.build(resolved.job.model, seed=1)


def test_a_loss_that_counts_otherwise_stops_the_run(folder: Path) -> None:
    description = job(folder, model={"entry": "rows_of_numbers:build", "config": {"counts": False}})
    description["cluster"]["gpus_per_node"] = 1
    done = subprocess.run(
        [*MEMLAUNCH, "run", write(description, folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    first, *_ = done.stderr.splitlines()
    assert first == f"every rank runs `build` of {folder}/rows_of_numbers.py", "named before it runs"
    assert "the loss counted" in done.stderr
    assert "hint: the samples count, unless the entry has a `count`" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_planner_traces_the_example() -> None:
    """On fake tensors, but for the function itself; a batch norm's statistics are part of the parameters."""
    resolved = json.loads(resolve.load(CNN / "job.json").to_json())
    with Tracer("cpu", processes=1) as tracer:
        shape = tracer.shape(resolved)
        found = tracer.trace(resolved, {k: v for k, v in shape.items() if k not in ("parameters", "layers")})
        batches = tracer.batches(resolved)
    assert shape["samples"] == resolved["training"]["micro_batch_size"]
    assert shape["parameters"] == found["parameters"] == [37_770, 37_770]
    assert found["breakdown"]["parameters"] >= 4 * 37_770
    assert found["breakdown"]["activations"] > 0
    assert batches["data"]["samples"] == 1437


def test_the_example_reads_digits(tmp_path: Path) -> None:
    """In fp16, with accumulation, checkpointing and 8-bit state, on two ranks."""
    done = subprocess.run(
        [*MEMLAUNCH, "run", CNN / "job.json", "--set", f"output.dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = RunDir(Path(done.stdout.strip()))
    assert metrics(run)[-1]["eval_accuracy"] > 0.9
    assert metrics(run)[0]["loss_scale"] is not None
    saved = load_file(run.model / "model.safetensors")
    assert saved["blocks.0.layers.1.running_mean"].abs().sum() > 0
